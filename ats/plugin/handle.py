"""What `ats.patch` needs from every model library: the state of a patched model, and classes with ATS.

Patching changes the `__class__` of a model or block: the object keeps its modules, parameters and state-dict keys, and
can be changed back. Classes that torch creates at run time (FSDP2, parametrizations) stay in front. The two libraries
are `timm/model.py` and `transformers/model.py`. Each has `VERSIONS` (original class -> ATS version) and the functions
`refusal`, `attach`, `default_score` and `network` (the facts for `plan_reductions`), which take a model.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

from torch import nn

from ats.errors import UserError, suggest
from ats.kernels.cpu import BACKENDS
from ats.models.backbone import HasBlocks
from ats.models.block import ATSBlock, unwrapped
from ats.models.weights import WRAPPERS
from ats.reduction import REDUCTIONS, Reduction
from ats.reduction.base import options_of
from ats.restore import check_restore
from ats.tokens import LAYOUTS, KeptTokens


def version_of(original: type[nn.Module], *bases: type, name: str = "", **attributes: object) -> type[nn.Module]:
    """The ATS version of a class: a subclass of `bases` and the original, with these attributes. It becomes a global of
    the module that defines the last of `bases`, so whole models can be pickled. `name` defaults to "ATS" + the
    original's.
    """
    name, module = name or f"ATS{original.__name__}", bases[-1].__module__
    attributes |= {"__module__": module, "__doc__": f"{original.__name__} with ATS.", "original": original}
    version = type(name, (*bases, original), attributes)
    setattr(sys.modules[module], name, version)
    return version


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module without ATS and without the classes torch put in front."""
    kind = type(module)
    if version := _version_in(kind):
        return version.original
    while any(base.__module__.startswith(WRAPPERS) for base in (kind, *kind.__bases__[:-1])):
        kind = kind.__bases__[-1]
    return kind


def change_class(module: nn.Module, new: type[nn.Module]) -> None:
    """Replace a module's original class or its ATS version by `new`, behind the classes torch put in front."""
    old = _version_in(type(module)) or original_class(module)
    module.__class__ = _rebased(type(module), old, new)


def _version_in(kind: type) -> type | None:
    """The ATS version that a class is or derives from."""
    return next(
        (base for base in kind.__mro__ if "original" in vars(base) and base.__module__.startswith("ats.")), None
    )


@cache  # one class for all blocks, like torch's own: torch.compile compiles per class
def _rebased(kind: type, old: type, new: type) -> type:
    """The class `kind` with `new` instead of its base `old`."""
    if kind is old:
        return new
    # transformers gives every subclass of a layer a `forward`; here that would be `old`'s.
    skipped = ("__dict__", "__weakref__", "forward")
    attributes = {name: value for name, value in vars(kind).items() if name not in skipped}
    bases = (*kind.__bases__[:-1], _rebased(kind.__bases__[-1], old, new))
    return type(kind.__name__.replace(old.__name__, new.__name__), bases, attributes)


@dataclass
class State:
    """State that patching adds to a model."""

    settings: dict = field(default_factory=dict)  # as `ats.patch` got them
    apply: Callable[[nn.Module, dict], None] | None = None  # changes the model's settings; from `patch.py`
    trace: bool = False  # keep the trace of the last batch in `last`
    last: list[KeptTokens] | None = None
    cpu_backend: str = "auto"  # see `kernels/cpu.py`
    restore: str = "zero"  # see `ats/restore.py`
    embedding_costs: dict = field(default_factory=dict)  # input shape -> measured multiply-adds of the patch embedding


class Handle:
    """`model.ats`: reads and sets the settings of `ats.patch`, and holds the trace.

    `trace = True` records what the blocks keep; it is off by default because a trace takes memory. `cpu_backend` is
    ATS.CPU_BACKEND: auto (default), torch or onednn. `restore` says what features hold at dropped patches: zero
    (default), last or nearest, see `ats/restore.py`.
    """

    def __init__(self, model: nn.Module) -> None:
        object.__setattr__(self, "_model", model)

    @property
    def _state(self) -> State:
        if not isinstance(self._model, Patched):
            raise UserError("This model no longer has ATS: call ats.patch(model, ...), then use model.ats.")
        return self._model.ats_state

    @property
    def settings(self) -> dict:
        """What `ats.patch` was given, minus blocks removed since (by timm's `prune_intermediate_layers`)."""
        state = self._state
        state.settings = _cut(state.settings, len(self._model.block_list()))
        return state.settings

    @property
    def last(self) -> list[KeptTokens]:
        """If `trace` is on, what each block with a reduction kept of the last batch: `.block`, `.num_tokens` [B]
        (including prefix tokens) and `.patches`, the original indices of the patches kept in each image.
        """
        last = self._state.last
        if last is None:
            raise UserError("No batch has been traced: set model.ats.trace = True and run the model on a batch.")
        return last

    def __getattr__(self, name: str) -> object:
        if name.startswith("_"):  # copying a handle asks for these before it has its model
            raise AttributeError(name)
        settings = self.settings
        if name in ("trace", "cpu_backend", "restore"):
            return getattr(self._state, name)
        if name in settings:
            return settings[name]
        raise AttributeError(
            f"model.ats has no {name}.{suggest(name, [*settings, 'trace', 'last', 'cpu_backend', 'restore'])}"
        )

    def __setattr__(self, name: str, value: object) -> None:
        state, settings = self._state, self.settings
        if name == "trace":
            state.trace, state.last = bool(value), None
        elif name in ("cpu_backend", "restore"):
            setattr(self._model, name, value)
        elif name in settings:
            state.apply(self._model, settings | {name: value})
        else:
            names = [*settings, "trace", "cpu_backend", "restore"]
            raise UserError(f"model.ats has no setting {name}: choose from {', '.join(names)}.{suggest(name, names)}")

    def __repr__(self) -> str:
        """Short: blocks, sampler, K and whatever is not at its default."""
        settings = self.settings
        kind = REDUCTIONS.get(settings.get("sampler"))
        defaults = {option.name: option.default for option in options_of(kind)} if kind else {}
        shown = {
            name: value
            for name, value in settings.items()
            if name in ("blocks", "sampler", "stages", "num_tokens") or value != defaults.get(name, value)
        }
        return f"ats({', '.join(f'{name}={value!r}' for name, value in shown.items())})"


