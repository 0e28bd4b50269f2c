"""TimeSformer (Bertasius et al., ICML 2021) with adaptive token sampling: divided space-time, joint and space-only
attention.

Names, shapes and numbers are the authors' (facebookresearch/TimeSformer), so released checkpoints load unchanged. ATS
samples from each sequence. A sequence is

* divided: a frame. Its copy of the clip's CLS scores its patches in the spatial attention; the temporal attention of
  the next block runs over the frames that kept a position;
* joint: a clip, one CLS for all its tokens, in the release's order (patch by patch, time fastest);
* space only: a frame, as if it were an image.

Shapes: B clips, T frames, N = 1 + grid tokens of a frame, C channels, S sequences.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from fvcore.common.config import CfgNode
from timm.models.vision_transformer import Attention, Block
from torch import Tensor, nn

from ats.attention import ragged_attention
from ats.errors import UserError
from ats.models.backbone import Records, init_linears, reductions_from_cfg
from ats.models.block import ATSBlock
from ats.models.cost import BlockGrid, linear_multiply_adds
from ats.models.vit import VisionTransformer, clip_to_frames, vit_settings_from_cfg
from ats.reduction import Reduction
from ats.tokens import KeptTokens, Layout, RaggedTokens

logger = logging.getLogger(__name__)

ATTENTION_TYPES = ("divided_space_time", "joint_space_time", "space_only")


def tubes(tokens: RaggedTokens) -> tuple[Tensor, Layout]:
    """Group patches into tubes: a tube is one position in all frames of a clip that kept it. Returns [P] rows of the
    patches in `tokens.x`, sorted by tube length, and the tubes' layout.
    """
    rows = torch.nonzero(tokens.position >= tokens.num_prefix_tokens).squeeze(1)
    clip = tokens.layout.sequence[rows] // tokens.frames_per_clip
    tube = clip * tokens.num_positions + tokens.position[rows]
    num_frames = torch.bincount(tube)
    order = torch.argsort(num_frames[tube] * len(num_frames) + tube, stable=True)
    lengths = num_frames[num_frames > 0].sort().values
    return rows[order], Layout.from_lengths(lengths)


class DividedBlock(ATSBlock):
    """Attention in time, then in space, which drops patches, then the MLP.

    Its sequences are frames [CLS, patches]: each frame has a copy of the clip's CLS. Without a reduction this is the
    release's block, so the dense network uses it too.

    Args:
        base_block: a ViT block with the modules of `add_temporal_attention`.
    """

    def prepare(self, tokens: RaggedTokens) -> RaggedTokens:
        """Attention in time: a patch attends to its position in the frames that kept it. CLS and fused tokens do not
        change.
        """
        attn = self.temporal_attn
        rows, layout = tubes(tokens)
        qkv = attn.qkv(self.temporal_norm1(tokens.x.index_select(0, rows)))
        q, k, v = qkv.unflatten(-1, (3, attn.num_heads, -1)).unbind(1)
        dropout_p = attn.attn_drop.p if self.training else 0.0
        out = ragged_attention(q, k, v, queries=layout, keys=layout, scale=attn.scale, dropout_p=dropout_p)
        out = attn.proj_drop(attn.proj(out.flatten(1)))
        out = self.temporal_fc(self.drop_sequences(self.drop_path1, out, layout))
        return tokens.with_x(tokens.x.index_add(0, rows, out.to(tokens.x.dtype)))

    def finish(self, tokens: RaggedTokens) -> RaggedTokens:
        """CLS becomes the mean of its T copies, which differ after the spatial step; the MLP runs on one copy."""
        x, frames = tokens.x, tokens.frames_per_clip
        cls_rows = tokens.prefix_index()
        first = cls_rows[::frames]
        x = x.index_copy(0, first, x[cls_rows].unflatten(0, (-1, frames)).mean(dim=1))
        chosen = tokens.position != 0
        chosen[first] = True
        rows = torch.nonzero(chosen).squeeze(1)
        layout = Layout.from_lengths(tokens.layout.lengths.unflatten(0, (-1, frames)).sum(dim=1) - (frames - 1))
        out = x.index_select(0, rows)
        out = out + self.drop_sequences(self.drop_path2, self.ls2(self.mlp(self.norm2(out))), layout)
        x = x.to(out.dtype).index_copy(0, rows, out)
        return tokens.with_x(x.index_copy(0, cls_rows, x[first].repeat_interleave(frames, dim=0)))


def add_temporal_attention(block: Block, *, attn_drop: float, proj_drop: float) -> Block:
    """Give a ViT block the modules of the temporal step. Its last layer is zero, so at first it is the image block."""
    dim, num_heads, qkv_bias = block.attn.qkv.in_features, block.attn.num_heads, block.attn.qkv.bias is not None
    block.temporal_norm1 = nn.LayerNorm(dim, eps=1e-6)
    block.temporal_attn = Attention(dim, num_heads, qkv_bias=qkv_bias, attn_drop=attn_drop, proj_drop=proj_drop)
    block.temporal_fc = nn.Linear(dim, dim)
    init_linears(block.temporal_attn)
    init_linears(block.temporal_fc, nn.init.zeros_)
    return block


class TimeSformer(VisionTransformer):
    """TimeSformer.

    Args:
        attention_type: one of ATTENTION_TYPES.
        temporal_embed_len: length of the time embedding; clips of another length resize it (nearest) on the fly.
        settings: arguments of VisionTransformer.
    """

    layouts = ("packed",)
    resize_mode = "nearest"

    def __init__(
        self,
        *,
        attention_type: str = "divided_space_time",
        temporal_embed_len: int = 8,
        reductions: dict[int, Reduction] | None = None,
        **settings: Any,
    ) -> None:
        assert attention_type in ATTENTION_TYPES, attention_type
        reductions = reductions or {}
        if attention_type == "joint_space_time" and any(r.share_frames for r in reductions.values()):
            raise UserError(
                "ATS.SHARE_FRAMES True has no meaning with TIMESFORMER.ATTENTION_TYPE joint_space_time, which samples "
                "from the whole clip at once; set it to False."
            )
        super().__init__(**settings)
        self.attention_type = attention_type
        if attention_type != "space_only":
            self.time_embed = nn.Parameter(torch.zeros(1, temporal_embed_len, self.embed_dim))
        if attention_type == "divided_space_time":
            self.check_reductions(reductions.values())
            rates = {"attn_drop": settings.get("attn_drop_rate", 0.0), "proj_drop": settings.get("drop_rate", 0.0)}
            for index, block in enumerate(self.blocks):
                self.blocks[index] = DividedBlock(add_temporal_attention(block, **rates), reductions.get(index), index)
        else:
            self.reduce_blocks(reductions)

    def run(self, x: Tensor) -> tuple[Tensor, Records]:
        tokens = self.encode(x)
        cls = tokens.prefix().unflatten(0, (len(x), tokens.frames_per_clip))
        # Divided: all frames have the same CLS. Space only: the mean over frames.
        cls = cls.mean(dim=1) if self.attention_type == "space_only" else cls[:, 0]
        return self.classify(self.norm(cls)), tokens.trace

    def encode(self, x: Tensor, *, restore: str = "zero") -> RaggedTokens:
        num_frames = x.shape[2]
        frames = self.embed(clip_to_frames(x))
        if self.attention_type != "space_only":
            frames = self.add_time(frames.unflatten(0, (-1, num_frames)))  # [B, T, N, C]
            if self.attention_type == "joint_space_time":
                patches = frames[:, :, 1:].transpose(1, 2).flatten(1, 2)
                frames = torch.cat([frames[:, 0, :1], patches], dim=1)
                num_frames = 1  # a clip is one sequence now
            else:
                frames = frames.flatten(0, 1)
        return self.run_blocks(frames, frames_per_clip=num_frames, restore=restore)

    def add_time(self, frames: Tensor) -> Tensor:
        """Add the time embedding to the patches, not to CLS: [B, T, N, C] -> [B, T, N, C]."""
        time_embed = _resize_time(self.time_embed, frames.shape[1]).transpose(0, 1)[None]
        return torch.cat([frames[:, :, :1], self.pos_drop(frames[:, :, 1:] + time_embed)], dim=2)

    def adapt_state_dict(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights of the release, or of an image ViT to start training from, for this model.

        From an image ViT, the temporal attention and its norm copy the spatial ones; the layer after it and the time
        embedding are zero, as in the release. At first the network is the image network on each frame.
        """
        state = super().adapt_state_dict(state)
        if self.attention_type == "space_only":
            return state
        if "time_embed" in state:
            released, num_frames = state["time_embed"], self.time_embed.shape[1]
            if released.ndim == 3 and released.shape[1] != num_frames:
                logger.info("Time embedding resized from %d frames to %d.", released.shape[1], num_frames)
                state["time_embed"] = _resize_time(released, num_frames)
            return state
        logger.warning("Weights of an image network: initialising the temporal weights from the spatial ones.")
        state["time_embed"] = torch.zeros_like(self.time_embed)
        if self.attention_type == "divided_space_time":
            for key in [key for key in state if ".attn." in key or ".norm1." in key]:
                state[key.replace(".attn.", ".temporal_attn.").replace(".norm1.", ".temporal_norm1.")] = state[key]
            for key, value in self.state_dict().items():
                if ".temporal_fc." in key:
                    state[key] = torch.zeros_like(value)
        return state

    def block_grids(self, input_shape: Sequence[int]) -> list[BlockGrid]:
        joint = self.attention_type == "joint_space_time"
        grid = BlockGrid.of(input_shape[2] if joint else 1, *self.patch_grid(input_shape), time_last=joint)
        return [grid] * len(self.blocks)

    def sequences_per_sample(self, input_shape: Sequence[int]) -> int:
        return 1 if self.attention_type == "joint_space_time" else input_shape[2]

    def stem_multiply_adds(self, trace: Sequence[KeptTokens], input_shape: Sequence[int]) -> float:
        frame, head = super().stem_multiply_adds(trace, input_shape), linear_multiply_adds(self.head)
        return input_shape[2] * (frame - head) + head

    def block_multiply_adds(
        self, trace: Sequence[KeptTokens], input_shape: Sequence[int], *, paper: bool
    ) -> list[Tensor]:
        """Of each block, [B] float64, with the attention in time. The MLP runs on one copy of CLS."""
        costs = super().block_multiply_adds(trace, input_shape, paper=paper)
        if self.attention_type != "divided_space_time":
            return costs
        num_clips, _, num_frames = input_shape[:3]
        height, width = self.patch_grid(input_shape)
        dim, hidden = self.embed_dim, self.blocks[0].mlp.fc1.out_features
        kept = {entry.block: entry for entry in trace}
        lengths = costs[0].new_full((num_clips, height * width), num_frames)  # of the tubes
        for index in range(len(costs)):
            # qkv, proj and temporal_fc on every patch, attention within every tube
            in_time = 5 * lengths.sum(dim=1) * dim * dim + 2 * (lengths**2).sum(dim=1) * dim
            costs[index] = costs[index] + in_time - (num_frames - 1) * 2 * dim * hidden
            if index in kept:
                lengths = _tube_lengths(kept[index], num_clips, num_frames, height * width)
        return costs


