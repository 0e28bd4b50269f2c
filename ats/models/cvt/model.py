"""CvT (convolutional vision transformer) for images, with adaptive token sampling in its last stage.

Names, shapes and numbers are microsoft/CvT's (`lib/models/cls_cvt.py`). `blocks.py` has the blocks and says
what they score, sample and keep.

Block indices run through the stages: 0 to 12 in CvT-13. Only the last stage (3 to 12) can sample: it has CLS, and no
strided convolution follows it.

Trace: `patches` of a block are indices in the last stage's grid, row major: 14 x 14 for 224 x 224 pixels. `num_tokens`
counts these tokens (and CLS); `ATS.NUM_TOKENS` counts cells of the keys' grid (and CLS), here 7 x 7.

Shapes: B images, N = P + grid tokens, P = 1 in a stage with CLS, else 0, C channels.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import ClassVar

import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn

from ats.errors import UserError
from ats.models.activation_checkpoint import run_block
from ats.models.backbone import Backbone, Records, init_linears, reductions_from_cfg, trunc_normal_02_
from ats.models.block import ATSBlock, run_blocks
from ats.models.cost import BlockGrid, conv_multiply_adds, linear_multiply_adds, size
from ats.models.cvt.blocks import NORM_EPS, ConvATSBlock, ConvBlock, StageSpec, check_stage
from ats.models.dense_grid import convolved_grid, divide
from ats.reduction import Reduction
from ats.tokens import BlockRecord, KeptTokens, RaggedTokens

logger = logging.getLogger(__name__)


class ConvEmbed(nn.Module):
    """Overlapping patches of a feature map as tokens, row major, normalised."""

    def __init__(self, dim_in: int, spec: StageSpec) -> None:
        super().__init__()
        self.proj = nn.Conv2d(dim_in, spec.dim_embed, spec.patch_size, spec.patch_stride, spec.patch_padding)
        self.norm = nn.LayerNorm(spec.dim_embed, eps=NORM_EPS)

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """[B, C_in, H, W] -> [B, grid, C] and the grid."""
        x = self.proj(x)
        return self.norm(x.flatten(2).transpose(1, 2)), tuple(x.shape[2:])


class Stage(nn.Module):
    """A patch embedding and the blocks on its grid, with its own CLS token or without."""

    def __init__(self, dim_in: int, spec: StageSpec) -> None:
        super().__init__()
        self.spec, self.num_prefix_tokens = spec, int(spec.cls_token)
        self.patch_embed = ConvEmbed(dim_in, spec)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, spec.dim_embed)) if spec.cls_token else None
        self.pos_drop = nn.Dropout(spec.drop_rate)
        last = max(spec.depth - 1, 1)
        self.blocks = nn.ModuleList(
            ConvBlock(spec, drop_path_rate=spec.drop_path_rate * index / last) for index in range(spec.depth)
        )

    def forward(self, x: Tensor) -> tuple[RaggedTokens, tuple[int, int]]:
        """[B, C_in, H, W] -> the kept tokens and the grid. Their `max_tokens` counts the cells of the keys' grid."""
        x, grid = self.patch_embed(x)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)

        def begin(x: Tensor) -> RaggedTokens:
            stride = 1 if self.spec.qkv_proj_method == "linear" else self.spec.stride_kv
            num_cells = size(divide((1, *grid), (1, stride, stride)))
            tokens = RaggedTokens.from_dense(x, self.num_prefix_tokens, grid=(1, *grid))
            return replace(tokens, max_tokens=self.num_prefix_tokens + num_cells)

        def call(block: nn.Module, x: Tensor | RaggedTokens, _: int) -> Tensor | RaggedTokens:
            is_ats = isinstance(block, ATSBlock)
            return run_block(block, x) if is_ats else run_block(block, x, grid, self.num_prefix_tokens)

        return run_blocks(self.blocks, self.pos_drop(x), begin, call=call), grid


