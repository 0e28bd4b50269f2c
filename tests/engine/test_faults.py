"""Runs that are killed or stopped, or that lack resources or data: they resume to the result of an undisturbed run, or
end with one clear message.

`make test-faults` kills more often:
pytest tests/engine/test_faults.py -k any_moment --kills 30
"""

from __future__ import annotations

import errno
import logging
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from processes import Run, run_net, run_net_well
from runs import assert_same, read_log

from ats.checkpoint import load_checkpoint, save_checkpoint
from ats.engine import checkpointing, output, train
from ats.engine.checkpointing import checkpoint_path, list_checkpoints
from ats.engine.output import log_to_file, setup_logging
from ats.engine.train_log import drop_lines_after
from ats.errors import Stopped, UserError

pytestmark = pytest.mark.usefixtures("one_thread")


def assert_same_end(output_dir: Path, expected: Path, epochs: int) -> None:
    """Two finished runs have the same log, exported weights and last checkpoint."""
    assert read_log(output_dir) == read_log(expected)
    assert_same(*(load_checkpoint(folder / "model.safetensors") for folder in (output_dir, expected)))
    contents, other = (load_checkpoint(checkpoint_path(folder, epochs)) for folder in (output_dir, expected))
    for key in ("model_state", "ema_state", "optimizer_state", "scaler_state", "epoch", "step", "best_top1"):
        assert_same(contents.get(key), other.get(key))


# ---- SIGKILL


EVERYTHING = [
    *("TRAIN.ENABLE", "True", "TEST.ENABLE", "False", "SOLVER.MAX_EPOCH", "6", "LOG_PERIOD", "3"),
    *("TRAIN.CHECKPOINT_STEPS", "2", "TRAIN.CHECKPOINT_KEEP", "2", "TRAIN.EVAL_PERIOD", "2"),
    *("EMA.ENABLE", "True", "EMA.DECAY", "0.9", "MIXUP.ENABLE", "True", "AUG.ENABLE", "True", "AUG.NUM_SAMPLE", "2"),
    *("VIT.DROP_PATH_RATE", "0.2", "VIT.DROP_RATE", "0.1", "SOLVER.CLIP_GRAD_L2NORM", "1"),
    *("TRAIN.MIXED_PRECISION", "True", "TRAIN.AMP_DTYPE", "float16", "DATA_LOADER.NUM_WORKERS", "1"),
]


class Killer:
    """Kills runs at different moments: some lines of the log and milliseconds after the start, while a checkpoint is
    being written, or after an evaluation.
    """

    KINDS = ("random", "writing", "evaluated", "random")

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self.moments: list[str] = []

    def kill(self, run: Run, output_dir: Path) -> bool:
        """Wait for the moment and send SIGKILL; False if the run ended before it."""
        kind = self.KINDS[len(self.moments) % len(self.KINDS)]
        process = run.processes[0]

        def is_moment() -> bool:
            if kind == "writing":
                return any((output_dir / "checkpoints").glob(".*.tmp"))
            return run.console().count("reach top-1" if kind == "evaluated" else "gradient norm") >= num_lines

        num_lines = 1 if kind == "evaluated" else self._random.randrange(4)
        for _ in range(self._random.randint(1, 3) if kind == "writing" else 1):  # the second checkpoint, or the third
            while process.is_alive() and is_moment() and kind == "writing":
                time.sleep(0.0005)
            while process.is_alive() and not is_moment():
                time.sleep(0.0005)
        if kind != "writing":
            time.sleep(self._random.uniform(0, 0.3))
        if not process.is_alive():
            return False
        process.kill()
        run.wait()
        tmp = any((output_dir / "checkpoints").glob(".*.tmp"))
        newest = next((path.stem.removeprefix("checkpoint_") for path in list_checkpoints(output_dir)), "no checkpoint")
        self.moments.append(f"{kind}, after {newest}{', a half-written checkpoint' if tmp else ''}")
        return True


@pytest.mark.long
def test_killed_at_any_moment(tiny_config, tmp_path, pytestconfig):
    """After SIGKILL at any moment, the same command resumes to the undisturbed run's result, bit for bit.

    Everything random is on, with a data worker, EMA, float16's scaler and log lines that average over steps before and
    after the kill.
    """
    expected = tmp_path / "expected"
    run_net_well(expected, ["--cfg", tiny_config, *EVERYTHING, "OUTPUT_DIR", expected])
    num_kills = pytestconfig.getoption("kills")
    killer = Killer(seed=num_kills)
    num_runs = 0
    while True:
        num_runs += 1
        output_dir = tmp_path / f"run_{num_runs}"
        argv = ["--cfg", tiny_config, *EVERYTHING, "OUTPUT_DIR", output_dir]
        while True:
            run = run_net(output_dir, argv)
            if len(killer.moments) == num_kills or not killer.kill(run, output_dir):
                break
        assert run.wait() == [0], run.console()
        assert_same_end(output_dir, expected, epochs=6)
        if len(killer.moments) == num_kills:
            break
    print(f"\n{len(killer.moments)} kills in {num_runs} runs, runs lost: 0")
    print("\n".join(f"  {moment}" for moment in killer.moments))


