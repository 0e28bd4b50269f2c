"""Per-sample records of an evaluation, scores of videos in several views, and the `Result` of both.

ensemble = Ensemble(num_videos=len(dataset) // 3, num_views=3)
ensemble.add(logits, label, index)      # batch by batch, in any order
scores = ensemble.scores()              # [num_videos, classes], once every clip has been added
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ats.config import CfgNode
from ats.datasets import Kinetics, Sample
from ats.engine.device import all_gather, all_reduce
from ats.errors import UserError, printable
from ats.flops import Gflops

logger = logging.getLogger(__name__)


def hits(logits: Tensor, label: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For each row of logits [B, classes]: top-1 hit, top-5 hit, all finite. [B] bool each.

    A row that is not finite is never a hit.
    """
    finite = logits.isfinite().all(dim=1)
    top = logits.topk(min(5, logits.shape[1]), dim=1).indices
    correct = (top == label.to(top.device)[:, None]) & finite[:, None]
    return correct[:, 0], correct.any(dim=1), finite


@dataclass
class Result:
    """The result of an evaluation, with the fields of result.json.

    For videos in several views, samples are clips, `gflops` is per view, and `top1` and `top5` are per video.
    """

    top1: float  # percent
    top5: float  # with fewer than five classes, all of them count
    num_samples: int
    num_nonfinite: int  # samples with NaN or infinite logits; they count as wrong
    gflops: dict[str, float]  # as run: mean, std, min, p5, p50, p95, max over the samples; paper_mean; dense (no ATS)
    tokens_per_block: dict[int, float]  # ATS block -> mean number of tokens kept, prefix tokens included
    images_per_second: float  # of the forward passes, summed over the processes; see `Tally.rate`
    wall_seconds: float  # duration of the whole evaluation, including data loading
    params_m: float
    device: str
    token_counts: dict[int, list[int]]  # ATS block -> how many sequences kept 0, 1, 2, ... tokens; not in result.json
    video: dict[str, object] | None = None  # several views: clip_top1, clip_top5, numbers of videos and clips
    dtype: str = "float32"  # of the weights, or of autocast