class CvT(Backbone):
    """Convolutional vision transformer.

    Args:
        stages: first to last. The head classifies CLS of the last one; without CLS, the mean of its kept tokens.
        weight_init: "trunc_norm" (normal, 0.02) or "xavier", of the linear layers.
    """

    no_merge = "its keys are convolved cells of a grid, where a merged token has no single position"
    layer_patterns: ClassVar[dict] = {
        "stages": [
            (r"^stage(\d+)\.(?:patch_embed|cls_token)", None),
            (r"^stage(\d+)\.blocks\.(\d+)", None),
            (r"^norm", (99999,)),
        ]
    }

    def __init__(
        self,
        *,
        stages: Sequence[StageSpec],
        num_classes: int = 1000,
        head_drop_rate: float = 0.0,
        weight_init: str = "trunc_norm",
        reductions: dict[int, Reduction] | None = None,
    ) -> None:
        super().__init__()
        self.num_classes, self.num_stages = num_classes, len(stages)
        self.num_prefix_tokens = int(stages[-1].cls_token)
        dims = [3, *(spec.dim_embed for spec in stages)]
        for index, spec in enumerate(stages):
            self.add_module(f"stage{index}", Stage(dims[index], spec))
        self.norm = nn.LayerNorm(dims[-1], eps=NORM_EPS)
        self.head_drop = nn.Dropout(head_drop_rate)
        self.head = nn.Linear(dims[-1], num_classes)
        self.init_weights(weight_init)
        self.reduce_last_stage(reductions or {})

    @property
    def stages(self) -> list[Stage]:
        """The stages, first to last."""
        return [getattr(self, f"stage{index}") for index in range(self.num_stages)]

    def init_weights(self, scheme: str) -> None:
        """Fresh weights as in the reference; convolutions keep torch's own."""
        for stage in self.stages:
            if stage.cls_token is not None:
                trunc_normal_02_(stage.cls_token)
        for stage in self.stages:
            init_linears(stage, nn.init.xavier_uniform_ if scheme == "xavier" else trunc_normal_02_)
        init_linears(self.head)

    def reduce_last_stage(self, reductions: dict[int, Reduction]) -> None:
        """Put ATS into the blocks of the last stage, in place. Raises a UserError for a block outside it, or if ATS
        cannot drop the stage's keys.
        """
        if not reductions:
            return
        self.check_reductions(reductions.values())  # before the blocks: no other block would help
        stage, depth = self.stages[-1], len(self.block_list())
        first = depth - len(stage.blocks)
        if min(reductions) < first:
            raise UserError(
                f"ATS.BLOCKS {sorted(reductions)}: only CvT's last stage can sample, blocks {first} to {depth - 1}."
            )
        check_stage(stage.spec)
        self.reduce_blocks(reductions, ConvATSBlock, blocks=stage.blocks, first_index=first)

    def run(self, x: Tensor) -> tuple[Tensor, Records]:
        for stage in self.stages:
            tokens, grid = stage(x)
            if stage is not self.stages[-1]:
                patches = tokens.layout.pad(tokens.x)[:, stage.num_prefix_tokens :]
                x = patches.transpose(1, 2).unflatten(2, grid)
        return self.head(self.head_drop(self.read_out(tokens))), tokens.trace

    def read_out(self, tokens: RaggedTokens) -> Tensor:
        """Input of the head, [B, C]: CLS, or the mean of the kept tokens."""
        if tokens.num_prefix_tokens:
            return self.norm(tokens.prefix()[:, 0])
        return tokens.layout.pad(self.norm(tokens.x)).sum(dim=1) / tokens.layout.lengths[:, None]

    def block_list(self) -> list[nn.Module]:
        return [block for stage in self.stages for block in stage.blocks]

    def prefix_of(self, index: int) -> int:
        return [stage.num_prefix_tokens for stage in self.stages for _ in stage.blocks][index]

    def block_grids(self, input_shape: Sequence[int]) -> list[BlockGrid]:
        return [
            BlockGrid((1, *grid), (1, *grid), (1, *key_grid(block, grid)))
            for stage, grid in zip(self.stages, self.stage_grids(input_shape), strict=True)
            for block in stage.blocks
        ]

    def stage_grids(self, input_shape: Sequence[int]) -> list[tuple[int, int]]:
        """Height and width of each stage's grid of tokens."""
        grids, grid = [], tuple(input_shape[-2:])
        for stage in self.stages:
            conv = stage.patch_embed.proj
            grid = convolved_grid(grid, conv.kernel_size, conv.stride, conv.padding)
            grids.append(grid)
        return grids

    def block_cost(self, block: nn.Module, record: BlockRecord, grid: BlockGrid, *, paper: bool, frames: int) -> Tensor:
        """One block, [B] float64. Convolutions run on the whole grid and are counted so.

        As run, an ATS block projects and attends from kept queries only; in the paper's accounting every query is
        projected and meets every key.
        """
        attn, dim, hidden, reduction = block.attn, block.spec.dim_embed, block.mlp.fc1.out_features, record.reduction
        convolutions = 0
        convs = (attn.conv_proj_q, attn.conv_proj_k, attn.conv_proj_v)
        for conv, cells in zip(convs, (grid.queries, grid.keys, grid.keys), strict=True):
            if conv is not None and hasattr(conv, "conv"):
                convolutions += conv_multiply_adds(conv.conv, size(cells))
        n, keys, m = (t.double() for t in (record.num_in, record.num_keys, record.num_out))
        cost = convolutions + 2 * keys * dim * dim + m * dim * dim + 2 * m * dim * hidden
        if paper or reduction is None:
            return cost + n * dim * dim + (n + m) * keys * dim
        by_all = reduction.score == "mean_attention"
        return cost + (n if by_all else m + 1) * dim * dim + (n if by_all else 1) * keys * dim + 2 * m * keys * dim

    def stem_multiply_adds(self, trace: Sequence[KeptTokens], input_shape: Sequence[int]) -> float:
        embeds = zip(self.stages, self.stage_grids(input_shape), strict=True)
        stem = sum(conv_multiply_adds(stage.patch_embed.proj, size((1, *grid))) for stage, grid in embeds)
        return stem + linear_multiply_adds(self.head)


