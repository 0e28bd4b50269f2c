"""Rotary position embedding for packed tokens."""

from __future__ import annotations

import torch
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from torch import Tensor

from ats.tokens import RaggedTokens

NO_FUSE = "its blocks look up positions, but a fused token has none"


def rotary_table(rope: Tensor, num_prefix_tokens: int) -> Tensor:
    """Sine and cosine of patches, [n, 2D] or [H, n, 2D], as [P + n, 1 or H, 2D]; prefix tokens are not rotated (sine 0,
    cosine 1).
    """
    table = rope[:, None] if rope.ndim == 2 else rope.transpose(0, 1)
    prefix = torch.zeros_like(table[:1]).expand(num_prefix_tokens, -1, -1).clone()
    prefix[..., table.shape[-1] // 2 :] = 1
    return torch.cat([prefix, table])


def rotated(x: Tensor, tokens: RaggedTokens | None, *, half: bool) -> Tensor:
    """Queries or keys [T, h, D], rotated by their tokens' positions. `tokens` None: CLS, which is not rotated.

    Args:
        half: pair a channel with the one D / 2 away, not with its neighbour.
    """
    if tokens is None or tokens.rotary is None:
        return x
    return apply_rot_embed_cat(x, tokens.rotary.index_select(0, tokens.lookup()), half=half).type_as(x)
