"""What is known about one configuration key, and how its values are checked and converted. Imports no PyTorch."""

from __future__ import annotations

import ast
import textwrap
from contextlib import suppress
from dataclasses import dataclass

import yaml

from ats.errors import UserError, suggest
from ats.options import FROM_0, Range

NONE = type(None)
_WHOLE_WORDS = {"break_long_words": False, "break_on_hyphens": False}


@dataclass(frozen=True)
class Key:
    """One configuration key. Everything the project knows about it is here."""

    name: str  # with its section, "VIT.DEPTH"
    default: object  # its value where nothing sets it
    help: str  # what it means
    range: Range | None = None  # the numbers it takes; for a list, the range of each number
    types: tuple[type, ...] = ()  # the types it takes, by default the type of `default`
    choices: tuple[object, ...] = ()  # the values it takes, if they are few
    lengths: tuple[int, ...] = ()  # the lengths a list may have, by default any; 0 where an empty list means something
    items: tuple[type, ...] = ()  # what a list holds, where it holds neither numbers nor what `default` shows
    has_block_rows: bool = False  # a list [[block, number, ...], ...]; `range` is for the numbers after the block
    networks: tuple[str, ...] = ()  # the values of MODEL.NAME that read it, by default those of its section
    samplers: tuple[str, ...] = ()  # the values of ATS.SAMPLER that read it; empty: it does not depend on ATS.SAMPLER
    machine: bool = False  # it says where and how a run is carried out, not what it computes: not in the config's hash
    free: bool = False  # it may change between a stop and a resume, because it changes none of the weights

    def __post_init__(self) -> None:
        if not self.types:
            object.__setattr__(self, "types", (type(self.default),))
        values = self.default if isinstance(self.default, list) else [self.default]
        is_text = self.choices or self.items or any(isinstance(value, (bool, str)) for value in values)
        assert bool(self.range) != bool(is_text), f"{self.name}: numbers, and only numbers, have a range"
        assert self.range or not (self.lengths or self.has_block_rows), f"{self.name}: only for lists of numbers"
        assert self.convert(self.default) == self.default, f"{self.name}: its default"
        assert self.help, f"{self.name}: its help"

    @property
    def section(self) -> str:
        """ "VIT" for VIT.DEPTH, "" for OUTPUT_DIR."""
        return self.name.rpartition(".")[0]

    def convert(self, value: object) -> object:
        """`value` as one of the key's types: 1 for 1.0, "true" for True, a scalar for a list.

        Raises a UserError if the type does not fit, or the value is not among the choices or out of range.
        """
        shown = (type(self.default[0]),) if isinstance(self.default, list) and self.default else ()
        is_text = isinstance(value, str) and str in self.types
        try:
            result = value if is_text else _convert(self.types, parse(value), shown or self.items or (int, float, str))
        except TypeError:
            names = " or ".join({NONE: "None", bool: "True or False"}.get(kind, kind.__name__) for kind in self.types)
            raise UserError(f"{self.name} must be {names}, not {value!r}. ({self.help})") from None
        if self.choices and result not in self.choices:
            options = [str(choice) for choice in self.choices]
            raise UserError(f"{self.name} {value}: choose from {', '.join(options)}.{suggest(str(value), options)}")
        if not self._is_in_range(result):
            raise UserError(f"{self.name} {value}: give {self._wanted()}.")
        return result

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

    def _is_in_range(self, value: object) -> bool:
        if self.range is None or value is None:
            return True
        if isinstance(value, list) and self.lengths and len(value) not in self.lengths:
            return False
        numbers = value if isinstance(value, list) else [value]
        if self.has_block_rows:  # what is no row is named where the network is built
            rows = [row for row in numbers if isinstance(row, (list, tuple)) and row]
            if not all(FROM_0.holds(row[0]) for row in rows):
                return False
            numbers = [number for row in rows for number in row[1:]]
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
    """Keys with one prefix."""

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
    """A command-line string as the Python value it spells: `[3, 4]`, `0.5`, `true`, `None`; else the string itself."""
    if not isinstance(value, str):
        return value
    text = value.strip()
    with suppress(ValueError, SyntaxError):
        return ast.literal_eval(text)
    if text.lower() in ("true", "false", "null", "~") or (text.startswith("[") and text.endswith("]")):
        with suppress(yaml.YAMLError):
            return yaml.safe_load(text)
    return value


def _convert(types: tuple[type, ...], value: object, item_types: tuple[type, ...]) -> object:
    """`value` as one of `types`, a list's items as one of `item_types`. Raises a TypeError if it cannot be."""
    if isinstance(value, (list, tuple)) and list in types:
        as_it_is = dict if dict in item_types else (list, tuple)
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
        return float(value)
    if str in types:
        return str(value)
    if list not in types or isinstance(value, str):
        raise TypeError
    return _convert((list,), [value], item_types)
