"""MViT v1 and v2 (multiscale vision transformers) for video and images, with adaptive token sampling.

Names, shapes and numbers are SlowFast's (`slowfast/models/video_model_builder.py`, MViT); logits are what its head
gives before the softmax of evaluation. The dense blocks are in `mvit_block.py`; from the first sampling block on
`mvit_ats.py` takes over, where it is described what is scored, sampled and kept.

Trace: `patches` of block i are indices in the grid of that block's queries, which is the grid of its output (t h w
order): 8 x 14 x 14 in blocks 4 to 13 of MViT-B 16x4. `num_tokens` counts these tokens (and CLS), not pooled cells.

Shapes: B clips or images, N = P + grid tokens, P = 1 with CLS, else 0, grid (T, H, W), T = 1 for images.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from fvcore.common.config import CfgNode
from timm.layers import trunc_normal_
from torch import Tensor, nn

from ats.errors import UserError
from ats.models.activation_checkpoint import run_block
from ats.models.block import samplers_from_cfg
from ats.models.dense_grid import Grid
from ats.models.mvit.ats_block import MultiScaleATSBlock
from ats.models.mvit.cost import mvit_multiply_adds
from ats.models.mvit.dense import NORM_EPS, BlockSpec, MultiScaleBlock, convolved_grid
from ats.models.mvit.keys import adapt_mvit_state_dict, resize_positions
from ats.models.mvit.plan import check_samplers, plan_blocks
from ats.reduction.sampling import BlockSampler
from ats.tokens import KeptTokens, RaggedTokens


class PatchEmbed(nn.Module):
    """Overlapping patches of a clip (Conv3d) or an image (Conv2d) as tokens, in (t h w) order."""

    def __init__(self, dim: int, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> None:
        super().__init__()
        conv = nn.Conv2d if len(kernel) == 2 else nn.Conv3d
        self.proj = conv(3, dim, tuple(kernel), stride=tuple(stride), padding=tuple(padding))

    def forward(self, x: Tensor) -> tuple[Tensor, Grid]:
        """[B, 3, (T,) H, W] -> [B, grid, C] and the grid."""
        x = self.proj(x)
        grid = (1, *x.shape[2:])[-3:]
        return x.flatten(2).transpose(1, 2), tuple(grid)


class MViT(nn.Module):
    """Multiscale vision transformer.

    Args:
        blocks: what each block does; see `plan_blocks`.
        patch_grid: grid (T, H, W) the position embedding is made for; other inputs resize it as they come.
        input_grid: grid of the patches that are expected; whether blocks can sample is checked for it, and again for
            inputs of another grid as they come.
        patch_kernel, patch_stride, patch_padding: two numbers for images, three for clips.
        cls_token: read out CLS; without it the mean of the tokens (of those kept).
        mean_pooling: read out the norm of the patches' mean, whether there is CLS or not.
        abs_pos, sep_pos: absolute positions, as one table or as the sum of a spatial and a temporal one.
        head_init_scale: factor on the head's initial weights.
        zero_decay_pos_cls: no weight decay on positions and CLS.
        attention: options of MultiScaleAttention.
        samplers: block -> what it keeps; empty for the dense network.
    """

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
        samplers: dict[int, BlockSampler] | None = None,
        **attention: object,
    ) -> None:
        super().__init__()
        dim, depth = blocks[0].dim_in, len(blocks)
        self.num_classes, self.patch_grid, self.mean_pooling = num_classes, patch_grid, mean_pooling
        self.num_prefix_tokens, self.zero_decay_pos_cls = int(cls_token), zero_decay_pos_cls
        self.head_keys = ("head.",)
        self.patch_embed = PatchEmbed(dim, patch_kernel, patch_stride, patch_padding)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if cls_token else None
        frames, height, width = patch_grid
        joint, separate = abs_pos and not sep_pos, abs_pos and sep_pos
        self.pos_embed_spatial = nn.Parameter(torch.zeros(1, height * width, dim)) if separate else None
        self.pos_embed_temporal = nn.Parameter(torch.zeros(1, frames, dim)) if separate else None
        self.pos_embed_class = nn.Parameter(torch.zeros(1, 1, dim)) if separate and cls_token else None
        num_positions = self.num_prefix_tokens + frames * height * width
        self.pos_embed = nn.Parameter(torch.zeros(1, num_positions, dim)) if joint else None
        self.pos_drop = nn.Dropout(drop_rate)
        self.blocks = nn.ModuleList(
            MultiScaleBlock(
                spec,
                mlp_ratio=mlp_ratio,
                drop_rate=drop_rate,
                drop_path_rate=drop_path_rate * index / max(depth - 1, 1),
                **attention,
            )
            for index, spec in enumerate(blocks)
        )
        self.norm = nn.LayerNorm(blocks[-1].dim_out, eps=NORM_EPS)
        self.head = Head(blocks[-1].dim_out, num_classes, drop_rate=head_drop_rate)
        self.init_weights(head_init_scale)
        samplers = samplers or {}
        check_samplers(samplers, blocks, input_grid)
        self.sampling_blocks, self.checked_grid = sorted(samplers), input_grid
        for index in range(min(samplers, default=depth), depth):
            self.blocks[index] = MultiScaleATSBlock(self.blocks[index], samplers.get(index))

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

    def group_matcher(self, coarse: bool = False) -> dict:
        """Which parameters form a layer, in timm's form, for layer-wise learning rates."""
        return {
            "stem": r"^cls_token|pos_embed|patch_embed",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }

    def no_weight_decay(self) -> set[str]:
        """Parameters that are never decayed."""
        if not self.zero_decay_pos_cls:
            return set()
        marks = ("pos_embed", "cls_token", "rel_pos")
        return {name for name, _ in self.named_parameters() if any(mark in name for mark in marks)}

    def forward(self, x: Tensor) -> Tensor:
        """Clips [B, 3, T, H, W] or images [B, 3, H, W] -> logits [B, classes]."""
        return self.forward_tokens(x)[0]

    def forward_tokens(self, x: Tensor) -> tuple[Tensor, list[KeptTokens]]:
        """Clips or images -> logits [B, classes] and, for every ATS block in order, the tokens it kept."""
        x, grid = self.embed(x)
        if grid != self.checked_grid:
            check_samplers(self.sampling_blocks, [block.spec for block in self.blocks], grid)
        trace: list[KeptTokens] = []
        tokens = None
        for index, block in enumerate(self.blocks):
            if isinstance(block, MultiScaleATSBlock):
                tokens = RaggedTokens.from_dense(x, self.num_prefix_tokens) if tokens is None else tokens
                tokens, grid = run_block(block, tokens, grid)
                if block.sampler is not None:
                    trace.append(KeptTokens.of(tokens, index))
            else:
                x, grid = run_block(block, x, grid, self.num_prefix_tokens)
        tokens = RaggedTokens.from_dense(x, self.num_prefix_tokens) if tokens is None else tokens
        return self.head(self.read_out(tokens)), trace

    def embed(self, x: Tensor) -> tuple[Tensor, Grid]:
        """Clips or images -> tokens with positions [B, N, C] and their grid."""
        dims = 2 + len(self.patch_embed.proj.kernel_size)
        if x.ndim != dims:
            wanted = "[B, 3, H, W]" if dims == 4 else "[B, 3, T, H, W]"
            raise UserError(f"This MViT takes {wanted}, not {list(x.shape)}; MVIT.PATCH_2D says which.")
        x, grid = self.patch_embed(x)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        positions = self.positions(grid)
        return self.pos_drop(x if positions is None else x + positions), grid

    def positions(self, grid: Grid) -> Tensor | None:
        """The absolute position embedding [1, N, C] for a grid, resized if it belongs to another."""
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
        """What the head classifies, [B, C]: CLS, or the mean of the tokens that are left."""
        if self.num_prefix_tokens and not self.mean_pooling:
            return self.norm(tokens.prefix()[:, 0])
        x = tokens.x if self.mean_pooling else self.norm(tokens.x)
        padded = tokens.layout.pad(x)[:, self.num_prefix_tokens :]
        mean = padded.sum(dim=1) / (tokens.layout.lengths - self.num_prefix_tokens)[:, None]
        return self.norm(mean) if self.mean_pooling else mean

    def adapt_state_dict(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights of SlowFast, facebookresearch/mvit, pytorchvideo, torchvision or timm as this model's."""
        return adapt_mvit_state_dict(self, state)

    def multiply_adds(self, trace: list[KeptTokens], input_shape: tuple[int, ...], *, paper: bool) -> Tensor:
        """Multiply-adds of each clip or image [B] (float64) of a batch of `input_shape`, from the tokens it kept; see
        `ats/flops.py`.
        """
        return mvit_multiply_adds(self, trace, input_shape, paper=paper)


class Head(nn.Module):
    """Dropout and a linear classifier, under SlowFast's name `projection`."""

    def __init__(self, dim: int, num_classes: int, *, drop_rate: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(drop_rate)
        self.projection = nn.Linear(dim, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C] -> logits [B, classes]."""
        return self.projection(self.dropout(x))


def mvit_from_cfg(cfg: CfgNode) -> MViT:
    """MODEL.NAME MViT, described by the keys of MVIT and ATS, DATA.NUM_FRAMES and DATA.TRAIN_CROP_SIZE."""
    mvit, image = cfg.MVIT, cfg.MVIT.PATCH_2D
    for name in ("PATCH_KERNEL", "PATCH_STRIDE", "PATCH_PADDING"):
        if len(mvit[name]) != (2 if image else 3):
            raise UserError(
                f"MVIT.{name} {mvit[name]}: give {'two numbers (h, w)' if image else 'three numbers (t, h, w)'} with "
                f"MVIT.PATCH_2D {image}."
            )
    stride = (1, *mvit.PATCH_STRIDE)[-3:]
    size = cfg.DATA.TRAIN_CROP_SIZE
    patch_grid = (1 if image else cfg.DATA.NUM_FRAMES // stride[0], size // stride[1], size // stride[2])
    sizes = (size, size) if image else (cfg.DATA.NUM_FRAMES, size, size)
    input_grid = (1, *convolved_grid(sizes, mvit.PATCH_KERNEL, mvit.PATCH_STRIDE, mvit.PATCH_PADDING))[-3:]
    if min(patch_grid + input_grid) < 1:
        raise UserError(
            f"DATA.NUM_FRAMES {cfg.DATA.NUM_FRAMES} and DATA.TRAIN_CROP_SIZE {size} leave no patches of stride "
            f"MVIT.PATCH_STRIDE {mvit.PATCH_STRIDE}."
        )
    blocks = plan_blocks(
        depth=mvit.DEPTH,
        embed_dim=mvit.EMBED_DIM,
        num_heads=mvit.NUM_HEADS,
        patch_grid=patch_grid,
        input_grid=input_grid,
        dim_mul=mvit.DIM_MUL,
        head_mul=mvit.HEAD_MUL,
        pool_q_stride=mvit.POOL_Q_STRIDE,
        pool_kv_stride=mvit.POOL_KV_STRIDE or (),
        pool_kv_stride_adaptive=mvit.POOL_KV_STRIDE_ADAPTIVE,
        pool_kvq_kernel=mvit.POOL_KVQ_KERNEL,
        dim_mul_in_att=mvit.DIM_MUL_IN_ATT,
    )
    return MViT(
        blocks=blocks,
        patch_grid=patch_grid,
        input_grid=input_grid,
        num_classes=cfg.MODEL.NUM_CLASSES,
        patch_kernel=mvit.PATCH_KERNEL,
        patch_stride=mvit.PATCH_STRIDE,
        patch_padding=mvit.PATCH_PADDING,
        mlp_ratio=mvit.MLP_RATIO,
        cls_token=mvit.CLS_EMBED_ON,
        mean_pooling=mvit.USE_MEAN_POOLING,
        abs_pos=mvit.USE_ABS_POS,
        sep_pos=mvit.SEP_POS_EMBED,
        head_drop_rate=cfg.MODEL.DROPOUT_RATE,
        drop_rate=mvit.DROPOUT_RATE,
        drop_path_rate=mvit.DROPPATH_RATE,
        head_init_scale=mvit.HEAD_INIT_SCALE,
        zero_decay_pos_cls=mvit.ZERO_DECAY_POS_CLS,
        mode=mvit.MODE,
        qkv_bias=mvit.QKV_BIAS,
        rel_pos_spatial=mvit.REL_POS_SPATIAL,
        rel_pos_temporal=mvit.REL_POS_TEMPORAL,
        residual_pooling=mvit.RESIDUAL_POOLING,
        samplers=samplers_from_cfg(cfg, depth=mvit.DEPTH, num_prefix_tokens=int(mvit.CLS_EMBED_ON)),
    )
