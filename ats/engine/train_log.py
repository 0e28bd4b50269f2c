"""Training progress: a bar or lines on the console, `log.jsonl` and `tensorboard/` in OUTPUT_DIR, and the count of
unreadable files.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import simplejson
import torch
from torch import Tensor
from tqdm import tqdm

from ats.config import CfgNode
from ats.datasets.build import noun_of
from ats.engine.device import is_main
from ats.engine.step import StepStats
from ats.engine.tally import Result
from ats.errors import UserError, counted, needing, printable, rounded
from ats.files import naming, write

logger = logging.getLogger(__name__)


class Window:
    """Averages over the steps of a log line. The arguments are the `state()` of the window to continue."""

    def __init__(self, *, sums: dict | None = None, num_steps: int = 0, seconds: float = 0.0) -> None:
        self._sums: dict[str | int, float] = defaultdict(float, sums or {})
        self._num_steps, self._start = num_steps, time.perf_counter() - seconds

    def state(self) -> dict:
        """The window as plain values, for a checkpoint."""
        seconds = time.perf_counter() - self._start
        return {"sums": dict(self._sums), "num_steps": self._num_steps, "seconds": seconds}

    def add(self, values: dict[str | int, float]) -> None:
        """Add the values of a step."""
        for name, value in values.items():
            self._sums[name] += value
        self._num_steps += 1

    def means(self) -> dict[str | int, float]:
        """The mean of every value, and the `seconds` per step."""
        sums = self._sums | {"seconds": time.perf_counter() - self._start}
        return {name: total / self._num_steps for name, total in sums.items()}


class TrainLog:
    """Shows a bar on a terminal, else a line every LOG_PERIOD steps; writes `log.jsonl` and TensorBoard files.

    Only process 0 shows and writes anything. Epochs and steps count from 1; an epoch has `num_steps`. Reports the
    memory of `device` if it is a GPU. A resumed run continues after `steps_done` with its last `window`.
    """

    def __init__(
        self, output_dir: Path, cfg: CfgNode, *, num_steps: int, device: torch.device, steps_done: int, window: dict
    ) -> None:
        self._num_epochs, self._num_steps, self._period = cfg.SOLVER.MAX_EPOCH, num_steps, cfg.LOG_PERIOD
        self._path, self._tensorboard, self._device = output_dir / "log.jsonl", output_dir / "tensorboard", device
        self._done, self._done_before, self._samples = steps_done, steps_done, f"{noun_of(cfg)}s"
        self._start = time.perf_counter()
        self.window = Window(**window)
        self._writer = None
        if is_main() and cfg.TENSORBOARD.ENABLE:
            with needing("tensorboard", what="TENSORBOARD.ENABLE True needs"):
                from torch.utils.tensorboard import SummaryWriter
            threading.excepthook = _let_the_main_thread_report
            with naming(self._tensorboard):
                self._writer = SummaryWriter(str(self._tensorboard), purge_step=steps_done + 1)
        shown: dict[str, Any] = {"desc": "train", "unit": "step", "dynamic_ncols": True}
        disable = None if is_main() else True  # None: show it on a terminal only
        self._bar = tqdm(total=self._num_epochs * num_steps, initial=steps_done, disable=disable, **shown)

    def step(
        self, stats: StepStats, *, lr: float, num_images: int, seconds_waited: float = 0.0, num_bad: int = 0
    ) -> None:
        """Record a step; every LOG_PERIOD steps and at the end of an epoch, log the averages since the last line.

        Args:
            num_images: size of the batch. seconds_waited: for its data. num_bad: bad files since training began.
        """
        own: dict[Any, float] = {"loss": stats.loss, "grad_norm": stats.grad_norm, **stats.tokens}
        self.window.add(own | {"images": num_images, "waited": seconds_waited})
        self._bar.update()
        self._done += 1
        epoch, step = self._place()
        if step % self._period and step < self._num_steps:
            return
        means = self.window.means()
        self.window = Window()
        values: dict[str, Any] = {"loss": means["loss"], "lr": lr, "grad_norm": means["grad_norm"]}
        values["tokens_per_block"] = {block: mean for block, mean in means.items() if isinstance(block, int)}
        values["bad_files"] = num_bad
        if stats.loss_scale is not None:
            values["loss_scale"] = stats.loss_scale
        values["images_per_second"] = means["images"] / means["seconds"]
        values["data_wait_share"] = min(means["waited"] / means["seconds"], 1.0)
        if self._device.type == "cuda":
            values["gpu_memory_gib"] = torch.cuda.max_memory_allocated(self._device) / 2**30
        self._write("train", values)
        self._bar.set_postfix_str(f"loss {means['loss']:.4f}, lr {lr:.2e}", refresh=False)
        # Extrapolates the mean pace of this run so far, including evaluations and checkpoints.
        pace = (time.perf_counter() - self._start) / (self._done - self._done_before)
        time_left = timedelta(seconds=round(pace * (self._bar.total - self._done)))
        bad_files = f", {counted(num_bad, 'bad file')}" if num_bad else ""
        tokens = " ".join(f"{mean:.1f}" for mean in values["tokens_per_block"].values())
        logger.log(
            logging.INFO if self._bar.disable else logging.DEBUG,  # on a terminal the bar shows it
            "epoch %d/%d step %d/%d: loss %.4f, lr %.3e, gradient norm %.3g, %.0f %s/s, %.0f %% waiting for data"
            "%s%s, %s to go",
            *(epoch, self._num_epochs, step, self._num_steps, means["loss"], lr, means["grad_norm"]),
            *(values["images_per_second"], self._samples, 100 * values["data_wait_share"]),
            *(bad_files, f", tokens {tokens}" if tokens else "", time_left),
        )

    def _place(self) -> tuple[int, int]:
        """Epoch and step of the last step done, from 1."""
        epoch, step = divmod(self._done - 1, self._num_steps)
        return epoch + 1, step + 1

    def evaluation(self, result: Result, *, is_ema: bool, draw: Callable[[], Tensor | None] | None = None) -> None:
        """Log an evaluation, and with TensorBoard the picture [3, H, W], in 0..1, that `draw` returns."""
        weights = "EMA weights" if is_ema else "weights"
        cost, dense = result.gflops["mean"], result.gflops["dense"]
        values = {"top1": result.top1, "top5": result.top5, "gflops": cost, "weights": weights}
        self._write("val", values | {"tokens_per_block": result.tokens_per_block})
        logger.info(
            "epoch %d/%d: %s reach top-1 %.2f %%, top-5 %.2f %% at %s GFLOPs (dense %s)",
            *(self._place()[0], self._num_epochs, weights, result.top1, result.top5, rounded(cost), rounded(dense)),
        )
        if self._writer is None:
            return
        picture = None if draw is None else draw()
        with naming(self._tensorboard):
            for block, counts in result.token_counts.items():
                kept = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
                self._writer.add_histogram(f"val/tokens_kept/{block}", kept, self._done)
            if picture is not None:
                self._writer.add_image("val/kept_tokens", picture, self._done)

    def _write(self, event: str, values: dict[str, object]) -> None:
        """Add a line to log.jsonl, and its numbers to TensorBoard."""
        if not is_main():
            return
        epoch, step = self._place()
        line = {"event": event, "epoch": epoch, "step": step, **values}
        with naming(self._path), self._path.open("a") as file:
            file.write(simplejson.dumps(line, ignore_nan=True) + "\n")
        if self._writer is None:
            return
        numbers = {
            f"{event}/{name}/{key}".rstrip("/"): item
            for name, value in values.items()
            for key, item in (value if isinstance(value, dict) else {"": value}).items()
            if isinstance(item, (int, float))
        }
        with naming(self._tensorboard):
            for name, item in numbers.items():
                self._writer.add_scalar(name, item, self._done)

    def close(self) -> None:
        """Close the bar and TensorBoard's file."""
        self._bar.close()
        if self._writer is not None:
            with naming(self._tensorboard):
                self._writer.close()


