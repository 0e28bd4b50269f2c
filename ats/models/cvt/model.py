"""CvT (convolutional vision transformer) for images, with adaptive token sampling in its last stage.

Names, shapes and numbers are those of microsoft/CvT (`lib/models/cls_cvt.py`). The dense blocks are in `cvt_block.py`;
from the first sampling block on `cvt_ats.py` takes over, where it is described what is scored, sampled and kept.

Blocks are counted through the stages: 0 to 12 in CvT-13, of which 3 to 12 are the last stage, the only one that can
sample: CLS lives there, and no strided convolution comes behind it.

Trace: `patches` of a block are indices in the last stage's grid, row major: 14 x 14 for 224 x 224 pixels. `num_tokens`
counts these tokens (and CLS); `ATS.NUM_TOKENS` counts cells of the keys' grid (and CLS), 7 x 7 there.

Shapes: B images, N = P + grid tokens, P = 1 in a stage with CLS, else 0, C channels.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from fvcore.common.config import CfgNode
from timm.layers import trunc_normal_
from torch import Tensor, nn

from ats.errors import UserError
from ats.models.activation_checkpoint import run_block
from ats.models.block import samplers_from_cfg
from ats.models.cvt.ats_block import ConvATSBlock, begin_ragged, check_stage
from ats.models.cvt.cost import cvt_multiply_adds
from ats.models.cvt.dense import NORM_EPS, ConvBlock, StageSpec
from ats.reduction.sampling import BlockSampler
from ats.tokens import KeptTokens, RaggedTokens

logger = logging.getLogger(__name__)


class ConvEmbed(nn.Module):
    """Overlapping patches of a feature map as tokens, row major, normalised."""

    def __init__(self, dim_in: int, spec: StageSpec) -> None:
        super().__init__()
        self.proj = nn.Conv2d(dim_in, spec.dim, spec.patch_size, spec.patch_stride, spec.patch_padding)
        self.norm = nn.LayerNorm(spec.dim, eps=NORM_EPS)

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """[B, C_in, H, W] -> [B, grid, C] and the grid."""
        x = self.proj(x)
        return self.norm(x.flatten(2).transpose(1, 2)), tuple(x.shape[2:])


class Stage(nn.Module):
    """A patch embedding and the blocks on its grid, with a CLS token of its own or without."""

    def __init__(self, dim_in: int, spec: StageSpec) -> None:
        super().__init__()
        self.spec, self.num_prefix_tokens = spec, int(spec.cls_token)
        self.patch_embed = ConvEmbed(dim_in, spec)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, spec.dim)) if spec.cls_token else None
        self.pos_drop = nn.Dropout(spec.drop_rate)
        last = max(spec.depth - 1, 1)
        self.blocks = nn.ModuleList(
            ConvBlock(spec, drop_path_rate=spec.drop_path_rate * index / last) for index in range(spec.depth)
        )

    def forward(self, x: Tensor, first_block: int) -> tuple[RaggedTokens, tuple[int, int], list[KeptTokens]]:
        """[B, C_in, H, W] -> the tokens that are left, the grid, and what each ATS block kept.

        Args:
            first_block: number of the stage's first block in the network, for the trace.
        """
        x, grid = self.patch_embed(x)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        x = self.pos_drop(x)
        tokens, trace = None, []
        for index, block in enumerate(self.blocks):
            if not isinstance(block, ConvATSBlock):
                x = run_block(block, x, grid, self.num_prefix_tokens)
                continue
            tokens = begin_ragged(x, grid, self.num_prefix_tokens, self.spec) if tokens is None else tokens
            tokens = run_block(block, tokens, grid)
            if block.sampler is not None:
                trace.append(KeptTokens.of(tokens, first_block + index))
        return RaggedTokens.from_dense(x, self.num_prefix_tokens) if tokens is None else tokens, grid, trace


class CvT(nn.Module):
    """Convolutional vision transformer.

    Attributes:
        head_keys: prefixes of the classifier's keys, which TRAIN.RESET_HEAD leaves fresh.

    Args:
        stages: first to last. The head reads CLS of the last one; where there is none, the mean of its tokens (of those
            kept).
        weight_init: "trunc_norm" (normal, 0.02) or "xavier", of the linear layers.
        samplers: block of the network -> what it keeps; empty for the dense network.
    """

    head_keys: tuple[str, ...] = ("head.",)

    def __init__(
        self,
        *,
        stages: Sequence[StageSpec],
        num_classes: int = 1000,
        head_drop_rate: float = 0.0,
        weight_init: str = "trunc_norm",
        samplers: dict[int, BlockSampler] | None = None,
    ) -> None:
        super().__init__()
        self.num_classes, self.num_stages = num_classes, len(stages)
        dims = [3, *(spec.dim for spec in stages)]
        for index, spec in enumerate(stages):
            self.add_module(f"stage{index}", Stage(dims[index], spec))
        self.norm = nn.LayerNorm(dims[-1], eps=NORM_EPS)
        self.head_drop = nn.Dropout(head_drop_rate)
        self.head = nn.Linear(dims[-1], num_classes)
        self.init_weights(weight_init)
        self.insert_ats(samplers or {})

    @property
    def stages(self) -> list[Stage]:
        """The stages, first to last."""
        return [getattr(self, f"stage{index}") for index in range(self.num_stages)]

    def init_weights(self, scheme: str) -> None:
        """Fresh weights as in the reference; convolutions keep torch's own."""
        for stage in self.stages:
            if stage.cls_token is not None:
                trunc_normal_(stage.cls_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                if scheme == "xavier" and module is not self.head:
                    nn.init.xavier_uniform_(module.weight)
                else:
                    trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def insert_ats(self, samplers: dict[int, BlockSampler]) -> None:
        """Replace the first block with a sampler and all blocks behind it.

        Raises:
            UserError: a block outside the last stage, or a last stage whose keys ATS cannot drop.
        """
        if not samplers:
            return
        stage = self.stages[-1]
        depth = sum(len(stage.blocks) for stage in self.stages)
        first = depth - len(stage.blocks)
        if min(samplers) < first:
            raise UserError(
                f"ATS.BLOCKS {sorted(samplers)}: only the last stage of CvT can sample, which is blocks {first} to "
                f"{depth - 1}."
            )
        check_stage(stage.spec)
        for index in range(min(samplers) - first, len(stage.blocks)):
            stage.blocks[index] = ConvATSBlock(stage.blocks[index], samplers.get(first + index))

    def group_matcher(self, coarse: bool = False) -> dict:
        """Which parameters form a layer, in timm's form, for layer-wise learning rates."""
        return {
            "stages": [
                (r"^stage(\d+)\.(?:patch_embed|cls_token)", None),
                (r"^stage(\d+)\.blocks\.(\d+)", None),
                (r"^norm", (99999,)),
            ]
        }

    def no_weight_decay(self) -> set[str]:
        """Parameters that are never decayed."""
        return {name for name, _ in self.named_parameters() if name.endswith("cls_token")}

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> logits [B, classes]."""
        return self.forward_tokens(x)[0]

    def forward_tokens(self, x: Tensor) -> tuple[Tensor, list[KeptTokens]]:
        """Images [B, 3, H, W] -> logits [B, classes] and, for every ATS block in order, the tokens it kept."""
        first_block = 0
        for stage in self.stages:
            tokens, grid, trace = stage(x, first_block)
            first_block += len(stage.blocks)
            if stage is not self.stages[-1]:
                patches = tokens.layout.pad(tokens.x)[:, stage.num_prefix_tokens :]
                x = patches.transpose(1, 2).unflatten(2, grid)
        return self.head(self.head_drop(self.read_out(tokens))), trace

    def read_out(self, tokens: RaggedTokens) -> Tensor:
        """What the head classifies, [B, C]: CLS, or the mean of the tokens that are left."""
        if tokens.num_prefix_tokens:
            return self.norm(tokens.prefix()[:, 0])
        return tokens.layout.pad(self.norm(tokens.x)).sum(dim=1) / tokens.layout.lengths[:, None]

    def multiply_adds(self, trace: list[KeptTokens], input_shape: tuple[int, ...], *, paper: bool) -> Tensor:
        """Multiply-adds of each image [B] (float64) of a batch of `input_shape`, from the tokens it kept; see
        `ats/flops.py`.
        """
        return cvt_multiply_adds(self, trace, input_shape, paper=paper)


def stages_from_cfg(cvt: CfgNode) -> list[StageSpec]:
    """The stages that the CVT keys describe, one entry of each list for a stage.

    Raises:
        UserError: lists of another length, or entries that do not fit together.
    """
    for key, values in cvt.items():
        if isinstance(values, list) and len(values) != cvt.NUM_STAGES:
            raise UserError(f"CVT.{key} {values}: give {cvt.NUM_STAGES} entries, one for each of CVT.NUM_STAGES.")
    if any(cvt.POS_EMBED):
        logger.warning(
            "CVT.POS_EMBED has no effect: CvT has no position embedding, and the reference reads no such key."
        )
    stages = [
        StageSpec(
            patch_size=cvt.PATCH_SIZE[i],
            patch_stride=cvt.PATCH_STRIDE[i],
            patch_padding=cvt.PATCH_PADDING[i],
            dim=cvt.DIM_EMBED[i],
            num_heads=cvt.NUM_HEADS[i],
            depth=cvt.DEPTH[i],
            mlp_ratio=cvt.MLP_RATIO[i],
            attn_drop_rate=cvt.ATTN_DROP_RATE[i],
            drop_rate=cvt.DROP_RATE[i],
            drop_path_rate=cvt.DROP_PATH_RATE[i],
            qkv_bias=cvt.QKV_BIAS[i],
            cls_token=cvt.CLS_TOKEN[i],
            method=cvt.QKV_PROJ_METHOD[i],
            kernel_qkv=cvt.KERNEL_QKV[i],
            padding_kv=cvt.PADDING_KV[i],
            stride_kv=cvt.STRIDE_KV[i],
            padding_q=cvt.PADDING_Q[i],
            stride_q=cvt.STRIDE_Q[i],
        )
        for i in range(cvt.NUM_STAGES)
    ]
    for index, spec in enumerate(stages):
        if spec.method not in ("dw_bn", "avg", "linear"):
            raise UserError(f"CVT.QKV_PROJ_METHOD {spec.method}: choose from dw_bn, avg, linear.")
        if spec.dim % spec.num_heads:
            raise UserError(
                f"CVT.DIM_EMBED {spec.dim} of stage {index} is not a multiple of CVT.NUM_HEADS {spec.num_heads}."
            )
        if spec.method == "dw_bn" and (spec.stride_q != 1 or 2 * spec.padding_q != spec.kernel_qkv - 1):
            raise UserError(
                f"Stage {index}: queries must keep the grid of the residual, so CVT.STRIDE_Q is 1 and CVT.PADDING_Q "
                f"(CVT.KERNEL_QKV - 1) / 2, not {spec.stride_q} and {spec.padding_q} with kernel {spec.kernel_qkv}."
            )
    return stages


def cvt_from_cfg(cfg: CfgNode) -> CvT:
    """MODEL.NAME CvT, described by the keys of CVT and ATS."""
    stages = stages_from_cfg(cfg.CVT)
    depth = sum(spec.depth for spec in stages)
    return CvT(
        stages=stages,
        num_classes=cfg.MODEL.NUM_CLASSES,
        head_drop_rate=cfg.MODEL.DROPOUT_RATE,
        weight_init=cfg.CVT.INIT,
        samplers=samplers_from_cfg(cfg, depth=depth, num_prefix_tokens=int(stages[-1].cls_token)),
    )
