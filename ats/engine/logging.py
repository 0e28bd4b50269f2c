"""Where a run's messages and numbers go: the console, and in OUTPUT_DIR `log.txt`, `log.jsonl` and `tensorboard/`.

Messages at level DEBUG are for `log.txt` alone.
"""

from __future__ import annotations

import logging
import logging.handlers
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import simplejson
from tqdm import tqdm

from ats.config import CfgNode
from ats.engine.meters import Eta, Window
from ats.errors import UserError

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from ats.engine.evaluate import Result

ROOT = logging.getLogger("ats")
logger = logging.getLogger(__name__)


class _ConsoleHandler(logging.Handler):
    """Writes to stderr above a running progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


class _Formatter(logging.Formatter):
    """`[time] message`, with the level in front of the message from WARNING on."""

    def format(self, record: logging.LogRecord) -> str:
        level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        return f"[{self.formatTime(record, '%m-%d %H:%M:%S')}] {level}{record.getMessage()}"


def setup_logging() -> None:
    """Send the package's messages to the console, and keep them until the config tells `log_to_file` its folder."""
    ROOT.setLevel(logging.DEBUG)
    ROOT.handlers.clear()
    console = _ConsoleHandler(logging.INFO)
    console.setFormatter(_Formatter())
    ROOT.addHandler(console)
    ROOT.addHandler(logging.handlers.MemoryHandler(1000, flushLevel=logging.CRITICAL + 1, flushOnClose=False))


def log_to_file(path: Path) -> None:
    """Append the package's messages to this file from now on, those kept since `setup_logging` first."""
    if not ROOT.handlers:
        setup_logging()
    file = logging.FileHandler(path)
    file.setFormatter(_Formatter())
    for handler in ROOT.handlers[1:]:  # what stands behind the console: the memory, or the file of an earlier run
        if isinstance(handler, logging.handlers.MemoryHandler):
            handler.setTarget(file)
            handler.flush()
        ROOT.removeHandler(handler)
        handler.close()
    ROOT.addHandler(file)


def open_output_dir(cfg: CfgNode) -> Path:
    """Create OUTPUT_DIR, begin `log.txt` and write `config.yaml` there; returns its path."""
    output_dir = Path(cfg.OUTPUT_DIR).expanduser()
    output_dir.mkdir(parents=True, exist_ok=True)
    log_to_file(output_dir / "log.txt")
    (output_dir / "config.yaml").write_text(cfg.dump())
    return output_dir


def log_plan(plan: dict[str, str]) -> None:
    """Log what is going to run, one aligned line per item."""
    for name, value in plan.items():
        logger.info("%-8s  %s", name, value)


@dataclass
class StepStats:
    """One training step: loss, gradient norm before clipping, block -> mean kept tokens, the scaler's scale if on."""

    loss: float
    grad_norm: float
    tokens: dict[int, float]
    loss_scale: float | None = None


class TrainLog:
    """A running training: a bar on a terminal, else a line every `period` steps; `log.jsonl`; TensorBoard if asked.

    Epochs and steps are counted from 0 in arguments and from 1 in what is written. A resumed run goes on behind its
    `epochs_done`; what was logged of later ones is dropped.
    """

    def __init__(
        self,
        output_dir: Path,
        *,
        num_epochs: int,
        num_steps: int,
        period: int,
        epochs_done: int = 0,
        tensorboard: bool = False,
    ) -> None:
        self._num_epochs, self._num_steps, self._period = num_epochs, num_steps, max(period, 1)
        self._path = output_dir / "log.jsonl"
        lines = self._path.read_text().splitlines() if epochs_done and self._path.exists() else []
        self._path.write_text("".join(f"{line}\n" for line in lines if _epoch_of(line) <= epochs_done))
        self._writer = _tensorboard_writer(output_dir, epochs_done * num_steps) if tensorboard else None
        total, done = num_epochs * num_steps, epochs_done * num_steps
        self._bar = tqdm(total=total, initial=done, desc="train", unit="step", dynamic_ncols=True, disable=None)
        self._eta = Eta(total - done)
        self._window = Window()

    def step(self, epoch: int, step: int, stats: StepStats, *, lr: float, num_images: int) -> None:
        """Count a step; log the averages since the last line every `period` steps and at the end of an epoch."""
        if step == 0:
            self._window = Window()  # the time of the evaluation before it does not count
        self._window.add({"loss": stats.loss, "grad_norm": stats.grad_norm, "images": num_images, **stats.tokens})
        self._eta.step()
        self._bar.update()
        if (step + 1) % self._period and step + 1 < self._num_steps:
            return
        means = self._window.take()
        values = {"loss": means["loss"], "lr": lr, "grad_norm": means["grad_norm"]}
        values["images_per_second"] = means["images"] / means["seconds"]
        values["tokens_per_block"] = {block: mean for block, mean in means.items() if isinstance(block, int)}
        if stats.loss_scale is not None:
            values["loss_scale"] = stats.loss_scale
        self._write("train", epoch, step, values)
        tokens = " ".join(f"{mean:.1f}" for mean in values["tokens_per_block"].values())
        self._bar.set_postfix_str(f"loss {means['loss']:.4f}, lr {lr:.2e}", refresh=False)
        logger.log(
            logging.INFO if self._bar.disable else logging.DEBUG,  # on a terminal the bar says it
            "epoch %d/%d step %d/%d: loss %.4f, lr %.3e, gradient norm %.3g, %.0f images/s%s, %s to go",
            *(epoch + 1, self._num_epochs, step + 1, self._num_steps, means["loss"], lr, means["grad_norm"]),
            *(values["images_per_second"], f", tokens {tokens}" if tokens else "", self._eta),
        )

    def evaluation(self, epoch: int, result: Result, *, is_ema: bool) -> None:
        """Log the evaluation after `epoch`."""
        weights = "EMA weights" if is_ema else "weights"
        cost, dense = result.gflops["mean"], result.gflops["dense"]
        values = {"top1": result.top1, "top5": result.top5, "gflops": cost, "weights": weights}
        self._write("val", epoch, self._num_steps - 1, values | {"tokens_per_block": result.tokens_per_block})
        logger.info(
            "epoch %d/%d: %s reach top-1 %.2f %%, top-5 %.2f %% at %.4g GFLOPs (dense %.4g)",
            *(epoch + 1, self._num_epochs, weights, result.top1, result.top5, cost, dense),
        )

    def _write(self, event: str, epoch: int, step: int, values: dict[str, object]) -> None:
        line = {"event": event, "epoch": epoch + 1, "step": step + 1, **values}
        with self._path.open("a") as file:
            file.write(simplejson.dumps(line, ignore_nan=True) + "\n")
        if self._writer is None:
            return
        total_step = epoch * self._num_steps + step + 1
        for name, value in values.items():
            items = value if isinstance(value, dict) else {"": value}
            for key, item in items.items():
                if isinstance(item, (int, float)):
                    self._writer.add_scalar(f"{event}/{name}/{key}".rstrip("/"), item, total_step)

    def close(self) -> None:
        """Finish the bar and TensorBoard's file."""
        self._bar.close()
        if self._writer is not None:
            self._writer.close()


def _tensorboard_writer(output_dir: Path, first_step: int) -> SummaryWriter:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError("TENSORBOARD.ENABLE True needs TensorBoard: pip install tensorboard") from error
    return SummaryWriter(str(output_dir / "tensorboard"), purge_step=first_step + 1)


def _epoch_of(line: str) -> float:
    try:
        return simplejson.loads(line)["epoch"]
    except simplejson.JSONDecodeError:
        return float("inf")  # the line that was being written when the run was killed