def _let_the_main_thread_report(error: threading.ExceptHookArgs) -> None:
    """If the disk is full, TensorBoard's thread dies silently; the main thread gets the error at its next call."""
    is_tensorboards = type(error.thread).__module__.startswith("tensorboard")
    if not (is_tensorboards and isinstance(error.exc_value, OSError)):
        threading.__excepthook__(error)


def drop_lines_after(path: Path, epoch: int, step: int) -> None:
    """Drop the lines of `log.jsonl` that a run resumed after `epoch` epochs and `step` steps will write again."""

    def is_kept(line: str) -> bool:
        try:
            values = simplejson.loads(line)
            if values["event"] == "val" and step == 0:  # the evaluation after the last epoch will run again
                return values["epoch"] < epoch
            return values["epoch"] <= epoch or (values["epoch"] == epoch + 1 and values["step"] <= step)
        except (ValueError, LookupError, TypeError):
            return False  # half a line, or zeros: the run was killed, or the power failed, while writing

    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    write(path, "".join(f"{line}\n" for line in lines if is_kept(line)))


@dataclass
class BadFiles:
    """Counts the unreadable files that training replaced, logs each once, and stops a run with too many."""

    max_fraction: float  # largest allowed share of bad samples among those read so far
    counts: Sequence[int] = (0, 0)  # samples read and bad samples so far, from the checkpoint if the run continues
    grace: int = 1000  # count at least this many samples as read, so that an early bad file does not end the run
    _paths: set[str] = field(default_factory=set)

    def add(self, bad: Sequence[str], *, num_read: int, num_bad: int) -> None:
        """Add a batch; raises a UserError if more than `max_fraction` of the samples read so far are bad.

        Args:
            bad: per sample of this process, the path of the file that cannot be read, or "".
            num_read, num_bad: samples and bad samples over all processes.
        """
        for path in bad:
            if path and path not in self._paths:
                logger.warning("%s cannot be read; another sample takes its place.", printable(path))
                self._paths.add(path)
        num_read, num_bad = self.counts = [self.counts[0] + num_read, self.counts[1] + num_bad]
        if num_bad > self.max_fraction * max(num_read, self.grace):
            first = "".join(f"\n  {printable(path)}" for path in sorted(self._paths)[:5])
            more = f"\n  and {len(self._paths) - 5} more" if len(self._paths) > 5 else ""
            raise UserError(
                f"{num_bad} of the {num_read} training samples read so far cannot be read, more than "
                f"DATA.MAX_BAD_FRACTION {self.max_fraction} allows. Fix or remove these files, or raise the key:"
                f"{first}{more}"
            )
