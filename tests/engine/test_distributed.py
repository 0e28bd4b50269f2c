"""Several processes give the losses, weights and results of one; if one is lost, the others stop."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import Run, run_net, run_net_well
from runs import assert_same, read_log
from torch import distributed as dist

from ats.checkpoint import load_checkpoint
from ats.config import load_config
from ats.datasets.loader import TrainBatchSampler
from ats.engine import train
from ats.engine.checkpointing import checkpoint_path
from ats.engine.device import explain_lost_process, process_group, rank
from ats.engine.tally import Ensemble, Tally
from ats.errors import UserError

pytestmark = pytest.mark.long


def numbers(line: dict) -> dict:
    """The numbers in a line of the log that may differ by round-off."""
    values = line | {f"block {block}": mean for block, mean in line["tokens_per_block"].items()}
    return {key: value for key, value in values.items() if isinstance(value, float)}


def read_result(output_dir: Path) -> dict:
    result = json.loads((output_dir / "result.json").read_text())
    changing = ("images_per_second", "wall_seconds", "versions", "config_sha256")
    return {key: value for key, value in result.items() if key not in changing}


@given(batch=st.integers(2, 20), world_size=st.integers(1, 5), seed=st.integers(0, 9))
@settings(max_examples=100)
def test_shares_of_pairs(batch, world_size, seed):
    """Each sample of a batch goes to one process, and samples that mixup mixes (i and B - 1 - i) to the same one."""
    if batch < 2 * world_size:
        return
    whole = next(iter(TrainBatchSampler(batch, batch_size=batch, seed=seed)))
    partner = dict(zip(whole, reversed(whole), strict=True))
    shares = [
        next(iter(TrainBatchSampler(batch, batch_size=batch, seed=seed, rank=rank, world_size=world_size, pairs=True)))
        for rank in range(world_size)
    ]
    assert sorted(chain(*shares)) == sorted(whole)
    for share in shares:
        assert [partner[draw] for draw in share] == share[::-1]


@pytest.mark.parametrize("mixup", [False, True])
def test_two_processes_equal_one(tiny_config, tmp_path, mixup):
    """20 steps with augmentation: losses, weights and result.json do not depend on how the batch is split.

    Two processes split 15 samples into 7 and 8; with mixup, 16 samples in 3 passes. They split 32 validation images,
    in batches of 11, into 5 + 6, 5 + 6 and 5 + 5.
    """
    changes = ["TRAIN.ENABLE", "True", "SOLVER.MAX_EPOCH", "5", "TRAIN.EVAL_PERIOD", "3", "LOG_PERIOD", "1"]
    changes += ["AUG.ENABLE", "True", "AUG.NUM_SAMPLE", "2", "SOLVER.CLIP_GRAD_L2NORM", "1", "EMA.ENABLE", "True"]
    changes += ["TRAIN.BATCH_SIZE", "16" if mixup else "15", "MIXUP.ENABLE", str(mixup), "TEST.BATCH_SIZE", "11"]
    # The gradient of the keys' bias is pure round-off, but AdamW takes full steps along it: leave the bias out.
    changes += ["EMA.DECAY", "0.5", "VIT.QKV_BIAS", "False"]
    argv = ["--cfg", tiny_config, *changes, "OUTPUT_DIR"]
    one, two = tmp_path / "one", tmp_path / "two"
    run_net_well(one, [*argv, one])
    process = run_net_well(two, [*argv, two, "TRAIN.GRAD_ACCUM_STEPS", "3" if mixup else "1"], num_processes=2)
    assert "Traceback" not in process.console()
    assert "2 with 0 data workers" in process.console(0)
    assert process.console(1) == ""  # only the first process prints
    log, other_log = read_log(one), read_log(two)
    assert sum(line["event"] == "train" for line in log) == 20
    losses = [line["loss"] for line in log if line["event"] == "train"]
    assert max(losses) - min(losses) > 0.1
    for line, other in zip(log, other_log, strict=True):
        assert other.keys() == line.keys()
        assert numbers(other) == pytest.approx(numbers(line), abs=1e-5, rel=1e-4)  # the gradient norm is about 3
        if line["event"] == "train":
            assert other["loss"] == pytest.approx(line["loss"], abs=1e-5, rel=0)
    weights, other_weights = (load_checkpoint(out / "model.safetensors") for out in (one, two))
    for key, value in weights.items():
        torch.testing.assert_close(other_weights[key], value, atol=1e-5, rtol=0)
    assert read_result(one) == read_result(two)


CVT = """
MODEL: {NAME: CvT, NUM_CLASSES: 4}
CVT: {NUM_STAGES: 1, PATCH_SIZE: [4], PATCH_STRIDE: [4], PATCH_PADDING: [0], DIM_EMBED: [8], NUM_HEADS: [1], DEPTH: [2],
  MLP_RATIO: [2.0], ATTN_DROP_RATE: [0.0], DROP_RATE: [0.0], DROP_PATH_RATE: [0.0], QKV_BIAS: [true], CLS_TOKEN: [true],
  POS_EMBED: [false], QKV_PROJ_METHOD: [dw_bn], KERNEL_QKV: [3], PADDING_KV: [1], STRIDE_KV: [2], PADDING_Q: [1],
  STRIDE_Q: [1]}