@dataclass
class Tally:
    """Per-sample records, in order of arrival."""

    # Per batch [B, 6] float64: index, top-1 hit, top-5 hit, non-finite, GFLOPs as run, GFLOPs as the paper counts.
    rows: list[Tensor] = field(default_factory=list)
    token_counts: dict[int, Counter[int]] = field(default_factory=dict)  # ATS block -> tokens kept -> sequences
    timing: list[tuple[int, float]] = field(default_factory=list)  # per batch: samples, seconds of its forward pass
    dense: float = 0.0  # GFLOPs of a sample without ATS

    def add(self, logits: Tensor, label: Tensor, index: Tensor, trace: list, cost: Gflops, seconds: float) -> None:
        """Add a batch: logits [B, classes], label and index [B]."""
        hit1, hit5, finite = hits(logits, label)
        columns = [index, hit1, hit5, ~finite, cost.as_run, cost.paper]
        self.rows.append(torch.stack([column.to("cpu", torch.float64) for column in columns], dim=1))
        for entry in trace:
            self.token_counts.setdefault(entry.block, Counter()).update(entry.num_tokens.tolist())
        self.dense = cost.dense
        self.timing.append((len(index), seconds))

    def rate(self) -> float:
        """Samples per second of forward passes, excluding the first batch unless it is the only one."""
        timing = self.timing[1:] or self.timing
        return sum(n for n, _ in timing) / sum(seconds for _, seconds in timing) if timing else 0.0

    def result(self, *, ensemble: Ensemble | None, start: float, params_m: float, device: str) -> Result:
        """Averages over the samples of all processes, without the clips of skipped videos.

        `start`: `time.perf_counter` at the start of the evaluation. Raises a UserError if there are no samples.
        """
        parts = all_gather(self)
        # Sorted by index, so that the sums do not depend on the batch size or the number of processes.
        rows = torch.cat([torch.zeros(0, 6, dtype=torch.float64), *(rows for part in parts for rows in part.rows)])
        rows = rows[rows[:, 0].argsort()]
        if (rows[1:, 0] == rows[:-1, 0]).any():
            raise RuntimeError("Samples were evaluated twice: build_loader needs the rank and the world size.")
        if ensemble is not None:
            ensemble.exchange()
            rows = rows[~ensemble.skipped[rows[:, 0].long() // ensemble.num_views]]
        if not len(rows):
            reason = "the data set is empty" if ensemble is None else "no video can be read"
            raise UserError(f"There is nothing to evaluate: {reason}.")
        _, hit1, hit5, nonfinite, as_run, paper = rows.T
        gflops = {"mean": as_run.mean().item(), "std": as_run.std(correction=0).item()}
        for name, share in (("min", 0.0), ("p5", 0.05), ("p50", 0.5), ("p95", 0.95), ("max", 1.0)):
            gflops[name] = as_run.quantile(share).item()
        gflops |= {"paper_mean": paper.mean().item(), "dense": max(part.dense for part in parts)}
        blocks = sorted({block for part in parts for block in part.token_counts})
        counts = {b: sum((part.token_counts.get(b, Counter()) for part in parts), Counter[int]()) for b in blocks}
        result = Result(
            top1=100 * hit1.mean().item(),
            top5=100 * hit5.mean().item(),
            num_samples=len(rows),
            num_nonfinite=int(nonfinite.sum()),
            gflops=gflops,
            tokens_per_block={b: sum(n * times for n, times in c.items()) / c.total() for b, c in counts.items()},
            images_per_second=sum(part.rate() for part in parts),
            wall_seconds=time.perf_counter() - start,
            params_m=params_m,
            device=device,
            token_counts={b: [c[n] for n in range(max(c) + 1)] for b, c in counts.items()},
        )
        if ensemble is None:
            return result
        top1, top5 = ensemble.accuracy()
        num_videos = int((~ensemble.skipped).sum())
        per_video = {name: ensemble.num_views * gflops[name] for name in ("mean", "paper_mean", "dense")}
        video: dict[str, object] = {"num_videos": num_videos, "num_clips": num_videos * ensemble.num_views}
        video |= {"num_views": ensemble.num_views, "num_skipped_videos": int(ensemble.skipped.sum())}
        video |= {"gflops_per_video": per_video, "clip_top1": result.top1, "clip_top5": result.top5}
        return replace(result, top1=top1, top5=top5, video=video)


@dataclass(eq=False, kw_only=True)
class Ensemble:
    """Scores of `num_videos * num_views` clips per video; clip `index` belongs to video `index // num_views`."""

    num_videos: int
    num_views: int
    method: str = "sum"  # how to combine the clips' scores, class by class: "sum" or "max"
    clip_score: str = "logits"  # what to combine: "logits" or their "softmax"

    def __post_init__(self) -> None:
        self.seen = torch.zeros(self.num_videos, self.num_views, dtype=torch.bool)  # the clips added so far
        self.skipped = torch.zeros(self.num_videos, dtype=torch.bool)  # videos with a clip that cannot be read
        self.labels = torch.full((self.num_videos,), -1)  # [num_videos], -1 until a clip of the video is added
        self._scores: Tensor | None = None  # [num_videos, classes] float64

    def add(self, logits: Tensor, label: Tensor, index: Tensor) -> None:
        """Add a batch of clips: logits [B, classes], label and index [B].

        Raises:
            RuntimeError: a clip was added before, or the clips of a video have different labels.
        """
        self._mark_seen(index)
        video, label = index // self.num_views, label.cpu()
        self.labels[video[self.labels[video] < 0]] = label[self.labels[video] < 0]
        if wrong := index[self.labels[video] != label].tolist():
            raise RuntimeError(f"Clip {wrong[0]} has another label than the other clips of its video.")
        # In float64, the order of the clips does not change any significant digit of the sum.
        scores = logits.detach().to("cpu", torch.float64)
        if self.clip_score == "softmax":
            scores = scores.softmax(dim=1)
        if self._scores is None:
            self._scores = self._no_scores(scores.shape[1])
        if self.method == "sum":
            self._scores.index_add_(0, video, scores)
        else:
            self._scores.scatter_reduce_(0, video[:, None].expand_as(scores), scores, "amax")

    def drop_bad(self, batch: Sample) -> Sample:
        """Drop unreadable clips from a batch; their videos are marked as skipped and logged."""
        good = torch.tensor([not path for path in batch.bad])
        for path in sorted(set(filter(None, batch.bad))):
            logger.warning("%s cannot be read; its video is left out.", printable(path))
        self._mark_seen(batch.index[~good])
        self.skipped[batch.index[~good] // self.num_views] = True
        return Sample(batch.x[good], batch.label[good], batch.index[good], [""] * int(good.sum()))

    def _mark_seen(self, index: Tensor) -> None:
        if len(index) and not 0 <= int(index.min()) <= int(index.max()) < self.seen.numel():
            raise RuntimeError(f"There are clips 0 to {self.seen.numel() - 1}; got {index.tolist()}.")
        flat = self.seen.view(-1)
        repeated = index[flat[index]].tolist()
        if repeated or len(index.unique()) < len(index):
            raise RuntimeError(f"Clips came twice: {repeated or index.tolist()}.")
        flat[index] = True

    def _no_scores(self, num_classes: int) -> Tensor:
        start = 0.0 if self.method == "sum" else -torch.inf
        return torch.full((self.num_videos, num_classes), start, dtype=torch.float64)

    def exchange(self) -> None:
        """Merge the clips of all processes into each; raises a RuntimeError if two have seen the same clip."""
        seen = all_reduce(self.seen.to(torch.int32))
        if (seen > 1).any():
            raise RuntimeError(f"Processes have seen the same clips: {(seen > 1).nonzero()[:10].tolist()}.")
        self.seen = seen.bool()
        self.skipped = all_reduce(self.skipped.to(torch.int32), "max").bool()
        all_reduce(self.labels, "max")
        num_classes = int(all_reduce(torch.tensor(0 if self._scores is None else self._scores.shape[1]), "max"))
        if num_classes:
            if self._scores is None:  # this process had no clips
                self._scores = self._no_scores(num_classes)
            all_reduce(self._scores, self.method)

    def scores(self) -> Tensor:
        """Scores [num_videos, classes], float64, each clip counted once; raises a RuntimeError if a clip is missing.

        The rows of skipped videos are meaningless.
        """
        missing = (~self.seen.all(dim=1)).nonzero().flatten().tolist()
        if missing or self._scores is None:
            raise RuntimeError(f"{len(missing)} videos lack some of their {self.num_views} clips: {missing[:10]}.")
        return self._scores

    def accuracy(self) -> tuple[float, float]:
        """Top-1 and top-5 accuracy in percent, over the videos not skipped; like `scores`, needs all clips."""
        hit1, hit5, _ = hits(self.scores()[~self.skipped], self.labels[~self.skipped])
        return 100 * hit1.double().mean().item(), 100 * hit5.double().mean().item()


def build_ensemble(cfg: CfgNode, dataset: object) -> Ensemble | None:
    """The ensemble for a test set of clips; None for images. Raises a UserError for images in several views."""
    if not isinstance(dataset, Kinetics):
        if cfg.TEST.NUM_ENSEMBLE_VIEWS not in (1, 10):  # 10 is the default, meant for clips
            raise UserError(f"TEST.NUM_ENSEMBLE_VIEWS {cfg.TEST.NUM_ENSEMBLE_VIEWS}: images have one view; type 1.")
        return None
    scores = {"method": cfg.DATA.ENSEMBLE_METHOD, "clip_score": cfg.TEST.ENSEMBLE_OF}
    return Ensemble(num_videos=dataset.num_videos, num_views=dataset.num_views, **scores)
