"""PS-ViT (vision transformer with progressive sampling), with adaptive token sampling in its transformer layers.

Names, shapes and numbers are those of yuexy/PS-ViT (`models/ps_vit.py`). Yue et al., "Vision Transformer with
Progressive Sampling", ICCV 2021. Tokens are features sampled at points of a convolutional feature map; in each of the
first NUM_ITERS blocks the points move by offsets that the block before predicts. From there on it is ViT with a CLS
token, so ATS takes over as there (`ats_block.py`).

Blocks are counted through the network: 0 to 3 move the points of a PS-ViT with 4 iterations, 4 on can sample.

Trace: `patches` are indices of points. Point x * rows + y starts in column x and row y of the grid (y fastest, unlike
row major), in the middle of its part of the feature map.

Shapes: B images, P points, N = 1 + P tokens, C channels; points are (y, x) in pixels of the feature map [H, W], whole
numbers are pixel centres.
"""

from __future__ import annotations

import logging
from dataclasses import replace

import torch
from fvcore.common.config import CfgNode
from timm.layers import trunc_normal_
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from ats.errors import UserError
from ats.models.block import insert_ats, run_blocks, samplers_from_cfg
from ats.models.cost import block_multiply_adds, blocks_multiply_adds, conv_multiply_adds, linear_multiply_adds
from ats.models.psvit_layers import Bottleneck, SamplingLayer
from ats.reduction.sampling import BlockSampler
from ats.tokens import KeptTokens

logger = logging.getLogger(__name__)

STRIDE = 4  # pixels of the image to a pixel of the feature map


