"""Configuration: `get_cfg()` gives every default, `load_config(path, overrides)` a checked and frozen configuration.

A YAML file may name other files in `_BASE_`, relative to itself; they are read first. YAMLs of the official ATS release
and of SlowFast load as they are (`legacy.py`). To add a key, write its entry in `keys.py`; nothing else has to change.
"""

from __future__ import annotations

import difflib
import logging
from pathlib import Path

import yaml

from ats.config import legacy
from ats.config.schema import CfgNode, flatten, get_cfg
from ats.errors import UserError

logger = logging.getLogger(__name__)

PACKAGE = Path(__file__).resolve().parents[1]
# The YAML files and weights that ship with the package: where `pip install` puts them, or those of the clone.
SHIPPED = PACKAGE / "configs" if (PACKAGE / "configs").is_dir() else PACKAGE.parent / "configs"

__all__ = ["CfgNode", "find_shipped", "get_cfg", "load_config", "load_yaml"]


def load_config(path: str | Path | None = None, overrides: list[str] | None = None) -> CfgNode:
    """Defaults, then the YAML file (`find_shipped`), then the overrides `[KEY, VALUE, ...]`; returned frozen.

    Raises a UserError if the file is missing or not YAML, a key is unknown, or a value wrong.
    """
    cfg = get_cfg()
    if path is not None:
        cfg.merge_pairs(flatten(load_yaml(find_shipped(path))))
    cfg.merge_from_list(list(overrides or []))
    cfg.freeze()
    return cfg


def find_shipped(path: str | Path) -> Path:
    """`path` if the file exists, else the shipped config (or weights) of that name, from any folder:
    `ImageNet/DeiT_S.yaml`, with or without `configs/` before it. If neither exists, `path` as it is.
    """
    path = Path(path)
    if not path.is_file() and not path.is_absolute():
        name = Path(*path.parts[1:]) if path.parts[:1] == ("configs",) else path
        if (SHIPPED / name).is_file():
            logger.info("%s is the shipped %s", path, SHIPPED / name)
            return SHIPPED / name
    return path


def load_yaml(path: str | Path, seen: tuple[Path, ...] = ()) -> dict:
    """The nested mapping in a YAML file, merged over its `_BASE_` file or files. `seen`: the files that led to it.

    Raises a UserError if the file is missing, not YAML or not a mapping; if it has a key twice with two values (YAML
    itself would let the last one win); if its `_BASE_` files form a circle.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"No config file {path}.{_nearest(path)}")
    if path.resolve() in seen:
        raise UserError(f"{path}: its _BASE_ files name each other in a circle.")
    try:
        content = yaml.load(path.read_text(), Loader=_UniqueKeyLoader) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a YAML file: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds {type(content).__name__}, not KEY: VALUE pairs.")
    bases = content.pop("_BASE_", [])
    merged: dict = {}
    for base in [bases] if isinstance(bases, str) else bases:
        _merge(merged, load_yaml(path.parent / Path(base).expanduser(), (*seen, path.resolve())))
    return _merge(merged, content)


def _nearest(path: Path) -> str:
    """`" Did you mean A or B?"`: config files with a similar name, beside `path` or shipped."""
    beside = [str(p) for p in sorted(path.parent.glob("*.yaml"))]
    shipped = [p.relative_to(SHIPPED).as_posix() for p in sorted(SHIPPED.glob("*/[!_]*.yaml"))]
    same_folder = [name for name in shipped if Path(name).parent.name == path.parent.name]
    for names in (beside, same_folder, shipped):
        by_stem = {Path(name).stem.lower(): name for name in names}
        if near := difflib.get_close_matches(path.stem.lower(), by_stem):
            return f" Did you mean {' or '.join(by_stem[stem] for stem in near)}?"
    return f" There are: {', '.join(beside)}" if beside else ""


def _merge(into: dict, other: dict) -> dict:
    for name, value in other.items():
        if isinstance(value, dict) and isinstance(into.get(name), dict):
            _merge(into[name], value)
        else:
            into[name] = value
    return into


class _UniqueKeyLoader(yaml.SafeLoader):
    """Safe YAML that refuses a key written twice with two values (except where a published file does so)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        values: dict[object, list[object]] = {}
        for key, value in node.value:
            values.setdefault(self.construct_object(key, deep=True), []).append(self.construct_object(value, deep=True))
        for key, repeated in values.items():
            if len(repeated) > 1:
                if any(value != repeated[0] for value in repeated) and (key, *repeated) not in legacy.REPEATED:
                    raise yaml.constructor.ConstructorError(None, None, f"key {key} appears twice", node.start_mark)
                logger.warning("%s: key %s appears twice, the last one counts: %s.", self.name, key, repeated[-1])
        return super().construct_mapping(node, deep)