def _resize_time(time_embed: Tensor, num_frames: int) -> Tensor:
    """[1, T', C] -> [1, T, C], nearest as in the release."""
    if time_embed.shape[1] == num_frames:
        return time_embed
    return F.interpolate(time_embed.transpose(1, 2), size=num_frames, mode="nearest").transpose(1, 2)


def _tube_lengths(entry: KeptTokens, batch_size: int, num_frames: int, grid: int) -> Tensor:
    """[B, grid] float64: the number of frames of each clip that kept a position."""
    clip = torch.arange(batch_size * num_frames, device=entry.num_tokens.device) // num_frames
    clip, position = clip.repeat_interleave(entry.num_tokens), entry.position
    has_place = position >= 0  # a fused token has none
    index = clip[has_place] * (1 + grid) + position[has_place]
    count = torch.bincount(index, minlength=batch_size * (1 + grid))
    return count.reshape(batch_size, 1 + grid)[:, 1:].double()


def timesformer_from_cfg(cfg: CfgNode) -> TimeSformer:
    """MODEL.NAME TimeSformer, described by the VIT, TIMESFORMER and ATS keys."""
    if cfg.MODEL.DROPOUT_RATE:
        logger.warning(
            "MODEL.DROPOUT_RATE has no effect: TimeSformer has no dropout before its head, as in the release."
        )
    return TimeSformer(
        **vit_settings_from_cfg(cfg) | {"head_drop_rate": 0.0},
        attention_type=cfg.TIMESFORMER.ATTENTION_TYPE,
        temporal_embed_len=cfg.TIMESFORMER.TEMPORAL_EMBED_LEN or cfg.DATA.NUM_FRAMES,
        reductions=reductions_from_cfg(cfg, depth=cfg.VIT.DEPTH, num_prefix_tokens=1),
    )