class PSViT(nn.Module):
    """PS-ViT.

    Attributes:
        head_keys: prefixes of the classifier's keys, which TRAIN.RESET_HEAD leaves fresh.

    Args:
        img_size: side of the images; the points are laid out for it.
        num_points: points along height and width.
        num_iters: blocks that move the points; `depth` counts them.
        stem_dims: widths of the first convolution, inside the bottlenecks, and of the first bottleneck's output.
        offset_gamma, point_gradient: see SamplingLayer.
        samplers: block of the network -> what it keeps; empty for the dense network.
    """

    head_keys: tuple[str, ...] = ("head.",)

    def __init__(
        self,
        *,
        img_size: int = 224,
        num_points: tuple[int, int] = (14, 14),
        num_classes: int = 1000,
        num_iters: int = 4,
        stem_dims: tuple[int, int, int] = (64, 64, 256),
        offset_gamma: float = 1.0,
        point_gradient: str = "released",
        depth: int = 14,
        embed_dim: int = 384,
        num_heads: int = 6,
        mlp_ratio: float = 3.0,
        qkv_bias: bool = False,
        head_drop_rate: float = 0.0,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        samplers: dict[int, BlockSampler] | None = None,
    ) -> None:
        super().__init__()
        self.num_classes, self.img_size, self.num_points = num_classes, img_size, num_points
        self.num_iters, self.feature_size = num_iters, img_size // STRIDE
        self.register_buffer("point_coord", self.first_points())
        self.pos_layer = nn.Linear(2, embed_dim)
        first, inner, middle = stem_dims
        self.stem = nn.Sequential(
            nn.Conv2d(3, first, 7, stride=2, padding=3, bias=False),
            nn.BatchNorm2d(first),
            nn.ReLU(),
            nn.MaxPool2d(3, stride=2, padding=1),
            Bottleneck(first, inner, middle),
            Bottleneck(middle, inner, embed_dim),
        )
        blocks = [
            Block(
                embed_dim,
                num_heads,
                mlp_ratio,
                qkv_bias=qkv_bias,
                proj_drop=drop_rate,
                attn_drop=attn_drop_rate,
                drop_path=drop_path_rate * index / max(depth - 1, 1),
                norm_layer=nn.LayerNorm,
            )
            for index in range(depth)
        ]
        self.ps_layers = nn.ModuleList(
            SamplingLayer(
                block, embed_dim, gamma=offset_gamma, predicts=index < num_iters - 1, point_gradient=point_gradient
            )
            for index, block in enumerate(blocks[:num_iters])
        )
        self.trans_layers = nn.ModuleList(blocks[num_iters:])
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.norm = nn.LayerNorm(embed_dim)
        self.head_drop = nn.Dropout(head_drop_rate)
        self.head = nn.Linear(embed_dim, num_classes)
        self.init_weights()
        if samplers and min(samplers) < num_iters:
            raise UserError(
                f"ATS.BLOCKS {sorted(samplers)}: blocks 0 to {num_iters - 1} of PS-ViT move the points, without CLS. "
                f"Blocks that can sample: {num_iters} to {depth - 1}."
            )
        insert_ats(self.trans_layers, {index - num_iters: sampler for index, sampler in (samplers or {}).items()})

    def first_points(self) -> Tensor:
        """The points [1, P, 2] before they move: middles of equal parts of the feature map, y fastest."""
        y, x = (torch.arange(n) * (self.feature_size / n) + self.feature_size / n / 2 for n in self.num_points)
        return torch.stack([y.repeat(len(x)), x.repeat_interleave(len(y))], dim=1)[None]

    def init_weights(self) -> None:
        """Fresh weights as in the reference: truncated normal of standard deviation 0.02; points that do not move."""
        trunc_normal_(self.cls_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for layer in self.ps_layers:
            if layer.offset_layer is not None:
                nn.init.zeros_(layer.offset_layer.weight)

    def group_matcher(self, coarse: bool = False) -> dict:
        """Which parameters form a layer, in timm's form, for layer-wise learning rates."""
        return {
            "stem": r"^stem|pos_layer",
            "ps_layers": r"^ps_layers\.(\d+)",
            "trans_layers": [(r"^trans_layers\.(\d+)", None), (r"^cls_token", (0,)), (r"^norm", (99999,))],
        }

    def no_weight_decay(self) -> set[str]:
        """Parameters that are never decayed."""
        return {"cls_token"}

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> logits [B, classes]."""
        return self.forward_tokens(x)[0]

    def forward_tokens(self, x: Tensor) -> tuple[Tensor, list[KeptTokens]]:
        """Images [B, 3, H, W] -> logits [B, classes] and, for every ATS block in order, the tokens it kept."""
        x = self.embed(x)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        tokens, trace = run_blocks(self.trans_layers, x, num_prefix_tokens=1)
        trace = [replace(entry, block=entry.block + self.num_iters) for entry in trace]
        return self.head(self.head_drop(self.norm(tokens.prefix()[:, 0]))), trace

    def embed(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] -> the tokens after the last iteration [B, P, C].

        Raises:
            UserError: images of another size than the points are laid out for.
        """
        if x.ndim != 4 or x.shape[1:] != (3, self.img_size, self.img_size):
            raise UserError(
                f"This PS-ViT takes images [B, 3, {self.img_size}, {self.img_size}], not {list(x.shape)}: its points "
                "are laid out for DATA.TRAIN_CROP_SIZE."
            )
        features = self.stem(x)
        points, offsets, tokens = self.point_coord.expand(len(x), -1, -1), None, None
        for layer in self.ps_layers:
            tokens, offsets, points = layer(features, points, offsets, tokens, self.pos_layer, self.feature_size)
        return tokens

    def adapt_state_dict(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights of the release as this model's: it stores the shared `pos_layer` again with every iteration, and the
        first points, which belong to an image size.
        """
        state = dict(state)
        for key in [key for key in state if ".position_layer." in key]:
            shared = state.get(f"pos_layer.{key.rsplit('.', 1)[1]}")
            if shared is not None and torch.equal(state[key], shared):
                del state[key]  # any other position layer is not this network's, and reported as unexpected
        points, own = state.get("point_coord"), self.first_points()
        if points is not None and points.shape == own.shape and not torch.allclose(points.float(), own, atol=1e-3):
            logger.info("point_coord of another image size: points are laid out for %d pixels.", self.img_size)
            state["point_coord"] = own
        return state

    def multiply_adds(self, trace: list[KeptTokens], input_shape: tuple[int, ...], *, paper: bool) -> Tensor:
        """Multiply-adds of each image [B] (float64) of a batch of `input_shape`, from the tokens it kept; see
        `ats/flops.py`. Bilinear sampling is not counted.
        """
        num_points = self.num_points[0] * self.num_points[1]
        counted = [replace(entry, block=entry.block - self.num_iters) for entry in trace]
        total = blocks_multiply_adds(self.trans_layers, counted, 1 + num_points, input_shape[0], paper=paper)
        points = torch.tensor(float(num_points), dtype=torch.float64, device=total.device)
        for layer in self.ps_layers:
            total = total + block_multiply_adds(layer.transformer_layer, points, points, paper=paper)
            total = total + linear_multiply_adds(self.pos_layer, num_points)
            if layer.offset_layer is not None:
                total = total + linear_multiply_adds(layer.offset_layer, num_points)
        return total + self.stem_multiply_adds(*input_shape[2:]) + linear_multiply_adds(self.head)

    def stem_multiply_adds(self, height: int, width: int) -> int:
        """Multiply-adds of the stem, for images of this size."""
        first = [-(-side // 2) for side in (height, width)]  # the first convolution and the pooling halve, rounding up
        pooled = [-(-side // 2) for side in first]
        cost = conv_multiply_adds(self.stem[0], first[0] * first[1])
        convs = [module for module in self.stem[1:].modules() if isinstance(module, nn.Conv2d)]
        return cost + sum(conv_multiply_adds(conv, pooled[0] * pooled[1]) for conv in convs)


def psvit_from_cfg(cfg: CfgNode) -> PSViT:
    """MODEL.NAME PSViT, described by the keys of PSVIT and ATS, and DATA.TRAIN_CROP_SIZE."""
    psvit = cfg.PSVIT
    for name, count in (("NUM_POINTS", 2), ("STEM_DIMS", 3)):
        if len(psvit[name]) != count or any(value < 1 for value in psvit[name]):
            raise UserError(f"PSVIT.{name} {psvit[name]}: give {count} numbers from 1.")
    if not 1 <= psvit.NUM_ITERS <= psvit.DEPTH:
        raise UserError(f"PSVIT.NUM_ITERS {psvit.NUM_ITERS}: give 1 to PSVIT.DEPTH, {psvit.DEPTH}.")
    if psvit.EMBED_DIM % psvit.NUM_HEADS:
        raise UserError(f"PSVIT.EMBED_DIM {psvit.EMBED_DIM} is not a multiple of PSVIT.NUM_HEADS {psvit.NUM_HEADS}.")
    return PSViT(
        img_size=cfg.DATA.TRAIN_CROP_SIZE,
        num_points=tuple(psvit.NUM_POINTS),
        num_classes=cfg.MODEL.NUM_CLASSES,
        num_iters=psvit.NUM_ITERS,
        stem_dims=tuple(psvit.STEM_DIMS),
        offset_gamma=psvit.OFFSET_GAMMA,
        point_gradient=psvit.POINT_GRADIENT,
        depth=psvit.DEPTH,
        embed_dim=psvit.EMBED_DIM,
        num_heads=psvit.NUM_HEADS,
        mlp_ratio=psvit.MLP_RATIO,
        qkv_bias=psvit.QKV_BIAS,
        head_drop_rate=cfg.MODEL.DROPOUT_RATE,
        drop_rate=psvit.DROP_RATE,
        attn_drop_rate=psvit.ATTN_DROP_RATE,
        drop_path_rate=psvit.DROP_PATH_RATE,
        samplers=samplers_from_cfg(cfg, depth=psvit.DEPTH, num_prefix_tokens=1),
    )
