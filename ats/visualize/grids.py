"""What the ATS blocks of a network scored and kept, laid over its input: `look(model, x)`.

The trace says what each block did; the network says where its tokens lie (`block_grids`, `token_places`).
Patches and pooled cells are cells of a grid. PS-ViT's tokens are points that move with the image: each is drawn as a
disc.

Shapes: B samples, S sequences (images, clips, or the frames of clips), T frames, h x w cells.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ats.errors import UserError
from ats.models.backbone import HasBlocks
from ats.models.block import ats_blocks
from ats.models.cost import BlockGrid, Grid, size
from ats.reduction import Candidates
from ats.reduction.scores import usable
from ats.tokens import BlockRecord, Trace

DISC_PIXELS = 112  # points are drawn on a grid of this many cells along each side


class BlockView(NamedTuple):
    """What one ATS block did to a batch of B samples. The view of one sample (`sample`) has no axis B."""

    block: int  # index in the network
    num_kept: Tensor  # [B] int64, tokens it kept of each sample, CLS not counted
    num_tokens: int  # how many there would be with nothing dropped
    kept: Tensor  # [B, T, h, w] bool, the cells of the picture that are left
    # [B, T, h', w'] float32, the significance of the tokens it chose from; sums to 1 over a sequence. NaN where an
    # earlier block dropped the token, and everywhere in a block that does not score.
    scores: Tensor
    # [B, T, h, w] int64, equal where one token stands for the cells; None where tokens were dropped, not merged.
    groups: Tensor | None = None

    def sample(self, index: int | slice) -> BlockView:
        """The view of one sample of the batch, or of several."""
        return self._replace(
            num_kept=self.num_kept[index],
            kept=self.kept[index],
            scores=self.scores[index],
            groups=None if self.groups is None else self.groups[index],
        )


@torch.no_grad()
def look(model: nn.Module, x: Tensor) -> tuple[Tensor, Trace, list[BlockView]]:
    """Run a network of `ats.models`, or a patched one, on images [B, 3, H, W] or clips [B, 3, T, H, W].

    Returns:
        Logits and trace of `model.forward_tokens`, and a view of every entry of the trace, on the CPU.

    Raises:
        UserError: the network does not say where its tokens lie.
    """
    if not isinstance(model, HasBlocks):
        raise UserError(
            f"Cannot tell where the tokens of a {type(model).__name__} lie in the picture: derive it from "
            "ats.models.backbone.Backbone and give it block_grids (docs/EXTENDING.md)."
        )
    blocks = ats_blocks(model)
    merges = all(block.reduction.merges and not block.reduction.drops for block in blocks)
    for block in blocks:
        block.record_scores, block.record_places = True, merges
    try:
        logits, trace = model.forward_tokens(x)
    finally:
        for block in blocks:
            del block.record_scores, block.record_places
    grids, places = model.block_grids(tuple(x.shape)), model.token_places(tuple(x.shape))
    records = [record for record in trace.records if record.kept is not None]
    return logits, trace, [_view(record, grids[record.block], len(x), places) for record in records]


def _view(record: BlockRecord, grid: BlockGrid, batch_size: int, points: Tensor | None) -> BlockView:
    entry, num_sequences, num_tokens = record.kept, len(record.kept.num_tokens), size(grid.queries)
    kept = torch.zeros(num_sequences, num_tokens, dtype=torch.bool)
    for row, patches in zip(kept, entry.patches, strict=True):
        row[patches.cpu()] = True

    scores = torch.full((num_sequences, size(grid.keys)), torch.nan)
    if record.candidates is not None:
        shares = _shares(record.candidates, entry.num_prefix_tokens, size(grid.keys))
        # With ATS.SHARE_FRAMES the frames of a clip share their scores.
        scores = shares.repeat_interleave(num_sequences // len(shares), dim=0)

    groups = None
    if points is not None:
        kept, scores = draw_points(points, kept, False), draw_points(points, scores, torch.nan)
    else:
        if record.places is not None:
            groups = record.places.row.cpu().reshape(num_sequences, -1)[:, entry.num_prefix_tokens :]
            groups = _on_grid(groups, grid.queries, grid)
            groups = groups.reshape(batch_size, -1, *groups.shape[-2:])
        kept, scores = _on_grid(kept, grid.queries, grid), _on_grid(scores, grid.keys, grid)
        kept, scores = (t.reshape(batch_size, -1, *t.shape[-2:]) for t in (kept, scores))
    num_kept = (entry.num_tokens.cpu() - entry.num_prefix_tokens).reshape(batch_size, -1).sum(dim=1)
    return BlockView(entry.block, num_kept, num_tokens * num_sequences // batch_size, kept, scores, groups)


def _shares(candidates: Candidates, num_prefix_tokens: int, num_cells: int) -> Tensor:
    """[S, n] each cell's share of its sequence's significance, NaN where there was nothing to score."""
    position = candidates.position.cpu() - num_prefix_tokens
    present = candidates.valid.cpu() & (position >= 0)  # a fused token has no position
    weight = usable(candidates.scores, candidates.valid).float()
    weight = (weight / weight.sum(dim=1, keepdim=True)).cpu()
    shares = torch.full((len(weight), num_cells), torch.nan)
    sequence = torch.arange(len(weight))[:, None].expand_as(position)
    shares[sequence[present], position[present]] = weight[present]
    return shares


def _on_grid(values: Tensor, shape: Grid, grid: BlockGrid) -> Tensor:
    """[S, n] -> [S, T, h, w]."""
    if not grid.time_last:
        return values.reshape(-1, *shape)
    num_frames, height, width = shape
    return values.reshape(-1, height, width, num_frames).movedim(-1, 1)


def draw_points(points: Tensor, values: Tensor, elsewhere: float | bool) -> Tensor:
    """Values [B, P] of points [B, P, 2] (y and x, 0 to 1) as discs on a square grid [B, 1, h, w]; cells that are near
    no point are `elsewhere`.
    """
    centre = (torch.arange(DISC_PIXELS) + 0.5) / DISC_PIXELS
    cells = torch.cartesian_prod(centre, centre)  # y, x
    distance, nearest = torch.cdist(cells.expand(len(points), -1, -1), points.cpu().float()).min(dim=2)
    is_near = distance <= 0.5 / points.shape[1] ** 0.5
    drawn = torch.where(is_near, values.gather(1, nearest), elsewhere)
    return drawn.reshape(len(values), 1, DISC_PIXELS, DISC_PIXELS)
