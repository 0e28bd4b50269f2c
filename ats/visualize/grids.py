"""What the ATS blocks of a network scored and kept, laid over its input: `look(model, x)`.

Where a token lies in the picture differs from family to family; `token_grids` knows. Patches and pooled cells are cells
of a grid. PS-ViT's tokens are points that move with the image: each is a disc around its point.

Scores are not part of a trace. They are read off the samplers, which are swapped for recording ones while a batch is
looked at, so a network that nobody looks at does nothing more than before.

Shapes: B samples, S sequences (images, clips, or the frames of clips), T frames, h x w cells.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import singledispatch
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ats.errors import UserError
from ats.models.cvt import CvT
from ats.models.cvt.cost import conv_grid
from ats.models.dense_grid import Grid
from ats.models.mvit import MViT
from ats.models.mvit.dense import divide
from ats.models.psvit import PSViT
from ats.models.timesformer import TimeSformer
from ats.models.vit import VisionTransformer
from ats.models.xvit import XViT
from ats.plugin.timm.model import ATSModel
from ats.reduction.sampling import BlockSampler, Candidates, usable
from ats.tokens import KeptTokens

DISC_PIXELS = 112  # PS-ViT's discs are drawn on a grid of so many cells along each side


class BlockView(NamedTuple):
    """What one ATS block did to a batch of B samples.

    Attributes:
        block: index in the network.
        num_kept: [B] int64, tokens it kept of each sample, CLS not counted.
        num_tokens: how many there would be with nothing dropped.
        kept: [B, T, h, w] bool, the cells of the picture that are still there.
        scores: [B, T, h', w'] float32, the significance of what it could choose from; sums to 1 over a sequence, and is
            NaN where there was nothing any more, and everywhere in a block that merges tokens instead of scoring them.

    Of one sample (`sample`) they have no axis B.
    """

    block: int
    num_kept: Tensor
    num_tokens: int
    kept: Tensor
    scores: Tensor

    def sample(self, index: int) -> BlockView:
        """The view of one sample of the batch."""
        return self._replace(num_kept=self.num_kept[index], kept=self.kept[index], scores=self.scores[index])


class Grids(NamedTuple):
    """Grids (T, h, w) of a block's output tokens and of the cells it scores, for one sequence; with `time_last` tokens
    are in the order (h, w, T).
    """

    tokens: Grid
    cells: Grid
    time_last: bool = False


@torch.no_grad()
def look(model: nn.Module, x: Tensor) -> tuple[Tensor, list[KeptTokens], list[BlockView]]:
    """Run a network on a batch and see what its ATS blocks do.

    Args:
        x: images [B, 3, H, W] or clips [B, 3, T, H, W].

    Returns:
        Logits and trace of `model.forward_tokens`, and a view of every entry of the trace, on the CPU.

    Raises:
        UserError: it is not known where the tokens of such a network lie.
    """
    grids = token_grids(model, tuple(x.shape))
    with recorded_candidates(model) as seen, recorded_points(model) as points:
        logits, trace = model.forward_tokens(x)
    return logits, trace, [_view(entry, seen.get(entry.block), grids[entry.block], len(x), points) for entry in trace]


def _view(
    entry: KeptTokens, candidates: Candidates | None, grids: Grids, batch_size: int, points: list[PointMap]
) -> BlockView:
    num_sequences = len(entry.num_tokens)
    num_tokens, num_cells = (torch.Size(grid).numel() for grid in (grids.tokens, grids.cells))
    kept = torch.zeros(num_sequences, num_tokens, dtype=torch.bool)
    for row, patches in zip(kept, entry.patches, strict=True):
        row[patches.cpu()] = True

    scores = torch.full((num_sequences, num_cells), torch.nan)
    if candidates is not None:
        shares = _shares(candidates, entry.num_prefix_tokens, num_cells)
        # With ATS.SHARE_FRAMES the frames of a clip are scored as one.
        scores = shares.repeat_interleave(num_sequences // len(shares), dim=0)

    if points:
        kept, scores = points[-1].draw(kept, False), points[-1].draw(scores, torch.nan)
    else:
        kept, scores = _on_grid(kept, grids.tokens, grids), _on_grid(scores, grids.cells, grids)
        kept, scores = (t.reshape(batch_size, -1, *t.shape[-2:]) for t in (kept, scores))
    num_kept = (entry.num_tokens.cpu() - entry.num_prefix_tokens).reshape(batch_size, -1).sum(dim=1)
    return BlockView(entry.block, num_kept, num_tokens * num_sequences // batch_size, kept, scores)


def _shares(candidates: Candidates, num_prefix_tokens: int, num_cells: int) -> Tensor:
    """[S, n] each cell's share of its sequence's significance, NaN where there was nothing to score."""
    valid, position = candidates.valid.cpu(), candidates.position.cpu() - num_prefix_tokens
    weight = usable(candidates.scores, candidates.valid).float()
    weight = (weight / weight.sum(dim=1, keepdim=True)).cpu()
    shares = torch.full((len(weight), num_cells), torch.nan)
    sequence = torch.arange(len(weight))[:, None].expand_as(position)
    shares[sequence[valid], position[valid]] = weight[valid]
    return shares


def _on_grid(values: Tensor, grid: Grid, grids: Grids) -> Tensor:
    """[S, n] -> [S, T, h, w]."""
    if not grids.time_last:
        return values.reshape(-1, *grid)
    num_frames, height, width = grid
    return values.reshape(-1, height, width, num_frames).movedim(-1, 1)


# ---- scores


@dataclass(frozen=True)
class RecordingSampler(BlockSampler):
    """A BlockSampler that leaves what it is asked about in `seen`, by block."""

    seen: dict[int, Candidates] = field(default_factory=dict)

    def __call__(self, candidates: Candidates, *, slots: int, num_prefix_tokens: int) -> Tensor:
        """As a BlockSampler."""
        self.seen[self.block] = candidates
        return super().__call__(candidates, slots=slots, num_prefix_tokens=num_prefix_tokens)


@contextmanager
def recorded_candidates(model: nn.Module) -> Iterator[dict[int, Candidates]]:
    """Within it the dictionary gets, for every ATS block, what that block scored in the last batch."""
    seen: dict[int, Candidates] = {}
    samplers = {m: m.sampler for m in model.modules() if isinstance(getattr(m, "sampler", None), BlockSampler)}
    try:
        for module, sampler in samplers.items():
            settings = {f.name: getattr(sampler, f.name) for f in fields(BlockSampler)}
            module.sampler = RecordingSampler(**settings, seen=seen)
        yield seen
    finally:
        for module, sampler in samplers.items():
            module.sampler = sampler


# ---- where tokens lie


@singledispatch
def token_grids(model: nn.Module, input_shape: tuple[int, ...]) -> dict[int, Grids]:
    """For every block that may sample the grids of its tokens.

    Args:
        input_shape: of the batch.

    Raises:
        UserError: the class of the network is not known here.
    """
    raise UserError(
        f"It is not known where the tokens of a {type(model).__name__} lie in the picture: "
        "register a function for it with ats.visualize.grids.token_grids.register."
    )


@token_grids.register
def _(model: VisionTransformer, input_shape: tuple[int, ...]) -> dict[int, Grids]:
    grid = (1, *(side // model.patch_size for side in input_shape[-2:]))
    return dict.fromkeys(range(len(model.blocks)), Grids(grid, grid))


@token_grids.register
def _(model: XViT, input_shape: tuple[int, ...]) -> dict[int, Grids]:
    return token_grids(model.base_model, input_shape)


@token_grids.register
def _(model: TimeSformer, input_shape: tuple[int, ...]) -> dict[int, Grids]:
    num_frames = input_shape[2] if model.attention_type == "joint_space_time" else 1  # of a sequence
    grid = (num_frames, *(side // model.patch_size for side in input_shape[-2:]))
    return dict.fromkeys(range(len(model.blocks)), Grids(grid, grid, time_last=num_frames > 1))


@token_grids.register
def _(model: ATSModel, input_shape: tuple[int, ...]) -> dict[int, Grids]:
    grid = (1, *model.patch_embed.dynamic_feat_size(tuple(input_shape[-2:])))
    return dict.fromkeys(range(len(model.blocks)), Grids(grid, grid))


@token_grids.register
def _(model: MViT, input_shape: tuple[int, ...]) -> dict[int, Grids]:
    grid: Grid = (1, *conv_grid(list(input_shape[2:]), model.patch_embed.proj))[-3:]
    grids = {}
    for index, block in enumerate(model.blocks):
        grids[index] = Grids(block.spec.query_grid(grid), block.spec.key_grid(grid))
        grid = grids[index].tokens
    return grids


@token_grids.register
def _(model: CvT, input_shape: tuple[int, ...]) -> dict[int, Grids]:
    grids, grid = {}, list(input_shape[-2:])
    for stage in model.stages:
        grid = conv_grid(grid, stage.patch_embed.proj)
        for block in stage.blocks:
            stride = getattr(block, "key_stride", (1, 1, 1))
            grids[len(grids)] = Grids((1, *grid), divide((1, *grid), stride))
    return grids


@token_grids.register
def _(model: PSViT, input_shape: tuple[int, ...]) -> dict[int, Grids]:
    line = (1, 1, model.num_points[0] * model.num_points[1])  # in no order that means a place
    return dict.fromkeys(range(model.num_iters, model.num_iters + len(model.trans_layers)), Grids(line, line))


class PointMap:
    """Which of PS-ViT's points each cell of a square grid belongs to, if it is near one.

    Args:
        points: [B, P, 2], y and x, from 0 to 1. radius: of the discs.
    """

    def __init__(self, points: Tensor, radius: float) -> None:
        centre = (torch.arange(DISC_PIXELS) + 0.5) / DISC_PIXELS
        cells = torch.cartesian_prod(centre, centre)  # y, x
        distance, self.nearest = torch.cdist(cells.expand(len(points), -1, -1), points.cpu().float()).min(dim=2)
        self.is_near = distance <= radius

    def draw(self, values: Tensor, elsewhere: float | bool) -> Tensor:
        """Values [B, P] of the points -> [B, 1, h, w]."""
        drawn = torch.where(self.is_near, values.gather(1, self.nearest), elsewhere)
        return drawn.reshape(len(values), 1, DISC_PIXELS, DISC_PIXELS)


@contextmanager
def recorded_points(model: nn.Module) -> Iterator[list[PointMap]]:
    """Within it the list gets PS-ViT's points, of every batch, where they are sampled for the last time."""
    maps: list[PointMap] = []
    if not isinstance(model, PSViT):
        yield maps
        return
    radius = 0.5 / max(model.num_points)

    def record(_module: nn.Module, _args: tuple, out: tuple[Tensor, Tensor | None, Tensor]) -> None:
        maps.append(PointMap(out[2] / model.feature_size, radius))

    handle = model.ps_layers[-1].register_forward_hook(record)
    try:
        yield maps
    finally:
        handle.remove()
