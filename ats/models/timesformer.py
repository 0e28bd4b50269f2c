"""TimeSformer (Bertasius et al., ICML 2021) with adaptive token sampling: divided space-time, joint and space-only
attention.

Names, shapes and numbers are those of the authors' release (facebookresearch/TimeSformer), so its checkpoints load as
they are. What a sequence is, and so what samples for itself:

* divided: a frame. Its CLS, a copy of the clip's, scores its patches in the spatial attention; the temporal attention
  of the next block runs over the frames in which a position survives;
* joint: the clip, one CLS over all its tokens, in the release's order (patch by patch, time fastest);
* space only: a frame, as if it were an image.

Shapes: B clips, T frames, N = 1 + grid tokens of a frame, C channels, S sequences.
"""

from __future__ import annotations

import logging
from functools import partial

import torch
import torch.nn.functional as F
from fvcore.common.config import CfgNode
from timm.layers import trunc_normal_
from timm.models.vision_transformer import Attention, Block
from torch import Tensor, nn

from ats.attention import ragged_attention
from ats.errors import UserError, suggest
from ats.models.block import ATSBlock, insert_ats, run_blocks, samplers_from_cfg
from ats.models.cost import blocks_multiply_adds, conv_multiply_adds, linear_multiply_adds
from ats.models.vit import VisionTransformer, clip_to_frames, vit_settings_from_cfg
from ats.reduction.sampling import BlockSampler
from ats.tokens import KeptTokens, Layout, RaggedTokens

logger = logging.getLogger(__name__)

ATTENTION_TYPES = ("divided_space_time", "joint_space_time", "space_only")


def tubes(tokens: RaggedTokens) -> tuple[Tensor, Layout]:
    """The patches ordered by tube: all frames' tokens of one position in a clip, in time.

    Returns:
        [P] rows of the patches in `tokens.x`, tubes of equal length next to each other, and the tubes' layout.
    """
    rows = torch.nonzero(tokens.position >= tokens.num_prefix_tokens).squeeze(1)
    clip = tokens.layout.sequence[rows] // tokens.group
    tube = clip * tokens.num_positions + tokens.position[rows]
    num_frames = torch.bincount(tube)
    order = torch.argsort(num_frames[tube] * len(num_frames) + tube, stable=True)
    lengths = num_frames[num_frames > 0].sort().values
    return rows[order], Layout.from_lengths(lengths)


class DividedBlock(ATSBlock):
    """Attention in time, then in space, then the MLP; in the spatial step a sampler drops patches.

    Its tokens are frames [CLS, patches] in which the clip's one CLS stands T times, once in every frame. With nothing
    dropped this is the release's block, so it is also the dense network's.

    Args:
        host: a ViT block; `add_temporal_attention` has given it the temporal modules.
    """

    def forward(self, tokens: RaggedTokens) -> RaggedTokens:
        """Tokens in, the kept ones out, both after a full block."""
        return self.feed_forward(self.attend(self.attend_in_time(tokens)))

    def attend_in_time(self, tokens: RaggedTokens) -> RaggedTokens:
        """Every patch attends to its position in the frames that still have it; CLS takes no part."""
        attn = self.temporal_attn
        rows, layout = tubes(tokens)
        qkv = attn.qkv(self.temporal_norm1(tokens.x.index_select(0, rows)))
        q, k, v = qkv.unflatten(-1, (3, attn.num_heads, -1)).unbind(1)
        dropout_p = attn.attn_drop.p if self.training else 0.0
        out = ragged_attention(q, k, v, queries=layout, keys=layout, scale=attn.scale, dropout_p=dropout_p)
        out = attn.proj_drop(attn.proj(out.flatten(1)))
        out = self.temporal_fc(self.drop_path(self.drop_path1, out, layout))
        return tokens.with_x(tokens.x.index_add(0, rows, out.to(tokens.x.dtype)))

    def feed_forward(self, tokens: RaggedTokens) -> RaggedTokens:
        """CLS becomes the mean of its T copies, which differ after the spatial step; the MLP runs on it once."""
        x, group = tokens.x, tokens.group
        cls_rows = tokens.prefix_index()
        first = cls_rows[::group]
        x = x.index_copy(0, first, x[cls_rows].unflatten(0, (-1, group)).mean(dim=1))
        chosen = tokens.position > 0
        chosen[first] = True
        rows = torch.nonzero(chosen).squeeze(1)
        layout = Layout.from_lengths(tokens.layout.lengths.unflatten(0, (-1, group)).sum(dim=1) - (group - 1))
        out = x.index_select(0, rows)
        out = out + self.drop_path(self.drop_path2, self.ls2(self.mlp(self.norm2(out))), layout)
        x = x.to(out.dtype).index_copy(0, rows, out)
        return tokens.with_x(x.index_copy(0, cls_rows, x[first].repeat_interleave(group, dim=0)))


