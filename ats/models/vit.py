"""Vision Transformer / DeiT (Touvron et al., ICML 2021) with adaptive token sampling.

Names, shapes and numbers are timm's and DeiT's, so their checkpoints load as they are. The dense blocks are timm's own;
ATS takes over from the first sampling block on (`ats_block.py`).

Shapes: B images, N = P + grid tokens, P prefix tokens (CLS; with distillation CLS and DIST), C channels.
"""

from __future__ import annotations

import logging
import math
from functools import partial

import torch
from fvcore.common.config import CfgNode
from timm.layers import build_sincos2d_pos_embed, resample_abs_pos_embed, trunc_normal_
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from ats.errors import UserError
from ats.models.block import insert_ats, run_blocks, samplers_from_cfg
from ats.models.cost import blocks_multiply_adds, conv_multiply_adds, linear_multiply_adds
from ats.reduction.sampling import BlockSampler
from ats.tokens import KeptTokens

logger = logging.getLogger(__name__)


class PatchEmbed(nn.Module):
    """Non-overlapping patches of an image as tokens [B, grid, C], row major."""

    def __init__(self, patch_size: int, embed_dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, grid, C]."""
        return self.proj(x).flatten(2).transpose(1, 2)


def clip_to_frames(x: Tensor) -> Tensor:
    """Clips [B, 3, T, H, W] as images [B*T, 3, H, W], the frames of a clip one after the other.

    Raises:
        UserError: x is something else.
    """
    if x.ndim != 5 or x.shape[1] != 3:
        raise UserError(f"Video networks take clips [B, 3, T, H, W], not a tensor {tuple(x.shape)}.")
    return x.transpose(1, 2).flatten(0, 1)


class VisionTransformer(nn.Module):
    """ViT / DeiT.

    Attributes:
        head_keys: prefixes of the classifier's keys, which TRAIN.RESET_HEAD leaves fresh.

    Args:
        img_size: height and width the position embedding belongs to; other sizes resize it (bicubic) as they come.
        distilled: a second prefix token with its own head; the two heads' logits are averaged.
        weight_init: "deit" or "big_vision", see `init_weights`.
        samplers: block -> what it keeps; empty for the dense network.
        layout: how the tokens that are left lie in memory, a name in `tokens.LAYOUTS`.
    """

    head_keys: tuple[str, ...] = ("head",)

    def __init__(
        self,
        *,
        img_size: tuple[int, int] = (224, 224),
        patch_size: int = 16,
        num_classes: int = 1000,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        distilled: bool = False,
        head_drop_rate: float = 0.0,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        weight_init: str = "deit",
        samplers: dict[int, BlockSampler] | None = None,
        layout: str = "packed",
    ) -> None:
        super().__init__()
        self.layout = layout
        self.num_classes, self.embed_dim, self.patch_size = num_classes, embed_dim, patch_size
        self.grid_size = (img_size[0] // patch_size, img_size[1] // patch_size)
        self.num_prefix_tokens = 2 if distilled else 1

        self.patch_embed = PatchEmbed(patch_size, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.dist_token = nn.Parameter(torch.zeros(1, 1, embed_dim)) if distilled else None
        num_positions = self.num_prefix_tokens + self.grid_size[0] * self.grid_size[1]
        self.pos_embed = nn.Parameter(torch.zeros(1, num_positions, embed_dim))
        self.pos_drop = nn.Dropout(drop_rate)
        self.blocks = nn.ModuleList(
            Block(
                embed_dim,
                num_heads,
                mlp_ratio,
                qkv_bias=qkv_bias,
                proj_drop=drop_rate,
                attn_drop=attn_drop_rate,
                drop_path=drop_path_rate * index / max(depth - 1, 1),
                norm_layer=partial(nn.LayerNorm, eps=1e-6),
            )
            for index in range(depth)
        )
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.head_drop = nn.Dropout(head_drop_rate)
        self.head = nn.Linear(embed_dim, num_classes)
        self.head_dist = nn.Linear(embed_dim, num_classes) if distilled else None
        self.init_weights(weight_init)
        insert_ats(self.blocks, samplers or {})

    def init_weights(self, scheme: str) -> None:
        """Fresh weights: "deit" is a truncated normal of standard deviation 0.02, "big_vision" Xavier with sine-cosine
        positions (Beyer et al., 2022; here the positions go on to be learned).

        0.02 suits widths of several hundred; a network of width 64 hardly starts to learn from it.
        """
        for parameter in (self.pos_embed, self.cls_token, self.dist_token):
            if parameter is not None:
                trunc_normal_(parameter, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                if scheme == "big_vision":
                    nn.init.xavier_uniform_(module.weight)
                else:
                    trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if scheme == "big_vision":
            nn.init.zeros_(self.head.weight)
            positions = build_sincos2d_pos_embed(self.grid_size, self.embed_dim, temperature=100.0)
            self.pos_embed.data[0, self.num_prefix_tokens :] = positions.reshape(-1, self.embed_dim)

    def group_matcher(self, coarse: bool = False) -> dict:
        """Which parameters form a layer, in timm's form, for layer-wise learning rates."""
        return {
            "stem": r"^cls_token|dist_token|pos_embed|patch_embed",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }

    def no_weight_decay(self) -> set[str]:
        """Parameters that are never decayed."""
        return {"pos_embed", "cls_token", "dist_token"}

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> logits [B, classes]."""
        return self.forward_tokens(x)[0]

    def forward_tokens(self, x: Tensor) -> tuple[Tensor, list[KeptTokens]]:
        """Images [B, 3, H, W] -> logits [B, classes] and, for every ATS block in order, the tokens it kept."""
        tokens, trace = run_blocks(
            self.blocks, self.embed(x), num_prefix_tokens=self.num_prefix_tokens, layout=self.layout
        )
        return self.classify(self.norm(tokens.prefix())), trace

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
        """The position embedding [1, N, C] for a grid of patches, resized if it belongs to another."""
        return self.pos_embed if grid == self.grid_size else self.resize_positions(self.pos_embed, grid, self.grid_size)

    def resize_positions(self, pos_embed: Tensor, grid: tuple[int, int], old_grid: tuple[int, int]) -> Tensor:
        """A position embedding [1, P + old grid, C] for another grid, as timm resizes it."""
        return resample_abs_pos_embed(pos_embed, list(grid), list(old_grid), num_prefix_tokens=self.num_prefix_tokens)

    def classify(self, prefix: Tensor) -> Tensor:
        """Normalised prefix tokens [B, P, C] -> logits."""
        logits = self.head(self.head_drop(prefix[:, 0]))
        if self.head_dist is None:
            return logits
        return (logits + self.head_dist(self.head_drop(prefix[:, 1]))) / 2

    def adapt_state_dict(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights of a release as this model's: the official ATS code's constant masks left out, position embedding
        resized.
        """
        state = {key: value for key, value in state.items() if not key.endswith("attn.out_zero_mask")}
        pos_embed = state.get("pos_embed")
        if pos_embed is not None and pos_embed.ndim == 3 and pos_embed.shape != self.pos_embed.shape:
            num_old = pos_embed.shape[1] - self.num_prefix_tokens
            if math.isqrt(max(num_old, 0)) ** 2 == num_old > 0 and pos_embed.shape[2] == self.embed_dim:
                logger.info("Position embedding resized from %d patches to %s.", num_old, self.grid_size)
                side = math.isqrt(num_old)
                state["pos_embed"] = self.resize_positions(pos_embed, self.grid_size, (side, side))
        return state

    def multiply_adds(self, trace: list[KeptTokens], input_shape: tuple[int, ...], *, paper: bool) -> Tensor:
        """Multiply-adds of each image [B] (float64) of a batch of `input_shape`, from the tokens it kept; see
        `ats/flops.py`.
        """
        batch_size, _, height, width = input_shape
        grid = (height // self.patch_size) * (width // self.patch_size)
        total = blocks_multiply_adds(self.blocks, trace, self.num_prefix_tokens + grid, batch_size, paper=paper)
        heads = [head for head in (self.head, self.head_dist) if head is not None]
        return total + conv_multiply_adds(self.patch_embed.proj, grid) + sum(map(linear_multiply_adds, heads))


def vit_settings_from_cfg(cfg: CfgNode) -> dict:
    """What the VIT keys say of any network made of ViT's blocks, as arguments of `VisionTransformer`.

    Raises:
        UserError: keys that do not fit together.
    """
    if cfg.VIT.DISTILLED and cfg.MODEL.NAME != "ViT":
        raise UserError(f"VIT.DISTILLED True: MODEL.NAME {cfg.MODEL.NAME} has no distillation token; set it to False.")
    img_size = tuple(cfg.VIT.IMG_SIZE) if isinstance(cfg.VIT.IMG_SIZE, list) else (cfg.VIT.IMG_SIZE, cfg.VIT.IMG_SIZE)
    if any(side % cfg.VIT.PATCH_SIZE for side in img_size):
        raise UserError(f"VIT.IMG_SIZE {cfg.VIT.IMG_SIZE} is not a multiple of VIT.PATCH_SIZE {cfg.VIT.PATCH_SIZE}.")
    if cfg.VIT.EMBED_DIM % cfg.VIT.NUM_HEADS:
        raise UserError(f"VIT.EMBED_DIM {cfg.VIT.EMBED_DIM} is not a multiple of VIT.NUM_HEADS {cfg.VIT.NUM_HEADS}.")
    return {
        "img_size": img_size,
        "patch_size": cfg.VIT.PATCH_SIZE,
        "num_classes": cfg.MODEL.NUM_CLASSES,
        "embed_dim": cfg.VIT.EMBED_DIM,
        "depth": cfg.VIT.DEPTH,
        "num_heads": cfg.VIT.NUM_HEADS,
        "mlp_ratio": cfg.VIT.MLP_RATIO,
        "qkv_bias": cfg.VIT.QKV_BIAS,
        "head_drop_rate": cfg.MODEL.DROPOUT_RATE,
        "drop_rate": cfg.VIT.DROP_RATE,
        "attn_drop_rate": cfg.VIT.ATTN_DROP_RATE,
        "drop_path_rate": cfg.VIT.DROP_PATH_RATE,
        "weight_init": cfg.VIT.WEIGHT_INIT,
    }


def vit_from_cfg(cfg: CfgNode) -> VisionTransformer:
    """MODEL.NAME ViT, described by the keys of VIT and ATS."""
    return VisionTransformer(
        **vit_settings_from_cfg(cfg),
        distilled=cfg.VIT.DISTILLED,
        layout=cfg.ATS.LAYOUT,
        samplers=samplers_from_cfg(cfg, depth=cfg.VIT.DEPTH, num_prefix_tokens=2 if cfg.VIT.DISTILLED else 1),
    )
