"""Read and write weights safely, and match their keys strictly.

* Files are read with `weights_only=True` or as safetensors. A pickle that would run code is refused and runs nothing.
* Reference releases wrap their weights (`model`, `state_dict`, ...) and prefix their keys (`module.`, ...). Both are
  removed here; what is specific to an architecture (e.g. resizing position embeddings) is its `adapt_state_dict`.
"""

from __future__ import annotations

import argparse
import pickle
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ats.config import CfgNode, find_shipped
from ats.errors import UserError, counted
from ats.files import atomic_write

# Keys under which releases keep their weights. EMA weights come first: they are the ones that were evaluated.
WRAPPERS = ("ema_state", "state_dict_ema", "model_ema", "model_state", "model", "state_dict", "module")
SUFFIXES = (".pth", ".pyth", ".pt", ".bin", ".safetensors")
PREFIXES = ("module.", "_orig_mod.", "base_model.", "model.")
Weights = str | Path | dict[str, Tensor]  # a file, or a state dict, which may be wrapped


def load_checkpoint(path: str | Path) -> dict:
    """The contents of a .pth, .pyth or .safetensors file, on the CPU. Shipped files are found from any folder.

    Raises a UserError if there is no such file, it is damaged or no checkpoint, or it is a pickle that would run code.
    """
    path = find_shipped(path)
    if path.is_dir():
        files = sorted(file.name for file in path.iterdir() if file.suffix in SUFFIXES)
        raise UserError(f"{path} is a folder: type the file in it, {path / (files[0] if files else 'FILE')}.")
    if not path.is_file():
        raise UserError(f"No checkpoint file {path}.")
    try:
        if path.suffix == ".safetensors" or _is_safetensors(path):
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):  # DeiT's and timm's training arguments
            contents = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, SafetensorError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        text = str(error)
        if isinstance(error, pickle.UnpicklingError) and re.search("weights_only|unsupported", text, re.IGNORECASE):
            match = re.search(r"GLOBAL ([\w.]+)|global (?:name )?[`'\"]?([\w.]+)", text)
            name = (match[1] or match[2]) if match else "an unknown class"
            reason = f"loading it would run code ({name}). None of it was run."
            advice = "Ask for a file that holds only tensors and plain values (a state_dict, or .safetensors)."
            raise UserError(f"{path} was refused: {reason} {advice}") from error
        # A KeyError is no reason: it holds only a byte that is not a pickle opcode.
        reason = "" if isinstance(error, KeyError) else text.split("\n")[0]
        raise UserError(f"{path} is not a checkpoint or is damaged{f': {reason}' if reason else ''}") from error
    if not isinstance(contents, dict):
        raise UserError(f"{path} holds a {type(contents).__name__}, not a dictionary of weights.")
    return contents


def _is_safetensors(path: Path) -> bool:
    """Whether a file is in safetensors format, whatever its name: the header's length, then the header, in JSON."""
    with open(path, "rb") as file:
        start = file.read(9)
    return start[8:] == b"{" and int.from_bytes(start[:8], "little") < path.stat().st_size


def save_checkpoint(path: str | Path, contents: dict) -> None:
    """Write tensors and plain values atomically: `path` is either the old file or the whole new one."""
    # To an open file, a full disk is an OSError that says so; torch's own writer says "unexpected pos".
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        torch.save(contents, file)


def save_safetensors(path: str | Path, state_dict: dict[str, Tensor]) -> None:
    """Write weights as safetensors, also atomically."""
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in state_dict.items()}
    with atomic_write(path) as temporary:
        save_file(tensors, temporary)


def load_weights(model: nn.Module, source: Weights, *, skip: Iterable[str] = (), advice: str = "") -> None:
    """Load weights into `model`, strictly: the keys must match, except those that `adapt_state_dict` knows to ignore.

    Keys that begin with one of `skip` keep the model's values, e.g. ("head.",) for other classes. `advice`: keys to
    type, for the message about a file with another number of classes.

    Raises:
        UserError: the file cannot be read, or has missing, unexpected or misshapen keys, which the message lists.
    """
    name = "the given state dict" if isinstance(source, dict) else str(source)
    state = unwrap(source if isinstance(source, dict) else load_checkpoint(source))
    if not state:
        raise UserError(f"{name} holds no weights.")
    expected = model.state_dict()
    state = strip_prefixes(state, expected)
    for key in state.keys() & expected.keys():
        if expected[key].ndim == 0 and state[key].numel() == 1:  # some writers store scalars as vectors of length 1
            state[key] = state[key].reshape(())
    if hasattr(model, "adapt_state_dict"):
        state = model.adapt_state_dict(state)
    state |= {key: value for key, value in expected.items() if key.startswith(tuple(skip))}
    _check(expected, state, name, advice)
    model.load_state_dict(state)


def to_fine_tune(cfg: CfgNode) -> str:
    """The config keys to add, to fine-tune TEST.CHECKPOINT_FILE_PATH for other classes."""
    keys = {"ENABLE": True, "RESET_HEAD": True, "CHECKPOINT_FILE_PATH": cfg.TEST.CHECKPOINT_FILE_PATH}
    return " ".join(f"TRAIN.{key} {value}" for key, value in keys.items() if value and not cfg.TRAIN[key])


def unwrap(contents: dict) -> dict[str, Tensor]:
    """The state dict in a checkpoint: under the first of WRAPPERS that it has, else its top-level tensors."""
    for wrapper in WRAPPERS:
        if isinstance(contents.get(wrapper), dict):
            return unwrap(contents[wrapper])
    return {key: value for key, value in contents.items() if isinstance(value, Tensor)}


def strip_prefixes(state: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """Remove the PREFIXES that all keys share, unless the model's own keys have them."""
    while state.keys().isdisjoint(expected):
        prefix = next((p for p in PREFIXES if all(key.startswith(p) for key in state)), None)
        if prefix is None:
            break
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _check(expected: dict[str, Tensor], state: dict[str, Tensor], name: str, advice: str) -> None:
    missing, unexpected = expected.keys() - state.keys(), state.keys() - expected.keys()
    misshapen = {
        key: f"{key} {tuple(state[key].shape)} instead of {tuple(expected[key].shape)}"
        for key in expected.keys() & state.keys()
        if state[key].shape != expected[key].shape
    }
    problems = {"missing": missing, "unexpected": unexpected, "of another shape": misshapen.values()}
    lines = [f"  {len(keys)} keys {title}: {_grouped(keys)}" for title, keys in problems.items() if keys]
    if not lines:
        return
    if not missing and not unexpected and all("head" in key or "new_fc" in key for key in misshapen):
        classes = state[next(iter(misshapen))].shape[0]
        others = f" or, to fine-tune it for others, {advice}" if advice else ""
        hint = f"The file has {counted(classes, 'class', 'classes')}: set MODEL.NUM_CLASSES {classes}{others}."
    else:
        hint = "Compare MODEL.NAME and the VIT keys with the network that the file belongs to (see --print-config all)."
    raise UserError("\n".join([f"{name} does not belong to this model.", *lines, f"  {hint}"]))


def _grouped(keys: Iterable[str], limit: int = 12) -> str:
    """List the keys, those that differ only in their block number as one with a count, the shortest paths first."""
    shortest_first = sorted(keys, key=lambda key: (key.count("."), key))
    groups = Counter(re.sub(r"(?<=\.)\d+(?=\.)", "*", key) for key in shortest_first)
    texts = [f"{key} (x{count})" if count > 1 else key for key, count in groups.items()]
    return ", ".join(texts[:limit]) + (f", ... ({len(texts) - limit} more groups)" if len(texts) > limit else "")
