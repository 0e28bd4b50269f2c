"""The interface of every network here: logits and trace, blocks, token grids, cost, supported features.

A backbone derives from `Backbone` and defines `blocks` (or `block_list`), `run`, `block_grids` and
`stem_multiply_adds`; docs/EXTENDING.md shows one. GFLOPs, `calibrate`, pictures and benchmarks call these methods and
read the trace. None of them checks a network's name or class.

Shapes: B samples (images or clips), S sequences (images, clips, or the frames of clips), C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, ClassVar

import torch
from fvcore.common.config import CfgNode
from timm.layers import trunc_normal_
from torch import Tensor, nn

from ats.errors import UserError
from ats.kernels.cpu import fastest
from ats.models.block import ATSBlock, run_blocks
from ats.models.cost import BlockGrid, size, vit_block_multiply_adds
from ats.reduction import REDUCTIONS, Reduction
from ats.reduction.base import options_of
from ats.reduction.plan import NEUTRAL, config_key, default_blocks, plan_reductions, refuse_unread
from ats.restore import Places
from ats.tokens import BlockRecord, KeptTokens, RaggedTokens, Trace

Records = tuple[BlockRecord, ...]
UNDECAYED = ("cls_token", "dist_token", "pos_embed", "temp_embed", "time_embed", "rel_pos")  # see `no_weight_decay`


class HasBlocks:
    """What a network says about its blocks. Base class of `Backbone` and of patched models."""

    layouts: ClassVar[tuple[str, ...]] = ("packed",)  # names in `tokens.LAYOUTS` that it supports
    layout: str = "packed"  # the current one
    cpu_backend: str = "auto"  # kernels to use on a CPU, a name in `kernels.cpu.BACKENDS`
    no_merge: str = ""  # why its tokens cannot be merged or fused; "" if they can
    no_fuse: str = ""  # why they cannot be fused, which creates tokens without a position
    num_prefix_tokens: int  # P, tokens that are always kept, CLS first; 0: no CLS
    head_keys: tuple[str, ...] = ("head",)  # prefixes of the classifier's keys, which TRAIN.RESET_HEAD does not load
    blocks: nn.ModuleList  # all blocks, unless `block_list` is overridden
    gives_probabilities: bool = False  # its output is probabilities, not logits

    def block_list(self) -> list[nn.Module]:
        """All blocks, in the order of ATS.BLOCKS."""
        return list(self.blocks)

    def block_grids(self, input_shape: Sequence[int]) -> list[BlockGrid]:
        """Where each block's tokens lie, for inputs of this shape, if none are dropped."""
        raise NotImplementedError

    def stem_multiply_adds(self, trace: Sequence[KeptTokens], input_shape: Sequence[int]) -> Tensor | float:
        """Multiply-adds of a sample outside the blocks (embedding, head): [B], or one number for all samples."""
        raise NotImplementedError

    def token_places(self, input_shape: Sequence[int]) -> Tensor | None:
        """Where the last batch's tokens lie if not on a grid: [B, N, 2], y and x from 0 to 1. None: on the grids."""
        return None

    def refusal(self, reduction: Reduction) -> str:
        """Why this network does not support `reduction`; "" if it does."""
        return (reduction.merges and self.no_merge) or (reduction.makes_fused and self.no_fuse) or ""

    def fastest_kernels(self, x: Tensor) -> AbstractContextManager:
        """A context for a forward pass of x; on a CPU, it runs on the fastest kernels (`kernels/cpu.py`)."""

        def num_tokens() -> int:
            return self.prefix_of(0) + size(self.block_grids(x.shape)[0].queries)

        # A checkpointed block runs again in the backward pass, outside this context.
        recomputes = torch.is_grad_enabled() and getattr(self, "grad_checkpointing", False)
        backend = "torch" if recomputes else self.cpu_backend
        return fastest(self.block_list(), x, backend=backend, num_tokens=num_tokens)

    # ---- cost, from the trace

    def multiply_adds(self, trace: Sequence[KeptTokens], input_shape: Sequence[int], *, paper: bool) -> Tensor:
        """Multiply-adds of each sample, [B] float64, for the trace of a batch of `input_shape`; see `ats/flops.py`. An
        empty trace gives the cost of the dense network.
        """
        blocks = self.block_multiply_adds(trace, input_shape, paper=paper)
        return sum(blocks[1:], blocks[0]) + self.stem_multiply_adds(trace, input_shape)

    def block_multiply_adds(
        self, trace: Sequence[KeptTokens], input_shape: Sequence[int], *, paper: bool
    ) -> list[Tensor]:
        """Multiply-adds of each block, [B] float64."""
        num_samples, frames = input_shape[0], self.sequences_per_sample(input_shape)
        recorded = {record.block: record for record in getattr(trace, "records", ())}
        costs = []
        for index, (block, grid) in enumerate(zip(self.block_list(), self.block_grids(input_shape), strict=True)):
            record = recorded.get(index) or grid.dense_record(index, num_samples * frames, self.prefix_of(index))
            record = record if paper else record.with_padding()
            cost = self.block_cost(block, record, grid, paper=paper, frames=frames)
            costs.append(cost.reshape(num_samples, -1).sum(dim=1))
        device = next((record.num_in.device for record in recorded.values()), None)
        return costs if device is None else [cost.to(device) for cost in costs]

    def block_cost(self, block: nn.Module, record: BlockRecord, grid: BlockGrid, *, paper: bool, frames: int) -> Tensor:
        """Multiply-adds of one block, [S] float64, from its record; `frames` consecutive sequences are a sample."""
        return vit_block_multiply_adds(block, record, paper=paper, frames=frames)

    def sequences_per_sample(self, input_shape: Sequence[int]) -> int:
        """Sequences of a sample: 1, or the frames of a clip."""
        return 1

    def prefix_of(self, index: int) -> int:
        """Prefix tokens in block `index`."""
        return self.num_prefix_tokens


