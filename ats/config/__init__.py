"""Configuration: `get_cfg()` returns the defaults, `load_config(path, overrides)` a checked and frozen configuration.

A YAML file may name base files in `_BASE_`, relative to itself; they are read first. YAML files of the official ATS
release and of SlowFast load unchanged (`legacy.py`). To add a key, add its entry to `keys.py`; nothing else changes.
"""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from ats.config.preprocessing import adopt_preprocessing
from ats.config.schema import CfgNode, flatten, get_cfg
from ats.config.yaml_text import read_yaml
from ats.errors import UserError, shown

logger = logging.getLogger(__name__)

PACKAGE = Path(__file__).resolve().parents[1]
# The YAML files and weights that ship with the package: in an installation, or in the clone.
SHIPPED = PACKAGE / "configs" if (PACKAGE / "configs").is_dir() else PACKAGE.parent / "configs"

_named: set[Path] = set()  # shipped files already logged
Settings = dict[str, tuple[object, Path]]  # dotted key -> its value, and the file that sets it

__all__ = ["CfgNode", "find_shipped", "get_cfg", "load_config", "load_yaml"]


def load_config(path: str | Path | None = None, overrides: Sequence[object] | None = None) -> CfgNode:
    """Merge the defaults, the YAML file (`find_shipped`) and the overrides `[KEY, VALUE, ...]`; return them frozen.

    For timm networks, image keys that neither sets follow the weights (`preprocessing.py`). MODEL.NUM_CLASSES None
    becomes the number of classes in DATA.PATH_TO_DATA_DIR, if that exists.

    Raises a UserError if the file is missing or not YAML, a key is unknown, or a value is wrong.
    """
    cfg = get_cfg()
    if path is not None:
        settings = _read(find_shipped(path), {})
        cfg.merge_pairs(
            [(key, value) for key, (value, _) in settings.items()], {k: f for k, (_, f) in settings.items()}
        )
    cfg.merge_from_list(list(overrides or []))
    adopt_preprocessing(cfg)
    if cfg.MODEL.NUM_CLASSES is None:
        from ats.datasets.build import count_classes  # imports PyTorch

        cfg.MODEL.NUM_CLASSES = count_classes(cfg)
        if cfg.MODEL.NUM_CLASSES is not None:
            logger.info("MODEL.NUM_CLASSES %d, as in %s", cfg.MODEL.NUM_CLASSES, cfg.DATA.PATH_TO_DATA_DIR)
    cfg.freeze()
    return cfg


def find_shipped(path: str | Path) -> Path:
    """`path` if that file exists, else the shipped config or weights file of that name; works from any folder.

    For example `ImageNet/DeiT_S.yaml`, with or without `configs/` before it. Else returns `path` unchanged.
    """
    path = Path(os.path.expanduser(path))
    if not os.path.isfile(path) and not path.is_absolute():
        name = Path(*path.parts[1:]) if path.parts[:1] == ("configs",) else path
        if os.path.isfile(SHIPPED / name):
            if path not in _named:
                _named.add(path)
                logger.info("%s is the shipped %s", path, SHIPPED / name)
            return SHIPPED / name
    return path


def load_yaml(path: str | Path) -> dict[str, object]:
    """Dotted key -> value of a YAML file, merged over its `_BASE_` file or files.

    Raises a UserError if the file is missing, not YAML or not a mapping; if a key appears twice with different values
    (plain YAML would keep the last); or if its `_BASE_` files form a cycle.
    """
    return {key: value for key, (value, _) in _read(Path(path), {}).items()}


def _read(path: Path, files: dict[Path, Settings | None], asked_by: str = "") -> Settings:
    """`load_yaml`, with the file of each value. `files`: files read so far; None while their bases are being read."""
    path = Path(os.path.expanduser(path))
    if not os.path.isfile(path):
        what = "It is a folder." if os.path.isdir(path) else _nearest(path)
        raise UserError(f"{asked_by}No config file {shown(str(path))}. {what}".rstrip())
    real = Path(os.path.realpath(path))
    if real not in files:
        files[real] = None
        files[real] = _merge(path, files)
    settings = files[real]
    if settings is None:
        raise UserError(f"{path}: its _BASE_ files name each other in a circle.")
    return settings


def _merge(path: Path, files: dict[Path, Settings | None]) -> Settings:
    content = read_yaml(path)
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise UserError(f"{path} holds {type(content).__name__}, not KEY: VALUE pairs.")
    bases = content.pop("_BASE_", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise UserError(f"{path}: _BASE_ {shown(bases)}: give a YAML file, or a list of them.")
    merged: Settings = {}
    for base in bases:
        merged |= _read(path.parent / os.path.expanduser(base), files, f"{path}: _BASE_: ")
    own: dict[str, object] = {}
    for key, value in flatten(content):
        if key in own and own[key] != value:
            raise UserError(f"{path} has two values for {shown(key)}.")
        own[key] = value
        merged.pop(key, None)  # reinsert at the end: an old spelling here must override the new one in a base
        merged[key] = value, path
    return merged


def _nearest(path: Path) -> str:
    """`"Did you mean A or B?"`: config files with similar names, next to `path` or shipped."""
    beside = [str(p) for p in sorted(path.parent.glob("*.yaml"))] if os.path.isdir(path.parent) else []
    shipped = [p.relative_to(SHIPPED).as_posix() for p in sorted(SHIPPED.glob("*/[!_]*.yaml"))]
    same_folder = [name for name in shipped if Path(name).parent.name == path.parent.name]
    for names in (beside, same_folder, shipped):
        by_stem = {Path(name).stem.lower(): name for name in names}
        if near := difflib.get_close_matches(path.stem.lower(), by_stem):
            return f"Did you mean {' or '.join(by_stem[stem] for stem in near)}?"
    return f"There are: {', '.join(beside[:20])}{', ...' * (len(beside) > 20)}" if beside else ""
