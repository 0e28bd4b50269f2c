"""X-ViT (Bulat et al., NeurIPS 2021) with adaptive token sampling: a ViT on each frame, with keys and values shifted
between neighbouring frames, and a small transformer over the frames' CLS tokens.

Names, shapes and numbers are the authors' (1adrianb/video-transformers), so released checkpoints load unchanged. Each
frame is a sequence with its own CLS: it scores and keeps its own patches. With ATS.SHARE_FRAMES, all frames of a
segment keep the same patches.

The shift reads the same patch in the next and the previous frame. After an ATS block such a neighbour may be missing;
its channels are then zeros, as at the ends of a segment. A fused token has no position and keeps its own channels.

Shapes: B clips, T frames, N = 1 + grid tokens of a frame, C channels, R packed tokens of all frames, H heads of D
channels.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from fvcore.common.config import CfgNode
from timm.models.vision_transformer import Attention, Block
from torch import Tensor, nn

from ats.errors import UserError
from ats.models.backbone import Backbone, Records, reductions_from_cfg, settings
from ats.models.block import ATSBlock
from ats.models.cost import BlockGrid, linear_multiply_adds, vit_block_multiply_adds
from ats.models.vit import VisionTransformer, clip_to_frames, vit_settings_from_cfg
from ats.reduction import Reduction
from ats.tokens import KeptTokens, RaggedTokens

logger = logging.getLogger(__name__)


def shift_frames(x: Tensor, *, frames: int, fold: int) -> Tensor:
    """The shift in time of dense frames [B*T, N, C] within segments of `frames` frames.

    Channels 0 .. fold - 1 come from the same token of the next frame, the following `fold` from the previous frame;
    zeros where a segment has no such frame. The rest does not change. Channel c is head * D + d.
    """
    following, preceding, own = x.unflatten(0, (-1, frames)).tensor_split([fold, 2 * fold], dim=-1)
    following = torch.cat([following[:, 1:], torch.zeros_like(following[:, :1])], dim=1)
    preceding = torch.cat([torch.zeros_like(preceding[:, :1]), preceding[:, :-1]], dim=1)
    return torch.cat([following, preceding, own], dim=-1).flatten(0, 1)


def neighbours(tokens: RaggedTokens) -> tuple[Tensor, Tensor]:
    """Rows of the same patch in the next and in the previous frame, each [R]. A missing one is R, one past the end. A
    fused token is its own neighbour.
    """
    place = tokens.grid_index
    table = tokens.row_at_position.reshape(-1, tokens.frames_per_clip, tokens.num_positions)
    nothing = torch.full_like(table[:, :1], len(place))
    following = torch.cat([table[:, 1:], nothing], dim=1).flatten()[place]
    preceding = torch.cat([nothing, table[:, :-1]], dim=1).flatten()[place]
    if tokens.has_fused:
        is_fused, own = tokens.position < 0, torch.arange(len(place), device=place.device)
        following, preceding = (torch.where(is_fused, own, rows) for rows in (following, preceding))
    return following, preceding


def shift_tokens(x: Tensor, following: Tensor, preceding: Tensor, *, fold: int) -> Tensor:
    """`shift_frames` for packed tokens [R, C], with the rows of `neighbours`. The same as scattering to the grid,
    shifting and gathering, but moves only the shifted channels.
    """
    shifted = F.pad(x[:, : 2 * fold], (0, 0, 0, 1))  # row R: no neighbour
    parts = shifted[:, :fold].index_select(0, following), shifted[:, fold:].index_select(0, preceding), x[:, 2 * fold :]
    return torch.cat(parts, dim=1)


class ShiftedAttention(nn.Module):
    """timm's Attention `base` with keys and values shifted in time within segments of `frames` frames: `fold` channels
    from the next frame, and the same number from the previous frame.
    """

    def __init__(self, base: Attention, *, frames: int, fold: int) -> None:
        super().__init__()
        self.__dict__.update(base.__dict__)
        self.frames, self.fold = frames, fold

    def forward(self, x: Tensor, attn_mask: None = None, is_causal: bool = False) -> Tensor:
        """Dense frames [B*T, N, C] -> [B*T, N, C]; it ignores timm's other arguments."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        k, v = (shift_frames(t, frames=self.frames, fold=self.fold) for t in (k, v))
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
        dropout_p = self.attn_drop.p if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, scale=self.scale)
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))


