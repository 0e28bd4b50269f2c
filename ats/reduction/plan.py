"""From the settings of ATS to what each block does: which blocks sample, with which K, and whether all that fits.

Settings come from a config (`ATS.NUM_TOKENS`) or from `ats.patch` (`num_tokens`). Here they have the names they have in
`ats.patch`; `spell` turns these into what the caller typed, so that messages speak of that.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence

from ats.errors import UserError, suggest
from ats.reduction.sampling import REDUCERS, RULES, SAMPLERS, SCORES, BlockSampler, TokenReducer

logger = logging.getLogger(__name__)

Spell = Callable[[str], str]

_SECTIONS = {"r": "TOME", "prop_attn": "TOME", "keep_rate": "EVIT", "fuse_token": "EVIT"}


def config_key(setting: str) -> str:
    """The key of a setting in a config: "ATS.NUM_TOKENS" for "num_tokens"."""
    return f"{_SECTIONS.get(setting, 'ATS')}.{setting.upper()}"


def plan_samplers(
    *,
    depth: int,
    blocks: Sequence[int],
    num_tokens: int | float | Sequence[int | float] = 1.0,
    num_prefix_tokens: int = 1,
    min_tokens: int = 8,
    sampler: str = "inverse_transform",
    score: str = "cls_attention_value_norm",
    rule: str = "official",
    seed: int = 0,
    share_frames: bool = False,
    reducer_options: Mapping[str, object] | None = None,
    spell: Spell = config_key,
) -> dict[int, BlockSampler | TokenReducer]:
    """A BlockSampler, or what `sampler` names in REDUCERS, for each of the `blocks` of a network with `depth` blocks.

    Args:
        num_tokens: K for all blocks, or one entry per block of the network (entries of other blocks are not used). What
            is above 1 is rounded, and raised to `min_tokens`; a warning says so.
        reducer_options: of the reducers, which use none of the settings of samplers: `r`, `keep_rate`, ...
        spell: see above.

    Raises:
        UserError: a block out of range or twice, K out of range, a list of the wrong length, an unknown name.
    """
    for setting, value, options in (
        ("sampler", sampler, [*SAMPLERS, *REDUCERS]),
        ("score", score, SCORES),
        ("rule", rule, RULES),
    ):
        if value not in options:
            raise UserError(f"{spell(setting)} {value}: choose from {', '.join(options)}.{suggest(value, options)}")
    _check_blocks(blocks, depth, spell)
    if sampler in REDUCERS:
        network = {"depth": depth, "num_prefix_tokens": num_prefix_tokens}
        options = {"options": reducer_options or {}, "spell": spell}
        return {block: REDUCERS[sampler].plan(block=block, **network, **options) for block in sorted(blocks)}
    if score != "mean_attention" and num_prefix_tokens == 0:
        needs = f"{spell('score')} {score} needs a CLS token and this network has none"
        raise UserError(f"{needs}; use {spell('score')} mean_attention.")
    least = max(min_tokens, num_prefix_tokens + 2)
    of_all = {"sampler": sampler, "score": score, "rule": rule, "seed": seed, "share_frames": share_frames}
    samplers = {
        block: BlockSampler(block=block, num_tokens=k, min_tokens=least, **of_all)
        for block, k in _num_tokens_of(blocks, num_tokens, depth, spell).items()
    }
    why = f"{spell('min_tokens')} {least}" if least == min_tokens else f"{num_prefix_tokens} prefix tokens and two more"
    _say_what_changes(samplers, why, spell)
    return samplers


def _check_blocks(blocks: Sequence[int], depth: int, spell: Spell) -> None:
    for block in blocks:
        if not 0 <= block < depth:
            raise UserError(
                f"{spell('blocks')} {list(blocks)}: block {block} does not exist, the network has blocks 0 to "
                f"{depth - 1}."
            )
    if len(set(blocks)) < len(blocks):
        raise UserError(f"{spell('blocks')} {list(blocks)}: a block stands twice.")


def _num_tokens_of(
    blocks: Sequence[int], num_tokens: int | float | Sequence[int | float], depth: int, spell: Spell
) -> dict[int, int | float]:
    """K of each of the blocks, in their order in the network."""
    per_block = [num_tokens] * depth if isinstance(num_tokens, (int, float)) else num_tokens
    if len(per_block) != depth:
        raise UserError(
            f"{spell('num_tokens')} has {len(per_block)} entries, the network {depth} blocks: give one number, or "
            f"{depth}."
        )
    for block in sorted(blocks):
        k = per_block[block]
        is_number = isinstance(k, (int, float)) and not isinstance(k, bool)
        if not (is_number and 0 < k < math.inf):  # false of NaN
            raise UserError(
                f"{spell('num_tokens')} {k!r} (block {block}): give a ratio in (0, 1] or a number of tokens above 1."
            )
    return {block: per_block[block] for block in sorted(blocks)}


def _say_what_changes(samplers: dict[int, BlockSampler], why: str, spell: Spell) -> None:
    """One warning for all blocks whose K is not the number of tokens that was given.

    Args:
        why: where the least K comes from.
    """
    changed: dict[int | float, list[int]] = {}
    for block, sampler in samplers.items():
        if sampler.num_tokens > 1 and sampler.num_tokens != sampler.budget(slots=0):
            changed.setdefault(sampler.num_tokens, []).append(block)
    parts = []
    for k, blocks in changed.items():
        sampler = samplers[blocks[0]]
        reason = f"below {why}" if k < sampler.min_tokens else "not a whole number"
        where = f"blocks {_ranges(blocks)} use" if len(blocks) > 1 else f"block {blocks[0]} uses"
        parts.append(f"{spell('num_tokens')} {k} is {reason}: {where} {sampler.budget(slots=0)}")
    if parts:
        logger.warning("%s.", "; ".join(parts))


def _ranges(blocks: list[int]) -> str:
    """Ascending blocks as "1, 3-5"."""
    starts = [block for block in blocks if block - 1 not in blocks]
    ends = [block for block in blocks if block + 1 not in blocks]
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))