ATS: {ENABLE: false}
"""


def _train_with_batch_norm(config: Path, tmp_path: Path) -> None:
    evaluate, evaluated = train.evaluate, []

    def evaluate_and_keep(model, loader, **kwargs):
        evaluated.append({name: value.clone() for name, value in model.state_dict().items()})
        return evaluate(model, loader, **kwargs)

    train.evaluate = evaluate_and_keep
    with process_group("cpu"):
        for ema, key in ((False, "model_state"), (True, "ema_state")):
            out = tmp_path / key
            # Of 15 samples a process gets 7 or 8, and 1 to 3 in a pass.
            changes = ["TRAIN.BATCH_SIZE", "15", "TRAIN.GRAD_ACCUM_STEPS", "3", "EMA.ENABLE", str(ema)]
            train.train(load_config(config, [*changes, "EMA.DECAY", "0.5", "OUTPUT_DIR", str(out)]))
            for epoch, state in enumerate(evaluated, start=1):
                assert any("running_mean" in name for name in state)
                assert_same(state, load_checkpoint(checkpoint_path(out, epoch))[key])
            assert len(evaluated) == 2
            evaluated.clear()


def test_every_process_evaluates_the_network_that_is_saved(tiny_config, tmp_path):
    """Each updates batch norm's running statistics with its own samples, and the EMA with these."""
    config = tmp_path / "cvt.yaml"
    config.write_text(f"_BASE_: {tiny_config.name}\n{CVT}")
    run = Run(tmp_path / "run", _train_with_batch_norm, config, tmp_path, num_processes=2)
    assert run.wait() == [0, 0], run.console()


