"""This project's CfgNode: fvcore's, but every value is checked against its key, and errors suggest the nearest key.

Also finds the keys that differ from the defaults, and those that are set but not read.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path

from fvcore.common.config import CfgNode as FvcoreCfgNode

from ats.config import legacy
from ats.config.key import Key
from ats.config.keys import keys, sections
from ats.errors import UserError, quoted, shown, suggest
from ats.reduction import REDUCTIONS, Sampler

logger = logging.getLogger(__name__)


class CfgNode(FvcoreCfgNode):
    """A configuration. Every merge goes through `merge_pairs`, which checks each value."""

    @property
    def given(self) -> set[str]:
        """The dotted keys that were merged into it, even with default values."""
        return self.__dict__.setdefault("_given", set())

    def merge_from_list(self, cfg_list: list) -> None:
        """Merge `[KEY, VALUE, KEY, VALUE, ...]`; values may be strings as typed on a command line."""
        if len(cfg_list) % 2:
            raise UserError(f"Overrides come as KEY VALUE pairs; {quoted(cfg_list[-1])} has no value.")
        self.merge_pairs(zip(map(str, cfg_list[0::2]), cfg_list[1::2], strict=True))

    def merge_from_other_cfg(self, cfg_other: Mapping) -> None:
        """Merge a nested mapping."""
        self.merge_pairs(flatten(cfg_other))

    def merge_from_file(self, cfg_filename: str, allow_unsafe: bool = False) -> None:
        """Merge a YAML file with its `_BASE_` files; see `ats.config.load_yaml`."""
        from ats.config import load_yaml

        self.merge_from_other_cfg(load_yaml(cfg_filename))

    def merge_pairs(self, pairs: Iterable[tuple[str, object]], files: Mapping[str, Path] | None = None) -> None:
        """Merge `(dotted key, value)` pairs, translating keys of older releases. `files`: the file each key came from.

        Raises a UserError for an unknown key (with suggestions), or a value of the wrong type, choice or range.
        """
        known, pairs, files = keys(), list(pairs), files or {}
        for given, value in [*legacy.implied(dict(pairs)), *pairs]:
            try:
                if value in (None, {}) and _is_section(given, known):  # all its keys are commented out
                    continue
                for name, new in legacy.translate(given, value, known):
                    if name not in known:
                        raise UserError(_unknown(name, known))
                    _set(self, name, known[name].convert(new))
                    self.given.add(name)
            except UserError as error:
                message = str(error) if shown(given) in str(error) else f"{shown(given)}: {error}"
                raise UserError(f"{files[given]}: {message}" if given in files else message) from None


def _is_section(name: str, known: Iterable[str]) -> bool:
    return any(key.startswith(f"{name}.") for key in known)


def _unknown(name: str, known: Mapping[str, Key]) -> str:
    if name and _is_section(name, known):
        first = next(key for key in known if key.startswith(f"{name}."))
        return f"Unknown config key {name}. It is a section: give its keys, for example {first} {known[first].default}."
    return f"Unknown config key {shown(name)}.{suggest(name, known)} `--help all` lists all keys."


def get_cfg() -> CfgNode:
    """A fresh, mutable configuration with every key at its default."""
    return nest((name, copy.copy(key.default)) for name, key in keys().items())


def flatten(node: Mapping) -> Iterator[tuple[str, object]]:
    """`(dotted key, value)` of a nested mapping."""
    known = keys()

    def walk(node: Mapping, prefix: str) -> Iterator[tuple[str, object]]:
        for name, value in node.items():
            if isinstance(value, Mapping) and value and f"{prefix}{name}" not in known:
                yield from walk(value, f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}", value

    return walk(node, "")


def nest(pairs: Iterable[tuple[str, object]]) -> CfgNode:
    """The inverse of `flatten`: a CfgNode of these `(dotted key, value)` pairs alone."""
    cfg = CfgNode()
    for name, value in pairs:
        _set(cfg, name, value)
    return cfg


def changed(cfg: CfgNode) -> dict[str, object]:
    """Dotted key -> value of every key that is not at its default."""
    known = keys()
    return {name: value for name, value in flatten(cfg) if name not in known or value != known[name].default}


def _set(cfg: CfgNode, name: str, value: object) -> None:
    *parents, leaf = name.split(".")
    for parent in parents:
        if parent not in cfg:
            cfg[parent] = CfgNode()
        cfg = cfg[parent]
    cfg[leaf] = value


def unread_keys(cfg: CfgNode) -> dict[str, list[str]]:
    """Keys of `cfg` that are not at their default but have no effect, grouped by what ignores them: "MODEL.NAME ViT".

    `Section.networks`, `Key.networks` and `Key.samplers` say what reads a key. A network that no key names may read
    every key.
    """
    network = "timm/<name>" if cfg.MODEL.NAME.startswith("timm/") else cfg.MODEL.NAME
    used, values = {*samplers(cfg)}, changed(cfg)
    entries = [(section, key) for section in sections() for key in section.keys]
    is_known_network = any(network in section.networks for section, _ in entries)
    stages = _stages(cfg) if cfg.ATS.ENABLE else []
    overruled = {f"ATS.{name}" for name in ("SAMPLER", "BLOCKS") if stages and all(name in stage for stage in stages)}
    unread: dict[str, list[str]] = {}
    for section, key in entries:
        if key.name not in values or (key.samplers and not cfg.ATS.ENABLE):
            continue
        networks = key.networks or section.networks
        if is_known_network and networks and network not in networks:
            unread.setdefault(f"MODEL.NAME {cfg.MODEL.NAME}", []).append(key.name)
        elif key.samplers and not used & {*key.samplers}:
            unread.setdefault(f"ATS.SAMPLER {', '.join(sorted(used))}", []).append(key.name)
        elif key.name in overruled:
            unread.setdefault("ATS.STAGES", []).append(key.name)
    return unread


def samplers(cfg: CfgNode) -> list[str]:
    """The values of ATS.SAMPLER that the stages of `cfg` use, stage by stage."""
    return [str(stage.get("SAMPLER", cfg.ATS.SAMPLER)) for stage in _stages(cfg) or [{}]]


def titles(cfg: CfgNode) -> list[str]:
    """Titles of the stages, for tables: "ToMe", "ATS merge"."""
    names = []
    for sampler, stage in zip(samplers(cfg), _stages(cfg) or [{}], strict=True):
        dropped = stage.get("DROPPED", cfg.ATS.get("DROPPED", "drop"))
        merges = issubclass(REDUCTIONS[sampler], Sampler) and dropped != "drop"
        names.append(f"{REDUCTIONS[sampler].title} {dropped}" if merges else REDUCTIONS[sampler].title)
    return names


def _stages(cfg: CfgNode) -> list[dict[str, object]]:
    """ATS.STAGES with upper-case names."""
    return [{str(name).upper(): value for name, value in stage.items()} for stage in cfg.ATS.STAGES]


def warn_of_unread_keys(cfg: CfgNode) -> None:
    """Warn, once per process, about the keys of `cfg` that are set but not read."""
    if unread := unread_keys(cfg):
        text = "; ".join(f"{reader} does not read {', '.join(names)}" for reader, names in unread.items())
        _warn_once("Keys without effect: %s.", text)


_warn_once = cache(logger.warning)
