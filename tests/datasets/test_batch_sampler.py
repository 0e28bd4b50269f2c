"""The batch samplers of ats.datasets.loader: the order of an epoch, for any number of processes."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ats.config import load_config
from ats.datasets import EvalBatchSampler, TrainBatchSampler
from ats.errors import UserError

sizes = {
    "num_samples": st.integers(1, 80),
    "share": st.integers(1, 5),
    "world_size": st.integers(1, 4),
    "num_repeats": st.integers(1, 4),
    "seed": st.integers(0, 9),
    "epoch": st.integers(0, 9),
}


@given(**sizes)
@settings(max_examples=150)
def test_train_sampler_laws(num_samples, share, world_size, num_repeats, seed, epoch):
    """The ranks' shares add up to the order of one process; R draws per image; only (seed, epoch) matters."""
    batch_size = share + world_size - 1
    if num_samples < batch_size:
        return
    kwargs = {"batch_size": batch_size, "seed": seed, "num_repeats": num_repeats}

    def batches(rank=0, world_size=1, epochs=(epoch,), start_batch=0):
        sampler = TrainBatchSampler(num_samples, rank=rank, world_size=world_size, **kwargs)
        for e in epochs:
            sampler.set_epoch(e, start_batch=start_batch)
            result = list(sampler)
        assert len(result) == len(sampler)
        return result

    whole = batches()
    of_rank = [batches(rank, world_size) for rank in range(world_size)]
    for step, batch in enumerate(zip(*of_rank, strict=True)):
        joined = list(chain(*batch))
        sizes = [len(part) for part in batch]
        assert 1 <= min(sizes) <= max(sizes) <= min(sizes) + 1
        assert joined == whole[step]
    draws = list(chain(*whole))
    assert all(0 <= draw.index < num_samples for draw in draws)
    counts = np.bincount([draw.index for draw in draws], minlength=num_samples)
    assert sorted(counts[counts > 0])[1:] == [num_repeats] * (np.count_nonzero(counts) - 1)  # the last may be cut short
    assert counts.max(initial=0) <= num_repeats
    assert len(draws) == num_samples // batch_size * batch_size
    assert batches(epochs=(epoch + 1, epoch)) == whole  # earlier epochs do not matter
    if whole:
        assert batches(start_batch=len(whole) // 2) == whole[len(whole) // 2 :]  # resume in mid-epoch


def test_train_sampler_orders_differ():
    """A different epoch or seed gives a different order; repeats of an image get different seeds."""
    orders = []
    for seed, epoch in ((0, 0), (0, 1), (1, 0)):
        sampler = TrainBatchSampler(100, batch_size=10, seed=seed, num_repeats=2)
        sampler.set_epoch(epoch)
        orders.append(sampler.global_order())
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert len({draw.seed for draw in orders[0]}) == 100


@given(num_samples=st.integers(0, 60), batch_size=st.integers(1, 20), world_size=st.integers(1, 7))
@settings(max_examples=150)
def test_eval_sampler_reads_each_sample_once(num_samples, batch_size, world_size):
    """For any number of processes, every sample is read exactly once and no batch is too large."""
    seen = []
    for rank in range(world_size):
        sampler = EvalBatchSampler(num_samples, batch_size=batch_size, rank=rank, world_size=world_size)
        batches = list(sampler)
        assert len(batches) == len(sampler)
        assert all(0 < len(batch) <= -(-batch_size // world_size) for batch in batches)
        seen += chain(*batches)
    assert sorted(seen) == list(range(num_samples))


def test_wrong_batch_sizes_are_named():
    with pytest.raises(UserError, match=r"12 samples.*batch of 16.*TRAIN\.BATCH_SIZE to at most 12"):
        TrainBatchSampler(12, batch_size=16, seed=0)
    with pytest.raises(UserError, match=r"TRAIN\.BATCH_SIZE 5 is too small for 3. Set TRAIN\.BATCH_SIZE to at least 6"):
        TrainBatchSampler(12, batch_size=5, seed=0, world_size=3, pairs=True)
    for key in ("TRAIN.BATCH_SIZE", "TEST.BATCH_SIZE", "AUG.NUM_SAMPLE"):
        with pytest.raises(UserError, match=rf"{key} 0: give a number from 1"):
            load_config(None, [key, "0"])
    with pytest.raises(ValueError, match=r"start_batch must be in 0\.\.3"):
        TrainBatchSampler(12, batch_size=4, seed=0).set_epoch(0, start_batch=4)
