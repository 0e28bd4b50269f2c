"""Reading and writing weights: safe files only, strict matching, and the key names and wrappers of every reference
release.

* Files are read with `weights_only=True` or as safetensors; a pickle that would run code is refused and nothing of it
  runs.
* Releases wrap their weights (`model`, `model_state`, `state_dict`, ...) and prefix their keys (`module.`,
  `base_model.`, ...); both are undone here. What only one architecture knows (e.g. resizing position embeddings) is its
  `adapt_state_dict`.
* Files are written to a temporary name, synced and renamed, so a file with its final name is whole.
"""

from __future__ import annotations

import argparse
import logging
import pickle
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save_file as save_safetensors_file
from torch import Tensor, nn

from ats.config import CfgNode, find_shipped
from ats.errors import UserError, counted
from ats.files import atomic_write

logger = logging.getLogger(__name__)

# Where releases keep their weights, averaged ones first: they are what a training evaluated.
WRAPPERS = ("ema_state", "state_dict_ema", "model_ema", "model_state", "model", "state_dict", "module")
SUFFIXES = (".pth", ".pyth", ".pt", ".bin", ".safetensors")
PREFIXES = ("module.", "_orig_mod.", "base_model.", "model.")


def load_checkpoint(path: str | Path) -> dict:
    """The contents of a .pth / .pyth / .safetensors file, on the CPU; also of a shipped one, from any folder.

    Raises:
        UserError: no such file, not a checkpoint, damaged, or a pickle that would run code.
    """
    path = find_shipped(path)
    if path.is_dir():
        files = sorted(file.name for file in path.iterdir() if file.suffix in SUFFIXES)
        raise UserError(f"{path} is a folder: type the file in it, {path / (files[0] if files else 'FILE')}.")
    if not path.is_file():
        raise UserError(f"No checkpoint file {path}.")
    try:
        if path.suffix == ".safetensors" or _holds_safetensors(path):
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):  # training arguments in DeiT's and timm's files
            contents = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "weights_only" not in str(error).lower() and "unsupported" not in str(error).lower():
            raise UserError(_damaged(path, error)) from error
        raise UserError(
            f"{path} was refused: loading it would run code ({_refused_global(error)}); nothing of it was run. "
            "Ask for a file with tensors and plain values only (a state_dict, or .safetensors)."
        ) from error
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise UserError(_damaged(path, error)) from error
    if not isinstance(contents, dict):
        raise UserError(f"{path} holds a {type(contents).__name__}, not a dictionary of weights.")
    return contents


def _damaged(path: Path, error: Exception) -> str:
    """What is known of a file that cannot be read. A KeyError only names a byte that is no command of a pickle."""
    reason = "" if isinstance(error, KeyError) else str(error).split("\n")[0]
    return f"{path} is not a checkpoint or is damaged{f': {reason}' if reason else ''}"


def _holds_safetensors(path: Path) -> bool:
    """Whether a file of another name is of safetensors: it begins with the length of its header, which is JSON."""
    with open(path, "rb") as file:
        start = file.read(9)
    return start[8:] == b"{" and int.from_bytes(start[:8], "little") < path.stat().st_size


def save_checkpoint(path: str | Path, contents: dict) -> None:
    """Write tensors and plain values so that `path` is either the old file or the whole new one, whatever happens."""
    # Into an open file: a full disk is then an OSError that says so, where torch's own writer says "unexpected pos".
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        torch.save(contents, file)


def save_safetensors(path: str | Path, state_dict: dict[str, Tensor]) -> None:
    """Write weights alone as safetensors, with the same guarantee."""
    with atomic_write(path) as temporary:
        save_safetensors_file(
            {key: tensor.detach().cpu().contiguous() for key, tensor in state_dict.items()}, temporary
        )


