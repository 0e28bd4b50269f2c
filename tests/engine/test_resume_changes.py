"""What changed between a stop and a resume: the data, the batch size, or settings that --force lets through."""

from __future__ import annotations

import logging
import operator
import os
import shutil
import signal
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from runs import read_log

from ats.checkpoint import load_checkpoint, save_checkpoint
from ats.config import CfgNode
from ats.engine import train
from ats.engine.checkpointing import checkpoint_path, list_checkpoints
from ats.errors import Stopped, UserError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def data(colours: Path, tmp_path: Path) -> Path:
    """A copy of `colours` whose files may be removed: 64 samples to train on."""
    return Path(shutil.copytree(colours, tmp_path / "data"))


@pytest.fixture
def cfg_of(make_cfg: Callable[..., CfgNode], data: Path) -> Callable[..., CfgNode]:
    """Two epochs of 4 steps on `data`, a checkpoint after every step, no evaluation."""
    changes = ["DATA.PATH_TO_DATA_DIR", str(data), "TRAIN.CHECKPOINT_STEPS", "1", "TRAIN.CHECKPOINT_KEEP", "0"]
    changes += ["TRAIN.EVAL_PERIOD", "0", "TEST.ENABLE", "False", "LOG_PERIOD", "1"]
    return lambda *more: make_cfg(*changes, *more)


def stop_after(cfg: CfgNode, step: int, epoch: int = 0) -> Path:
    """Train, and keep the checkpoints that a run has which stops after `step` steps of an epoch (counted from 0)."""
    train.train(cfg)
    last = checkpoint_path(Path(cfg.OUTPUT_DIR), epoch, step)
    paths = list_checkpoints(Path(cfg.OUTPUT_DIR))
    for path in paths[: paths.index(last)]:
        path.unlink()
    return last


def remove(files: Iterable[Path], count: int) -> None:
    """Delete some of the files, of all classes."""
    for path in sorted(files, key=lambda path: path.name)[:count]:
        path.unlink()


def steps_of(cfg: CfgNode) -> list[tuple[int, int]]:
    """Epoch and step of the lines in log.jsonl."""
    return [(line["epoch"], line["step"]) for line in read_log(cfg.OUTPUT_DIR)]


