"""What an evaluation collects per sample, and what it makes of it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from ats.engine.distributed import gather
from ats.engine.ensemble import Ensemble
from ats.engine.meters import hits
from ats.errors import UserError
from ats.flops import Gflops


@dataclass
class Result:
    """What an evaluation found; the fields of result.json.

    top1, top5: percent of the samples (top5 among fewer than five classes: among all of them).
    gflops: `mean`, `std`, `min`, `p5`, `p50`, `p95`, `max` over the samples as run; `paper_mean` in the paper's
        accounting; `dense` of the same network without ATS.
    tokens_per_block: ATS block -> mean number of tokens kept, prefix tokens counted.
    images_per_second: rate of the forward passes alone, the first batch (warm-up) left out where there are others, of
        all processes together; `wall_seconds` is the whole evaluation with reading the data.
    num_nonfinite: samples whose logits were not finite; they count as wrong.
    token_counts: ATS block -> number of sequences that kept 0, 1, 2, ... tokens; not in result.json.
    video: of videos in several views; then samples are clips, `gflops` is per view, `top1` and `top5` are of the
        videos, and this has `clip_top1`, `clip_top5` and `Ensemble.summary`.
    """

    top1: float
    top5: float
    num_samples: int
    num_nonfinite: int
    gflops: dict[str, float]
    tokens_per_block: dict[int, float]
    images_per_second: float
    wall_seconds: float
    params_m: float
    device: str
    token_counts: dict[int, list[int]]
    video: dict[str, object] | None = None


def _mean_count(counts: Tensor) -> float:
    return int((counts * torch.arange(len(counts))).sum()) / int(counts.sum())


@dataclass
class Tally:
    """Per-sample records of an evaluation, in order of arrival; those of several processes can be concatenated."""

    # Per batch [B, 6] float64: index, hit at 1, hit at 5, non-finite, GFLOPs as run, GFLOPs of the paper.
    rows: list[Tensor] = field(default_factory=list)
    # ATS block -> number of sequences that kept 0, 1, 2, ... tokens
    tokens: dict[int, Tensor] = field(default_factory=dict)
    # Per batch: samples, seconds of the forward pass.
    timing: list[tuple[int, float]] = field(default_factory=list)
    dense: float = 0.0
    images_per_second: float = 0.0

    def add(self, logits: Tensor, label: Tensor, index: Tensor, trace: list, cost: Gflops, seconds: float) -> None:
        """Add one batch: logits [B, C], label and index [B]."""
        hit1, hit5, finite = hits(logits, label)
        columns = [index, hit1, hit5, ~finite, cost.as_run, cost.paper]
        self.rows.append(torch.stack([column.to("cpu", torch.float64) for column in columns], dim=1))
        for entry in trace:
            self._count(entry.block, entry.num_tokens.cpu().bincount())
        self.dense = cost.dense
        self.timing.append((len(index), seconds))

    def _count(self, block: int, counts: Tensor) -> None:
        old = self.tokens.get(block, counts[:0])
        pad = len(counts) - len(old)
        self.tokens[block] = nn.functional.pad(old, (0, max(pad, 0))) + nn.functional.pad(counts, (0, max(-pad, 0)))

    @classmethod
    def of_all_processes(cls, own: Tally) -> Tally:
        """The records of all processes, on every one of them."""
        tally = cls()
        for other in gather(own):
            tally.rows += other.rows
            for block, counts in other.tokens.items():
                tally._count(block, counts)
            tally.dense = max(tally.dense, other.dense)
        tally.images_per_second = sum(gather(own.rate()))
        return tally

    def rate(self) -> float:
        """Samples per second of forward passes, without the first where there are others."""
        timed = self.timing[1:] or self.timing
        return sum(n for n, _ in timed) / sum(seconds for _, seconds in timed) if timed else 0.0

    def result(self, *, ensemble: Ensemble | None, wall_seconds: float, params_m: float, device: str) -> Result:
        """The averages over all samples, clips of skipped videos left out."""
        rows = torch.cat(self.rows)
        rows = rows[rows[:, 0].argsort()]
        if (rows[1:, 0] == rows[:-1, 0]).any():
            raise RuntimeError("Samples were evaluated twice: build_loader needs the rank and the world size.")
        if ensemble is not None:
            rows = rows[~ensemble.skipped[rows[:, 0].long() // ensemble.num_views]]
            if not len(rows):
                raise UserError("There is nothing to evaluate: no video can be read.")
        _, hit1, hit5, nonfinite, as_run, paper = rows.T
        quantiles = torch.tensor([0.0, 0.05, 0.5, 0.95, 1.0], dtype=torch.float64)
        low, p5, p50, p95, high = torch.quantile(as_run, quantiles).tolist()
        spread = {"mean": as_run.mean().item(), "std": as_run.std(correction=0).item()}
        spread |= {"min": low, "p5": p5, "p50": p50, "p95": p95, "max": high}
        result = Result(
            top1=100 * hit1.mean().item(),
            top5=100 * hit5.mean().item(),
            num_samples=len(rows),
            num_nonfinite=int(nonfinite.sum()),
            gflops=spread | {"paper_mean": paper.mean().item(), "dense": self.dense},
            tokens_per_block={block: _mean_count(counts) for block, counts in sorted(self.tokens.items())},
            images_per_second=self.images_per_second,
            wall_seconds=wall_seconds,
            params_m=params_m,
            device=device,
            token_counts={block: counts.tolist() for block, counts in sorted(self.tokens.items())},
        )
        return result if ensemble is None else _of_videos(result, ensemble)


def _of_videos(clips: Result, ensemble: Ensemble) -> Result:
    """The result of the clips as that of their videos."""
    top1, top5 = ensemble.accuracy()
    video = ensemble.summary(clips.gflops) | {"clip_top1": clips.top1, "clip_top5": clips.top5}
    return replace(clips, top1=top1, top5=top5, video=video)
