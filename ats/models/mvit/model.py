"""MViT v1 and v2 (multiscale vision transformers) for video and images, with adaptive token sampling.

Names, shapes and numbers are SlowFast's (`slowfast/models/video_model_builder.py`, MViT); the output is logits, before
the softmax of SlowFast's evaluation. `dense.py` has the dense blocks, `ats_block.py` those from the first sampling
block on, and says what they score, sample and keep.

Trace: `patches` of block i are indices in the grid of its queries and its output (t h w order): 8 x 14 x 14 in blocks 4
to 13 of MViT-B 16x4. `num_tokens` counts these tokens (and CLS), not pooled cells.

Shapes: B clips or images, N = P + grid tokens, P = 1 with CLS, else 0, grid (T, H, W), T = 1 for images.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from fvcore.common.config import CfgNode
from timm.layers import trunc_normal_
from torch import Tensor, nn

from ats.errors import UserError
from ats.models.activation_checkpoint import run_block
from ats.models.backbone import Backbone, Records, reductions_from_cfg, settings
from ats.models.block import ATSBlock, ats_blocks, run_blocks
from ats.models.cost import BlockGrid, conv_multiply_adds, linear_multiply_adds, size
from ats.models.dense_grid import Grid, convolved_grid
from ats.models.mvit.ats_block import MultiScaleATSBlock
from ats.models.mvit.dense import NORM_EPS, BlockSpec, MultiScaleBlock
from ats.models.mvit.keys import adapt_mvit_state_dict, resize_positions
from ats.models.mvit.plan import blocks_that_can_sample, check_sampling_blocks, plan_blocks
from ats.reduction import Reduction
from ats.tokens import BlockRecord, KeptTokens, RaggedTokens


class MViT(Backbone):
    """Multiscale vision transformer.

    Args:
        blocks: what each block does; see `plan_blocks`.
        patch_grid: grid (T, H, W) of the position embedding; other inputs resize it on the fly.
        input_grid: expected grid of the patches, for which the constructor checks that blocks can sample. `run` checks
            other grids.
        patch_kernel, patch_stride, patch_padding: two numbers for images, three for clips.
        cls_token: classify CLS; without it, the mean of the kept tokens.
        mean_pooling: classify the norm of the patches' mean, with CLS or without.
        abs_pos, sep_pos: absolute positions, as one table or as the sum of a spatial and a temporal one.
        head_init_scale: factor on the head's initial weights.
        zero_decay_pos_cls: no weight decay on positions and CLS.
        attention: options of MultiScaleAttention.
    """

    no_merge = "its keys are pooled cells of a grid, where a merged token has no single position"

    def __init__(
        self,
        *,
        blocks: Sequence[BlockSpec],
        patch_grid: Grid,
        input_grid: Grid,
        num_classes: int = 400,
        patch_kernel: Sequence[int] = (3, 7, 7),
        patch_stride: Sequence[int] = (2, 4, 4),
        patch_padding: Sequence[int] = (1, 3, 3),
        mlp_ratio: float = 4.0,
        cls_token: bool = True,
        mean_pooling: bool = False,
        abs_pos: bool = True,
        sep_pos: bool = False,
        head_drop_rate: float = 0.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        head_init_scale: float = 1.0,
        zero_decay_pos_cls: bool = True,
        reductions: dict[int, Reduction] | None = None,
        **attention: Any,
    ) -> None:
        super().__init__()
        dim, depth = blocks[0].dim_in, len(blocks)
        self.num_classes, self.patch_grid, self.mean_pooling = num_classes, patch_grid, mean_pooling
        self.num_prefix_tokens, self.zero_decay_pos_cls = int(cls_token), zero_decay_pos_cls
        conv = nn.Conv2d if len(patch_kernel) == 2 else nn.Conv3d
        proj = conv(3, dim, tuple(patch_kernel), tuple(patch_stride), tuple(patch_padding))
        self.patch_embed = nn.Sequential(OrderedDict(proj=proj))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if cls_token else None
        frames, height, width = patch_grid
        joint, separate = abs_pos and not sep_pos, abs_pos and sep_pos
        self.pos_embed_spatial = nn.Parameter(torch.zeros(1, height * width, dim)) if separate else None
        self.pos_embed_temporal = nn.Parameter(torch.zeros(1, frames, dim)) if separate else None
        self.pos_embed_class = nn.Parameter(torch.zeros(1, 1, dim)) if separate and cls_token else None
        num_positions = self.num_prefix_tokens + frames * height * width
        self.pos_embed = nn.Parameter(torch.zeros(1, num_positions, dim)) if joint else None
        self.pos_drop = nn.Dropout(drop_rate)
        options = {"mlp_ratio": mlp_ratio, "drop_rate": drop_rate} | attention
        rates = [drop_path_rate * index / max(depth - 1, 1) for index in range(depth)]
        self.blocks = nn.ModuleList(
            MultiScaleBlock(spec, drop_path_rate=rate, **options) for spec, rate in zip(blocks, rates, strict=True)
        )
        self.norm = nn.LayerNorm(blocks[-1].dim_out, eps=NORM_EPS)
        projection = nn.Linear(blocks[-1].dim_out, num_classes)
        self.head = nn.Sequential(OrderedDict(dropout=nn.Dropout(head_drop_rate), projection=projection))
        self.init_weights(head_init_scale)
        self.checked_grid = input_grid
        self.reduce_blocks(reductions, MultiScaleATSBlock)
        check_sampling_blocks(sorted(reductions or {}), blocks, input_grid)

    def init_weights(self, head_scale: float) -> None:
        """Fresh weights as in SlowFast: truncated normal of standard deviation 0.02, biases 0.02."""
        for name, parameter in self.named_parameters():
            if name.startswith(("pos_embed", "cls_token")) or "rel_pos" in name:
                trunc_normal_(parameter, std=0.02)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d, nn.Conv3d)):
                trunc_normal_(module.weight, std=0.02)
            if isinstance(module, (nn.Linear, nn.LayerNorm)) and module.bias is not None:
                nn.init.constant_(module.bias, 0.02)
        self.head.projection.weight.data.mul_(head_scale)
        self.head.projection.bias.data.mul_(head_scale)

    def no_weight_decay(self) -> set[str]:
        return super().no_weight_decay() if self.zero_decay_pos_cls else set()

    def run(self, x: Tensor) -> tuple[Tensor, Records]:
        x, grid = self.embed(x)
        if grid != self.checked_grid:
            sampling = [block.index for block in ats_blocks(self)]
            check_sampling_blocks(sampling, [block.spec for block in self.blocks], grid)

        def begin(dense: tuple[Tensor, Grid]) -> RaggedTokens:
            return RaggedTokens.from_dense(dense[0], self.num_prefix_tokens, grid=dense[1])

        def call(block: nn.Module, x: tuple[Tensor, Grid] | RaggedTokens, _: int) -> tuple[Tensor, Grid] | RaggedTokens:
            return run_block(block, x) if isinstance(block, ATSBlock) else run_block(block, *x, self.num_prefix_tokens)

        tokens = run_blocks(self.blocks, (x, grid), begin, call=call)
        return self.head(self.read_out(tokens)), tokens.trace

    def embed(self, x: Tensor) -> tuple[Tensor, Grid]:
        """Clips or images -> tokens with positions [B, N, C] and their grid."""
        dims = 2 + len(self.patch_embed.proj.kernel_size)
        if x.ndim != dims:
            wanted = "[B, 3, H, W]" if dims == 4 else "[B, 3, T, H, W]"
            raise UserError(f"This MViT takes {wanted}, not {list(x.shape)}: see MVIT.PATCH_2D.")
        x = self.patch_embed(x)
        grid, x = (1, *x.shape[2:])[-3:], x.flatten(2).transpose(1, 2)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        positions = self.positions(grid)
        return self.pos_drop(x if positions is None else x + positions), grid

    def positions(self, grid: Grid) -> Tensor | None:
        """The absolute position embedding [1, N, C] for a grid."""
        frames, height, width = self.patch_grid
        if self.pos_embed is not None:
            prefix, patches = self.pos_embed.split([self.num_prefix_tokens, frames * height * width], dim=1)
            return torch.cat([prefix, resize_positions(patches, self.patch_grid, grid)], dim=1)
        if self.pos_embed_spatial is None:
            return None
        spatial = resize_positions(self.pos_embed_spatial, (1, height, width), (1, *grid[1:]))
        temporal = resize_positions(self.pos_embed_temporal, (frames, 1, 1), (grid[0], 1, 1))
        patches = (temporal[:, :, None] + spatial[:, None]).flatten(1, 2)
        return patches if self.pos_embed_class is None else torch.cat([self.pos_embed_class, patches], dim=1)

    def read_out(self, tokens: RaggedTokens) -> Tensor:
        """Input of the head, [B, C]: CLS, or the mean of the kept tokens."""
        if self.num_prefix_tokens and not self.mean_pooling:
            return self.norm(tokens.prefix()[:, 0])
        x = tokens.x if self.mean_pooling else self.norm(tokens.x)
        padded = tokens.layout.pad(x)[:, self.num_prefix_tokens :]
        mean = padded.sum(dim=1) / (tokens.layout.lengths - self.num_prefix_tokens)[:, None]
        return self.norm(mean) if self.mean_pooling else mean

    def adapt_state_dict(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights of SlowFast, facebookresearch/mvit, pytorchvideo, torchvision or timm for this model."""
        return adapt_mvit_state_dict(self, state)

    def block_grids(self, input_shape: Sequence[int]) -> list[BlockGrid]:
        grids, grid = [], self.input_grid(input_shape)
        for block in self.blocks:
            grids.append(BlockGrid(grid, block.spec.query_grid(grid), block.spec.key_grid(grid)))
            grid = grids[-1].queries
        return grids

    def input_grid(self, input_shape: Sequence[int]) -> Grid:
        """The grid of the patches of inputs of this shape."""
        stem = self.patch_embed.proj
        return (1, *convolved_grid(input_shape[2:], stem.kernel_size, stem.stride, stem.padding))[-3:]

    def block_cost(self, block: nn.Module, record: BlockRecord, grid: BlockGrid, *, paper: bool, frames: int) -> Tensor:
        """One block, [S] float64. Convolutions run on the whole grid and are counted so.

        As run, an ATS block attends from kept queries only; relative positions are a product with all distances and
        widen queries, keys and values. In the paper's accounting every query is projected and meets every key, and
        positions are an added matrix, as in the dense block.
        """
        spec, attn, reduction = block.spec, block.attn, record.reduction
        dim, hidden = spec.dim_attn, block.mlp.fc1.out_features
        n, queries, keys, m = (t.double() for t in (record.num_in, record.num_queries, record.num_keys, record.num_out))
        cost = 2 * n * spec.dim_in * dim  # keys and values
        for pool, pooled in ((attn.pool_q, grid.queries), (attn.pool_k, grid.keys), (attn.pool_v, grid.keys)):
            if isinstance(pool, nn.Conv3d):
                cost = cost + attn.num_heads * conv_multiply_adds(pool, size(pooled))
        tables = (attn.rel_pos_t, attn.rel_pos_h, attn.rel_pos_w)
        sizes = [sizes for table, *sizes in zip(tables, grid.queries, grid.keys, strict=True) if table is not None]
        coordinates = sum(num_k for _, num_k in sizes)
        if paper or not record.max_tokens:  # a dense block has no record of its own
            cost = cost + coordinates * dim * (queries - self.num_prefix_tokens)
            cost = cost + n * spec.dim_in * dim + queries * keys * dim + m * keys * dim
        else:
            if attn.has_rel_pos:
                num_distances = sum(2 * max(pair) - 1 for pair in sizes)
                cost = cost + (num_distances + 1) * dim * queries
            width = dim + attn.num_heads * (coordinates + -coordinates % 8)  # of queries, keys and values, all heads
            num_projected = n if block.projects_all_queries else m + (reduction is not None)
            cost = cost + num_projected * spec.dim_in * dim + 2 * m * keys * width
            if reduction is not None:
                cost = cost + keys * width * (queries if reduction.score == "mean_attention" else 1)
        cost = cost + m * dim * dim + m * dim * hidden + m * hidden * spec.dim_out
        if block.proj is not None:
            before_pooling = block.widens_in_attention and block.pool_skip is not None
            cost = cost + (n if before_pooling else m) * spec.dim_out * (
                spec.dim_in if block.widens_in_attention else dim
            )
        return cost

    def stem_multiply_adds(self, trace: Sequence[KeptTokens], input_shape: Sequence[int]) -> float:
        stem = conv_multiply_adds(self.patch_embed.proj, size(self.input_grid(input_shape)))
        return stem + linear_multiply_adds(self.head.projection)