def warnings(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(record.getMessage() for record in caplog.records if record.levelno == logging.WARNING)


SECOND_EPOCH = [(2, 1), (2, 2), (2, 3), (2, 4)]


@pytest.mark.parametrize(
    ("step", "num_removed", "batch_size", "first", "steps_per_epoch"),
    [
        (2, 16, 16, (1, 3), 3),  # a step of the epoch is left
        (3, 16, 16, (2, 1), 3),  # exactly none
        (3, 40, 16, (2, 1), 1),  # fewer samples than it has seen
        (2, 0, 32, (1, 2), 2),
        (3, 0, 32, (1, 2), 2),  # 48 samples are one and a half batches: none is left out
        (3, 0, 64, (1, 1), 1),  # not one whole batch
        (3, 0, 8, (1, 7), 8),
        (3, 24, 20, (2, 1), 2),
    ],
)
def test_an_epoch_goes_on_after_the_samples_seen(
    cfg_of, data, caplog, step, num_removed, batch_size, first, steps_per_epoch
):
    stop_after(cfg_of(), step)
    remove(data.glob("train/*/*.png"), num_removed)
    (data.parent / "out" / "log.jsonl").unlink()
    caplog.clear()
    cfg = cfg_of("TRAIN.BATCH_SIZE", str(batch_size))
    train.train(cfg, force=batch_size != 16)
    expected = [(epoch, step) for epoch in (1, 2) for step in range(1, steps_per_epoch + 1)]
    assert steps_of(cfg) == expected[expected.index(first) :]
    assert warnings(caplog).count("changed since the last run") == 1
    assert f"steps per epoch 4 -> {steps_per_epoch}" in warnings(caplog)
    assert f"Continuing after the {16 * step} samples that epoch 1 has seen" in warnings(caplog)
    caplog.clear()
    train.train(cfg)  # and the last checkpoint is the new one
    assert "2 of 2 epochs are done." in caplog.text
    assert not warnings(caplog)


def test_data_that_grew_and_data_that_changed_between_epochs(cfg_of, data, caplog):
    stop_after(cfg_of(), step=3)
    for path in list(data.glob("train/red/*.png")):
        shutil.copy(path, path.with_name(f"new_{path.name}"))
    caplog.clear()
    train.train(cfg_of())
    assert steps_of(cfg_of()) == [(epoch, step) for epoch in (1, 2) for step in (1, 2, 3, 4, 5)]
    assert "train samples 64 -> 80, steps per epoch 4 -> 5" in warnings(caplog)
    stop_after(cfg_of(), epoch=1, step=0)
    remove(data.glob("train/*/*.png"), 3)  # as many steps, of other samples
    caplog.clear()
    train.train(cfg_of())
    assert "train samples 80 -> 77" in warnings(caplog)
    assert "Continuing after" not in warnings(caplog)


@pytest.mark.parametrize("step", [2, 3])
def test_checkpoints_of_earlier_versions_hold_no_sizes(cfg_of, data, caplog, step):
    last = stop_after(cfg_of(), step)
    contents = load_checkpoint(last)
    del contents["sizes"]
    save_checkpoint(last, contents)
    caplog.clear()
    train.train(cfg_of())
    assert steps_of(cfg_of()) == [(epoch, step) for epoch in (1, 2) for step in (1, 2, 3, 4)]
    assert not warnings(caplog)
    for path in list_checkpoints(data.parent / "out"):
        path.unlink()
    save_checkpoint(last, contents)
    remove(data.glob("train/*/*.png"), 32)
    caplog.clear()
    train.train(cfg_of())
    assert steps_of(cfg_of())[-2:] == [(2, 1), (2, 2)]
    assert ("changed since the last run" in warnings(caplog)) == (step > 2)


def test_the_rest_of_an_epoch_that_is_empty_ends_with_checkpoint_and_evaluation(cfg_of, data):
    """As if its last step had just been made."""
    changes = ("TRAIN.EVAL_PERIOD", "1", "SOLVER.MAX_EPOCH", "1", "TRAIN.CHECKPOINT_STEPS", "3")
    stop_after(cfg_of(*changes), step=3)
    remove(data.glob("train/*/*.png"), 16)
    (data.parent / "out" / "log.jsonl").unlink()
    train.train(cfg_of(*changes))
    assert [(line["event"], line["epoch"]) for line in read_log(data.parent / "out")] == [("val", 1)]
    assert checkpoint_path(data.parent / "out", 1).exists()
    assert checkpoint_path(data.parent / "out", 1).with_name("checkpoint_best.pyth").exists()


def test_an_epoch_that_begins_again_evaluates_nothing_before_it(cfg_of, data):
    """One batch is the whole set now, and the epoch has not seen as many samples."""
    changes = ("TRAIN.EVAL_PERIOD", "1")
    stop_after(cfg_of(*changes), epoch=1, step=1)
    train.train(cfg_of(*changes, "TRAIN.BATCH_SIZE", "64"), force=True)
    assert [(line["event"], line["epoch"]) for line in read_log(data.parent / "out")][4:] == [
        *(("val", 1), ("train", 2), ("train", 2), ("val", 2))
    ]


def test_after_a_larger_batch_the_next_run_resumes_from_the_new_checkpoint(cfg_of, data, monkeypatch, caplog):
    """Step 12 of 4 samples is step 6 of 8: once step 7 is saved, the old checkpoint, later by its name, is deleted."""
    stop_after(cfg_of("TRAIN.BATCH_SIZE", "4", "SOLVER.MAX_EPOCH", "1"), step=12)
    cfg = cfg_of("TRAIN.BATCH_SIZE", "8", "SOLVER.MAX_EPOCH", "1", "TRAIN.CHECKPOINT_KEEP", "1")
    lose_the_machine_after(1, monkeypatch)
    with pytest.raises(ConnectionError):
        train.train(cfg, force=True)
    assert [load_checkpoint(path)["step"] for path in list_checkpoints(data.parent / "out")] == [7]
    monkeypatch.undo()
    train.train(cfg)
    assert "0 of 1 epochs are done and 7 of 8 steps" in caplog.text


def lose_the_machine_after(num_steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = iter([train.train_step] * num_steps)

    def step(*args, **kwargs):
        if (make := next(steps, None)) is None:
            raise ConnectionError
        return make(*args, **kwargs)

    monkeypatch.setattr(train, "train_step", step)


# ---- settings that --force lets through


FIRST = ("SOLVER.MAX_EPOCH", "1", "TRAIN.EVAL_PERIOD", "0", "TEST.ENABLE", "False")
START = r"to start a new training from its weights, type OUTPUT_DIR FOLDER TRAIN\.CHECKPOINT_FILE_PATH \S*00001\.pyth"
BIGGER = ("VIT.IMG_SIZE", "64", "DATA.TRAIN_CROP_SIZE", "64", "DATA.TEST_CROP_SIZE", "64")


@pytest.mark.parametrize(
    ("changes", "reason", "advice"),
    [
        (
            ("SOLVER.OPTIMIZING_METHOD", "sgd", "SOLVER.BASE_LR", "0.1"),
            r"SOLVER\.OPTIMIZING_METHOD sgd cannot go on from the state of adamw",
            rf"Put back SOLVER\.OPTIMIZING_METHOD adamw or, {START}\.",
        ),
        (
            ("SOLVER.OPTIMIZING_METHOD", "adam"),  # keeps the same numbers as adamw
            "adam cannot go on from the state of adamw",
            rf"Put back SOLVER\.OPTIMIZING_METHOD adamw or, {START}\.",
        ),
        (
            ("SOLVER.ZERO_WD_1D_PARAM", "False"),
            r"its optimizer has groups of \[.*\] parameters there and of \[\d+\] now",
            rf"Put back SOLVER\.ZERO_WD_1D_PARAM True or, {START}\.",
        ),
        (
            ("SOLVER.LAYER_DECAY", "0.5"),
            r"its optimizer has groups of \[.*\] parameters there and of \[.*\] now",
            rf"Put back SOLVER\.LAYER_DECAY 1\.0 or, {START}\.",
        ),
        (
            BIGGER,
            r"its network has other weights \(pos_embed \(1, 17, 32\) there, \(1, 65, 32\) now\)",
            rf"Put back VIT\.IMG_SIZE 32 DATA\.TRAIN_CROP_SIZE 32 DATA\.TEST_CROP_SIZE 32 or, {START}\.",
        ),
        (
            ("VIT.EMBED_DIM", "16"),
            r"its network has other weights \(cls_token \(1, 1, 32\) there, \(1, 1, 16\) now; .*; \d+ more\)",
            r"Put back VIT\.EMBED_DIM 32\.",
        ),
        (("VIT.DEPTH", "4"), r"blocks\.3\.\S+ missing there, \(32,\) now", r"Put back VIT\.DEPTH 3\."),
    ],
)
def test_a_checkpoint_that_the_new_settings_cannot_use(make_cfg, changes, reason, advice):
    """One line says what differs, what to put back and, if its weights fit, how to start from them."""
    train.train(make_cfg(*FIRST))
    with pytest.raises(UserError, match=rf"^Cannot resume from \S*00001\.pyth: .*{reason}.*\. {advice}$") as error:
        train.train(make_cfg(*FIRST, *changes), force=True)
    assert "\n" not in str(error.value)
    if START in advice:
        path = checkpoint_path(Path(make_cfg().OUTPUT_DIR), 1)
        train.train(make_cfg(*FIRST, *changes, "TRAIN.CHECKPOINT_FILE_PATH", str(path), out="new"))


def test_a_network_of_other_classes_starts_from_the_weights_with_a_new_head(make_cfg, data):
    """Here the data has lost a class too."""
    train.train(make_cfg(*FIRST, "DATA.PATH_TO_DATA_DIR", str(data)))
    shutil.rmtree(data / "train" / "red")
    with pytest.raises(
        UserError, match=rf"head\.weight .* Put back MODEL\.NUM_CLASSES 4 or, {START} TRAIN\.RESET_HEAD"
    ):
        train.train(make_cfg(*FIRST, "DATA.PATH_TO_DATA_DIR", str(data), "MODEL.NUM_CLASSES", "3"), force=True)


@pytest.mark.parametrize(
    "changes",
    [
        ("EMA.ENABLE", "True"),
        ("TRAIN.MIXED_PRECISION", "True", "TRAIN.AMP_DTYPE", "float16"),
        ("TRAIN.GRAD_ACCUM_STEPS", "2"),
        ("ATS.ENABLE", "False"),
    ],
)
@pytest.mark.parametrize("on_first", [True, False])
def test_what_may_change_with_force(make_cfg, caplog, changes, on_first):
    """The run goes on, and names the settings unless they are free."""
    first, second = ((*FIRST, *changes), FIRST) if on_first else (FIRST, (*FIRST, *changes))
    train.train(make_cfg(*first))
    caplog.clear()
    train.train(make_cfg(*second, "SOLVER.MAX_EPOCH", "2"), force=True)
    assert "Resumed from" in caplog.text
    name = changes[0]
    assert (f"\n  {name}: " in warnings(caplog)) == (name != "TRAIN.GRAD_ACCUM_STEPS")


def test_the_optimizer_has_the_new_settings(make_cfg):
    """Not those that its saved state would bring back."""
    sgd = (*FIRST, "SOLVER.OPTIMIZING_METHOD", "sgd", "SOLVER.LAYER_DECAY", "0.5")
    train.train(make_cfg(*sgd))
    new = ("SOLVER.WEIGHT_DECAY", "0.25", "SOLVER.MOMENTUM", "0.5", "SOLVER.LAYER_DECAY", "0.9")
    cfg = make_cfg(*sgd, *new)
    trainer = train.Trainer(cfg, Path(cfg.OUTPUT_DIR), force=True)
    fresh = train.build_state(cfg, torch.device("cpu")).optimizer
    for group, expected in zip(trainer.state.optimizer.param_groups, fresh.param_groups, strict=True):
        assert all(group[name] == expected[name] for name in ("weight_decay", "momentum", "lr_scale"))
    assert trainer.state.optimizer.state


# ---- signals


@pytest.mark.parametrize(("function", "call"), [("train_step", 4), ("TrainLog.evaluation", 1)])
def test_a_signal_ends_the_run_where_no_step_follows(make_cfg, monkeypatch, function, call):
    """In the last step of the training, and after its last evaluation."""
    calls = []
    original = operator.attrgetter(function)(train)

    def with_signal(*args, **kwargs):
        calls.append(function)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **kwargs)

    monkeypatch.setattr(f"ats.engine.train.{function}", with_signal)
    cfg = make_cfg("SOLVER.MAX_EPOCH", "1")
    with pytest.raises(Stopped, match="SIGTERM after step 4 of 4 of epoch 1"):
        train.train(cfg)
    assert checkpoint_path(Path(cfg.OUTPUT_DIR), 1).exists()
    monkeypatch.undo()
    assert train.train(cfg).is_file()
