"""The CfgNode of this project: fvcore's, with values coerced to the type of their key and errors that name the nearest
key.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping

import yaml
from fvcore.common.config import CfgNode as FvcoreCfgNode

from ats.config import legacy
from ats.config.defaults import KEYS, NONE, Key
from ats.config.ranges import is_in_range, wanted
from ats.errors import UserError, suggest

KEY: dict[str, Key] = {key.name: key for key in KEYS}


class CfgNode(FvcoreCfgNode):
    """A configuration. Every way of changing it goes through `merge_pairs`, so a value is checked wherever it comes
    from.
    """

    def merge_from_list(self, cfg_list: list) -> None:
        """Merge `[KEY, VALUE, KEY, VALUE, ...]`; values may be strings as typed on a command line."""
        if len(cfg_list) % 2:
            raise UserError(f"Overrides come as KEY VALUE pairs; {cfg_list[-1]!r} has no value.")
        self.merge_pairs(zip(cfg_list[0::2], cfg_list[1::2], strict=True))

    def merge_from_other_cfg(self, cfg_other: Mapping) -> None:
        """Merge a nested mapping."""
        self.merge_pairs(flatten(cfg_other))

    def merge_from_file(self, cfg_filename: str, allow_unsafe: bool = False) -> None:
        """Merge a YAML file with its `_BASE_` files; see `ats.config.load_yaml`."""
        from ats.config import load_yaml

        self.merge_from_other_cfg(load_yaml(cfg_filename))

    def merge_pairs(self, pairs: Iterable[tuple[str, object]]) -> None:
        """Merge `(dotted key, value)` pairs; keys of older releases are translated.

        Raises:
            UserError: an unknown key (the nearest are named), or a value of another type, not a choice or out of range.
        """
        pairs = list(pairs)
        for key, value in [*legacy.implied(pairs), *pairs]:
            value = legacy.network_name(value) if key == "MODEL.NAME" else value
            translated = [(key, value)] if key in KEY else legacy.translate(key, parse(value))
            if translated is None:
                raise UserError(f"Unknown config key {key}.{suggest(key, KEY)} `--help` lists all keys.")
            for new_key, new_value in translated:
                node = self
                *parents, leaf = new_key.split(".")
                for parent in parents:
                    node = node[parent]
                node[leaf] = coerce(KEY[new_key], new_value)


def default_cfg() -> CfgNode:
    """A fresh CfgNode with every key at its default."""
    cfg = CfgNode()
    for key in KEYS:
        node = cfg
        *parents, leaf = key.name.split(".")
        for parent in parents:
            if parent not in node:
                node[parent] = CfgNode()
            node = node[parent]
        node[leaf] = list(key.default) if isinstance(key.default, list) else key.default
    return cfg


def flatten(node: Mapping, prefix: str = "") -> Iterable[tuple[str, object]]:
    """`(dotted key, value)` of a nested mapping."""
    for name, value in node.items():
        if isinstance(value, Mapping) and f"{prefix}{name}" not in KEY:
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def parse(value: object) -> object:
    """A command-line string as the Python value it spells: `[3, 4]`, `0.5`, `true`, `None`; anything else stays a
    string.
    """
    if not isinstance(value, str):
        return value
    text = value.strip()
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        pass
    if text.lower() in ("true", "false", "null", "~") or (text.startswith("[") and text.endswith("]")):
        try:
            return yaml.safe_load(text)
        except yaml.YAMLError:
            pass
    return value


def coerce(key: Key, value: object) -> object:
    """`value` as one of the types of `key`: 1 for 1.0, "true" for True, a scalar for a list.

    Raises:
        UserError: it is none of them, not among the choices or out of range.
    """
    types = key.types or (type(key.default),)
    result = (
        value
        if isinstance(value, str) and str in types
        else _convert(types, parse(legacy.normalise(value)), key.default)
    )
    if result is _NO:
        names = " or ".join({NONE: "None", bool: "True or False"}.get(kind, kind.__name__) for kind in types)
        raise UserError(f"{key.name} must be {names}, not {value!r}. ({key.help})")
    if key.choices and result not in key.choices:
        options = [str(choice) for choice in key.choices]
        raise UserError(f"{key.name} {value}: choose from {', '.join(options)}.{suggest(str(value), options)}")
    if not is_in_range(key.name, result):
        raise UserError(f"{key.name} {value}: give {wanted(key.name, types)}.")
    return result


_NO = object()  # "cannot be converted"; None is a value


def _convert(types: tuple[type, ...], value: object, default: object) -> object:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if isinstance(value, (list, tuple)):
        if list not in types:
            return _NO
        item_type = (type(default[0]),) if isinstance(default, list) and default else (int, float, str, list)
        items = [item if isinstance(item, (list, tuple)) else _convert(item_type, item, None) for item in value]
        return _NO if any(item is _NO for item in items) else items
    if value is None:
        return None if NONE in types else _NO
    if bool in types:
        return bool(value) if value in (0, 1) else _NO
    if is_number and int in types and value == int(value) and (isinstance(value, int) or float not in types):
        return int(value)
    if is_number and float in types:
        return float(value)
    if str in types:
        return str(value)
    return _convert((list,), [value], default) if list in types and not isinstance(value, str) else _NO