def load_weights(
    model: nn.Module, source: str | Path | dict[str, Tensor], *, skip: Iterable[str] = (), advice: str = ""
) -> None:
    """Load weights into `model`, strictly: every key of the file used or known to be without meaning, every key of the
    model filled.

    Args:
        source: a file, or a (possibly wrapped) state dict.
        skip: key prefixes left as they are in the model, e.g. ("head.",) for another set of classes.
        advice: what else one can type where the file has another number of classes.

    Raises:
        UserError: the file is not readable, or belongs to another architecture (missing, unexpected and misshapen keys,
            grouped).
    """
    name = "the given state dict" if isinstance(source, dict) else str(source)
    state = unwrap(source if isinstance(source, dict) else load_checkpoint(source))
    if not state:
        raise UserError(f"{name} holds no weights.")
    expected = model.state_dict()
    state = strip_prefixes(state, expected)
    for key in state.keys() & expected.keys():
        if expected[key].ndim == 0 and state[key].numel() == 1:  # some writers store a counter as a vector of one
            state[key] = state[key].reshape(())
    if hasattr(model, "adapt_state_dict"):
        state = model.adapt_state_dict(state)
    for key in expected:
        if key.startswith(tuple(skip)):
            state[key] = expected[key]
    _check(expected, state, name, advice)
    model.load_state_dict(state)


def to_fine_tune(cfg: CfgNode) -> str:
    """The keys that fine-tune what TEST.CHECKPOINT_FILE_PATH names for other classes, without those that are set."""
    keys = {"ENABLE": True, "RESET_HEAD": True, "CHECKPOINT_FILE_PATH": cfg.TEST.CHECKPOINT_FILE_PATH}
    return " ".join(f"TRAIN.{key} {value}" for key, value in keys.items() if value and not cfg.TRAIN[key])


def unwrap(contents: dict) -> dict[str, Tensor]:
    """The state dict inside a checkpoint: the first of WRAPPERS that is there, else the tensors on the top level."""
    for wrapper in WRAPPERS:
        if isinstance(contents.get(wrapper), dict):
            return unwrap(contents[wrapper])
    return {key: value for key, value in contents.items() if isinstance(value, Tensor)}


def strip_prefixes(state: dict[str, Tensor], expected: Iterable[str]) -> dict[str, Tensor]:
    """Remove a prefix that all keys share, unless the model's own keys have it."""
    expected = set(expected)
    while not expected & set(state):
        prefix = next((p for p in PREFIXES if all(key.startswith(p) for key in state)), None)
        if prefix is None:
            return state
        state = {key[len(prefix) :]: value for key, value in state.items()}
    return dict(state)


def _check(expected: dict[str, Tensor], state: dict[str, Tensor], name: str, advice: str) -> None:
    missing, unexpected = expected.keys() - state.keys(), state.keys() - expected.keys()
    misshapen = {
        key: f"{key} {tuple(state[key].shape)} instead of {tuple(expected[key].shape)}"
        for key in expected.keys() & state.keys()
        if state[key].shape != expected[key].shape
    }
    if not (missing or unexpected or misshapen):
        return
    lines = [f"{name} does not belong to this model."]
    for title, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", misshapen.values())):
        if keys:
            lines.append(f"  {len(keys)} keys {title}: {_grouped(keys)}")
    if not missing and not unexpected and all("head" in key or "new_fc" in key for key in misshapen):
        classes = state[next(iter(misshapen))].shape[0]
        lines.append(
            f"  The file has {counted(classes, 'class', 'classes')}: set MODEL.NUM_CLASSES {classes}"
            f"{f' or, to fine-tune it for others, {advice}' if advice else ''}."
        )
    else:
        lines.append(
            "  Compare MODEL.NAME and the VIT keys with the network the file was made for (--print-config shows them)."
        )
    raise UserError("\n".join(lines))


def _grouped(keys: Iterable[str], limit: int = 12) -> str:
    """Keys that differ in their block number alone as one, with their count; the network's own parts before its
    blocks'.
    """
    groups = Counter(
        re.sub(r"(?<=\.)\d+(?=\.)", "*", key) for key in sorted(keys, key=lambda key: (key.count("."), key))
    )
    texts = [f"{key} (x{count})" if count > 1 else key for key, count in groups.items()]
    return ", ".join(texts[:limit]) + (f", ... ({len(texts) - limit} more groups)" if len(texts) > limit else "")


def _refused_global(error: Exception) -> str:
    match = re.search(r"GLOBAL ([\w.]+)|global (?:name )?[`'\"]?([\w.]+)", str(error))
    return next(group for group in match.groups() if group) if match else "an unknown class"