# ---- checkpoints


def test_disk_full(make_cfg, tmp_path, monkeypatch):
    """A real "no space left" error in the second checkpoint: the first one stays, and once there is room, the same
    command resumes from it.
    """
    first, second = (checkpoint_path(tmp_path / "out", epoch) for epoch in (1, 2))
    obstacle = second.with_name(f".{second.name}.{os.getpid()}.tmp")
    evaluate = train.evaluate

    def fill_the_disk(*args, **kwargs):
        obstacle.symlink_to("/dev/full")
        return evaluate(*args, **kwargs)

    monkeypatch.setattr(train, "evaluate", fill_the_disk)
    with pytest.raises(UserError) as error:
        train.train(make_cfg())
    assert f"Cannot write the checkpoint {second}: No space left on device" in str(error.value)
    assert f"The last one is intact: {first}" in str(error.value)
    assert list_checkpoints(tmp_path / "out") == [first]
    assert not list(first.parent.glob(".*.tmp"))
    monkeypatch.undo()
    train.train(make_cfg())
    train.train(make_cfg(out="undisturbed"))
    assert_same_end(tmp_path / "out", tmp_path / "undisturbed", epochs=2)


def test_flipped_bits_are_noticed(make_cfg, tmp_path, caplog):
    """torch.load reads them without an error."""
    train.train(make_cfg())
    path = checkpoint_path(tmp_path / "out", 2)
    contents = bytearray(path.read_bytes())
    contents[len(contents) // 2] ^= 255
    path.write_bytes(contents)
    with pytest.raises(UserError, match="its checksums are wrong"):
        load_checkpoint(path)
    caplog.clear()
    train.train(make_cfg())
    assert f"Skipped a checkpoint: {path} is damaged: its checksums are wrong" in caplog.text
    assert f"Resumed from {checkpoint_path(tmp_path / 'out', 1)}" in caplog.text


@pytest.mark.parametrize(("field", "bit"), [(10, 0), (8, 5), (46, 7), (6, 7), (42, 3), (38, 4)])
def test_any_damage_of_the_newest_checkpoint_leads_to_the_older_one(field, bit, tmp_path, caplog):
    """In the zip archive's directory: compression, flags, name, version, place and kind of a file."""
    contents = {"model_state": {"a": torch.ones(3)}, "optimizer_state": {}, "epoch": -1}
    older, path = (checkpoint_path(tmp_path, 0, step) for step in (2, 3))
    save_checkpoint(older, contents)
    save_checkpoint(path, contents)
    damaged = bytearray(path.read_bytes())
    entry = damaged.rindex(b"PK\x01\x02", 0, damaged.rindex(b"/data/0"))
    damaged[entry + field + bit // 8] ^= 1 << bit % 8
    path.write_bytes(damaged)
    assert checkpointing._read_newest(tmp_path)[0] == older
    assert f"Skipped a checkpoint: {path}" in caplog.text


def test_the_last_and_the_best_are_kept(make_cfg, tmp_path, monkeypatch):
    accuracy = iter([50.0, 70.0, 60.0])
    evaluate = train.evaluate

    def evaluate_with_given_accuracy(*args, **kwargs):
        result = evaluate(*args, **kwargs)
        result.top1 = next(accuracy)
        return result

    monkeypatch.setattr(train, "evaluate", evaluate_with_given_accuracy)
    train.train(make_cfg("SOLVER.MAX_EPOCH", "3", "TRAIN.CHECKPOINT_STEPS", "3", "TRAIN.CHECKPOINT_KEEP", "2"))
    folder = tmp_path / "out" / "checkpoints"
    assert {path.name for path in folder.iterdir()} == {
        "checkpoint_epoch_00003.pyth",
        "checkpoint_epoch_00002_step_00000001.pyth",  # 9 steps of 4 per epoch
        "checkpoint_best.pyth",
    }
    assert load_checkpoint(folder / "checkpoint_best.pyth")["epoch"] == 1  # the second epoch
    assert load_checkpoint(folder / "checkpoint_epoch_00003.pyth")["best_top1"] == 70


def test_checkpoints_by_the_clock(make_cfg, tmp_path, monkeypatch):
    """Step 2 takes 70 seconds of a fake clock."""
    now = [0.0]
    train_step = train.train_step

    def slow_step(*args, **kwargs):
        now[0] += 70 if now[0] == 1 else 1
        return train_step(*args, **kwargs)

    monkeypatch.setattr(train, "train_step", slow_step)
    monkeypatch.setattr(checkpointing.time, "monotonic", lambda: now[0])
    train.train(make_cfg("SOLVER.MAX_EPOCH", "1", "TRAIN.CHECKPOINT_MINUTES", "1"))
    assert [path.name for path in list_checkpoints(tmp_path / "out")] == [
        "checkpoint_epoch_00001.pyth",
        "checkpoint_epoch_00000_step_00000002.pyth",
    ]


def test_non_finite_loss_names_the_last_checkpoint(make_cfg, tmp_path):
    changes = ("SOLVER.OPTIMIZING_METHOD", "sgd", "SOLVER.BASE_LR", "1e30", "TRAIN.CHECKPOINT_STEPS", "1")
    with pytest.raises(UserError) as error:
        train.train(make_cfg(*changes))
    (last,) = list_checkpoints(tmp_path / "out")[:1]
    assert f"Last checkpoint: {last}." in str(error.value)
    assert "in epoch 1, step " in str(error.value)


# ---- signals


FOREVER = ["TRAIN.ENABLE", "True", "SOLVER.MAX_EPOCH", "100000", "LOG_PERIOD", "1", "TRAIN.EVAL_PERIOD", "0"]


@pytest.mark.long
def test_interrupt_and_lock(tiny_config, tmp_path):
    """A second run in the same folder is refused; SIGINT ends the first with a checkpoint and status 130; the same
    command resumes from there.
    """
    argv = ["--cfg", tiny_config, *FOREVER, "TRAIN.CHECKPOINT_PERIOD", "0"]
    first = run_net(tmp_path / "first", argv)
    first.wait_for("epoch 2/100000")
    second = run_net(tmp_path / "second", argv)
    assert second.wait() == [1]
    assert f"is in use by another run (process {first.pid} on " in second.console()
    os.kill(first.pid, signal.SIGINT)
    assert first.wait() == [130], first.console()
    assert "stopped by SIGINT after step" in first.console()
    assert "run the same command to resume" in first.console()
    third = run_net(tmp_path / "third", argv)
    third.wait_for(f"Resumed from {list_checkpoints(tmp_path / 'out')[0]}")
    os.kill(third.pid, signal.SIGTERM)
    assert third.wait()[0] in (143, -signal.SIGTERM)  # -SIGTERM if it arrives before the first step


@pytest.mark.parametrize("signum", [signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU])
def test_signals_of_schedulers_and_closed_terminals(make_cfg, monkeypatch, signum):
    cfg, train_step = make_cfg("TRAIN.EVAL_PERIOD", "0", "TEST.ENABLE", "False"), train.train_step

    def step(*args, **kwargs):
        os.kill(os.getpid(), signum)
        return train_step(*args, **kwargs)

    monkeypatch.setattr(train, "train_step", step)
    with pytest.raises(Stopped, match=signum.name) as stopped:
        train.train(cfg)
    assert stopped.value.status == 128 + signum
    assert [path.name for path in list_checkpoints(Path(cfg.OUTPUT_DIR))] == [
        "checkpoint_epoch_00000_step_00000001.pyth"
    ]


def test_nohup_is_respected():
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with train.StopSignals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.received
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, previous)


def test_a_lost_console_ends_only_the_console(tmp_path, monkeypatch):
    """An ssh connection that breaks, or a full disk behind `2> file`."""

    def lost(*args, **kwargs):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    setup_logging()
    log_to_file(tmp_path / "log.txt")
    monkeypatch.setattr("sys.stderr.write", lost)
    monkeypatch.setattr(os, "write", lost)
    for text in ("first", "second"):
        logging.getLogger("ats.somewhere").info(text)
    with train.StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.received == signal.SIGHUP
    log = (tmp_path / "log.txt").read_text()
    assert all(text in log for text in ("first", "second"))
    assert log.count("Nothing more is printed: the console cannot be written to (Input/output error).") == 1


def test_lines_of_the_log_that_are_no_lines(tmp_path):
    """A power cut can leave zeros at the end of a file."""
    good = '{"event": "train", "epoch": 1, "step": 1}\n'
    path = tmp_path / "log.jsonl"
    path.write_bytes(good.encode() + b'\0\0\n\xff\xfe\n{"note": 1}\n[1]\n{"event": "train", "ep')
    drop_lines_after(path, epoch=1, step=0)
    assert path.read_text() == good


def test_weights_that_a_checkpoint_replaces_are_not_needed(make_cfg, tmp_path):
    """To start from is not to resume from: the file may be gone, until every checkpoint is damaged."""
    train.train(make_cfg("TEST.ENABLE", "False", "SOLVER.MAX_EPOCH", "1", out="first"))
    start = (tmp_path / "first" / "model.safetensors").rename(tmp_path / "start.safetensors")
    cfg = make_cfg("TEST.ENABLE", "False", "SOLVER.MAX_EPOCH", "1", "TRAIN.CHECKPOINT_FILE_PATH", str(start))
    weights = train.train(cfg).read_bytes()
    start.unlink()
    assert train.train(cfg).read_bytes() == weights
    for path in list_checkpoints(Path(cfg.OUTPUT_DIR)):
        path.write_bytes(b"")
    with pytest.raises(UserError, match=r"No checkpoint file .*start.safetensors"):
        train.train(cfg)


def test_tasks_that_srun_started_one_by_one(tmp_path, monkeypatch):
    def locked(*args):
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr("fcntl.lockf", locked)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    with pytest.raises(UserError, match=r"SLURM_STEP_NUM_TASKS is 4.*one torchrun per machine"):
        output._lock(tmp_path)


def _slow_steps() -> None:
    train_step = train.train_step

    def slow(*args, **kwargs):
        print("a slow step", flush=True)
        time.sleep(1000)
        return train_step(*args, **kwargs)

    train.train_step = slow


def test_second_interrupt_quits_at_once(tiny_config, tmp_path):
    run = run_net(tmp_path, ["--cfg", tiny_config, *FOREVER], setup=_slow_steps)
    run.wait_for("a slow step")
    os.kill(run.pid, signal.SIGINT)
    run.wait_for("SIGINT: stopping after this step, again to quit at once")
    os.kill(run.pid, signal.SIGINT)
    assert run.wait() == [130]
    assert "quit without a checkpoint" in run.console()


def _slow_evaluation() -> None:
    def slow(*args, **kwargs):
        print("a slow evaluation", flush=True)
        time.sleep(1000)

    train.evaluate = slow


@pytest.mark.long
def test_signal_ends_an_evaluation_at_once(tiny_config, tmp_path):
    """The epoch is already saved, and the next run repeats the evaluation."""
    argv = ["--cfg", tiny_config, "TRAIN.ENABLE", "True", "TEST.ENABLE", "False", "OUTPUT_DIR"]
    stopped, straight = tmp_path / "stopped", tmp_path / "straight"
    run = run_net(stopped, [*argv, stopped], setup=_slow_evaluation)
    run.wait_for("a slow evaluation")
    os.kill(run.pid, signal.SIGTERM)
    assert run.wait() == [143], run.console()
    assert "stopped by SIGTERM in the evaluation after epoch 1 of 2" in run.console()
    run_net_well(stopped, [*argv, stopped])
    run_net_well(straight, [*argv, straight])
    assert_same_end(stopped, straight, epochs=2)


# ---- data


def test_killed_data_worker(tiny_config, tmp_path):
    """The kernel kills one when memory runs out: the run ends with an error that says so, and does not hang."""
    run = run_net(tmp_path, ["--cfg", tiny_config, *FOREVER, "DATA_LOADER.NUM_WORKERS", "1"])
    run.wait_for("epoch 2/100000")
    (worker, *_) = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    os.kill(int(worker), signal.SIGKILL)
    assert run.wait() == [1]
    assert "error: DataLoader worker " in run.console()  # the rest of the message depends on the moment
    assert "killed by signal: Killed" in run.console() or "exited unexpectedly" in run.console()
    assert "DATA_LOADER.NUM_WORKERS" in run.console()
    assert "Traceback" not in run.console()


@pytest.mark.long
def test_broken_files_are_counted_and_replaced_reproducibly(tiny_config, colours, tmp_path):
    """One of 64 files is broken: the log counts it, and every run reads the same replacement, with a worker, without
    one, or with two processes.
    """
    data = tmp_path / "data"
    for path in colours.rglob("*.png"):
        copy = data / path.relative_to(colours)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes() if copy.name != "3.png" or "train/red" not in str(path) else b"broken")
    argv = ["--cfg", tiny_config, "TRAIN.ENABLE", "True", "TEST.ENABLE", "False", "DATA.PATH_TO_DATA_DIR", data]
    logs = []
    for num_workers, num_processes in ((0, 1), (1, 1), (0, 2)):
        out = tmp_path / f"{num_workers}_{num_processes}"
        changes = ["OUTPUT_DIR", out, "DATA_LOADER.NUM_WORKERS", num_workers]
        run = run_net_well(out, [*argv, *changes], num_processes=num_processes)
        assert run.console().count(f"{data / 'train' / 'red' / '3.png'} cannot be read") >= 1
        logs.append(read_log(out))
    assert [line["bad_files"] for line in logs[0] if line["event"] == "train"][-1] == 2  # once in each of two epochs
    assert logs[1] == logs[0]
    for line, other in zip(logs[0], logs[2], strict=True):
        assert other.get("bad_files") == line.get("bad_files")
        assert other.get("loss", 0) == pytest.approx(line.get("loss", 0), abs=1e-5)
