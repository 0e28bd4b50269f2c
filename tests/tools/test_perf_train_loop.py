"""tools/perf/train_loop.py: both loops do the same training, and it notices what the engine does in addition."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
import train_loop

from ats.config import get_cfg, load_config
from ats.engine.device import data_parallel, seed_everything
from ats.engine.step import Recipe, train_step
from ats.engine.train import build_state
from ats.engine.train_log import TrainLog

CPU = ["DEVICE", "cpu"]


pytestmark = pytest.mark.usefixtures("one_thread")


def assert_same_weights(model: torch.nn.Module, other: torch.nn.Module) -> None:
    state = other.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_both_train_the_same_network(tiny_config, tmp_path):
    """After six interleaved steps, two of them in the second epoch, weights are equal to the bit, and have changed.

    The learning rate is constant: the bare loop has no schedule.
    """
    constant = ["SOLVER.LR_POLICY", "constant", "SOLVER.WARMUP_EPOCHS", "0"]
    cfg = load_config(tiny_config, [*CPU, *constant, "SOLVER.CLIP_GRAD_L2NORM", "0.1"])
    trainer, bare, timed = train_loop.train_both(cfg, str(tmp_path / "run"), num_steps=6)
    assert (trainer.state.epoch, trainer.state.step) == (1, 2)
    assert len(timed.engine) == len(timed.bare) == len(timed.around) == 6
    assert_same_weights(trainer.state.model, bare.model)
    start = build_state(cfg, torch.device("cpu")).model
    assert not torch.equal(start.head.weight, bare.model.head.weight)
    assert (tmp_path / "run" / "log.jsonl").read_text().count("\n") == 3  # the engine's own log, every LOG_PERIOD 2


def test_the_bare_step_is_the_recipes(tiny_config):
    """Mixup, chunks, clipping by value and averaged weights give what the engine's step gives, to the bit."""
    changes = ["MIXUP.ENABLE", "True", "TRAIN.GRAD_ACCUM_STEPS", "2", "SOLVER.CLIP_GRAD_VAL", "0.01"]
    cfg = load_config(tiny_config, [*CPU, *changes, "EMA.ENABLE", "True", "EMA.DECAY", "0.5"])
    device, recipe = torch.device("cpu"), Recipe(cfg)
    state = build_state(cfg, device)
    bare, forward = train_loop.BareLoop(cfg, state, recipe, device), data_parallel(state.model.train())
    for step in range(3):
        x, target = torch.randn(16, 3, 32, 32), torch.arange(16) % 4
        seed_everything(step)
        bare.step(x.clone(), target)
        seed_everything(step)
        mixed = recipe.mixup(x, target)
        train_step(forward, *mixed, state, recipe)
        state.ema.update(state.model)
    assert_same_weights(state.model, bare.model)
    assert_same_weights(state.ema.module, bare.ema.module)


def test_what_the_engine_adds_is_noticed(tiny_config, monkeypatch):
    """A log that computes for 20 ms at every step shows in `around`; a step that works twice shows in the ratio."""
    cfg = load_config(tiny_config, CPU)

    def wasteful(self, *args, **kwargs):
        end = time.process_time() + 0.02
        while time.process_time() < end:
            pass
        return step(self, *args, **kwargs)

    plain = train_loop.compare_training(cfg, rounds=3)
    step = TrainLog.step
    monkeypatch.setattr(TrainLog, "step", wasteful)
    slow = train_loop.compare_training(cfg, rounds=3)
    assert slow["steps"] == 6
    assert milliseconds(slow, "around %") >= 19 > milliseconds(plain, "around %")
    monkeypatch.undo()
    monkeypatch.setattr(train_loop.Trainer, "_step", twice(train_loop.Trainer._step))
    assert train_loop.compare_training(cfg, rounds=10)["step / bare"] > 1.5
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
    """By hand, at 0.1 s a step: 0.6 s every minute, every 600 steps or every 2 epochs is 1 %; never is 0."""
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
        share = train_loop.checkpoint_share(cfg, seconds=0.6, step_seconds=0.1, num_steps=300)
        assert share == pytest.approx(want)


def test_command(tiny_config, tmp_path: Path, capsys):
    """It prints the row and leaves nothing in OUTPUT_DIR; a mistake gets one message."""
    assert train_loop.main(["--cfg", str(tiny_config), "--rounds", "1", *CPU]) == 0
    assert "step / bare" in capsys.readouterr().out
    assert not list((tmp_path / "out").iterdir())
    assert train_loop.main(["--cfg", str(tiny_config), "--rounds", "0"]) == 1
    assert "--rounds: give a whole number from 1, not 0" in capsys.readouterr().err
    assert train_loop.main([]) == 1
    assert "--cfg FILE is missing" in capsys.readouterr().err
