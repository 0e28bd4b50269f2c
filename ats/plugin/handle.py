"""What `ats.patch` needs of every library of models: the state of a patched model, and blocks that change their class.

A model or block becomes its ATS version by its `__class__` alone: the same object, with the same modules, parameters
and state-dict keys, and becomes itself again the same way. `timm_vit.py` and `transformers_vit.py` are the two
libraries; each has `MODELS` (host class -> ATS version), `HOSTS` (the other way round), and the functions `refusal`,
`adopt`, `release`, `default_score`, `num_blocks` and `num_prefix_tokens`, which take a model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import nn

from ats.errors import UserError, suggest
from ats.reduction.sampling import BlockSampler
from ats.tokens import KeptTokens


@dataclass
class State:
    """What a patched model knows beyond its host: settings (those of `ats.patch`) and what gives it others
    (`apply(model, settings)`, from `ats/plugin/patch.py`), and the trace if it is wanted.
    """

    settings: dict = field(default_factory=dict)
    apply: Callable[[nn.Module, dict], None] | None = None
    layout: str = "packed"  # name in tokens.LAYOUTS
    trace: bool = False
    last: list[KeptTokens] | None = None
    embedding_costs: dict = field(default_factory=dict)  # see timm_cost.py


class Handle:
    """`model.ats`: the settings of `ats.patch`, each of which can be read and set, and the trace.

    Attributes:
        trace: remember what the blocks keep. Off by default: a trace holds on to memory.
        last: with `trace`, a `KeptTokens` for each ATS block, of the last batch: `.block`, `.num_tokens` [B] (prefix
            tokens counted) and `.patches`, the original indices of the patches kept by each image.
    """

    def __init__(self, model: nn.Module) -> None:
        object.__setattr__(self, "_model", model)

    @property
    def last(self) -> list[KeptTokens]:
        """What the last batch kept, block by block."""
        state = self._model.ats_state
        if state.last is None:
            raise UserError("No batch has been traced: set model.ats.trace = True and run the model on a batch.")
        return state.last

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


class Patched:
    """What the ATS versions of all models have in common; never instantiated."""

    ats_state: State

    @property
    def ats(self) -> Handle:
        """The handle to re-tune and to look."""
        return Handle(self)


def with_sampler(
    blocks: nn.Module, samplers: dict[int, BlockSampler], versions: Mapping[type[nn.Module], type[nn.Module]]
) -> None:
    """Make a host's `blocks` those of a network with `samplers`: the first block with one and all behind it become
    their ATS version, those before their own class again. Without samplers all blocks are as they were.

    Args:
        versions: host class -> ATS version.
    """
    hosts = {version: host for host, version in versions.items()}
    first = min(samplers, default=len(blocks))
    for index, block in enumerate(blocks):
        if index >= first:
            block.__class__ = versions.get(type(block), type(block))
            block.sampler = samplers.get(index)
        elif type(block) in hosts:
            block.__class__ = hosts[type(block)]
            del block.sampler
