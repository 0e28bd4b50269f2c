"""X-ViT's shift of keys and values in time, on dense frames and on packed tokens.

The shift reads the same patch in the next and in the previous frame. Behind an ATS block such a neighbour may be gone;
then its channels are zeros, as the network knows them from the ends of a segment.

Shapes: B clips, T frames, N = 1 + grid tokens of a frame, C channels, R packed tokens of all frames, H heads of D
channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Attention
from torch import Tensor, nn

from ats.models.block import ATSBlock
from ats.tokens import RaggedTokens


def shift_frames(x: Tensor, *, group: int, fold: int) -> Tensor:
    """The shift in time of dense frames [B*T, N, C] within segments of `group` frames.

    Channels 0 .. fold - 1 come from the same token of the next frame, the following `fold` from the previous one, the
    rest stays; zeros where a segment has no such frame. Channels count through the heads: c = head * D + d.
    """
    following, preceding, own = x.unflatten(0, (-1, group)).tensor_split([fold, 2 * fold], dim=-1)
    following = torch.cat([following[:, 1:], torch.zeros_like(following[:, :1])], dim=1)
    preceding = torch.cat([torch.zeros_like(preceding[:, :1]), preceding[:, :-1]], dim=1)
    return torch.cat([following, preceding, own], dim=-1).flatten(0, 1)


def neighbours(tokens: RaggedTokens) -> tuple[Tensor, Tensor]:
    """Where in the packed tensor the same patch of the next and of the previous frame lies, each [R]; R, one past the
    end, where there is none.
    """
    place = tokens.grid_index
    table = tokens.row_at_position.reshape(-1, tokens.group, tokens.num_positions)
    nothing = torch.full_like(table[:, :1], len(place))
    following = torch.cat([table[:, 1:], nothing], dim=1).flatten()
    preceding = torch.cat([nothing, table[:, :-1]], dim=1).flatten()
    return following[place], preceding[place]


def shift_tokens(x: Tensor, following: Tensor, preceding: Tensor, *, fold: int) -> Tensor:
    """`shift_frames` of packed tokens [R, C] with the indices of `neighbours`: what scattering them to the grid with
    zeros, shifting and gathering would give, but only the shifted channels are moved.
    """
    shifted = F.pad(x[:, : 2 * fold], (0, 0, 0, 1))  # row R: no neighbour
    return torch.cat(
        [
            shifted[:, :fold].index_select(0, following),
            shifted[:, fold:].index_select(0, preceding),
            x[:, 2 * fold :],
        ],
        dim=1,
    )


class ShiftedAttention(nn.Module):
    """timm's Attention with keys and values shifted in time; takes over the children of `host`.

    Args:
        group: frames of a segment. fold: channels from the next frame, and as many from the previous one.
    """

    def __init__(self, host: Attention, *, group: int, fold: int) -> None:
        super().__init__()
        for name, child in host.named_children():
            self.add_module(name, child)
        self.num_heads, self.scale = host.num_heads, host.scale
        self.group, self.fold = group, fold

    def forward(self, x: Tensor, attn_mask: None = None, is_causal: bool = False) -> Tensor:
        """Dense frames [B*T, N, C] -> [B*T, N, C]; the other two arguments are timm's and not used."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        k, v = (shift_frames(t, group=self.group, fold=self.fold) for t in (k, v))
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
        dropout_p = self.attn_drop.p if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, scale=self.scale)
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))


class ShiftedATSBlock(ATSBlock):
    """An ATSBlock on frames; keys and values are shifted in time where the host's are."""

    def project_kv(self, x: Tensor, tokens: RaggedTokens) -> tuple[Tensor, Tensor]:
        """Keys and values, each [R, H, D], after the shift: the values that score a token are those it contributes."""
        k, v = super().project_kv(x, tokens)
        if not isinstance(self.attn, ShiftedAttention):
            return k, v
        following, preceding = neighbours(tokens)
        return tuple(shift_tokens(t.flatten(1), following, preceding, fold=self.attn.fold).view_as(t) for t in (k, v))