class ShiftedATSBlock(ATSBlock):
    """An ATSBlock on frames; keys and values are shifted in time where the base block's are."""

    def project_kv(self, x: Tensor, tokens: RaggedTokens) -> tuple[Tensor, Tensor]:
        """Keys and values, each [R, H, D], after the shift: a token is scored by the values it contributes."""
        k, v = super().project_kv(x, tokens)
        if not isinstance(self.attn, ShiftedAttention):
            return k, v
        rows = neighbours(tokens)
        k, v = (shift_tokens(t.flatten(1), *rows, fold=self.attn.fold).view_as(t) for t in (k, v))
        return k, v


class FrameTransformer(VisionTransformer):
    """X-ViT's backbone: a ViT on frames with a temporal embedding and, in `shifted_blocks`, shifted attention.

    Args:
        num_segments: frames of a segment, within which keys and values are shifted.
        shift_div: 1 / shift_div of the channels come from the next frame, the same share from the previous frame (none
            if it is 1).
        shifted_blocks: the blocks that shift; blocks that do not exist are ignored, as in the released configs.
        temporal_embed_len: length F of the temporal embedding; frame i of a clip gets entry i mod F.
        classify_frames: the backbone ends in a classifier; otherwise in dropout.
    """

    layouts = ("packed",)
    resize_mode = "bicubic"

    def __init__(
        self,
        *,
        num_segments: int,
        shift_div: int,
        shifted_blocks: Iterable[int],
        temporal_embed_len: int,
        classify_frames: bool,
        reductions: dict[int, Reduction] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        self.num_segments = num_segments
        self.temp_embed = nn.Parameter(torch.zeros(1, temporal_embed_len, 1, self.embed_dim))
        for index in set(shifted_blocks) & set(range(len(self.blocks))):
            block = self.blocks[index]
            block.attn = ShiftedAttention(block.attn, frames=num_segments, fold=self.embed_dim // shift_div)
        if classify_frames:
            nn.init.normal_(self.head.weight, std=0.001)
        else:
            self.head, self.head_drop = nn.Dropout(self.head_drop.p), nn.Identity()
        self.reduce_blocks(reductions, ShiftedATSBlock)

    def run(self, x: Tensor) -> tuple[Tensor, Records]:
        """Clips [B, 3, T, H, W] -> [B*T, C], or the frames' logits."""
        tokens = self.encode(x)
        return self.classify(self.norm(tokens.prefix())), tokens.trace

    def encode(self, x: Tensor, *, restore: str = "zero") -> RaggedTokens:
        """As in ViT. Raises a UserError unless the frames divide into segments and temporal embeddings."""
        frames = self.embed(clip_to_frames(x))
        lengths = {"XVIT.NUM_SEGMENTS": self.num_segments, "XVIT.TEMPORAL_EMBED_LEN": self.temp_embed.shape[1]}
        for name, length in lengths.items():
            if x.shape[2] % length:
                raise UserError(f"Clips of {x.shape[2]} frames: DATA.NUM_FRAMES must be a multiple of {name} {length}.")
        frames = (frames.unflatten(0, (-1, self.temp_embed.shape[1])) + self.temp_embed).flatten(0, 1)
        return self.run_blocks(frames, frames_per_clip=self.num_segments, restore=restore)


class TemporalHead(nn.Module):
    """A transformer over the frames' CLS tokens with its own CLS and a two-layer classifier.

    It has no positions in time, no bias in queries, keys and values, and LayerNorms with epsilon 1e-5.
    """

    def __init__(
        self,
        *,
        embed_dim: int,
        num_classes: int,
        head_drop_rate: float,
        num_attention_heads: int,
        num_hidden_layers: int,
        mlp_dim: int,
        hidden_dropout_prob: float,
        attention_probs_dropout_prob: float,
    ) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        options: dict[str, Any] = {"proj_drop": hidden_dropout_prob, "drop_path": hidden_dropout_prob}
        options |= {"attn_drop": attention_probs_dropout_prob, "norm_layer": partial(nn.LayerNorm, eps=1e-5)}
        blocks = (Block(embed_dim, num_attention_heads, **options) for _ in range(num_hidden_layers))
        self.temporal_encoder = nn.Sequential(*blocks)
        self.mlp_head = nn.Sequential(
            nn.LayerNorm(embed_dim),
            nn.Linear(embed_dim, mlp_dim),
            nn.GELU(),
            nn.Dropout(head_drop_rate),
            nn.Linear(mlp_dim, num_classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        """CLS tokens of the frames [B, T, C] -> logits [B, classes]."""
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        return self.mlp_head(self.temporal_encoder(x)[:, 0])

    def multiply_adds(self, num_frames: int) -> float:
        """Multiply-adds of one clip."""
        record = BlockGrid.of(num_frames, 1, 1).dense_record(0, 1, 1)
        blocks = sum(vit_block_multiply_adds(block, record, paper=True).item() for block in self.temporal_encoder)
        return blocks + sum(linear_multiply_adds(self.mlp_head[i]) for i in (1, 4))


class XViT(Backbone):
    """X-ViT.

    Args:
        temporal_head: arguments of TemporalHead; None averages the frames' logits instead.
        before_softmax: without a temporal head, average logits (True) or probabilities (False; the output is then
            probabilities).
        settings: arguments of FrameTransformer.
    """

    head_keys = ("consensus.mlp_head.4.", "new_fc.", "base_model.head.")
    num_prefix_tokens = 1
    layer_patterns: ClassVar[dict] = {
        "stem": r"^base_model\.(?:cls_token|pos_embed|temp_embed|patch_embed)",
        "blocks": [(r"^base_model\.blocks\.(\d+)", None), (r"^base_model\.norm", (99999,))],
    }

    def __init__(self, *, temporal_head: dict | None, before_softmax: bool = True, **settings: Any) -> None:
        super().__init__()
        num_classes, drop_rate, embed_dim = (settings[name] for name in ("num_classes", "head_drop_rate", "embed_dim"))
        # Without dropout the release's backbone ends in a classifier, even before its temporal head. The head needs
        # embed_dim inputs, so for any other number of classes the release breaks, and we leave the classifier out.
        classify_frames = drop_rate == 0 and (temporal_head is None or num_classes == embed_dim)
        self.base_model = FrameTransformer(classify_frames=classify_frames, **settings)
        self.consensus = self.new_fc = None
        if temporal_head is not None:
            self.consensus = TemporalHead(
                embed_dim=embed_dim, num_classes=num_classes, head_drop_rate=drop_rate, **temporal_head
            )
        elif not classify_frames:
            self.new_fc = nn.Linear(embed_dim, num_classes)
            nn.init.normal_(self.new_fc.weight, std=0.001)
            nn.init.zeros_(self.new_fc.bias)
        self.num_classes, self.before_softmax = num_classes, before_softmax
        self.gives_probabilities = self.consensus is None and not before_softmax

    def run(self, x: Tensor) -> tuple[Tensor, Records]:
        frames, records = self.base_model.run(x)
        frames = frames.unflatten(0, (len(x), x.shape[2]))
        if self.consensus is not None:
            return self.consensus(frames), records
        logits = frames if self.new_fc is None else self.new_fc(frames)
        return (logits if self.before_softmax else logits.softmax(dim=-1)).mean(dim=1), records

    def forward_features(self, x: Tensor, *, restore: str = "zero") -> Tensor:
        """[B*T, N, C] features of the frames' tokens, see `VisionTransformer.forward_features`."""
        with self.fastest_kernels(x):
            return self.base_model.forward_features(x, restore=restore)

    def adapt_state_dict(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights of the release, or of an image ViT to start training from, for this model.

        Drops classifiers that this network does not have, keeps the initial values of weights that an image ViT does
        not have, and logs both.
        """
        expected = self.state_dict()
        if not any(key.startswith("base_model.") for key in state):
            own = ("consensus.", "new_fc.")
            state = {key if key.startswith(own) else f"base_model.{key}": value for key, value in state.items()}
        backbone = {key.removeprefix("base_model."): v for key, v in state.items() if key.startswith("base_model.")}
        adapted = {f"base_model.{key}": value for key, value in self.base_model.adapt_state_dict(backbone).items()}
        state = {key: value for key, value in state.items() if not key.startswith("base_model.")} | adapted
        classifiers = ("new_fc.", "base_model.head.", "base_model.pre_logits.")  # of the release or of image networks
        unused = [key for key in state if key not in expected and key.startswith(classifiers)]
        if unused:
            logger.info("Not used by this network: %s.", ", ".join(unused))
        state = {key: value for key, value in state.items() if key not in unused}
        if "base_model.temp_embed" not in state:  # an image ViT
            fresh = {key for key in expected if key not in state and not key.startswith("base_model.blocks.")}
            logger.warning("Weights of an image network; left as initialised: %s.", ", ".join(sorted(fresh)))
            state |= {key: expected[key] for key in fresh}
        return state

    def block_list(self) -> list[nn.Module]:
        return self.base_model.block_list()

    def block_grids(self, input_shape: Sequence[int]) -> list[BlockGrid]:
        return self.base_model.block_grids(input_shape)

    def sequences_per_sample(self, input_shape: Sequence[int]) -> int:
        return input_shape[2]

    def stem_multiply_adds(self, trace: Sequence[KeptTokens], input_shape: Sequence[int]) -> float:
        per_frame = self.base_model.stem_multiply_adds(trace, input_shape)
        per_frame += 0 if self.new_fc is None else linear_multiply_adds(self.new_fc)
        head = 0 if self.consensus is None else self.consensus.multiply_adds(input_shape[2])
        return input_shape[2] * per_frame + head


def xvit_from_cfg(cfg: CfgNode) -> XViT:
    """MODEL.NAME XViT, described by the VIT (backbone), XVIT, TEMPORAL_HEAD and ATS keys."""
    vit = vit_settings_from_cfg(cfg)
    xvit, head = cfg.XVIT, cfg.TEMPORAL_HEAD
    use_head = xvit.CONSENSUS_TYPE == "vit"
    shifted_blocks = [block for block in xvit.LOCATIONS_LIST if xvit.USE_XVIT and block < cfg.VIT.DEPTH]
    if xvit.USE_XVIT and not shifted_blocks:
        logger.warning(
            "XVIT.LOCATIONS_LIST %s names none of the blocks 0 to %d: no block shifts, as with XVIT.USE_XVIT False.",
            xvit.LOCATIONS_LIST,
            cfg.VIT.DEPTH - 1,
        )
    if use_head and not xvit.BEFORE_SOFTMAX:
        raise UserError("XVIT.BEFORE_SOFTMAX False needs XVIT.CONSENSUS_TYPE avg; the temporal head has no softmax.")
    if use_head and cfg.VIT.EMBED_DIM % head.NUM_ATTENTION_HEADS:
        raise UserError(
            f"VIT.EMBED_DIM {cfg.VIT.EMBED_DIM} is not a multiple of TEMPORAL_HEAD.NUM_ATTENTION_HEADS "
            f"{head.NUM_ATTENTION_HEADS}."
        )
    for name in ("NUM_SEGMENTS", "TEMPORAL_EMBED_LEN"):
        if cfg.DATA.NUM_FRAMES % xvit[name]:
            raise UserError(f"DATA.NUM_FRAMES {cfg.DATA.NUM_FRAMES} is not a multiple of XVIT.{name} {xvit[name]}.")
    return XViT(
        **vit,
        **settings(xvit, "num_segments", "shift_div", "temporal_embed_len", "before_softmax"),
        shifted_blocks=shifted_blocks,
        temporal_head=settings(head) if use_head else None,
        reductions=reductions_from_cfg(cfg, depth=cfg.VIT.DEPTH, num_prefix_tokens=1),
    )
