"""Load weights into a network, matching keys strictly.

Releases wrap their weights (`model`, `state_dict`, ...) and prefix their keys (`module.`, `backbone.`, ...). Wrappers
and prefixes are removed. Anything specific to an architecture, e.g. resizing position embeddings, is in its
`adapt_state_dict`.
"""

from __future__ import annotations

import json
import logging
import re
import shlex
from collections import Counter, deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ats.checkpoint.file import load_checkpoint
from ats.config import CfgNode
from ats.errors import UserError, counted

logger = logging.getLogger(__name__)

# Keys under which releases keep their weights. EMA weights come first, because those were evaluated.
WRAPPERS = ("ema_state", "state_dict_ema", "model_ema", "model_state", "model", "state_dict", "module")
INFIXES = re.compile(r"\b_(orig_mod|checkpoint_wrapped_module|fsdp_wrapped_module)\.")  # PyTorch's own, at any level
# Keys that no network here needs: from pretraining (MAE, DINOv2), or left behind by profilers (thop).
NOT_NEEDED = re.compile(r"(mask_token|decoder)|(.*\.)?total_(ops|params)$")
GIVEN = "the given state dict"
Weights = str | Path | dict[str, Tensor]  # a file, or a state dict, which may be wrapped


def load_weights(model: nn.Module, source: Weights, *, skip: Iterable[str] = (), advice: str = "") -> None:
    """Load weights into `model` strictly: keys must match, except those that `adapt_state_dict` ignores.

    Keys that start with an entry of `skip` keep the model's values, e.g. ("head.",) for other classes. `advice`: config
    keys to type, for the message about a file with another number of classes.

    Raises:
        UserError: the file cannot be read, or has missing, unexpected or misshapen keys, which the message lists.
    """
    name = GIVEN if isinstance(source, dict) else str(source)
    expected = model.state_dict()
    kept = {key: value for key, value in expected.items() if key.startswith(tuple(skip))}
    needed = {key: value for key, value in expected.items() if key not in kept}
    state = _find(source if isinstance(source, dict) else load_checkpoint(source), needed, expected, name)
    for key in state.keys() & expected.keys():
        if expected[key].ndim == 0 and state[key].numel() == 1:  # some writers store scalars as vectors of length 1
            state[key] = state[key].reshape(())
    if hasattr(model, "adapt_state_dict"):
        try:
            state = model.adapt_state_dict(state)
        except (RuntimeError, LookupError, TypeError, ValueError) as error:  # shapes that no release has
            _check(expected, state, name, advice)
            raise UserError(f"{name} does not belong to this model: {str(error).splitlines()[0]}") from error
    # Only now, because timm's filters recognise releases by such keys.
    if unused := [key for key in state if key not in expected and NOT_NEEDED.match(key)]:
        logger.info("%s: not used by this network: %s.", name, _grouped(unused))
    state = {key: value for key, value in state.items() if key not in unused}
    state = {key: value for key, value in state.items() if not key.startswith(tuple(skip))} | kept
    _check(expected, state, name, advice)
    numbers = {key: state[key] for key, own in model.named_parameters() if key in state and not own.is_meta}
    if broken := [key for key, value in numbers.items() if not value.isfinite().all()]:
        logger.warning(
            "%s holds NaN or infinite weights, perhaps from a diverged training: %s.", name, _grouped(broken)
        )
    model.load_state_dict(state)


def to_fine_tune(cfg: CfgNode) -> str:
    """The config keys to add to fine-tune TEST.CHECKPOINT_FILE_PATH for other classes."""
    keys = {"ENABLE": True, "RESET_HEAD": True, "CHECKPOINT_FILE_PATH": cfg.TEST.CHECKPOINT_FILE_PATH}
    return " ".join(f"TRAIN.{key} {value}" for key, value in keys.items() if value and not cfg.TRAIN[key])


