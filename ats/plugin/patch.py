"""ATS in a model of timm or Hugging Face transformers you already have, with one line:

    model = timm.create_model("deit3_small_patch16_224", pretrained=True)
    ats.patch(model, blocks=range(3, 12), num_tokens=197)
    model.ats.num_tokens = 0.7      # re-tune at any time
    model.ats.trace = True          # then model.ats.last says what the last batch kept
    ats.unpatch(model)              # as if nothing had been

The model stays the same object, with its weights, state-dict keys and methods; `models/timm_vit.py` and
`models/transformers_vit.py` say what changes inside, docs/PLUGIN.md which models are accepted. What is not understood
exactly is refused by name rather than computed differently.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib import import_module
from types import ModuleType

from torch import nn

from ats.errors import UserError
from ats.plugin.timm import model as timm_vit
from ats.reduction.plan import plan_samplers
from ats.reduction.sampling import BlockSampler, TokenReducer

REDUCER_OPTIONS = ("r", "prop_attn", "keep_rate", "fuse_token")


def patch(
    model: nn.Module,
    *,
    blocks: Iterable[int],
    num_tokens: int | float | Iterable[int | float] = 1.0,
    sampler: str = "inverse_transform",
    score: str | None = None,
    rule: str = "official",
    min_tokens: int = 8,
    seed: int = 0,
    r: int | Iterable[int] = 8,
    prop_attn: bool = True,
    keep_rate: float | Iterable[float] = 0.7,
    fuse_token: bool = True,
) -> nn.Module:
    """Put ATS into `blocks` of a vision transformer of timm or transformers, in place.

    Args:
        score: name in `ats.reduction.sampling.SCORES`; None: the paper's where CLS is read out, else "mean_attention".
        blocks, num_tokens, sampler, rule, min_tokens, seed: as the config keys ATS.*.
        r, prop_attn: of sampler "tome", as TOME.*. keep_rate, fuse_token: of sampler "evit", as EVIT.*.

    Returns:
        The same model object, with a handle `model.ats` (`models.host.Handle`).

    Raises:
        UserError: the model is not understood (class and reason), it has ATS already, or a setting is out of range.
    """
    library = library_of(model)
    if type(model) in library.HOSTS:
        raise UserError(
            "This model has ATS already: change it by model.ats.num_tokens = ... (or .blocks, .sampler, .score), "
            "or call ats.unpatch(model) first."
        )
    reason = _wrapped(model) or library.refusal(model)
    if reason:
        raise UserError(f"ats.patch cannot take {type(model).__name__}: {reason}. See docs/PLUGIN.md.")
    settings = {
        "blocks": blocks,
        "num_tokens": num_tokens,
        "sampler": sampler,
        "score": library.default_score(model) if score is None else score,
        "rule": rule,
        "min_tokens": min_tokens,
        "seed": seed,
        "r": r,
        "prop_attn": prop_attn,
        "keep_rate": keep_rate,
        "fuse_token": fuse_token,
    }
    _apply(model, settings)
    return model


def unpatch(model: nn.Module) -> nn.Module:
    """Undo `patch`, in place: class, blocks and attributes are those the model had before.

    Returns:
        The same model object, with the weights it has now.

    Raises:
        UserError: it is not patched.
    """
    library = library_of(model)
    if type(model) not in library.HOSTS:
        raise UserError(f"This {type(model).__name__} has no ATS to take out: ats.patch(model, ...) was not called.")
    library.release(model)
    return model


def library_of(model: nn.Module) -> ModuleType:
    """The module of `ats.models` that knows the library this model is of (`models/host.py`); timm's for any other."""
    if not any(kind.__module__.startswith("transformers.") for kind in type(model).__mro__):
        return timm_vit
    try:
        return import_module("ats.plugin.transformers.model")
    except ImportError as error:
        import transformers

        raise UserError(
            f"ats.patch does not understand the models of transformers {transformers.__version__} ({error}); it is "
            "written for 5.23: pip install -U transformers."
        ) from error


def _wrapped(model: nn.Module) -> str:
    """What to patch where this is a wrapper around a model that can have ATS; "" if it is not."""
    for name in ("module", "_orig_mod", "model"):
        inner = getattr(model, name, None)
        if isinstance(inner, nn.Module) and type(inner) in (library := library_of(inner)).MODELS | library.HOSTS:
            return f"it wraps a {type(inner).__name__}; patch that one: ats.patch(model.{name}, ...)"
    return ""


def _apply(model: nn.Module, settings: dict) -> None:
    """Give the model's blocks the samplers that the settings describe; nothing changes if they are wrong."""
    settings = {name: _plain(value) for name, value in settings.items()}
    _check_block_list(settings["blocks"])
    for name, number in (("num_tokens", "a number, a ratio up to 1"), ("r", "a number"), ("keep_rate", "a share")):
        value = settings[name]
        if not isinstance(value, (int, float, list)):
            raise UserError(f"{name} {value!r}: give {number}, or a list with one per block.")
    for name in ("min_tokens", "seed"):
        if type(settings[name]) is not int:
            raise UserError(f"{name} {settings[name]!r}: give a whole number.")
    library_of(model).adopt(model, _plan(model, settings))
    state = model.ats_state
    state.settings, state.apply = settings, _apply


def _plan(model: nn.Module, settings: dict) -> dict[int, BlockSampler | TokenReducer]:
    library = library_of(model)
    sampling = {name: value for name, value in settings.items() if name not in REDUCER_OPTIONS}
    return plan_samplers(
        depth=library.num_blocks(model),
        num_prefix_tokens=library.num_prefix_tokens(model),
        reducer_options={name: settings[name] for name in REDUCER_OPTIONS},
        spell=str,  # by their names here
        **sampling,
    )


def _plain(value: object) -> object:
    """Numbers and arrays of NumPy and PyTorch as Python's, whatever else holds values as a list; others as they are."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Iterable) and not isinstance(value, (str, bytes, Mapping)):
        return [_plain(item) for item in value]
    return value


def _check_block_list(blocks: object) -> None:
    if not isinstance(blocks, list):
        raise UserError(f"blocks {blocks!r}: give the indices of the blocks that sample, e.g. blocks=range(3, 12).")
    if not blocks:
        raise UserError("blocks is empty: give the indices of the blocks that sample, e.g. blocks=range(3, 12).")
    if not all(type(block) is int for block in blocks):
        raise UserError(f"blocks {blocks}: give whole numbers, e.g. blocks=range(3, 12).")
