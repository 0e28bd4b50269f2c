"""From settings to a plan: which blocks drop or merge tokens, by which reduction, and whether the settings fit.

Settings come from a config (`ATS.NUM_TOKENS`) or from `ats.patch` (`num_tokens`). This file uses the names of
`ats.patch`; for messages, a `Naming` turns them into what the user typed.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from functools import partial
from typing import Any

from ats.errors import UserError, suggest
from ats.reduction.base import REDUCTIONS, Naming, OptionOf, Reduction, Scheduled, options_of

Stage = Mapping[str, Any]  # "sampler", "blocks" and options of that reduction; omitted options have their defaults


def config_key(setting: str, sampler: str = "") -> str:
    """The config key of a setting: "ATS.NUM_TOKENS" for "num_tokens", "TOME.R" for "r". If several reductions have an
    option of this name, the one of `sampler`.
    """
    kinds = [REDUCTIONS[sampler], *REDUCTIONS.values()] if sampler in REDUCTIONS else REDUCTIONS.values()
    keys = (option.key for kind in kinds for option in options_of(kind) if option.name == setting)
    return next(keys, f"ATS.{setting.upper()}")


def default_blocks(depth: int, can_sample: Container[int] | None = None) -> list[int]:
    """The default blocks: those of the last three quarters, as in the paper (3 to 11 of 12), that can sample."""
    blocks = list(range(depth // 4, depth))
    return [block for block in blocks if can_sample is None or block in can_sample] or blocks


def plan_reductions(
    stages: Sequence[Stage],
    *,
    depth: int,
    num_prefix_tokens: int = 1,
    has_cls: bool | None = None,
    namings: Sequence[Naming] = (),
) -> dict[int, Reduction]:
    """Block -> its reduction, by ascending block, for a network with `depth` blocks.

    Args:
        stages: blocks that share a reduction and its options. An option can be a list with one entry per block of the
            network, to give each block its own value; entries of other blocks are not used.
        num_prefix_tokens: tokens that are always kept. has_cls: the first of them is CLS, as it is by default.
        namings: one per stage; by default config keys.

    Raises:
        UserError: an unknown reduction or option, a value out of range, a list of the wrong length, a block that does
            not exist or is listed twice, or whatever a reduction's own `check` refuses.
    """
    has_cls = num_prefix_tokens > 0 if has_cls is None else has_cls
    network = {"depth": depth, "num_prefix_tokens": num_prefix_tokens, "has_cls": has_cls}
    planned: dict[int, Reduction] = {}
    for index, stage in enumerate(stages):
        naming = namings[index] if namings else partial(config_key, sampler=stage.get("sampler", ""))
        for reduction in _plan_stage(dict(stage), network, naming):
            if reduction.block in planned:
                raise UserError(f"{naming('blocks')}: block {reduction.block} is in two stages.")
            planned[reduction.block] = reduction
    return dict(sorted(planned.items()))


NEUTRAL = {"dropped": "drop", "schedule": "flat"}  # options that change the method -> the value that does not


def refuse_unread(settings: Mapping[str, object], samplers: Sequence[object], naming: Naming) -> None:
    """Raise a UserError if an option in NEUTRAL is set but none of these reductions has it."""
    known = {sampler for sampler in samplers if isinstance(sampler, str) and sampler in REDUCTIONS}
    for name, neutral in NEUTRAL.items():
        value = settings.get(name, neutral)
        readers = [
            sampler for sampler, kind in REDUCTIONS.items() if name in {option.name for option in options_of(kind)}
        ]
        if value != neutral and known and not known & {*readers}:
            raise UserError(
                f"{naming(name)} {value} has no effect with {naming('sampler')} {', '.join(map(str, samplers))}: use "
                f"{naming(name)} {neutral}, or {naming('sampler')} {', '.join(readers)}."
            )


def _plan_stage(stage: dict, network: dict, naming: Naming) -> list[Reduction]:
    depth = network["depth"]
    sampler, blocks = stage.pop("sampler", "inverse_transform"), stage.pop("blocks")
    if not isinstance(sampler, str) or sampler not in REDUCTIONS:
        names = list(REDUCTIONS)
        raise UserError(f"{naming('sampler')} {sampler}: choose from {', '.join(names)}.{suggest(str(sampler), names)}")
    kind = REDUCTIONS[sampler]
    options = {option.name: option for option in options_of(kind)}
    for name in stage:
        if name not in options:
            typed = naming(name)
            names = [option.upper() if typed.isupper() else option for option in options]
            raise UserError(
                f"{typed} is not an option of {naming('sampler')} {sampler}: choose from {', '.join(names)}."
                f"{suggest(typed.rpartition(' ')[2], names)}"
            )
    _check_blocks(blocks, depth, naming)
    values = {
        name: value_of_each_block(option, stage[name], blocks, depth, naming)
        for name, option in options.items()
        if name in stage
    }
    same: dict[str, Any] = network | {"stage": tuple(sorted(blocks))}
    planned = [
        kind(block=block, **same, **{name: own[block] for name, own in values.items()}) for block in sorted(blocks)
    ]
    if not planned:
        return []
    kind.check(planned, naming)
    scheduled = [reduction for reduction in planned if isinstance(reduction, Scheduled)]
    if not scheduled:
        return planned
    if scheduled[0].schedule != "flat" and isinstance(stage.get(kind.amount), (list, tuple)):
        raise UserError(
            f"{naming('schedule')} {scheduled[0].schedule} spreads one amount over the blocks, but "
            f"{naming(kind.amount)} is a list: give a number, or {naming('schedule')} flat."
        )
    return [reduction.scheduled() for reduction in scheduled]


def _check_blocks(blocks: Sequence[int], depth: int, naming: Naming) -> None:
    if not isinstance(blocks, (list, tuple, range)) or not all(type(block) is int for block in blocks) or not blocks:
        raise UserError(f"{naming('blocks')} {blocks!r}: give a list of blocks, e.g. [3, 4, 5].")
    for block in blocks:
        if not 0 <= block < depth:
            raise UserError(
                f"{naming('blocks')} {list(blocks)}: block {block} does not exist, the network has blocks 0 to "
                f"{depth - 1}."
            )
    if len(set(blocks)) < len(blocks):
        raise UserError(f"{naming('blocks')} {list(blocks)}: a block is listed twice.")


def value_of_each_block(
    option: OptionOf, value: object, blocks: Sequence[int], depth: int, naming: Naming
) -> dict[int, Any]:
    """Block -> its value of an option.

    Raises:
        UserError: a value the option does not take, or a list of the wrong length.
    """
    name = naming(option.name)
    if isinstance(value, (list, tuple)):
        if not option.about.per_block:
            raise UserError(f"{name} {list(value)}: give {_wanted(option)}.")
        if len(value) != depth:
            raise UserError(
                f"{name} has {len(value)} entries, the network {depth} blocks: give one number, or {depth}."
            )
    per_block = {block: value[block] if isinstance(value, (list, tuple)) else value for block in sorted(blocks)}
    for block, own in per_block.items():
        if option.about.choices:
            if own not in option.about.choices:
                choices = [str(choice) for choice in option.about.choices]
                raise UserError(f"{name} {own}: choose from {', '.join(choices)}.{suggest(str(own), choices)}")
        elif not _fits(option, own):
            where = f" (block {block})" if option.about.per_block else ""
            raise UserError(f"{name} {own!r}{where}: give {_wanted(option)}.")
        elif bool in _types(option) or (int in _types(option) and float not in _types(option)):
            per_block[block] = _types(option)[0](own)  # 8.0 as 8, 1 as True
    return per_block


def _fits(option: OptionOf, value: object) -> bool:
    types = _types(option)
    if isinstance(value, bool) or bool in types:
        return bool in types and value in (0, 1)
    if isinstance(value, (int, float)):
        whole = float in types or (int in types and math.isfinite(value) and value == int(value))
        return whole and (option.about.within is None or option.about.within.holds(value))
    return isinstance(value, types)


def _types(option: OptionOf) -> tuple[type, ...]:
    """Types of one block's value; lists hold one value per block."""
    return tuple(kind for kind in option.about.types or (type(option.default),) if kind is not list)


def _wanted(option: OptionOf) -> str:
    """What to type for an option."""
    about = option.about
    if about.give:
        return about.give
    types = _types(option)
    kind = {bool: "True or False", int: "a whole number", float: "a number", str: "text"}.get(types[0], "a value")
    return f"{kind} {about.within or ''}".rstrip()
