"""The definition of a configuration key, and how its values are checked and converted. Imports no PyTorch."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import textwrap
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from ats.config.yaml_text import parse_yaml
from ats.errors import UserError, quoted, shown, suggest
from ats.options import FROM_0, MAX_INT, Range

NONE = type(None)
MAX_DEPTH = 8  # of nested lists
_WHOLE_WORDS: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}


@dataclass(frozen=True)
class Key:
    """One configuration key: everything the project knows about it."""

    name: str  # with its section, "VIT.DEPTH"
    default: object
    help: str  # what it means
    range: Range | None = None  # allowed numbers; for a list, of each entry
    types: tuple[type, ...] = ()  # allowed types; default: the type of `default`
    choices: tuple[object, ...] = ()  # allowed values, if they are few
    lengths: tuple[int, ...] = ()  # allowed lengths of a list; default: any. 0 if an empty list has a meaning
    items: tuple[type, ...] = ()  # types of a list's entries, if `default` does not show them
    has_block_rows: bool = False  # a list [[block, number, ...], ...]; `range` applies to the numbers after the block
    networks: tuple[str, ...] = ()  # the values of MODEL.NAME that read it; default: those of its section
    samplers: tuple[str, ...] = ()  # the values of ATS.SAMPLER that read it; empty: independent of ATS.SAMPLER
    path: bool = False  # a file or folder: a leading ~ is the home folder
    required: bool = False  # a string that must not be empty
    machine: bool = False  # decides where and how a run executes, not what it computes; left out of the config's hash
    free: bool = False  # may change between a stop and a resume, because the weights do not depend on it

    def __post_init__(self) -> None:
        if not self.types:
            object.__setattr__(self, "types", (type(self.default),))
        values = self.default if isinstance(self.default, list) else [self.default]
        is_text = self.choices or {*self.items} - {int} or any(isinstance(value, (bool, str)) for value in values)
        assert bool(self.range) != bool(is_text), f"{self.name}: numbers, and only numbers, have a range"
        assert self.range or not (self.lengths or self.has_block_rows), f"{self.name}: only for lists of numbers"
        assert self.convert(self.default) == self.default, f"{self.name}: its default"
        assert self.help, f"{self.name}: its help"

    @property
    def section(self) -> str:
        """ "VIT" for VIT.DEPTH, "" for OUTPUT_DIR."""
        return self.name.rpartition(".")[0]

    def convert(self, value: object) -> Any:
        """`value` as one of the key's types: 1.0 becomes 1, "true" True, a scalar a list, ~ the home folder.

        Raises a UserError if the type does not fit, or the value is not among the choices or out of range.
        """
        is_text = isinstance(value, str) and str in self.types
        try:
            result: Any = value if is_text else _convert(self.types, self._parse(value), self._item_types)
        except TypeError:
            give = f": give {self._wanted()}." if self.range else "."
            raise UserError(f"{self.name} must be {self._kinds()}, not {quoted(value)}{give} ({self.help})") from None
        if self.choices and result not in self.choices:
            options = [str(choice) for choice in self.choices]
            raise UserError(
                f"{self.name} {shown(value)}: choose from {', '.join(options)}.{suggest(str(value), options)}"
            )
        if not self._is_in_range(result):
            limit = ", below 2^63" if isinstance(result, (int, float)) and result > MAX_INT else ""
            raise UserError(f"{self.name} {shown(value)}: give {self._wanted()}{limit}.")
        if self.required and not (result.strip() if self.path else result):
            raise UserError(f"{self.name} is empty. ({self.help})")
        return os.path.expanduser(result) if self.path else result

    def describe(self) -> str:
        """The key's paragraph in `--help`: types, range, default and meaning."""
        kinds = " | ".join("None" if kind is NONE else kind.__name__ for kind in self.types)
        text = self.help
        text += f" Choices: {', '.join(map(str, self.choices))}." if self.choices else ""
        text += f" Read by MODEL.NAME {', '.join(self.networks)}." if self.networks else ""
        text += f" Read by ATS.SAMPLER {', '.join(self.samplers)}." if self.samplers else ""
        text = textwrap.fill(text, 100, initial_indent="    ", subsequent_indent="    ", **_WHOLE_WORDS)
        within = f" {self.range or ''}".rstrip()
        return f"{self.name}  ({kinds}{within}, default {self.default!r})\n{text}"

    @property
    def _item_types(self) -> tuple[type, ...]:
        """Types a list may hold. Lists inside a list of numbers are checked by `_is_in_range`."""
        first = (type(self.default[0]),) if isinstance(self.default, list) and self.default else ()
        return (first or self.items or (int, float, str)) + ((list,) if self.range else ())

    def _parse(self, value: object) -> object:
        value = parse(value)
        if _is_deep(value, MAX_DEPTH):
            raise TypeError
        return [parse(item) for item in value] if self.range and isinstance(value, (list, tuple)) else value

    def _kinds(self) -> str:
        """The allowed types, for messages: "int or None", "list of float"."""
        names = {NONE: "None", bool: "True or False"} | {kind: kind.__name__ for kind in (int, float, str)}
        of_one = [kind for kind in self._item_types if kind is not list]
        names[list] = f"list of {names.get(of_one[0], of_one[0].__name__)}" if len(of_one) == 1 else "list"
        return " or ".join(names[kind] for kind in self.types)

    def _is_in_range(self, value: Any) -> bool:
        if self.range is None or value is None:
            return True
        if isinstance(value, list) and self.lengths and len(value) not in self.lengths:
            return False
        numbers = value if isinstance(value, list) else [value]
        if self.has_block_rows:  # row lengths are checked when the network is built
            if not all(isinstance(row, (list, tuple)) and row and FROM_0.holds(row[0]) for row in numbers):
                return False
            numbers = [number for row in numbers for number in row[1:]]
        return all(self.range.holds(number) for number in numbers)

    def _wanted(self) -> str:
        """What to give: "a number from 0 to below 1", "3 numbers from 1 or None"."""
        within = f" {self.range}".rstrip()
        several = f"numbers{within}" + " after each block from 0" * self.has_block_rows
        if self.lengths:
            several = f"{' or '.join(str(length) if length else 'no' for length in self.lengths)} {several}"
        options = [f"a number{within}"] * (int in self.types or float in self.types)
        return " or ".join(options + [several] * (list in self.types) + ["None"] * (NONE in self.types))


