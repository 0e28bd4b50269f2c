"""ats.datasets.loader and build_loader: the same batches for any number of workers; errors of workers."""

from __future__ import annotations

import errno
import gc
import multiprocessing
import os
import random
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from image_folders import SIZE, make_cfg, make_tree
from torch.utils.data import DataLoader, Dataset

from ats.datasets import Draw, Loader, Sample, build_loader
from ats.datasets import build as build_module
from ats.datasets import loader as loader_module
from ats.errors import UserError


@pytest.fixture(scope="module")
def shared_tree(tmp_path_factory) -> Path:
    return make_tree(tmp_path_factory.mktemp("shared") / "data")


def test_draw_decides_the_augmentation(shared_tree):
    """A draw's transform depends only on its seed and leaves the caller's generators unchanged."""
    cfg = make_cfg(shared_tree)
    dataset = build_loader(cfg, "train").dataset
    random.seed(5), np.random.seed(5), torch.manual_seed(5)  # noqa: NPY002
    expected = random.random(), np.random.rand(), torch.rand(1)  # noqa: NPY002
    random.seed(5), np.random.seed(5), torch.manual_seed(5)  # noqa: NPY002
    first = dataset[Draw(3, 8)].x
    assert (random.random(), np.random.rand(), torch.rand(1)) == expected  # noqa: NPY002
    assert torch.equal(dataset[Draw(3, 8)].x, first)
    assert not torch.equal(dataset[Draw(3, 9)].x, first)


def test_workers_change_nothing(shared_tree):
    """Two epochs with 0, 1 and 2 workers, and with two processes, give bit-identical batches."""

    def epochs(num_workers, rank=0, world_size=1):
        cfg = make_cfg(shared_tree, DATA_LOADER__NUM_WORKERS=num_workers, AUG__NUM_SAMPLE=3, TRAIN__BATCH_SIZE=4)
        loader = build_loader(cfg, "train", rank=rank, world_size=world_size)
        batches = []
        for epoch in (0, 1):
            loader.batch_sampler.set_epoch(epoch)
            batches += list(loader)
        return batches

    expected = epochs(0)
    assert [batch.x.shape for batch in expected] == [(4, 3, SIZE, SIZE)] * 6
    assert isinstance(expected[0], Sample)
    assert list(expected[0].bad) == [""] * 4
    assert not torch.equal(expected[0].index, expected[3].index)
    for batches in (epochs(1), epochs(2)):
        for batch, other in zip(expected, batches, strict=True):
            assert torch.equal(batch.x, other.x)
            assert torch.equal(batch.index, other.index)
    for batch, *parts in zip(expected, epochs(0, 0, 2), epochs(0, 1, 2), strict=True):
        assert torch.equal(batch.x, torch.cat([part.x for part in parts]))


class Slow(Dataset):
    """Samples slow enough that a worker can be killed while reading one."""

    def __len__(self) -> int:
        return 100

    def __getitem__(self, index: int) -> int:
        time.sleep(0.5)
        return index


def test_worker_that_closes_its_pipe_before_it_dies(monkeypatch):
    """As a killed worker sometimes does: one error that says what killed it, and none while the loader is deleted, when
    Python would only print it.
    """
    ignored = []
    monkeypatch.setattr("sys.unraisablehook", ignored.append)
    batches, others = DataLoader.__iter__, set(multiprocessing.active_children())

    def broken_pipe(loader):
        iterator = batches(loader)
        yield next(iterator)
        (worker,) = set(multiprocessing.active_children()) - others
        threading.Timer(0.3, worker.kill).start()
        raise ConnectionResetError("Connection reset by peer")

    monkeypatch.setattr(DataLoader, "__iter__", broken_pipe)
    with pytest.raises(RuntimeError, match=r"^DataLoader worker \(pid \d+\) is killed by signal: Killed"):
        list(Loader(Slow(), num_workers=1))
    gc.collect()
    assert not ignored


def test_an_error_of_the_pipe_alone_is_named(monkeypatch):
    """Even if no worker died, the error is reported as a loader error and names its cause."""
    monkeypatch.setattr(loader_module, "WORKER_DEATH_WAIT", 0)
    monkeypatch.setattr(DataLoader, "__iter__", lambda loader: iter(_raise_eof()))
    with pytest.raises(RuntimeError, match=r"^DataLoader worker exited unexpectedly .*EOFError"):
        list(Loader(Slow(), num_workers=1))


def _raise_eof():
    raise EOFError
    yield


class Unsendable(str):
    """What a worker can make and not hand over."""

    def __reduce__(self) -> tuple:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


class Unsendables(Dataset):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> str:
        return Unsendable(index)


def test_a_batch_that_cannot_be_handed_over():
    """Too many open files, or a TMPDIR too long for a socket: PyTorch would wait for the batch for ever."""
    with pytest.raises(UserError, match=r"cannot hand over its batch: .*Too many open files.*DATA_LOADER.NUM_WORKERS"):
        list(Loader(Unsendables(), num_workers=1, timeout=30))


def test_full_shared_memory(monkeypatch):
    def full(samples):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    monkeypatch.setattr(loader_module, "default_collate", full)
    error = loader_module.collate([])
    assert isinstance(error, UserError)
    assert "--shm-size" in str(error)


def test_unknown_dataset(shared_tree):
    """The error lists the choices; case does not matter."""
    with pytest.raises(UserError, match=r"TRAIN\.DATASET 'imagnet'.*Did you mean imagenet.*Choose one of: imagenet"):
        build_loader(make_cfg(shared_tree, TRAIN__DATASET="imagnet"), "train")
    assert len(build_loader(make_cfg(shared_tree, TEST__DATASET="ImageNet"), "test").dataset) == 12


def test_loader_settings(shared_tree, monkeypatch):
    """No more workers than cores; no repeated augmentation without AUG.ENABLE; no pinned memory without a GPU."""
    monkeypatch.setattr(build_module, "num_cores", lambda: 2)
    loader = build_loader(make_cfg(shared_tree, DATA_LOADER__NUM_WORKERS=8, AUG__NUM_SAMPLE=3), "train")
    assert isinstance(loader, Loader)
    assert (loader.num_workers, loader.persistent_workers) == (2, True)
    assert loader.pin_memory == torch.cuda.is_available()
    assert loader.batch_sampler.num_repeats == 3
    cfg = make_cfg(shared_tree, AUG__NUM_SAMPLE=3, AUG__ENABLE=False)
    assert build_loader(cfg, "train").batch_sampler.num_repeats == 1