def _cut(settings: dict, depth: int) -> dict:
    """Settings without the blocks from `depth` on."""
    cut = {name: value[:depth] if isinstance(value, list) else value for name, value in settings.items()}
    if "blocks" in settings:
        cut["blocks"] = [block for block in settings["blocks"] if block < depth]
    if "stages" in settings:
        stages = (_cut(stage, depth) for stage in settings["stages"])
        cut["stages"] = [stage for stage in stages if stage["blocks"]]
    return cut


class Patched(HasBlocks):
    """Base of the ATS versions of all models; never instantiated."""

    layouts = LAYOUTS
    ats_state: State

    @property
    def cpu_backend(self) -> str:
        """The CPU backend, from the state that a classifier shares with its base model."""
        return self.ats_state.cpu_backend

    @cpu_backend.setter
    def cpu_backend(self, value: str) -> None:
        if value not in BACKENDS:
            raise UserError(f"cpu_backend {value!r}: choose from {', '.join(BACKENDS)}.{suggest(value, BACKENDS)}")
        self.ats_state.cpu_backend = value

    @property
    def restore(self) -> str:
        """What features hold at dropped patches: a name in `restore.RESTORES`."""
        return self.ats_state.restore

    @restore.setter
    def restore(self, value: str) -> None:
        check_restore(value)
        self.ats_state.restore = value

    @property
    def ats(self) -> Handle:
        """Change settings and read the trace."""
        return Handle(self)


def refuse_merging(model: nn.Module, reductions: Iterable[Reduction], no_merge: str, no_fuse: str) -> None:
    """Raise a UserError if a reduction merges (fuses) tokens and `no_merge` (`no_fuse`) is a reason against it, not
    ""."""
    for reduction in reductions:
        reason = (reduction.merges and no_merge) or (reduction.makes_fused and no_fuse)
        if reason:
            name = original_class(model).__name__
            option = reduction.merging_option
            value = reduction.name if option == "sampler" else getattr(reduction, option)
            raise UserError(f"{option} {value} does not work with this {name}: {reason}.")


def refusal_of_blocks(model: nn.Module, blocks: nn.ModuleList, refusal: Callable[[nn.Module], str]) -> str:
    """Why ATS cannot be put into these blocks of `model`; "" if it can."""
    for name, module in (("it has", model), *((f"block {index} has", block) for index, block in enumerate(blocks))):
        if "forward" in vars(module) and not isinstance(module, (Patched, ATSBlock)):
            return (
                f"{name} a forward of its own, which ATS would not run; add such hooks (accelerate's) after ats.patch"
            )
    places: dict[nn.Module, int] = {}
    for index, block in enumerate(blocks):
        first = places.setdefault(block, index)
        if first < index:
            return (
                f"blocks {first} and {index} are the same {original_class(block).__name__} object, which cannot sample "
                f"in two places; give each its own: copy.deepcopy(block)"
            )
        if isinstance(block, ATSBlock) and not isinstance(model, Patched):
            return (
                f"it shares block {index} with another model, which has ATS; give it its own with copy.deepcopy, or "
                "ats.unpatch the other model first"
            )
        if reason := refusal(block):
            return f"block {index} {reason}"
    return "" if places else "it has no blocks"


def check_blocks(model: nn.Module, blocks: Iterable[nn.Module]) -> None:
    """Raise a UserError if the blocks, or what the head reads, are no longer what `ats.patch` saw."""
    state, begun = model.ats_state, False
    for place, block in enumerate(blocks):
        block = unwrapped(block)
        has_ats = isinstance(block, ATSBlock)
        if has_ats or begun:
            begun = True
            if not has_ats or block.index != place or block.ats_state is not state:
                raise UserError(
                    f"Block {place} is not the one that got ATS: blocks were replaced, moved or shared with another "
                    "model after ats.patch. Type model.ats.blocks = model.ats.blocks to put ATS into the current "
                    "blocks."
                )
            if block.reduction is not None and block.reduction.merges:
                refuse_merging(model, [block.reduction], model.no_merge, model.no_fuse)


def attach_to(
    parts: Sequence[nn.Module],
    blocks: nn.ModuleList,
    reductions: dict[int, Reduction],
    versions: Mapping[type[nn.Module], type[nn.Module]],
) -> None:
    """Change `parts`, which share one state, to their ATS versions, and give `blocks` these reductions. The first block
    with a reduction and all later blocks become ATS versions; earlier blocks become originals.
    """
    state = next((part.ats_state for part in parts if hasattr(part, "ats_state")), None) or State()
    for part in parts:
        change_class(part, versions[original_class(part)])
        part.ats_state = state
    first = min(reductions, default=len(blocks))
    for index, block in enumerate(blocks):
        if index >= first:
            change_class(block, versions[original_class(block)])
            block.reduction, block.index, block.ats_state = reductions.get(index), index, state
        else:
            make_original(block)


def make_original(module: nn.Module) -> None:
    """Change an ATS version back to its original; leave other modules alone."""
    if _version_in(type(module)):
        change_class(module, original_class(module))
        for name in ("ats_state", "reduction", "index", "layout"):
            vars(module).pop(name, None)