@dataclass(frozen=True)
class Section:
    """The keys with one prefix."""

    name: str  # the prefix; "" for keys without one
    help: str  # one line for `--help`
    keys: tuple[Key, ...]
    networks: tuple[str, ...] = ()  # the values of MODEL.NAME that read its keys; empty: they describe no network

    def describe(self) -> str:
        """The section's part of `--help`."""
        readers = f" Read by MODEL.NAME {', '.join(self.networks)}." if self.networks else ""
        head = f"---- {self.name or 'keys without a section'}: {self.help}{readers}"
        return "\n".join([head, *(key.describe() for key in self.keys)])


def parse(value: object) -> object:
    """Parse a command-line string: `[3, 4]`, `0.5`, `true`, `None`. Any other string is returned unchanged."""
    if not isinstance(value, str):
        return value
    text = value.strip()
    with suppress(ValueError, SyntaxError, RecursionError, MemoryError):  # the last two: thousands of brackets
        return ast.literal_eval(text)
    if text.lower() in ("true", "false", "null", "~") or (text.startswith("[") and text.endswith("]")):
        with suppress(UserError):
            return parse_yaml(text)
    return value


def typed(settings: Mapping[str, object]) -> str:
    """`KEY VALUE KEY VALUE`, as typed in a shell; `parse` restores the values."""
    return " ".join(f"{key} {shlex.quote(_text(value, top=True))}" for key, value in settings.items())


def _text(value: object, *, top: bool = False) -> str:
    if isinstance(value, (list, tuple)):
        return f"[{','.join(map(_text, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{_text(key)}: {_text(item)}' for key, item in value.items())}}}"
    if isinstance(value, str) and not top:  # quoted only if necessary
        return value if re.fullmatch(r"[A-Za-z_][\w./-]*", value) and parse_yaml(value) == value else json.dumps(value)
    if value is None:
        return "None" if top else "null"
    return re.sub(r"^(-?\d+)e", r"\1.0e", str(value))  # YAML reads 1e-07 as a number only with a decimal point


def _is_deep(value: object, levels: int) -> bool:
    """Whether lists or mappings in `value` are nested more than `levels` deep."""
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return levels < 0 or any(_is_deep(item, levels - 1) for item in items)


def _convert(types: tuple[type, ...], value: Any, item_types: tuple[type, ...]) -> Any:
    """`value` as one of `types`, a list's items as one of `item_types`. Raises a TypeError if that is impossible."""
    if isinstance(value, (list, tuple)) and list in types:
        as_it_is = (*(kind for kind in (list, dict) if kind in item_types), *((tuple,) if list in item_types else ()))
        return [item if isinstance(item, as_it_is) else _convert(item_types, item, ()) for item in value]
    if value is None and NONE in types:
        return None
    if value is None or isinstance(value, (list, tuple)) or (bool in types and value not in (0, 1)):
        raise TypeError
    if bool in types:
        return bool(value)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if is_number and int in types and value % 1 == 0 and (isinstance(value, int) or float not in types):
        return int(value)
    if is_number and float in types:
        with suppress(OverflowError):
            return float(value)
        return value  # too large for a float, so out of every range
    if str in types and isinstance(value, (int, str)) and not isinstance(value, bool):
        return str(value)
    if list not in types or isinstance(value, str):
        raise TypeError
    return _convert((list,), [value], item_types)