class Backbone(HasBlocks, nn.Module):
    """Base class of the networks in `ats.models`. Their argument `reductions`: block -> its reduction; None: dense."""

    layer_patterns: ClassVar[dict] = {  # see `group_matcher`
        "stem": r"^(?:cls_token|dist_token|pos_embed|time_embed|patch_embed)",
        "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
    }

    def group_matcher(self, coarse: bool = False) -> dict:
        """Which parameters form a layer, in timm's format, for layer-wise learning rates."""
        return self.layer_patterns

    def no_weight_decay(self) -> set[str]:
        """Parameters without weight decay: positions and prefix tokens."""
        names = (name for name, _ in self.named_parameters())
        return {name for name in names if name.rpartition(".")[2].startswith(UNDECAYED)}

    def run(self, x: Tensor) -> tuple[Tensor, Records]:
        """Images [B, 3, H, W] or clips [B, 3, T, H, W] -> logits [B, classes] and `RaggedTokens.trace`."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Images or clips -> logits [B, classes]."""
        with self.fastest_kernels(x):
            return self.run(x)[0]

    def forward_tokens(self, x: Tensor) -> tuple[Tensor, Trace]:
        """Images or clips -> logits [B, classes] and what each block with a reduction kept, in order."""
        with self.fastest_kernels(x):
            logits, records = self.run(x)
        return logits, Trace(records)

    def reduce_blocks(
        self,
        reductions: dict[int, Reduction] | None,
        block_type: type[ATSBlock] = ATSBlock,
        *,
        blocks: nn.ModuleList | None = None,
        first_index: int = 0,
    ) -> None:
        """Replace, in place, the first block that has a reduction and all later ones with ATSBlocks of `block_type`.

        Args:
            blocks: by default `self.blocks`. first_index: index of the first of them in the network.

        Raises:
            UserError: this network does not support such a reduction.
        """
        reductions, blocks = reductions or {}, self.blocks if blocks is None else blocks
        self.check_reductions(reductions.values())
        for place, block in enumerate(blocks, first_index):
            if reductions and place >= min(reductions):
                blocks[place - first_index] = new = block_type(block, reductions.get(place), place)
                new.ats_classes = type(block), block_type

    def check_reductions(self, reductions: Iterable[Reduction]) -> None:
        """Raise a UserError for a reduction that this network does not support."""
        for reduction in reductions:
            reason = self.refusal(reduction)
            if reason and reduction.merging_option == "dropped":
                key, value = config_key("dropped"), getattr(reduction, reduction.merging_option)
                raise UserError(f"{key} {value}: not for {type(self).__name__}: {reason}; use {key} drop.")
            if reason:
                others = [name for name, kind in REDUCTIONS.items() if not self.refusal(kind())]
                raise UserError(
                    f"{config_key('sampler')} {reduction.name}: not for {type(self).__name__}: {reason}. "
                    f"Choose from {', '.join(others)}."
                )

    def run_blocks(
        self, x: Tensor, *, frames_per_clip: int = 1, blocks: nn.ModuleList | None = None, restore: str = "zero"
    ) -> RaggedTokens:
        """Dense tokens [S, N, C] through `blocks`, by default `self.blocks`: the kept tokens, with their trace.

        Args:
            restore: what `ats.restore.restored` should return for dropped and merged tokens.
        """

        def begin(x: Tensor) -> RaggedTokens:
            kwargs = {"frames_per_clip": frames_per_clip, "layout": self.layout}
            return Places.begin(RaggedTokens.from_dense(x, self.num_prefix_tokens, **kwargs), restore)

        return run_blocks(self.blocks if blocks is None else blocks, x, begin)


