"""What `ats.patch` needs of every library of models: the state of a patched model, and blocks that change their class.

A model or block becomes its ATS version by its `__class__` alone: the same object, with the same modules, parameters
and state-dict keys, and becomes itself again the same way. `timm_vit.py` and `transformers_vit.py` are the two
libraries; each has `MODELS` (host class -> ATS version), `HOSTS` (the other way round), and the functions `refusal`,
`adopt`, `release`, `default_score`, `num_blocks` and `num_prefix_tokens`, which take a model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from ats.sampling import BlockSampler
from ats.tokens import KeptTokens


@dataclass
class State:
    """What a patched model knows beyond its host: settings (those of `ats.patch`), and the trace if it is wanted."""

    settings: dict = field(default_factory=dict)
    layout: str = "packed"  # name in tokens.LAYOUTS
    trace: bool = False
    last: list[KeptTokens] | None = None
    embedding_costs: dict = field(default_factory=dict)  # see timm_cost.py


class Patched:
    """What the ATS versions of all models have in common; never instantiated."""

    ats_state: State

    @property
    def ats(self) -> object:
        """The handle to re-tune and to look: `ats.plugin.Handle`."""
        from ats.plugin import Handle

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
