"""Vision Transformer / DeiT (Touvron et al., ICML 2021) with adaptive token sampling.

Names, shapes and numbers are timm's and DeiT's, so their checkpoints load unchanged. Dense blocks are timm's; the first
block with a reduction and all later blocks are ATSBlocks (`block.py`).

Shapes: B images, N = P + grid tokens, P prefix tokens (CLS; with distillation CLS and DIST), C channels.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from fvcore.common.config import CfgNode
from timm.layers import PatchEmbed, build_sincos2d_pos_embed, resample_abs_pos_embed, trunc_normal_
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from ats.errors import UserError
from ats.models.backbone import Backbone, Records, init_linears, reductions_from_cfg, settings
from ats.models.cost import BlockGrid, conv_multiply_adds, linear_multiply_adds
from ats.reduction import Reduction
from ats.restore import check_restore, restored
from ats.tokens import LAYOUTS, KeptTokens, RaggedTokens

logger = logging.getLogger(__name__)


def clip_to_frames(x: Tensor) -> Tensor:
    """Clips [B, 3, T, H, W] as images [B*T, 3, H, W], clip by clip. Raises a UserError for other shapes."""
    if x.ndim != 5 or x.shape[1] != 3:
        raise UserError(f"Video networks take clips [B, 3, T, H, W], not a tensor {tuple(x.shape)}.")
    return x.transpose(1, 2).flatten(0, 1)


class VisionTransformer(Backbone):
    """ViT / DeiT.

    Args:
        img_size: height and width of the position embedding; images of another size resize it (bicubic) on the fly.
        distilled: a second prefix token with its own head; the output is the mean of the two heads' logits.
        weight_init: "deit" or "big_vision", see `init_weights`.
        blocks: other arguments of `vit_blocks`.
    """

    head: nn.Module
    head_drop: nn.Module
    layouts = LAYOUTS
    resize_mode = ""  # how positions are resized, for F.interpolate; "": as in timm

    def __init__(
        self,
        *,
        img_size: tuple[int, int] = (224, 224),
        patch_size: int = 16,
        num_classes: int = 1000,
        embed_dim: int = 768,
        depth: int = 12,
        distilled: bool = False,
        head_drop_rate: float = 0.0,
        drop_rate: float = 0.0,
        weight_init: str = "deit",
        reductions: dict[int, Reduction] | None = None,
        **blocks: Any,
    ) -> None:
        super().__init__()
        self.num_classes, self.embed_dim, self.patch_size = num_classes, embed_dim, patch_size
        self.grid_size = (img_size[0] // patch_size, img_size[1] // patch_size)
        self.num_prefix_tokens = 2 if distilled else 1

        self.patch_embed = PatchEmbed(None, patch_size, embed_dim=embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.dist_token = nn.Parameter(torch.zeros(1, 1, embed_dim)) if distilled else None
        num_positions = self.num_prefix_tokens + self.grid_size[0] * self.grid_size[1]
        self.pos_embed = nn.Parameter(torch.zeros(1, num_positions, embed_dim))
        self.pos_drop = nn.Dropout(drop_rate)
        self.blocks = nn.ModuleList(vit_blocks(depth, embed_dim, eps=1e-6, drop_rate=drop_rate, **blocks))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.head_drop = nn.Dropout(head_drop_rate)
        self.head = nn.Linear(embed_dim, num_classes)
        self.head_dist = nn.Linear(embed_dim, num_classes) if distilled else None
        self.init_weights(weight_init)
        self.reduce_blocks(reductions)

    def init_weights(self, scheme: str) -> None:
        """Fresh weights: "deit" is a truncated normal of standard deviation 0.02, "big_vision" Xavier with sine-cosine
        positions (Beyer et al., 2022; here they are trained further).

        0.02 suits widths of several hundred; a network of width 64 hardly learns from it.
        """
        for parameter in (self.pos_embed, self.cls_token, self.dist_token):
            if parameter is not None:
                trunc_normal_(parameter, std=0.02)
        if scheme == "big_vision":
            init_linears(self, nn.init.xavier_uniform_)
            nn.init.zeros_(self.head.weight)
            positions = build_sincos2d_pos_embed(self.grid_size, self.embed_dim, temperature=100.0)
            self.pos_embed.data[0, self.num_prefix_tokens :] = positions.reshape(-1, self.embed_dim)
        else:
            init_linears(self)

    def run(self, x: Tensor) -> tuple[Tensor, Records]:
        tokens = self.encode(x)
        return self.classify(self.norm(tokens.prefix())), tokens.trace

    def encode(self, x: Tensor, *, restore: str = "zero") -> RaggedTokens:
        """Images or clips -> the kept tokens, before the final norm."""
        return self.run_blocks(self.embed(x), restore=restore)

    def forward_features(self, x: Tensor, *, restore: str = "zero") -> Tensor:
        """[S, N, C] normalised features of all tokens; sequences are images, or the frames of clips in order.

        Args:
            restore: values of dropped and merged tokens: zero, last or nearest, see `ats/restore.py`.
        """
        check_restore(restore)
        with self.fastest_kernels(x):
            return restored(self.encode(x, restore=restore), self.norm)

    def embed(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] -> tokens with positions [B, N, C]."""
        height, width = x.shape[-2:]
        if height % self.patch_size or width % self.patch_size:
            raise UserError(f"Images of {height} x {width} pixels cannot be cut into patches of {self.patch_size}.")
        patches = self.patch_embed(x)
        prefix = [self.cls_token] if self.dist_token is None else [self.cls_token, self.dist_token]
        tokens = torch.cat([*(token.expand(x.shape[0], -1, -1) for token in prefix), patches], dim=1)
        return self.pos_drop(tokens + self.positions((height // self.patch_size, width // self.patch_size)))

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """The position embedding [1, N, C] for a grid of patches."""
        return self.pos_embed if grid == self.grid_size else self.resize_positions(self.pos_embed, grid, self.grid_size)

    def resize_positions(self, pos_embed: Tensor, grid: tuple[int, int], old_grid: tuple[int, int]) -> Tensor:
        """A position embedding [1, P + old grid, C] resized to another grid, as the release resizes it."""
        num_prefix = self.num_prefix_tokens
        if not self.resize_mode:
            return resample_abs_pos_embed(pos_embed, list(grid), list(old_grid), num_prefix_tokens=num_prefix)
        patches = pos_embed[:, num_prefix:].unflatten(1, old_grid).permute(0, 3, 1, 2)
        patches = F.interpolate(patches, size=grid, mode=self.resize_mode)
        return torch.cat([pos_embed[:, :num_prefix], patches.flatten(2).transpose(1, 2)], dim=1)

    def classify(self, prefix: Tensor) -> Tensor:
        """Normalised prefix tokens [B, P, C] -> logits."""
        logits = self.head(self.head_drop(prefix[:, 0]))
        if self.head_dist is None:
            return logits
        return (logits + self.head_dist(self.head_drop(prefix[:, 1]))) / 2

    def adapt_state_dict(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A release's weights for this model: without the official ATS code's constant masks, positions resized."""
        state = {key: value for key, value in state.items() if not key.endswith("attn.out_zero_mask")}
        pos_embed = state.get("pos_embed")
        if pos_embed is not None and pos_embed.ndim == 3 and pos_embed.shape != self.pos_embed.shape:
            num_old = pos_embed.shape[1] - self.num_prefix_tokens
            if math.isqrt(max(num_old, 0)) ** 2 == num_old > 0 and pos_embed.shape[2] == self.embed_dim:
                logger.info("Position embedding resized from %d patches to %s.", num_old, self.grid_size)
                side = math.isqrt(num_old)
                state["pos_embed"] = self.resize_positions(pos_embed, self.grid_size, (side, side))
        return state

    def patch_grid(self, input_shape: Sequence[int]) -> tuple[int, int]:
        """Patches along height and width of images or clips of this shape."""
        return input_shape[-2] // self.patch_size, input_shape[-1] // self.patch_size

    def block_grids(self, input_shape: Sequence[int]) -> list[BlockGrid]:
        return [BlockGrid.of(1, *self.patch_grid(input_shape))] * len(self.blocks)

    def stem_multiply_adds(self, trace: Sequence[KeptTokens], input_shape: Sequence[int]) -> float:
        """Embedding and heads of one image or frame."""
        height, width = self.patch_grid(input_shape)
        heads = [head for head in (self.head, self.head_dist) if isinstance(head, nn.Linear)]
        return conv_multiply_adds(self.patch_embed.proj, height * width) + sum(map(linear_multiply_adds, heads))


def vit_blocks(
    depth: int,
    dim: int,
    *,
    num_heads: int = 12,
    mlp_ratio: float = 4.0,
    qkv_bias: bool = True,
    drop_rate: float = 0.0,
    attn_drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
    eps: float = 1e-5,
) -> list[Block]:
    """timm's blocks; stochastic depth grows from 0 in the first to `drop_path_rate` in the last."""
    options: dict[str, Any] = {"qkv_bias": qkv_bias, "proj_drop": drop_rate, "attn_drop": attn_drop_rate}
    options["norm_layer"] = partial(nn.LayerNorm, eps=eps)
    rates = (drop_path_rate * index / max(depth - 1, 1) for index in range(depth))
    return [Block(dim, num_heads, mlp_ratio, drop_path=rate, **options) for rate in rates]


def vit_settings_from_cfg(cfg: CfgNode) -> dict:
    """The VIT keys, for any network of ViT blocks, as arguments of `VisionTransformer`. Raises a UserError for keys
    that do not fit together.
    """
    vit = cfg.VIT
    if vit.DISTILLED and cfg.MODEL.NAME != "ViT":
        raise UserError(f"VIT.DISTILLED True: MODEL.NAME {cfg.MODEL.NAME} has no distillation token; set it to False.")
    img_size = tuple(vit.IMG_SIZE) if isinstance(vit.IMG_SIZE, list) else (vit.IMG_SIZE, vit.IMG_SIZE)
    if any(side % vit.PATCH_SIZE for side in img_size):
        raise UserError(f"VIT.IMG_SIZE {vit.IMG_SIZE} is not a multiple of VIT.PATCH_SIZE {vit.PATCH_SIZE}.")
    if vit.EMBED_DIM % vit.NUM_HEADS:
        raise UserError(f"VIT.EMBED_DIM {vit.EMBED_DIM} is not a multiple of VIT.NUM_HEADS {vit.NUM_HEADS}.")
    names = ("patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "qkv_bias", "drop_rate", "attn_drop_rate")
    return {
        "img_size": img_size,
        "num_classes": cfg.MODEL.NUM_CLASSES,
        "head_drop_rate": cfg.MODEL.DROPOUT_RATE,
        **settings(vit, *names, "drop_path_rate", "weight_init"),
    }


def vit_from_cfg(cfg: CfgNode) -> VisionTransformer:
    """MODEL.NAME ViT, described by the VIT and ATS keys."""
    num_prefix = 2 if cfg.VIT.DISTILLED else 1
    reductions = reductions_from_cfg(cfg, depth=cfg.VIT.DEPTH, num_prefix_tokens=num_prefix)
    return VisionTransformer(**vit_settings_from_cfg(cfg), distilled=cfg.VIT.DISTILLED, reductions=reductions)