def add_temporal_attention(block: Block, *, attn_drop_rate: float = 0.0, proj_drop_rate: float = 0.0) -> Block:
    """Give a ViT block the modules of the temporal step; its last layer is zero: it begins as the image block."""
    dim, num_heads = block.attn.qkv.in_features, block.attn.num_heads
    block.temporal_norm1 = nn.LayerNorm(dim, eps=1e-6)
    block.temporal_attn = Attention(
        dim,
        num_heads,
        qkv_bias=block.attn.qkv.bias is not None,
        attn_drop=attn_drop_rate,
        proj_drop=proj_drop_rate,
    )
    block.temporal_fc = nn.Linear(dim, dim)
    for layer in (block.temporal_attn.qkv, block.temporal_attn.proj):
        trunc_normal_(layer.weight, std=0.02)
    for bias in (block.temporal_attn.qkv.bias, block.temporal_attn.proj.bias):
        if bias is not None:
            nn.init.zeros_(bias)
    nn.init.zeros_(block.temporal_fc.weight)
    nn.init.zeros_(block.temporal_fc.bias)
    return block


class TimeSformer(VisionTransformer):
    """TimeSformer.

    Args:
        attention_type: one of ATTENTION_TYPES.
        temporal_embed_len: length of the time embedding; clips of another length resize it (nearest) as they come.
        samplers: block -> what it keeps; empty for the dense network.
        settings: arguments of VisionTransformer.
    """

    def __init__(
        self,
        *,
        attention_type: str = "divided_space_time",
        temporal_embed_len: int = 8,
        samplers: dict[int, BlockSampler] | None = None,
        **settings,
    ) -> None:
        if attention_type not in ATTENTION_TYPES:
            raise UserError(
                f"TIMESFORMER.ATTENTION_TYPE {attention_type}: choose from {', '.join(ATTENTION_TYPES)}."
                f"{suggest(attention_type, ATTENTION_TYPES)}"
            )
        samplers = samplers or {}
        if attention_type == "joint_space_time" and any(sampler.share_frames for sampler in samplers.values()):
            raise UserError(
                "ATS.SHARE_FRAMES True has no meaning with TIMESFORMER.ATTENTION_TYPE joint_space_time, which samples "
                "from the whole clip at once; set it to False."
            )
        super().__init__(**settings)
        self.attention_type = attention_type
        if attention_type != "space_only":
            self.time_embed = nn.Parameter(torch.zeros(1, temporal_embed_len, self.embed_dim))
        if attention_type == "divided_space_time":
            drop_rates = {
                "attn_drop_rate": settings.get("attn_drop_rate", 0.0),
                "proj_drop_rate": settings.get("drop_rate", 0.0),
            }
            for index, block in enumerate(self.blocks):
                self.blocks[index] = DividedBlock(add_temporal_attention(block, **drop_rates), samplers.get(index))
        else:
            insert_ats(self.blocks, samplers)

    def no_weight_decay(self) -> set[str]:
        """Parameters that are never decayed."""
        return super().no_weight_decay() | {"time_embed"}

    def group_matcher(self, coarse: bool = False) -> dict:
        """Which parameters form a layer, in timm's form, for layer-wise learning rates."""
        matcher = super().group_matcher(coarse)
        return matcher | {"stem": matcher["stem"] + "|time_embed"}

    def forward_tokens(self, x: Tensor) -> tuple[Tensor, list[KeptTokens]]:
        """Clips [B, 3, T, H, W] -> logits [B, classes] and, for every ATS block in order, the tokens it kept of each
        frame (divided, space only) or clip (joint).
        """
        num_clips, _, num_frames = x.shape[:3]
        frames = self.embed(clip_to_frames(x))
        if self.attention_type != "space_only":
            frames = self.add_time(frames.unflatten(0, (-1, num_frames)))  # [B, T, N, C]
            if self.attention_type == "joint_space_time":
                patches = frames[:, :, 1:].transpose(1, 2).flatten(1, 2)
                frames = torch.cat([frames[:, 0, :1], patches], dim=1)
                num_frames = 1  # from here on a clip is one sequence
            else:
                frames = frames.flatten(0, 1)
        tokens, trace = run_blocks(self.blocks, frames, num_prefix_tokens=1, group=num_frames)
        cls = tokens.prefix().unflatten(0, (num_clips, num_frames))
        # Copies of one CLS in the divided network; the mean over frames is the space-only network's.
        cls = cls.mean(dim=1) if self.attention_type == "space_only" else cls[:, 0]
        return self.classify(self.norm(cls)), trace

    def add_time(self, frames: Tensor) -> Tensor:
        """[B, T, N, C] -> [B, T, N, C], the time embedding added to the patches; CLS gets none."""
        time_embed = _resize_time(self.time_embed, frames.shape[1]).transpose(0, 1)[None]
        return torch.cat([frames[:, :, :1], self.pos_drop(frames[:, :, 1:] + time_embed)], dim=2)

    def resize_positions(self, pos_embed: Tensor, grid: tuple[int, int], old_grid: tuple[int, int]) -> Tensor:
        """As the release resizes it: the nearest entry."""
        patches = pos_embed[:, 1:].unflatten(1, old_grid).permute(0, 3, 1, 2)
        patches = F.interpolate(patches, size=grid, mode="nearest")
        return torch.cat([pos_embed[:, :1], patches.flatten(2).transpose(1, 2)], dim=1)

    def adapt_state_dict(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights of the release, or of an image ViT to start a training from, as this model's.

        From an image ViT the temporal attention takes over the spatial one and its norm, the layer behind it and the
        time embedding are zero, as in the release: the network begins as the image network on every frame.
        """
        state = super().adapt_state_dict(state)
        if self.attention_type == "space_only":
            return state
        if "time_embed" in state:
            if state["time_embed"].ndim == 3 and state["time_embed"].shape[1] != self.time_embed.shape[1]:
                logger.info(
                    "Time embedding resized from %d frames to %d.",
                    state["time_embed"].shape[1],
                    self.time_embed.shape[1],
                )
                state["time_embed"] = _resize_time(state["time_embed"], self.time_embed.shape[1])
            return state
        logger.warning("Weights of an image network: the temporal ones are made from the spatial ones.")
        state["time_embed"] = torch.zeros_like(self.time_embed)
        if self.attention_type == "divided_space_time":
            for key in [key for key in state if ".attn." in key or ".norm1." in key]:
                state[key.replace(".attn.", ".temporal_attn.").replace(".norm1.", ".temporal_norm1.")] = state[key]
            for key, value in self.state_dict().items():
                if ".temporal_fc." in key:
                    state[key] = torch.zeros_like(value)
        return state

    def multiply_adds(self, trace: list[KeptTokens], input_shape: tuple[int, ...], *, paper: bool) -> Tensor:
        """Multiply-adds of each clip [B] (float64) of a batch of `input_shape`, from the tokens it kept; see
        `ats/flops.py`.
        """
        batch_size, _, num_frames, height, width = input_shape
        grid = (height // self.patch_size) * (width // self.patch_size)
        stem_and_head = num_frames * conv_multiply_adds(self.patch_embed.proj, grid) + linear_multiply_adds(self.head)
        blocks = partial(blocks_multiply_adds, self.blocks, trace, paper=paper)
        if self.attention_type == "joint_space_time":
            return blocks(1 + grid * num_frames, batch_size) + stem_and_head
        frames = blocks(1 + grid, batch_size * num_frames, num_frames=num_frames)
        total = frames.reshape(batch_size, num_frames).sum(dim=1) + stem_and_head
        if self.attention_type == "space_only":
            return total
        return total + self._temporal_multiply_adds(trace, batch_size, num_frames, grid)

    def _temporal_multiply_adds(self, trace: list[KeptTokens], batch_size: int, num_frames: int, grid: int) -> Tensor:
        """What a divided network computes of B clips [B] on top of its spatial blocks, less the MLP's copies of CLS."""
        dim, hidden = self.embed_dim, self.blocks[0].mlp.fc1.out_features
        left = {entry.block: entry for entry in trace}
        device = trace[0].num_tokens.device if trace else None
        lengths = torch.full((batch_size, grid), num_frames, dtype=torch.float64, device=device)  # of the tubes
        total = torch.zeros(batch_size, dtype=torch.float64, device=device)
        for index in range(len(self.blocks)):
            # qkv, proj and temporal_fc on every patch, attention within every tube
            total = total + 5 * lengths.sum(dim=1) * dim * dim + 2 * (lengths**2).sum(dim=1) * dim
            total = total - (num_frames - 1) * 2 * dim * hidden
            if index in left:
                lengths = _tube_lengths(left[index], batch_size, num_frames, grid)
        return total


def _resize_time(time_embed: Tensor, num_frames: int) -> Tensor:
    """[1, T', C] -> [1, T, C], the nearest entry, as in the release."""
    if time_embed.shape[1] == num_frames:
        return time_embed
    return F.interpolate(time_embed.transpose(1, 2), size=num_frames, mode="nearest").transpose(1, 2)


def _tube_lengths(entry: KeptTokens, batch_size: int, num_frames: int, grid: int) -> Tensor:
    """[B, grid] float64: in how many frames of each clip a patch survives."""
    clip = torch.arange(batch_size * num_frames, device=entry.num_tokens.device) // num_frames
    clip = clip.repeat_interleave(entry.num_tokens)
    count = torch.bincount(clip * (1 + grid) + entry.position, minlength=batch_size * (1 + grid))
    return count.reshape(batch_size, 1 + grid)[:, 1:].double()


def timesformer_from_cfg(cfg: CfgNode) -> TimeSformer:
    """MODEL.NAME TimeSformer, described by the keys of VIT, TIMESFORMER and ATS."""
    if cfg.MODEL.DROPOUT_RATE:
        logger.warning(
            "MODEL.DROPOUT_RATE has no effect: TimeSformer has no dropout before its head, as in the release."
        )
    return TimeSformer(
        **vit_settings_from_cfg(cfg) | {"head_drop_rate": 0.0},
        attention_type=cfg.TIMESFORMER.ATTENTION_TYPE,
        temporal_embed_len=cfg.TIMESFORMER.TEMPORAL_EMBED_LEN or cfg.DATA.NUM_FRAMES,
        samplers=samplers_from_cfg(cfg, depth=cfg.VIT.DEPTH, num_prefix_tokens=1),
    )
