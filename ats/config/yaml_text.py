"""The YAML that configs use: words, numbers, lists and mappings, with bounded size and depth.

Values mean the same as on the command line. YAML 1.1 reads `012` as 10, `1:30` as 90 and `2026-11-01` as a date; here
they are strings, so keys that expect numbers refuse them.
"""

from __future__ import annotations

import logging
import math
import re
from pathlib import Path

import yaml

from ats.errors import UserError, shown

logger = logging.getLogger(__name__)

MAX_BYTES = 2**17  # per file; the project's longest config has 4 kB
MAX_VALUES = 100_000  # with aliases expanded: a few nested ones can stand for gigabytes
# Keys that a published YAML, SlowFast's MVIT_B_32x3_CONV, repeats: (key, first, last). The last counts, as in YAML.
REPEATED = [("DEPTH", 16, 24)]
_TAG = "tag:yaml.org,2002:"


def read_yaml(path: Path) -> object:
    """The contents of a YAML file. Raises a UserError with file and line if it is unreadable or not plain YAML."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}.") from error
    if len(content) > MAX_BYTES:
        raise UserError(
            f"{path} is not a YAML file: it has more than {MAX_BYTES // 1024} kB. Are these weights or data?"
        )
    try:
        return parse_yaml(content, name=str(path))
    except UserError as error:
        raise UserError(f"{path} is not a YAML file: {error}") from error


def parse_yaml(text: str | bytes, *, name: str = "") -> object:
    """Parse YAML text; `name` is for warnings. Raises a one-line UserError if it is not plain YAML."""
    try:
        loader = _Loader(text)
        loader.name = name
        return loader.get_single_data()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = ", ".join(filter(None, (error.context, error.problem))).replace(
            "'\\t' that", "'\\t' (a tab: indent with spaces) that"
        )
        raise UserError(f"line {mark.line + 1}: {problem}." if mark else f"{problem}.") from error
    except yaml.YAMLError as error:
        raise UserError(f"{str(error).splitlines()[0]}.") from error
    except RecursionError:
        raise UserError("its lists or mappings are nested too deeply.") from None


class _Loader(yaml.SafeLoader):
    """Safe YAML of bounded size. Refuses a repeated key with two values, except in `REPEATED`.

    Refuses all tags but !!str: no config needs one, and PyYAML raises errors of many kinds for wrong ones.
    """

    yaml_implicit_resolvers: dict = {}  # noqa: RUF012 - PyYAML's name; `_read_numbers_plainly` fills it

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None and self._count(node, {}) > MAX_VALUES:
            raise yaml.composer.ComposerError(None, None, "its aliases repeat too much", node.start_mark)
        return node

    def _count(self, node: yaml.Node, counts: dict[int, float]) -> float:
        """How many values `node` stands for; infinitely many if it contains itself. Also checks tags and keys."""
        if id(node) not in counts:
            counts[id(node)] = math.inf  # for now; read only if the node contains itself
            if problem := self._problem(node):
                raise yaml.composer.ComposerError(None, None, problem, node.start_mark)
            below = node.value if isinstance(node, yaml.SequenceNode) else []
            if isinstance(node, yaml.MappingNode):
                below = [entry for pair in node.value for entry in pair]
            counts[id(node)] = 1 + sum(self._count(entry, counts) for entry in below)
        return counts[id(node)]

    def _problem(self, node: yaml.Node) -> str:
        if node.tag in (f"{_TAG}merge", f"{_TAG}value"):
            return f"{node.value!r} is special in YAML and not for configs: put it in quotes if it is a text"
        if node.tag not in (f"{_TAG}str", self.resolve(type(node), node.value, (True, False))):
            return f"configs have no tags like {node.tag!r}"
        if isinstance(node, yaml.MappingNode) and not all(isinstance(key, yaml.ScalarNode) for key, _ in node.value):
            return "a key must be a word"
        return ""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        values: dict[object, list[object]] = {}
        for key, value in node.value:
            values.setdefault(self.construct_object(key, deep=True), []).append(self.construct_object(value, deep=True))
        for key, repeated in values.items():
            if len(repeated) > 1:
                if any(value != repeated[0] for value in repeated) and (key, *repeated) not in REPEATED:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"key {shown(key)} appears twice", node.start_mark
                    )
                logger.warning(
                    "%s: key %s appears twice, the last one counts: %s.", self.name, shown(key), shown(repeated[-1])
                )
        return super().construct_mapping(node, deep)


def _read_numbers_plainly() -> None:
    numbers = {f"{_TAG}{kind}" for kind in ("int", "float", "timestamp")}
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items():
        kept = [(tag, pattern) for tag, pattern in resolvers if tag not in numbers]
        _Loader.yaml_implicit_resolvers[first] = kept
    whole = re.compile(r"[-+]?(0|[1-9][0-9]{0,18})$")
    decimal = re.compile(r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$")
    _Loader.add_implicit_resolver(f"{_TAG}int", whole, list("-+0123456789"))
    _Loader.add_implicit_resolver(f"{_TAG}float", decimal, list("-+.0123456789"))


_read_numbers_plainly()
