"""ATS for your own timm or Hugging Face transformers model, in one line:

    model = timm.create_model("deit3_small_patch16_224", pretrained=True)
    ats.patch(model, num_tokens=197)
    model.ats.num_tokens = 0.7      # change it at any time
    model.ats.trace = True          # then model.ats.last has what the last batch kept
    ats.unpatch(model)              # undo

The model stays the same object, with its weights, state-dict keys and methods. `timm/model.py` and
`transformers/model.py` say what changes inside; docs/PLUGIN.md lists the accepted models. `patch` refuses any class it
does not know exactly, and names it, rather than compute something else.
"""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Iterable, Mapping
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from ats.errors import UserError, suggest
from ats.files import write
from ats.plugin.handle import Patched, make_original, original_class
from ats.plugin.timm import model as timm_models
from ats.reduction import REDUCTIONS, Reduction
from ats.reduction.base import options_of
from ats.reduction.plan import default_blocks, plan_reductions, refuse_unread, value_of_each_block
from ats.restore import check_restore

SETTINGS_FILE = "ats.json"


def patch(
    model: nn.Module,
    *,
    blocks: Iterable[int] | None = None,
    sampler: str = "inverse_transform",
    stages: Iterable[Mapping[str, object]] | None = None,
    restore: str = "zero",
    **options: object,
) -> nn.Module:
    """Put ATS into `blocks` of a timm or transformers vision transformer, in place. Returns the same object, with a
    handle `model.ats` (`handle.Handle`).

    Args:
        blocks, sampler: like the config keys ATS.BLOCKS (None: the last three quarters) and ATS.SAMPLER.
        stages: instead of those, several groups of blocks, each with its own reduction, like ATS.STAGES:
            `[{"sampler": "tome", "blocks": range(6), "r": 20}, {"blocks": range(6, 12), "num_tokens": 257}]`.
        restore: what features hold at dropped patches: zero, last or nearest, see `ats/restore.py`.
        options: the reduction's, like its config keys: num_tokens, score, rule, min_tokens, seed (ATS.*), r, prop_attn
            (TOME.*), keep_rate, fuse_token (EVIT.*), and those of other registered reductions. `score` None (default):
            the paper's if the head reads CLS, else "mean_attention".

    Raises:
        UserError: ATS does not support the model (class and reason), it has ATS already, or a setting is out of range.
    """
    if isinstance(model, Patched):
        raise UserError(
            "This model has ATS already: change its settings with model.ats.num_tokens = ... (or .blocks, .sampler, "
            ".score), or call ats.unpatch(model) first."
        )
    check_restore(restore)
    _refuse(model)
    if stages is not None:
        if blocks is not None or options or sampler != "inverse_transform":
            raise UserError("Give stages, or blocks with the sampler and options of one reduction, not both.")
        settings = {"stages": stages}
    else:
        settings = {"blocks": blocks, "sampler": sampler} | _defaults(sampler) | options
        unknown = [name for name in options if name not in _defaults(sampler)]
        if unknown:
            names = [*_defaults(sampler), "blocks", "sampler", "stages"]
            raise UserError(
                f"ats.patch has no option {unknown[0]}: choose from {', '.join(names)}.{suggest(unknown[0], names)}"
            )
        refuse_unread(options, [sampler], str)
        if settings["score"] is None:
            settings["score"] = library_of(model).default_score(model)
    _apply(model, settings)
    model.ats.restore = restore
    return model


def _defaults(sampler: str = "inverse_transform") -> dict[str, Any]:
    """Option -> default for all registered reductions; if several share a name, `sampler`'s default."""
    kinds = [*REDUCTIONS.values(), *([REDUCTIONS[sampler]] if str(sampler) in REDUCTIONS else [])]
    options = {option.name: option.default for kind in kinds for option in options_of(kind)} | {"score": None}
    options.pop("share_frames", None)  # images have no frames
    return options


# A signature with all options by name, for help() and editors.
_parameters = [p for p in inspect.signature(patch).parameters.values() if p.kind is not p.VAR_KEYWORD]
_parameters += [inspect.Parameter(name, _parameters[-1].KEYWORD_ONLY, default=own) for name, own in _defaults().items()]
patch.__signature__ = inspect.Signature(_parameters)


def settings(model: nn.Module) -> dict[str, object]:
    """What `ats.patch` did to a model, as plain values: `ats.patch(other, **ats.settings(model))` does it again.
    Raises a UserError if the model is not patched.
    """
    if not isinstance(model, Patched):
        raise UserError(f"This {type(model).__name__} has no ATS, so no settings: call ats.patch(model, ...) first.")
    found = copy.deepcopy(model.ats.settings)
    if "stages" not in found:
        own = {option.name for option in options_of(REDUCTIONS[found["sampler"]])}
        found = {name: value for name, value in found.items() if name in own | {"blocks", "sampler"}}
    return found | {"restore": model.ats.restore}


def save_settings(model: nn.Module, folder: str | Path) -> Path:
    """Write `settings` of a patched model to `folder`/ats.json. For transformers, `save_pretrained` does this."""
    path = Path(folder) / SETTINGS_FILE
    write(path, json.dumps(settings(model), indent=1) + "\n")
    return path