def _ensemble(index: torch.Tensor, method: str) -> Ensemble:
    ensemble = Ensemble(num_videos=4, num_views=3, method=method)
    ensemble.add(torch.sin(torch.arange(60.0)).view(12, 5)[index], index // 3, index)
    return ensemble


def _exchange() -> None:
    with process_group("cpu"):
        for method in ("sum", "max"):
            whole = _ensemble(torch.arange(12), method)
            if rank() < 2:
                ensemble = _ensemble(torch.arange(rank(), 12, 2), method)
            else:  # this process has no clips
                ensemble = Ensemble(num_videos=4, num_views=3, method=method)
            if rank() == 1:
                ensemble.skipped[3] = True
            ensemble.exchange()
            torch.testing.assert_close(ensemble.scores(), whole.scores(), rtol=1e-15, atol=1e-15)
            assert ensemble.labels.tolist() == [0, 1, 2, 3]
            assert ensemble.skipped.tolist() == [False, False, False, True]


def test_views_of_a_video_on_three_processes(tmp_path):
    """Two processes share the clips of every video and a third has none: all get the scores of a single process."""
    run = Run(tmp_path, _exchange, num_processes=3)
    assert run.wait() == [0, 0, 0], run.console()


def test_samples_evaluated_twice_are_noticed(tmp_path):
    """A loader that ignores the other processes would count every sample twice."""
    run = Run(tmp_path, _evaluate_everything, num_processes=2)
    assert run.wait() == [1, 1]
    assert run.console().count("RuntimeError: Samples were evaluated twice") == 2


def _evaluate_everything() -> None:
    with process_group("cpu"):
        tally = Tally(rows=[torch.zeros(1, 6, dtype=torch.float64)])
        tally.result(ensemble=None, start=0, params_m=1, device="cpu")


def test_a_lost_process_stops_the_other(tiny_config, tmp_path):
    """SIGKILL to one of two processes: the other one stops within a minute, with a message."""
    argv = ["--cfg", tiny_config, "TRAIN.ENABLE", "True", "SOLVER.MAX_EPOCH", "1000", "LOG_PERIOD", "1"]
    run = run_net(tmp_path / "run", argv, num_processes=2)
    run.wait_for("epoch 2/1000 step 1/")
    os.kill(run.processes[1].pid, signal.SIGKILL)
    killed = time.monotonic()
    assert run.wait() == [1, -signal.SIGKILL]
    assert time.monotonic() - killed < 60
    assert "error: Process 0 of 2 stops because another one has stopped" in run.console(0)
    assert "Traceback" not in run.console(0)


def test_signal_to_one_process_stops_both_at_the_same_step(tiny_config, tmp_path):
    """SIGTERM to the second of two processes: both save and end at the same step, and resume to the uninterrupted run's
    result, bit for bit.
    """
    argv = ["--cfg", tiny_config, "TRAIN.ENABLE", "True", "SOLVER.MAX_EPOCH", "6", "LOG_PERIOD", "3"]
    argv += ["MIXUP.ENABLE", "True", "VIT.DROP_PATH_RATE", "0.2", "TRAIN.EVAL_PERIOD", "5", "OUTPUT_DIR"]
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    run_net_well(straight, [*argv, straight], num_processes=2)
    run = run_net(stopped, [*argv, stopped], num_processes=2)
    run.wait_for("epoch 2/6 step 3/")
    os.kill(run.processes[1].pid, signal.SIGTERM)
    assert run.wait() == [143, 143], run.console()
    assert "stopped by SIGTERM after step" in run.console(0)
    run = run_net_well(stopped, [*argv, stopped], num_processes=2)
    assert "Resumed from" in run.console(0)
    assert read_log(stopped) == read_log(straight)
    weights, expected = (load_checkpoint(out / "model.safetensors") for out in (stopped, straight))
    assert all(torch.equal(weights[key], expected[key]) for key in expected)


def test_torchrun(tiny_config, tmp_path):
    """`torchrun --nproc_per_node=2` itself trains and tests; only one process prints."""
    script = Path(__file__).parents[2] / "tools" / "run_net.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    command += ["--cfg", str(tiny_config), "TRAIN.ENABLE", "True", "SOLVER.MAX_EPOCH", "1"]

    def torchrun(*changes: str) -> subprocess.CompletedProcess:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.run(
            [*command, *changes], env=environment, capture_output=True, text=True, timeout=300, check=False
        )

    process = torchrun()
    assert process.returncode == 0, process.stderr
    assert "process   2 with 0 data workers each" in process.stderr
    assert process.stdout.count("ViT + ATS") == 1
    assert "Warning" not in process.stderr
    assert json.loads((tmp_path / "out" / "result.json").read_text())["num_samples"] == 32


def test_not_started_by_torchrun(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match=r"WORLD_SIZE is 2 but LOCAL_RANK, .* are not set. Type: torchrun"):
        process_group().__enter__()


def test_port_in_use(monkeypatch):
    monkeypatch.setenv("MASTER_PORT", "29500")
    with pytest.raises(UserError, match=r"MASTER_PORT 29500 is in use.*--standalone"), explain_lost_process():
        raise dist.DistNetworkError("The server socket has failed to listen (port: 29500, name: EADDRINUSE)")