def mvit_from_cfg(cfg: CfgNode) -> MViT:
    """MODEL.NAME MViT, described by the MVIT and ATS keys, DATA.NUM_FRAMES and DATA.TRAIN_CROP_SIZE."""
    mvit, image, size, num_frames = cfg.MVIT, cfg.MVIT.PATCH_2D, cfg.DATA.TRAIN_CROP_SIZE, cfg.DATA.NUM_FRAMES
    for name in ("PATCH_KERNEL", "PATCH_STRIDE", "PATCH_PADDING"):
        if len(mvit[name]) != (2 if image else 3):
            raise UserError(
                f"MVIT.{name} {mvit[name]}: give {'two numbers (h, w)' if image else 'three numbers (t, h, w)'} with "
                f"MVIT.PATCH_2D {image}."
            )
    stride = (1, *mvit.PATCH_STRIDE)[-3:]
    patch_grid = (1 if image else num_frames // stride[0], size // stride[1], size // stride[2])
    sizes = (size, size) if image else (num_frames, size, size)
    input_grid = (1, *convolved_grid(sizes, mvit.PATCH_KERNEL, mvit.PATCH_STRIDE, mvit.PATCH_PADDING))[-3:]
    if min(patch_grid + input_grid) < 1:
        raise UserError(
            f"DATA.NUM_FRAMES {num_frames} and DATA.TRAIN_CROP_SIZE {size} leave no patches of stride "
            f"MVIT.PATCH_STRIDE {mvit.PATCH_STRIDE}."
        )
    patch = ("patch_kernel", "patch_stride", "patch_padding", "mlp_ratio", "head_init_scale", "zero_decay_pos_cls")
    attention = ("mode", "qkv_bias", "rel_pos_spatial", "rel_pos_temporal", "residual_pooling")
    blocks = plan_blocks(mvit, patch_grid, input_grid)
    return MViT(
        blocks=blocks,
        patch_grid=patch_grid,
        input_grid=input_grid,
        num_classes=cfg.MODEL.NUM_CLASSES,
        cls_token=mvit.CLS_EMBED_ON,
        mean_pooling=mvit.USE_MEAN_POOLING,
        abs_pos=mvit.USE_ABS_POS,
        sep_pos=mvit.SEP_POS_EMBED,
        head_drop_rate=cfg.MODEL.DROPOUT_RATE,
        drop_rate=mvit.DROPOUT_RATE,
        drop_path_rate=mvit.DROPPATH_RATE,
        reductions=reductions_from_cfg(
            cfg,
            depth=mvit.DEPTH,
            num_prefix_tokens=int(mvit.CLS_EMBED_ON),
            can_sample=blocks_that_can_sample(blocks, input_grid),
        ),
        **settings(mvit, *patch, *attention),
    )