def load(model: nn.Module, folder: str | Path) -> nn.Module:
    """Patch a model with the settings saved in `folder`. Returns the same object.

        model = ViTForImageClassification.from_pretrained(folder)
        ats.load(model, folder)

    Raises:
        UserError: there are no settings, or they do not fit this network.
    """
    path = Path(folder) / SETTINGS_FILE
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError as error:
        hint = "Write it with save_pretrained of a patched model, or with ats.save_settings(model, folder)."
        raise UserError(f"There is no {path}. {hint}") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    try:
        return patch(model, **found)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def unpatch(model: nn.Module) -> nn.Module:
    """Undo `patch`, in place: restore the class, blocks and attributes, keep the current weights. Returns the same
    object. Raises a UserError if it is not patched.
    """
    if not isinstance(model, Patched):
        path, inner = _wrapped(model)
        hint = (
            f"it wraps one: ats.unpatch({path})"
            if isinstance(inner, Patched)
            else "ats.patch(model, ...) was not called"
        )
        raise UserError(f"This {type(model).__name__} has no ATS to remove: {hint}.")
    for module in model.modules():
        make_original(module)
    return model


def library_of(model: nn.Module) -> ModuleType:
    """The module of `ats.plugin` for the model's library (see `handle.py`); by default timm's."""
    if not any(kind.__module__.startswith("transformers.") for kind in type(model).__mro__):
        return timm_models
    try:
        return import_module("ats.plugin.transformers.model")
    except ImportError as error:
        import transformers

        raise UserError(
            f"ats.patch does not support the models of transformers {transformers.__version__} ({error}). It needs "
            "5.23: pip install -U transformers."
        ) from error


def _wrapped(model: nn.Module) -> tuple[str, nn.Module | None]:
    """What to type for the supported model that this one wraps (DistributedDataParallel, torch.compile, timm's
    features_only, ...), and that model; None if there is none.
    """
    path = "model"
    while True:
        names = (name for name in ("module", "_orig_mod", "model") if isinstance(getattr(model, name, None), nn.Module))
        name = next(names, None)
        if name is None:
            return path, None
        path, model = f"{path}.{name}", getattr(model, name)
        if original_class(model) in library_of(model).VERSIONS:
            return path, model


def _refuse(model: nn.Module) -> None:
    """Raise a UserError, with the reason, if ATS cannot be put into the model as it is now."""
    library, (path, inner) = library_of(model), _wrapped(model)
    if inner is None:
        reason = library.refusal(model)
    else:
        reason = f"it wraps a {original_class(inner).__name__}; patch that one: ats.patch({path}, ...)"
    if reason:
        raise UserError(f"ats.patch cannot take {original_class(model).__name__}: {reason}. See docs/PLUGIN.md.")


def _apply(model: nn.Module, settings: dict) -> None:
    """Give the model's blocks the reductions of the settings. Wrong settings change nothing."""
    settings = {name: _plain(value) for name, value in settings.items()}
    if isinstance(model, Patched) and "sampler" in settings:  # a new sampler: its own defaults for unset options
        old, new = _defaults(model.ats_state.settings["sampler"]), _defaults(settings["sampler"])
        settings |= {name: new[name] for name in new if old[name] != new[name] and settings[name] == old[name]}
    stages = settings.get("stages", [settings])
    for stage in stages if isinstance(stages, list) else ():
        if isinstance(stage, dict) and stage.get("blocks") is None:
            stage["blocks"] = default_blocks(library_of(model).network(model)["depth"])
    planned = _plan(model, settings)
    _refuse(model)  # the blocks may have changed since `patch`
    library_of(model).attach(model, planned)
    state = model.ats_state
    state.settings, state.apply = settings, _apply


def _plan(model: nn.Module, settings: dict) -> dict[int, Reduction]:
    library = library_of(model)
    if "stages" in settings:
        given = settings["stages"]
        are_stages = isinstance(given, list) and given and all(isinstance(stage, dict) for stage in given)
        if not are_stages or not all(isinstance(name, str) for stage in given for name in stage):
            raise UserError(
                f"stages {given!r}: give a list of dicts, e.g. [{{'sampler': 'tome', 'blocks': range(6)}}]."
            )
        stages = [{"sampler": "inverse_transform"} | stage for stage in given]
        namings = [lambda name, where=f"stages[{index}] ": where + name for index in range(len(stages))]
    else:
        kind = REDUCTIONS.get(str(settings["sampler"]))
        own = [option.name for option in options_of(kind)] if kind else []
        stages = [{name: value for name, value in settings.items() if name in ("sampler", "blocks", *own)}]
        namings = [str]
    for stage, naming in zip(stages, namings, strict=True):
        if "share_frames" in stage:
            raise UserError(f"{naming('share_frames')}: images have no frames; leave it out.")
        blocks, name = stage.get("blocks"), naming("blocks")
        if not isinstance(blocks, list) or not blocks:
            what = f"{name} is empty" if blocks == [] else f"{name} {blocks!r}"
            raise UserError(f"{what}: give the indices of the blocks that sample, e.g. blocks=range(3, 12).")
        if not all(type(block) is int for block in blocks):
            raise UserError(f"{name} {blocks}: give whole numbers, e.g. blocks=range(3, 12).")
        kind = REDUCTIONS.get(stage["sampler"]) if isinstance(stage["sampler"], str) else None
        if stage.get("score") is None and kind and any(option.name == "score" for option in options_of(kind)):
            stage["score"] = library.default_score(model)
    network = library.network(model)
    planned = plan_reductions(stages, **network, namings=namings)
    # Options of other reductions apply once the sampler changes; refuse wrong ones now.
    unread = {option.name: option for kind in REDUCTIONS.values() for option in options_of(kind)}
    for name in unread.keys() & settings.keys() - set().union(*stages):
        value_of_each_block(unread[name], settings[name], settings["blocks"], network["depth"], str)
    return planned


def _plain(value: object) -> object:
    """NumPy and PyTorch numbers and arrays as Python's, other collections as lists, anything else unchanged."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, (str, bytes)):
        return [_plain(item) for item in value]
    return value