def reductions_from_cfg(
    cfg: CfgNode,
    *,
    depth: int,
    num_prefix_tokens: int,
    has_cls: bool | None = None,
    can_sample: Container[int] | None = None,
) -> dict[int, Reduction]:
    """The reductions that the ATS keys describe for a network of `depth` blocks; none with ATS.ENABLE False.
    `can_sample`: the blocks that ATS.BLOCKS None may choose; None: all. For the other arguments see `plan_reductions`.
    """
    if not cfg.ATS.ENABLE:
        return {}
    default = default_blocks(depth, can_sample) if cfg.ATS.BLOCKS is None else cfg.ATS.BLOCKS
    stages, namings = [], []
    for index, stage in enumerate(cfg.ATS.STAGES or [{}]):
        given = {str(name).lower(): value for name, value in stage.items()}
        if len(given) < len(stage):
            raise UserError(f"ATS.STAGES[{index}] {stage}: a key is listed twice.")
        sampler = given.get("sampler", cfg.ATS.SAMPLER)
        options = {}
        for option in options_of(REDUCTIONS[sampler]) if isinstance(sampler, str) and sampler in REDUCTIONS else ():
            section, key = option.key.split(".")
            options[option.name] = cfg.get(section, {}).get(key, option.default)  # cfg may predate the reduction
        stages.append({"sampler": sampler, "blocks": default} | options | given)
        namings.append(partial(_stage_key, index=index, given=given, sampler=sampler))
    given = {name: cfg.ATS.get(name.upper(), neutral) for name, neutral in NEUTRAL.items()}
    refuse_unread(given, [stage["sampler"] for stage in stages], config_key)
    if any(stage["blocks"] is default for stage in stages) and not default:
        raise UserError(
            "ATS.BLOCKS is empty: give blocks, e.g. ATS.BLOCKS [3,4,5], or ATS.ENABLE False for the dense network."
        )
    network = {"depth": depth, "num_prefix_tokens": num_prefix_tokens, "has_cls": has_cls}
    return plan_reductions(stages, **network, namings=namings)


def _stage_key(name: str, *, index: int, given: dict, sampler: str) -> str:
    """What the user typed for a setting of a stage."""
    return f"ATS.STAGES[{index}] {name.upper()}" if name in given else config_key(name, sampler)


def settings(section: CfgNode, *names: str) -> dict[str, Any]:
    """Keys of a section, by default all, as arguments of the same names: {"embed_dim": section.EMBED_DIM}."""
    return {name: section[name.upper()] for name in names or map(str.lower, section)}


trunc_normal_02_ = partial(trunc_normal_, std=0.02)


def init_linears(module: nn.Module, init: Callable[[Tensor], object] = trunc_normal_02_) -> None:
    """Fresh weights for all linear layers of a module, by `init`, and zero biases."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            init(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
