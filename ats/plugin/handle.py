"""What `ats.patch` needs of every library of models: the state of a patched model, and classes with ATS.

A model or block gets ATS by a change of its `__class__`: it stays the same object, with the same modules, parameters
and state-dict keys, and can change back. `timm/model.py` and `transformers/model.py` are the two libraries. Each has
`VERSIONS` (original class -> ATS version) and functions of a model: `refusal`, `attach`, `default_score`, and
`network`, the facts for `plan_reductions`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from ats.errors import UserError, suggest
from ats.models.backbone import HasBlocks
from ats.reduction import Reduction
from ats.tokens import LAYOUTS, KeptTokens


def version_of(original: type[nn.Module], *bases: type, name: str = "", **attributes: object) -> type[nn.Module]:
    """The ATS version of a class: a subclass of `bases` and the original, with these attributes. It is a global of the
    module that defines the last of `bases`, so whole models can be pickled. `name`: by default "ATS" + the original's.
    """
    name, module = name or f"ATS{original.__name__}", bases[-1].__module__
    attributes |= {"__module__": module, "__doc__": f"{original.__name__} with ATS.", "original": original}
    version = type(name, (*bases, original), attributes)
    setattr(sys.modules[module], name, version)
    return version


@dataclass
class State:
    """What a patched model knows beyond its original."""

    settings: dict = field(default_factory=dict)  # of `ats.patch`
    apply: Callable[[nn.Module, dict], None] | None = None  # changes the model's settings; from `patch.py`
    trace: bool = False  # keep the trace of the last batch in `last`
    last: list[KeptTokens] | None = None
    embedding_costs: dict = field(default_factory=dict)  # input shape -> measured multiply-adds of the patch embedding


class Handle:
    """`model.ats`: the settings of `ats.patch`, each of which can be read and set, and the trace.

    `trace` True records what the blocks keep. It is off by default, because a trace takes memory.
    """

    def __init__(self, model: nn.Module) -> None:
        object.__setattr__(self, "_model", model)

    @property
    def last(self) -> list[KeptTokens]:
        """With `trace`, what each block with a reduction kept of the last batch: `.block`, `.num_tokens` [B] (prefix
        tokens counted) and `.patches`, the original indices of the patches kept by each image.
        """
        last = self._model.ats_state.last
        if last is None:
            raise UserError("No batch has been traced: set model.ats.trace = True and run the model on a batch.")
        return last

    def __getattr__(self, name: str) -> object:
        state = self._model.ats_state
        if name == "trace":
            return state.trace
        if name in state.settings:
            return state.settings[name]
        raise AttributeError(f"model.ats has no {name}.{suggest(name, [*state.settings, 'trace', 'last'])}")

    def __setattr__(self, name: str, value: object) -> None:
        state = self._model.ats_state
        if name == "trace":
            state.trace, state.last = bool(value), None
        elif name in state.settings:
            state.apply(self._model, state.settings | {name: value})
        else:
            names = [*state.settings, "trace"]
            raise UserError(f"model.ats has no setting {name}: choose from {', '.join(names)}.{suggest(name, names)}")

    def __repr__(self) -> str:
        return f"ats({', '.join(f'{name}={value!r}' for name, value in self._model.ats_state.settings.items())})"


class Patched(HasBlocks):
    """Base of the ATS versions of all models; never instantiated."""

    layouts = LAYOUTS
    ats_state: State

    @property
    def ats(self) -> Handle:
        """Change settings and read the trace."""
        return Handle(self)


def refuse_merging(model: nn.Module, reductions: Iterable[Reduction], no_merge: str, no_fuse: str) -> None:
    """Raise a UserError if a reduction merges or fuses tokens and the model does not allow it, for these reasons."""
    for reduction in reductions:
        reason = (reduction.merges and no_merge) or (reduction.makes_fused and no_fuse)
        if reason:
            raise UserError(f"sampler {reduction.name} does not work with this {type(model).__name__}: {reason}.")


def refusal_of_blocks(blocks: nn.Module, refusal: Callable[[nn.Module], str]) -> str:
    """Why ATS cannot be put into these blocks; "" if it can."""
    reasons = (f"block {index} {reason}" for index, block in enumerate(blocks) if (reason := refusal(block)))
    return next(reasons, "") if len(blocks) else "it has no blocks"


def attach_to(
    parts: Sequence[nn.Module],
    blocks: nn.Module,
    reductions: dict[int, Reduction],
    versions: Mapping[type[nn.Module], type[nn.Module]],
) -> None:
    """Make `parts`, which share one state, their ATS versions, and give `blocks` these reductions: the first block that
    has one and all later blocks become their ATS versions, earlier blocks their originals.
    """
    state = next((part.ats_state for part in parts if hasattr(part, "ats_state")), None) or State()
    for part in parts:
        part.__class__ = versions.get(type(part), type(part))
        part.ats_state = state
    first = min(reductions, default=len(blocks))
    for index, block in enumerate(blocks):
        if index >= first:
            block.__class__ = versions.get(type(block), type(block))
            block.reduction, block.index = reductions.get(index), index
        else:
            restore(block)


def restore(module: nn.Module) -> None:
    """Make an ATS version its original again; other modules do not change."""
    original = vars(type(module)).get("original")
    if original is not None:
        module.__class__ = original
        for name in ("ats_state", "reduction", "index", "layout"):
            vars(module).pop(name, None)
