"""Multi-view testing: the scores of all clips of a video become the video's.

ensemble = Ensemble(num_videos=len(dataset) // 3, num_views=3)
ensemble.add(logits, label, index)      # batch by batch, in any order
scores = ensemble.scores()              # [num_videos, classes], after every clip came exactly once
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from ats.config import CfgNode
from ats.datasets import Kinetics, Sample
from ats.engine.distributed import max_over_processes, sum_over_processes, world_size
from ats.engine.meters import hits
from ats.errors import UserError

logger = logging.getLogger(__name__)


class Ensemble:
    """Scores per video; clip `index` belongs to video `index // num_views`.

    Args:
        num_videos, num_views: the test set has `num_videos * num_views` clips.
        method: "sum" or "max" over the clips, class by class.
        of: "logits" or their "softmax".

    Attributes:
        skipped: [num_videos] bool, videos left out because a clip of theirs could not be read.
        labels: [num_videos] int64, -1 before a clip came.
    """

    def __init__(self, *, num_videos: int, num_views: int, method: str = "sum", of: str = "logits"):
        if method not in ("sum", "max") or of not in ("logits", "softmax"):
            raise ValueError(f'method must be "sum" or "max", of "logits" or "softmax"; got {method!r}, {of!r}.')
        self.num_videos, self.num_views, self.method, self.of = num_videos, num_views, method, of
        self.seen = torch.zeros(num_videos, num_views, dtype=torch.bool)
        self.skipped = torch.zeros(num_videos, dtype=torch.bool)
        self.labels = torch.full((num_videos,), -1)
        self._scores: Tensor | None = None

    def add(self, logits: Tensor, label: Tensor, index: Tensor) -> None:
        """Add the clips of a batch: logits [B, classes], label and index [B].

        Raises:
            RuntimeError: a clip comes for the second time, or clips of one video have different labels.
        """
        self._see(index)
        video, label = index // self.num_views, label.cpu()
        self.labels[video[self.labels[video] < 0]] = label[self.labels[video] < 0]
        if wrong := index[self.labels[video] != label].tolist():
            raise RuntimeError(f"Clip {wrong[0]} has another label than the other clips of its video.")
        # float64: the sum does not depend on the order in which clips come, to any digit that counts.
        scores = logits.detach().to("cpu", torch.float64)
        if self.of == "softmax":
            scores = scores.softmax(dim=1)
        if self._scores is None:
            self._scores = self._no_scores(scores.shape[1])
        if self.method == "sum":
            self._scores.index_add_(0, video, scores)
        else:
            self._scores.scatter_reduce_(0, video[:, None].expand_as(scores), scores, "amax")

    def skip(self, index: Tensor) -> None:
        """Leave the videos of these clips out; their other clips are expected all the same."""
        self._see(index)
        self.skipped[index // self.num_views] = True

    def leave_out_bad(self, batch: Sample) -> Sample:
        """The rest of a batch without the clips that could not be read; these are skipped, by name."""
        good = torch.tensor([not path for path in batch.bad])
        for path in sorted(set(filter(None, batch.bad))):
            logger.warning("%s cannot be read; its video is left out.", path)
        self.skip(batch.index[~good])
        return Sample(batch.x[good], batch.label[good], batch.index[good], [""] * int(good.sum()))

    def _see(self, index: Tensor) -> None:
        if len(index) and not 0 <= int(index.min()) <= int(index.max()) < self.seen.numel():
            raise RuntimeError(f"There are clips 0 to {self.seen.numel() - 1}; got {index.tolist()}.")
        flat = self.seen.view(-1)
        repeated = index[flat[index]].tolist()
        if repeated or len(index.unique()) < len(index):
            raise RuntimeError(f"Clips came twice: {repeated or index.tolist()}.")
        flat[index] = True

    def exchange(self) -> None:
        """Put the clips that several processes have seen together, on every one of them.

        Raises:
            RuntimeError: two processes have seen the same clip.
        """
        if world_size() == 1:
            return
        seen = sum_over_processes(self.seen.to(torch.int32))
        if (seen > 1).any():
            raise RuntimeError(f"Processes have seen the same clips: {(seen > 1).nonzero()[:10].tolist()}.")
        self.seen = seen.bool()
        self.skipped = max_over_processes(self.skipped.to(torch.int32)).bool()
        max_over_processes(self.labels)
        num_classes = max_over_processes(torch.tensor(0 if self._scores is None else self._scores.shape[1])).item()
        if num_classes and self._scores is None:  # this process had no clip
            self._scores = self._no_scores(num_classes)
        if num_classes:
            (sum_over_processes if self.method == "sum" else max_over_processes)(self._scores)

    def _no_scores(self, num_classes: int) -> Tensor:
        start = 0.0 if self.method == "sum" else -torch.inf
        return torch.full((self.num_videos, num_classes), start, dtype=torch.float64)

    def scores(self) -> Tensor:
        """[num_videos, classes] float64, every clip counted once; the rows of skipped videos mean nothing.

        Raises:
            RuntimeError: a video has not all its clips.
        """
        missing = (~self.seen.all(dim=1)).nonzero().flatten().tolist()
        if missing or self._scores is None:
            raise RuntimeError(f"{len(missing)} videos have not all their {self.num_views} clips: {missing[:10]}.")
        return self._scores

    def accuracy(self) -> tuple[float, float]:
        """Top-1 and top-5 in percent of the videos that are not skipped.

        Raises:
            RuntimeError: as `scores`.
        """
        hit1, hit5, _ = hits(self.scores()[~self.skipped], self.labels[~self.skipped])
        return 100 * hit1.double().mean().item(), 100 * hit5.double().mean().item()

    def summary(self, gflops: dict[str, float]) -> dict[str, object]:
        """Counts (videos and clips without the skipped), and GFLOPs of a video over its views, from those per view."""
        num_videos = int((~self.skipped).sum())
        return {
            "num_videos": num_videos,
            "num_clips": num_videos * self.num_views,
            "num_views": self.num_views,
            "num_skipped_videos": int(self.skipped.sum()),
            "gflops_per_video": {name: self.num_views * gflops[name] for name in ("mean", "paper_mean", "dense")},
        }


def build_ensemble(cfg: CfgNode, dataset: object) -> Ensemble | None:
    """The ensemble for a test set of clips; None for images, which have one view.

    Raises:
        UserError: images are asked for several views.
    """
    if not isinstance(dataset, Kinetics):
        if cfg.TEST.NUM_ENSEMBLE_VIEWS not in (1, 10):  # 10 is the default, of clips
            raise UserError(f"TEST.NUM_ENSEMBLE_VIEWS {cfg.TEST.NUM_ENSEMBLE_VIEWS}: images have one view; type 1.")
        return None
    return Ensemble(
        num_videos=dataset.num_videos,
        num_views=dataset.num_views,
        method=cfg.DATA.ENSEMBLE_METHOD,
        of=cfg.TEST.ENSEMBLE_OF,
    )
