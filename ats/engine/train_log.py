"""A training's numbers: the bar or the lines on the console, and in OUTPUT_DIR `log.jsonl` and `tensorboard/`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import simplejson
import torch
from torch import Tensor
from tqdm import tqdm

from ats.engine.distributed import is_main
from ats.engine.meters import Eta, Window
from ats.engine.step import StepStats
from ats.errors import UserError, counted
from ats.files import atomic_write

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from ats.engine.evaluate import Result

logger = logging.getLogger(__name__)


class TrainLog:
    """A running training: a bar on a terminal, else a line every `period` steps; `log.jsonl`; TensorBoard if asked. All
    this on process 0; the others are silent.

    Epochs and steps are counted from 0 in arguments and from 1 in what is written. A resumed run goes on behind
    `epoch` finished epochs and `step` steps, with its `window`; what was logged of later steps is dropped.
    """

    def __init__(
        self,
        output_dir: Path,
        *,
        num_epochs: int,
        num_steps: int,
        period: int,
        device: torch.device | None = None,
        epoch: int = 0,
        step: int = 0,
        window: dict | None = None,
        tensorboard: bool = False,
    ) -> None:
        self._num_epochs, self._num_steps, self._period = num_epochs, num_steps, max(period, 1)
        self._path, self._device = output_dir / "log.jsonl", device
        total, done = num_epochs * num_steps, epoch * num_steps + step
        self._writer = None
        if is_main():
            _drop_lines_after(self._path, epoch=epoch, step=step)
            self._writer = _tensorboard_writer(output_dir, done) if tensorboard else None
        disable = None if is_main() else True  # None: unless on a terminal
        self._bar = tqdm(total=total, initial=done, desc="train", unit="step", dynamic_ncols=True, disable=disable)
        self._eta = Eta(total - done)
        self._window = Window(window)

    def start_epoch(self) -> None:
        """Begin an epoch: the time of the evaluation before it does not count."""
        self._window = Window()

    def step(
        self,
        epoch: int,
        step: int,
        stats: StepStats,
        *,
        lr: float,
        num_images: int,
        seconds_waited: float = 0.0,
        num_bad: int = 0,
    ) -> None:
        """Count a step; log the averages since the last line every `period` steps and at the end of an epoch.

        Args:
            num_images: of the step. seconds_waited: for its data. num_bad: bad files since the training began.
        """
        values = {"loss": stats.loss, "grad_norm": stats.grad_norm, "images": num_images, "waited": seconds_waited}
        self._window.add(values | stats.tokens)
        self._eta.step()
        self._bar.update()
        if (step + 1) % self._period and step + 1 < self._num_steps:
            return
        means = self._window.take()
        values = {"loss": means["loss"], "lr": lr, "grad_norm": means["grad_norm"]}
        values["tokens_per_block"] = {block: mean for block, mean in means.items() if isinstance(block, int)}
        values["bad_files"] = num_bad
        if stats.loss_scale is not None:
            values["loss_scale"] = stats.loss_scale
        values["images_per_second"] = means["images"] / means["seconds"]
        values["data_wait_share"] = min(means["waited"] / means["seconds"], 1.0)
        if self._device is not None and self._device.type == "cuda":
            values["gpu_memory_gib"] = torch.cuda.max_memory_allocated(self._device) / 2**30
        self._write("train", epoch, step, values)
        tokens = " ".join(f"{mean:.1f}" for mean in values["tokens_per_block"].values())
        self._bar.set_postfix_str(f"loss {means['loss']:.4f}, lr {lr:.2e}", refresh=False)
        logger.log(
            logging.INFO if self._bar.disable else logging.DEBUG,  # on a terminal the bar says it
            "epoch %d/%d step %d/%d: loss %.4f, lr %.3e, gradient norm %.3g, %.0f images/s, %.0f %% waiting for data"
            "%s%s, %s to go",
            *(epoch + 1, self._num_epochs, step + 1, self._num_steps, means["loss"], lr, means["grad_norm"]),
            *(values["images_per_second"], 100 * values["data_wait_share"]),
            *(
                f", {counted(num_bad, 'bad file')}" if num_bad else "",
                f", tokens {tokens}" if tokens else "",
                self._eta,
            ),
        )

    def window(self) -> dict:
        """What is averaged towards the next line, as plain values to go on from."""
        return self._window.state()

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
        if self._writer is not None:
            for block, counts in result.token_counts.items():
                kept = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
                self._writer.add_histogram(f"val/tokens_kept/{block}", kept, (epoch + 1) * self._num_steps)

    @property
    def wants_pictures(self) -> bool:
        """Whether `picture` has somewhere to go."""
        return self._writer is not None

    def picture(self, epoch: int, picture: Tensor) -> None:
        """A picture [3, H, W] in 0..1 after `epoch`, for TensorBoard."""
        if self._writer is not None:
            self._writer.add_image("val/kept_tokens", picture, (epoch + 1) * self._num_steps)

    def _write(self, event: str, epoch: int, step: int, values: dict[str, object]) -> None:
        if not is_main():
            return
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


def _tensorboard_writer(output_dir: Path, steps_done: int) -> SummaryWriter:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError("TENSORBOARD.ENABLE True needs TensorBoard: pip install tensorboard") from error
    return SummaryWriter(str(output_dir / "tensorboard"), purge_step=steps_done + 1)


def _drop_lines_after(path: Path, *, epoch: int, step: int) -> None:
    """Drop the lines of `log.jsonl` that a run resumed after `epoch` epochs and `step` steps will write again."""

    def is_kept(line: str) -> bool:
        try:
            values = simplejson.loads(line)
        except simplejson.JSONDecodeError:
            return False  # the line that was being written when the run was killed
        if values["event"] == "val" and step == 0:  # the evaluation after the last epoch is made once more
            return values["epoch"] < epoch
        return values["epoch"] <= epoch or (values["epoch"] == epoch + 1 and values["step"] <= step)

    lines = path.read_text().splitlines() if path.exists() else []
    with atomic_write(path) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in lines if is_kept(line)))
