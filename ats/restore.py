"""A feature for every patch, including dropped and merged ones. Their positions hold:

* `zero`: zeros.
* `last`: the value the token had when it was dropped or merged.
* `nearest`: the final value of the token that stands for it. For a merged token, that is the one it was merged into.
  For a dropped token, it is the one with the nearest key (cosine, all heads as one vector) among those its block kept.

Restoring leaves the remaining tokens unchanged, and GFLOPs do not count it.

Shapes: S sequences, N original positions, T rows of all sequences together, M rows of the longest, C channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ats.errors import UserError, suggest
from ats.reduction import Reduction, Step
from ats.reduction.merging import nearest_among
from ats.tokens import RaggedTokens

RESTORES = ("zero", "last", "nearest")


def check_restore(value: object) -> None:
    """Raise a UserError unless `value` is in RESTORES."""
    if value not in RESTORES:
        raise UserError(f"restore {value!r}: choose from {', '.join(RESTORES)}.{suggest(str(value), RESTORES)}")


@dataclass(frozen=True)
class Places:
    """What stands for each original position: `RaggedTokens.places`, with `last` and `nearest`."""

    row: Tensor  # [S * N] int64, a row of x; -1: none is left (only with `last`)
    gone: Tensor | None = None  # [S * N, C], with `last`: the values of tokens that are gone

    @classmethod
    def begin(cls, tokens: RaggedTokens, restore: str) -> RaggedTokens:
        """Set the places of complete `tokens`, unless `restore` is zero. Returns `tokens`."""
        if restore != "zero":
            row = torch.arange(tokens.layout.total, device=tokens.x.device)
            tokens.places = cls(row, torch.zeros_like(tokens.x) if restore == "last" else None)
        return tokens

    def after(self, step: Step, out: RaggedTokens, reduction: Reduction | None) -> Places:
        """The places after a block that returned `out`."""
        if reduction is None:
            return self  # all rows stay where they are
        if self.gone is None:
            return Places(_taken_by(step, out, reduction)[self.row])
        behind = reduction.after_attention and step.index is None  # then `kept` is all tokens, after attention
        row = torch.where(out.row_at_position < out.layout.total, out.row_at_position, -1)
        goes = (self.row >= 0) & (row < 0)
        value = (step.kept if behind else step.tokens).x.index_select(0, self.row.clamp_min(0))
        return Places(row, torch.where(goes[:, None], value, self.gone))


def restored(tokens: RaggedTokens, norm: Callable[[Tensor], Tensor] = lambda x: x) -> Tensor:
    """[S, N, C], a feature for every original position.

    Args:
        norm: pointwise, applied to the tokens and to the values kept by `last`.
    """
    places, x = tokens.places, norm(tokens.x)
    if places is None:
        return tokens.to_grid(x)
    dense = x.index_select(0, places.row.clamp_min(0))
    if places.gone is not None:
        dense = torch.where(places.row[:, None] >= 0, dense, norm(places.gone).to(dense.dtype))
    return dense.unflatten(0, (tokens.layout.num_sequences, tokens.num_positions))


def _taken_by(step: Step, out: RaggedTokens, reduction: Reduction) -> Tensor:
    """[T] the row of `out` that stands for each token of the block's input; arbitrary for padding."""
    layout = step.tokens.layout
    merged = reduction.merges and not (reduction.after_attention and out is step.kept)  # else it had nothing to merge
    if merged and step.taken_by is None:
        raise UserError(
            f"restore nearest: {reduction.name} merges tokens but does not say where they went. Its `merge` must set "
            "step.taken_by, see docs/EXTENDING.md. restore last works without it."
        )
    if merged and not reduction.after_attention:
        taken_by = step.taken_by
    else:
        taken_by = torch.arange(layout.total, device=layout.lengths.device)
        if step.index is not None:
            kept = step.kept.layout
            rows = torch.arange(kept.total, device=taken_by.device)
            rows = rows if kept.full else torch.where(kept.mask.flatten(), rows, -1)
            taken_by = torch.full_like(taken_by, -1).index_copy(0, step.index, rows)
        if merged:
            taken_by = torch.where(taken_by >= 0, step.taken_by[taken_by], -1)
    if not reduction.drops:
        return taken_by
    nearest = nearest_among(step.k, layout, layout.pad(taken_by) >= 0, step.tokens.num_prefix_tokens)
    return torch.where(taken_by >= 0, taken_by, taken_by[nearest])