def key_grid(block: nn.Module, grid: tuple[int, int]) -> tuple[int, int]:
    """Height and width of a block's keys for tokens on `grid`."""
    conv = block.attn.conv_proj_k
    if conv is None:
        return grid
    if hasattr(conv, "conv"):
        return convolved_grid(grid, conv.conv.kernel_size, conv.conv.stride, conv.conv.padding)
    return tuple(conv.avg(torch.empty(1, 1, *grid)).shape[2:])


def stages_from_cfg(cvt: CfgNode) -> list[StageSpec]:
    """The stages that the CVT keys describe, each by one entry of every list. Raises a UserError for a list of the
    wrong length, or entries that do not fit together.
    """
    for key, values in cvt.items():
        if isinstance(values, list) and len(values) != cvt.NUM_STAGES:
            raise UserError(f"CVT.{key} {values}: give {cvt.NUM_STAGES} entries, one for each of CVT.NUM_STAGES.")
    if any(cvt.POS_EMBED):
        logger.warning("CVT.POS_EMBED has no effect: CvT has no position embedding, and the reference ignores the key.")
    names = [field.name for field in fields(StageSpec)]
    stages = [StageSpec(**{name: cvt[name.upper()][i] for name in names}) for i in range(cvt.NUM_STAGES)]
    for index, spec in enumerate(stages):
        if spec.qkv_proj_method not in ("dw_bn", "avg", "linear"):
            raise UserError(f"CVT.QKV_PROJ_METHOD {spec.qkv_proj_method}: choose from dw_bn, avg, linear.")
        if spec.dim_embed % spec.num_heads:
            raise UserError(
                f"CVT.DIM_EMBED {spec.dim_embed} of stage {index} is not a multiple of CVT.NUM_HEADS {spec.num_heads}."
            )
        if spec.qkv_proj_method == "dw_bn" and (spec.stride_q != 1 or 2 * spec.padding_q != spec.kernel_qkv - 1):
            raise UserError(
                f"Stage {index}: queries must keep the grid of the residual, so CVT.STRIDE_Q is 1 and CVT.PADDING_Q "
                f"(CVT.KERNEL_QKV - 1) / 2, not {spec.stride_q} and {spec.padding_q} with kernel {spec.kernel_qkv}."
            )
    return stages


def cvt_from_cfg(cfg: CfgNode) -> CvT:
    """MODEL.NAME CvT, described by the CVT and ATS keys."""
    stages = stages_from_cfg(cfg.CVT)
    depth = sum(spec.depth for spec in stages)
    return CvT(
        stages=stages,
        num_classes=cfg.MODEL.NUM_CLASSES,
        head_drop_rate=cfg.MODEL.DROPOUT_RATE,
        weight_init=cfg.CVT.INIT,
        reductions=reductions_from_cfg(
            cfg,
            depth=depth,
            num_prefix_tokens=int(stages[-1].cls_token),
            can_sample=range(depth - stages[-1].depth, depth),
        ),
    )
