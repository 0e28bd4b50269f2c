"""X-ViT (Bulat et al., NeurIPS 2021) with adaptive token sampling: a ViT on every frame whose keys and values look at
the neighbouring frames, and a small transformer over the frames' CLS tokens.

Names, shapes and numbers are those of the authors' release (1adrianb/video-transformers), so its checkpoints load as
they are. The frames of a clip are sequences of their own: every frame has its CLS, scores and keeps its own patches
(or, with ATS.SHARE_FRAMES, those of its segment together).

Shapes: B clips, T frames, C channels.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from functools import partial

import torch
import torch.nn.functional as F
from fvcore.common.config import CfgNode
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from ats.errors import UserError
from ats.models.block import insert_ats, run_blocks, samplers_from_cfg
from ats.models.cost import block_multiply_adds, blocks_multiply_adds, conv_multiply_adds, linear_multiply_adds
from ats.models.temporal_shift import ShiftedATSBlock, ShiftedAttention
from ats.models.vit import VisionTransformer, clip_to_frames, vit_settings_from_cfg
from ats.reduction.sampling import BlockSampler
from ats.tokens import KeptTokens

logger = logging.getLogger(__name__)


class FrameTransformer(VisionTransformer):
    """X-ViT's backbone: a ViT on frames with a temporal embedding and, in `shifted_blocks`, shifted attention.

    Args:
        num_segments: frames of a segment, within which keys and values are shifted.
        shift_div: 1 / shift_div of the channels come from the next frame, as many from the previous one (none if it
            is 1).
        shifted_blocks: which blocks shift; those past the last are ignored, as in the released configs.
        temporal_embed_len: length F of the temporal embedding; frame i of a clip gets entry i mod F.
        classify_frames: whether the backbone ends in a classifier; without, in dropout.
        samplers: block -> what it keeps; empty for the dense network.
    """

    def __init__(
        self,
        *,
        num_segments: int,
        shift_div: int,
        shifted_blocks: Iterable[int],
        temporal_embed_len: int,
        classify_frames: bool,
        samplers: dict[int, BlockSampler] | None = None,
        **settings,
    ) -> None:
        super().__init__(**settings)
        self.num_segments = num_segments
        self.temp_embed = nn.Parameter(torch.zeros(1, temporal_embed_len, 1, self.embed_dim))
        for index in set(shifted_blocks) & set(range(len(self.blocks))):
            block = self.blocks[index]
            block.attn = ShiftedAttention(block.attn, group=num_segments, fold=self.embed_dim // shift_div)
        if classify_frames:
            nn.init.normal_(self.head.weight, std=0.001)
        else:
            self.head, self.head_drop = nn.Dropout(self.head_drop.p), nn.Identity()
        insert_ats(self.blocks, samplers or {}, ShiftedATSBlock)

    def resize_positions(self, pos_embed: Tensor, grid: tuple[int, int], old_grid: tuple[int, int]) -> Tensor:
        """As the release resizes it: bicubic without anti-aliasing."""
        patches = pos_embed[:, 1:].unflatten(1, old_grid).permute(0, 3, 1, 2)
        patches = F.interpolate(patches, size=grid, mode="bicubic", align_corners=False)
        return torch.cat([pos_embed[:, :1], patches.flatten(2).transpose(1, 2)], dim=1)

    def no_weight_decay(self) -> set[str]:
        """Parameters that are never decayed."""
        return super().no_weight_decay() | {"temp_embed"}

    def forward_tokens(self, x: Tensor) -> tuple[Tensor, list[KeptTokens]]:
        """Clips [B, 3, T, H, W] -> [B*T, C] (or frames' logits) and, for every ATS block, the tokens of each frame.

        Raises:
            UserError: the frames do not divide into segments or temporal embeddings.
        """
        num_frames = x.shape[2]
        frames = self.embed(clip_to_frames(x))
        for name, length in (
            ("XVIT.NUM_SEGMENTS", self.num_segments),
            ("XVIT.TEMPORAL_EMBED_LEN", self.temp_embed.shape[1]),
        ):
            if num_frames % length:
                raise UserError(f"Clips of {num_frames} frames: DATA.NUM_FRAMES must be a multiple of {name} {length}.")
        frames = (frames.unflatten(0, (-1, self.temp_embed.shape[1])) + self.temp_embed).flatten(0, 1)
        tokens, trace = run_blocks(self.blocks, frames, num_prefix_tokens=1, group=self.num_segments)
        return self.classify(self.norm(tokens.prefix())), trace


class TemporalHead(nn.Module):
    """A transformer over the frames' CLS tokens with a CLS of its own and a two-layer classifier.

    It has no positions in time, no bias in its queries, keys and values, and LayerNorms with epsilon 1e-5.
    """

    def __init__(
        self,
        *,
        embed_dim: int,
        num_heads: int,
        num_layers: int,
        mlp_dim: int,
        num_classes: int,
        head_drop_rate: float = 0.0,
        hidden_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.temporal_encoder = nn.Sequential(
            *(
                Block(
                    embed_dim,
                    num_heads,
                    proj_drop=hidden_drop_rate,
                    attn_drop=attn_drop_rate,
                    drop_path=hidden_drop_rate,
                    norm_layer=partial(nn.LayerNorm, eps=1e-5),
                )
                for _ in range(num_layers)
            )
        )
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
        num_tokens = torch.tensor(1.0 + num_frames, dtype=torch.float64)
        blocks = sum(block_multiply_adds(b, num_tokens, num_tokens, paper=True) for b in self.temporal_encoder)
        return float(blocks) + sum(linear_multiply_adds(self.mlp_head[i]) for i in (1, 4))


class XViT(nn.Module):
    """X-ViT.

    Args:
        temporal_head: arguments of TemporalHead; None averages the frames' logits instead.
        before_softmax: without a temporal head: average logits (True) or probabilities (False; these are the output).
        settings: arguments of FrameTransformer.
    """

    head_keys = ("consensus.mlp_head.4.", "new_fc.", "base_model.head.")

    def __init__(self, *, temporal_head: dict | None, before_softmax: bool = True, **settings) -> None:
        super().__init__()
        num_classes, drop_rate = settings["num_classes"], settings["head_drop_rate"]
        embed_dim = settings["embed_dim"]
        # Without dropout the release's backbone ends in a classifier, in front of its temporal head too. That one can
        # only read as many classes as channels; for other numbers, where the release breaks, there is no classifier.
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

    def group_matcher(self, coarse: bool = False) -> dict:
        """Which parameters form a layer, in timm's form, for layer-wise learning rates."""
        return {
            "stem": r"^base_model\.(cls_token|pos_embed|temp_embed|patch_embed)",
            "blocks": [(r"^base_model\.blocks\.(\d+)", None), (r"^base_model\.norm", (99999,))],
        }

    def no_weight_decay(self) -> set[str]:
        """Parameters that are never decayed."""
        return {f"base_model.{name}" for name in self.base_model.no_weight_decay()} | {"consensus.cls_token"}

    def forward(self, x: Tensor) -> Tensor:
        """Clips [B, 3, T, H, W] -> logits [B, classes]."""
        return self.forward_tokens(x)[0]

    def forward_tokens(self, x: Tensor) -> tuple[Tensor, list[KeptTokens]]:
        """Clips [B, 3, T, H, W] -> logits [B, classes] and, for every ATS block in order, the tokens each of the B*T
        frames kept.
        """
        frames, trace = self.base_model.forward_tokens(x)
        frames = frames.unflatten(0, (len(x), x.shape[2]))
        if self.consensus is not None:
            return self.consensus(frames), trace
        logits = frames if self.new_fc is None else self.new_fc(frames)
        return (logits if self.before_softmax else logits.softmax(dim=-1)).mean(dim=1), trace

    def adapt_state_dict(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights of the release, or of an image ViT to start a training from, as this model's.

        Classifiers this network does not have are left out; what an image ViT does not have stays as initialised; both
        are logged.
        """
        expected = self.state_dict()
        if not any(key.startswith("base_model.") for key in state):
            state = {
                key if key.startswith(("consensus.", "new_fc.")) else f"base_model.{key}": value
                for key, value in state.items()
            }
        backbone = {key.removeprefix("base_model."): v for key, v in state.items() if key.startswith("base_model.")}
        adapted = {f"base_model.{key}": value for key, value in self.base_model.adapt_state_dict(backbone).items()}
        state = {key: value for key, value in state.items() if not key.startswith("base_model.")} | adapted
        unused = [key for key in state if key not in expected and key.startswith(CLASSIFIERS)]
        if unused:
            logger.info("Not used by this network: %s.", ", ".join(unused))
        state = {key: value for key, value in state.items() if key not in unused}
        if "base_model.temp_embed" not in state:  # an image ViT
            fresh = {key for key in expected if key not in state and not key.startswith("base_model.blocks.")}
            logger.warning("Weights of an image network; left as initialised: %s.", ", ".join(sorted(fresh)))
            state |= {key: expected[key] for key in fresh}
        return state

    def multiply_adds(self, trace: list[KeptTokens], input_shape: tuple[int, ...], *, paper: bool) -> Tensor:
        """Multiply-adds of each clip [B] (float64) of a batch of `input_shape`, from the tokens its frames kept; see
        `ats/flops.py`.
        """
        batch_size, _, num_frames, height, width = input_shape
        model = self.base_model
        grid = (height // model.patch_size) * (width // model.patch_size)
        frames = blocks_multiply_adds(
            model.blocks, trace, 1 + grid, batch_size * num_frames, paper=paper, num_frames=num_frames
        )
        per_frame = conv_multiply_adds(model.patch_embed.proj, grid)
        per_frame += sum(linear_multiply_adds(h) for h in (model.head, self.new_fc) if isinstance(h, nn.Linear))
        head = 0 if self.consensus is None else self.consensus.multiply_adds(num_frames)
        return frames.reshape(batch_size, num_frames).sum(dim=1) + num_frames * per_frame + head


# Classifiers that the release keeps, or image networks have, though this network has no use for them.
CLASSIFIERS = ("new_fc.", "base_model.head.", "base_model.pre_logits.")


def xvit_from_cfg(cfg: CfgNode) -> XViT:
    """MODEL.NAME XViT, described by the keys of VIT (the backbone), XVIT, TEMPORAL_HEAD and ATS."""
    settings = vit_settings_from_cfg(cfg)
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
    for name, length in (
        ("XVIT.NUM_SEGMENTS", xvit.NUM_SEGMENTS),
        ("XVIT.TEMPORAL_EMBED_LEN", xvit.TEMPORAL_EMBED_LEN),
    ):
        if length < 1 or cfg.DATA.NUM_FRAMES % length:
            raise UserError(f"DATA.NUM_FRAMES {cfg.DATA.NUM_FRAMES} is not a multiple of {name} {length}.")
    temporal_head = {
        "num_heads": head.NUM_ATTENTION_HEADS,
        "num_layers": head.NUM_HIDDEN_LAYERS,
        "mlp_dim": head.MLP_DIM,
        "hidden_drop_rate": head.HIDDEN_DROPOUT_PROB,
        "attn_drop_rate": head.ATTENTION_PROBS_DROPOUT_PROB,
    }
    return XViT(
        **settings,
        num_segments=xvit.NUM_SEGMENTS,
        shift_div=xvit.SHIFT_DIV,
        shifted_blocks=shifted_blocks,
        temporal_embed_len=xvit.TEMPORAL_EMBED_LEN,
        temporal_head=temporal_head if use_head else None,
        before_softmax=xvit.BEFORE_SOFTMAX,
        samplers=samplers_from_cfg(cfg, depth=cfg.VIT.DEPTH, num_prefix_tokens=1),
    )
