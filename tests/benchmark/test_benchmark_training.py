"""tools/benchmark.py --train-loop: both loops do the same training, and what the engine does besides is noticed."""

from __future__ import annotations

import time
from pathlib import Path

import benchmark as tool
import pytest
import torch

from ats.benchmark import training
from ats.config import get_cfg, load_config
from ats.engine.device import seed_everything
from ats.engine.distributed import data_parallel
from ats.engine.step import Recipe, train_step
from ats.engine.train import build_state
from ats.engine.train_log import TrainLog

CPU = ["DEVICE", "cpu"]


pytestmark = pytest.mark.usefixtures("one_thread")


def assert_same_weights(model: torch.nn.Module, other: torch.nn.Module) -> None:
    state = other.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_both_train_the_same_network(tiny_config, tmp_path):
    """After six steps in turn, two of them in the second epoch: the same weights to the bit, other than at first. (The
    bare loop has no schedule of its learning rate.)
    """
    constant = ["SOLVER.LR_POLICY", "constant", "SOLVER.WARMUP_EPOCHS", "0"]
    cfg = load_config(tiny_config, [*CPU, *constant, "SOLVER.CLIP_GRAD_L2NORM", "0.1"])
    trainer, bare, turns = training.take_turns(cfg, str(tmp_path / "run"), num_steps=6)
    assert (trainer.state.epoch, trainer.state.step) == (1, 2)
    assert len(turns.engine) == len(turns.bare) == len(turns.around) == 6
    assert_same_weights(trainer.state.model, bare.model)
    start = build_state(cfg, torch.device("cpu")).model
    assert not torch.equal(start.head.weight, bare.model.head.weight)
    assert (tmp_path / "run" / "log.jsonl").read_text().count("\n") == 3  # the engine's own log, every LOG_PERIOD 2


def test_the_bare_step_is_the_recipes(tiny_config):
    """Mixup, chunks, clipped entries, averaged weights: what the engine's step does, to the bit."""
    changes = ["MIXUP.ENABLE", "True", "TRAIN.GRAD_ACCUM_STEPS", "2", "SOLVER.CLIP_GRAD_VAL", "0.01"]
    cfg = load_config(tiny_config, [*CPU, *changes, "EMA.ENABLE", "True", "EMA.DECAY", "0.5"])
    device, recipe = torch.device("cpu"), Recipe.from_cfg(cfg)
    state = build_state(cfg, device)
    bare, forward = training.BareLoop(cfg, state, recipe, device), data_parallel(state.model.train())
    for step in range(3):
        x, target = torch.randn(16, 3, 32, 32), torch.arange(16) % 4
        seed_everything(step)
        bare.step(x.clone(), target)
        seed_everything(step)
        mixed = recipe.mixup(x, target)
        train_step(forward, *mixed, optimizer=state.optimizer, scaler=state.scaler, recipe=recipe)
        state.ema.update(state.model)
    assert_same_weights(state.model, bare.model)
    assert_same_weights(state.ema.module, bare.ema.module)


def test_what_the_engine_adds_is_noticed(tiny_config, monkeypatch):
    """A log that computes for 20 ms at every step stands in `around`; a step that does its work twice in the ratio."""
    cfg = load_config(tiny_config, CPU)

    def wasteful(self, *args, **kwargs):
        end = time.process_time() + 0.02
        while time.process_time() < end:
            pass
        return step(self, *args, **kwargs)

    plain = training.compare_training(cfg, rounds=3)
    step = TrainLog.step
    monkeypatch.setattr(TrainLog, "step", wasteful)
    slow = training.compare_training(cfg, rounds=3)
    assert slow["steps"] == 6
    assert milliseconds(slow, "around %") >= 19 > milliseconds(plain, "around %")
    monkeypatch.undo()
    monkeypatch.setattr(training.Trainer, "_step", twice(training.Trainer._step))
    assert training.compare_training(cfg, rounds=10)["step / bare"] > 1.5
    whole = 100 * (slow["step / bare"] - 1) + slow["around %"] + slow["checkpoints %"]
    assert slow["overhead %"] == pytest.approx(whole)


def milliseconds(row: dict, share: str) -> float:
    """Per step."""
    return row[share] / 100 * row["bare ms/step"]


def twice(step):
    def step_twice(self, batch):
        step(self, batch)
        return step(self, batch)

    return step_twice


def test_checkpoints_are_spread_over_the_steps_between_them():
    """By hand: 0.6 s every minute is 1 %, as is 0.6 s every 600 steps or 2 epochs of 0.1 s a step; never is nothing."""
    cfg = get_cfg()
    for minutes, steps, period, evaluation, want in (
        (1, 0, 0, 0, 0.01),
        (0, 600, 0, 0, 0.01),
        (0, 0, 2, 5, 0.01),
        (0, 0, 0, 2, 0.01),  # before an evaluation
        (1, 600, 2, 0, 0.03),
        (0, 0, 0, 0, 0.0),
    ):
        cfg.TRAIN.CHECKPOINT_MINUTES, cfg.TRAIN.CHECKPOINT_STEPS = float(minutes), steps
        cfg.TRAIN.CHECKPOINT_PERIOD, cfg.TRAIN.EVAL_PERIOD = period, evaluation
        share = training.checkpoint_share(cfg, seconds=0.6, step_seconds=0.1, num_steps=300)
        assert share == pytest.approx(want)


def test_command(tiny_config, tmp_path: Path, capsys):
    """It prints the row, and leaves nothing in OUTPUT_DIR; mistakes are one message."""
    assert tool.main(["--cfg", str(tiny_config), "--train-loop", "--rounds", "1", *CPU]) == 0
    assert "step / bare" in capsys.readouterr().out
    assert not list((tmp_path / "out").iterdir())
    assert tool.main(["--cfg", str(tiny_config), "--train-loop", "--rounds", "0"]) == 1
    assert "--rounds 0 must be at least 1" in capsys.readouterr().err
    assert tool.main(["--train-loop"]) == 1
    assert "--train-loop needs --cfg" in capsys.readouterr().err