def unwrap(contents: dict, _seen: tuple[int, ...] = ()) -> dict[str, Tensor]:
    """The state dict in a checkpoint: under the first of WRAPPERS that holds one, else its top-level tensors."""
    for wrapper in WRAPPERS:
        inner: Any = contents.get(wrapper)
        is_new = isinstance(inner, dict) and id(inner) not in _seen and len(_seen) < len(WRAPPERS)
        if is_new and (state := unwrap(inner, (*_seen, id(contents), id(inner)))):
            return state
    return {key: value for key, value in contents.items() if isinstance(key, str) and isinstance(value, Tensor)}


def _find(contents: dict, needed: dict[str, Tensor], expected: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """The weights in `contents` for a network with the keys `expected`: from the dict and prefix with most of the
    `needed` keys. If none matches, returns all, in case `adapt_state_dict` renames them.
    """
    state = unwrap(contents)
    parts = {(): state} if state else _parts(contents)
    if not any(INFIXES.search(key) for key in expected):
        parts = {path: {INFIXES.sub("", key): value for key, value in part.items()} for path, part in parts.items()}
    counts = {(path, prefix): n for path, part in parts.items() for prefix, n in _prefixes(part, needed).items()}
    most = max(counts.values(), default=0)
    # 0.8, not half: one stage of another naming scheme (`stages.2.blocks.0...`) can hold two thirds of all blocks.
    places = [place for place, count in counts.items() if count == most and count >= 0.8 * len(needed)]
    if not places:
        places = [(path, "") for path, part in parts.items() if path == () or 2 * len(part) >= len(expected)]
        parts = {path: _without_shared_prefix(part, expected) for path, part in parts.items()}
    if len(places) != 1:
        raise UserError(_which(contents, places, name))
    ((path, prefix),) = places
    state = {key.removeprefix(prefix): value for key, value in parts[path].items() if key.startswith(prefix)}
    if unused := [key for key in parts[path] if not key.startswith(prefix)]:
        logger.info("%s: not used by this network: %s.", name, _grouped(unused))
    return state


def _parts(contents: dict) -> dict[tuple, dict[str, Tensor]]:
    """The tensors of every dict nested in `contents`, by the path of keys to it."""
    found, seen, todo = {}, set(), deque[tuple[tuple, Any]]([((), contents)])
    while todo:
        path, value = todo.popleft()
        if id(value) in seen or len(path) > 8:
            continue
        seen.add(id(value))
        items = value.items() if isinstance(value, dict) else enumerate(value)
        todo.extend(((*path, key), inner) for key, inner in items if isinstance(inner, (dict, list, tuple)))
        if isinstance(value, dict) and (state := unwrap(value)):
            found[path] = state
    return found


def _prefixes(state: dict[str, Tensor], expected: dict[str, Tensor]) -> Counter[str]:
    """Prefix -> how many keys, without it, are the network's own."""
    counts: Counter[str] = Counter()
    for key in state:
        starts = [0, *(dot.end() for dot in re.finditer(r"\.", key))]
        counts.update(key[:start] for start in starts[:16] if key[start:] in expected)
    return counts


def _without_shared_prefix(state: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, Tensor]:
    while state.keys().isdisjoint(expected) and len({key.partition(".")[0] for key in state}) == 1:
        if not all("." in key for key in state):
            break
        state = {key.partition(".")[2]: value for key, value in state.items()}
    return state


def _which(contents: dict, places: list[tuple[tuple, str]], name: str) -> str:
    """The message about a checkpoint with no weights, or with several sets to choose from."""
    keys = ", ".join(str(key)[:40] for key in list(contents)[:12]) + (", ..." if len(contents) > 12 else "")
    top_level = f"Its top-level keys: {keys}." if contents else "It is empty."
    if not places:
        return f"{name} holds no weights. {top_level}"
    if len({path for path, _ in places}) == len(places):  # the paths alone tell them apart
        places = [(path, "") for path, _ in places]
    labels = {".".join(map(str, (*path, prefix.rstrip(".")))).strip("."): (path, prefix) for path, prefix in places}
    label = next((label for label in labels if re.search("ema|teacher", label)), next(iter(labels)))
    path, prefix = labels[label]
    if name == GIVEN:
        return f"{name} holds several sets of weights: {', '.join(labels)}. {top_level} Give the one you want."
    file = Path(name)
    code = f"c.load_checkpoint({json.dumps(name)})"
    code = "".join([code, *(f"[{json.dumps(key, default=repr)}]" for key in path)]) if path else f"c.unwrap({code})"
    if prefix:
        code = f"{{k: v for k, v in {code}.items() if k.startswith({json.dumps(prefix)})}}"
    target = file.with_name(f"{file.stem}_{re.sub(r'[^0-9a-zA-Z]+', '_', label)}.pth")
    code = f"import ats.checkpoint as c; c.save_checkpoint({json.dumps(str(target))}, {code})"
    return (
        f"{name} holds several sets of weights: {', '.join(labels)}. {top_level}\nSave the one you want and give that "
        f"file. For {label}, type:\n  python -c {shlex.quote(code)}"
    )


def _check(expected: dict[str, Tensor], state: dict[str, Tensor], name: str, advice: str) -> None:
    missing, unexpected = expected.keys() - state.keys(), state.keys() - expected.keys()
    shared = sorted(expected.keys() & state.keys())
    misshapen = {key for key in shared if state[key].shape != expected[key].shape}
    shapes = [f"{key} {tuple(state[key].shape)} instead of {tuple(expected[key].shape)}" for key in sorted(misshapen)]
    types = [f"{key} {kind}" for key in shared if (kind := _wrong_type(state[key], expected[key]))]
    problems = {"missing": missing, "unexpected": unexpected, "of another shape": shapes, "of another type": types}
    lines = [f"  {len(keys)} keys {title}: {_grouped(keys)}" for title, keys in problems.items() if keys]
    if not lines:
        return
    others = f" or, to fine-tune it for others, {advice}" if advice else ""
    heads = [key for key in misshapen | missing if "head" in key or "new_fc" in key]
    classes = [state[key].shape[0] for key in heads if key in misshapen and state[key].ndim]
    hint = (
        "Compare MODEL.NAME and its keys (VIT; TIMM.KWARGS for timm/<name>) with the network that the file belongs to: "
        "--print-config all shows them."
    )
    if not unexpected and not types and len(heads) == len(misshapen | missing):
        if classes and not missing:
            number = counted(classes[0], "class", "classes")
            hint = f"The file has {number}: set MODEL.NUM_CLASSES {classes[0]}{others}."
        elif not misshapen:
            hint = "The file has no classifier" + (f": to train one, type {advice}." if advice else ".")
    raise UserError("\n".join([f"{name} does not belong to this model.", *lines, f"  {hint}"]))


def _wrong_type(given: Tensor, own: Tensor) -> str:
    """What would be lost if `own` took the values of `given`; "" if nothing."""
    if given.is_meta:
        return "without values (on the meta device)" if not own.is_meta else ""
    if given.layout != torch.strided or given.is_quantized:
        return "sparse or quantised"
    is_number = given.is_floating_point() or not own.is_floating_point()
    return "" if is_number else f"{given.dtype} instead of {own.dtype}".replace("torch.", "")


def _grouped(keys: Iterable[str], limit: int = 12) -> str:
    """List keys, shortest paths first; those that differ only in the block number are grouped with a count."""
    shortest_first = sorted(keys, key=lambda key: (key.count("."), key))
    groups = Counter(re.sub(r"(?<=\.)\d+(?=\.)", "*", key) for key in shortest_first)
    texts = [f"{key} (x{count})" if count > 1 else key for key, count in groups.items()]
    return ", ".join(texts[:limit]) + (f", ... ({len(texts) - limit} more groups)" if len(texts) > limit else "")
