"""A reduction is the way one block of a network drops or merges tokens. `register` gives it a name.

A reduction is a frozen dataclass whose fields are its options. It may define

* `select`: which of the block's tokens to keep, by significance score. It runs before the attention, so only kept
  tokens have queries (A^s V, `models/block.py`);
* `merge`: how the other tokens are merged into the kept ones. It runs before the attention, or after it with
  `after_attention`;
* `limit` and `multiply_adds`: how many tokens can be left, and what the reduction costs.

A method that is not defined costs nothing; `select` costs the scoring. The fields define the config keys
(`ATS.NUM_TOKENS`, `TOME.R`), their checks and help texts, and the arguments of `ats.patch`. docs/EXTENDING.md writes a
reduction in a page.

Shapes: S sequences, H heads, D channels of a head, T rows of all sequences together, M rows of the longest sequence,
P prefix tokens (CLS, distillation), which no reduction drops. A candidate is a token that is not a prefix token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from inspect import get_annotations
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from ats.errors import UserError
from ats.lazy import cached, torch
from ats.options import Option, option

if TYPE_CHECKING:
    from torch import Tensor

    from ats.tokens import RaggedTokens

SCORES = ("cls_attention_value_norm", "cls_attention", "mean_attention")
Naming = Callable[[str], str]  # name of an option -> what the user typed for it: "r" -> "TOME.R"


class Candidates:
    """The tokens that one block may drop, S sequences padded to M.

    Args:
        scores: [S, M] significance scores, 0 where not valid.
        lengths: [S] int64 candidates per sequence; they come first in its row.
        max_tokens: a sequence with this many candidates has not lost a token yet. Depends on the configuration only.
        num_positions: length of the original sequence at the network's input.
        position: computes the property `position`.
        merged: an earlier block merged tokens, so no sequence counts as complete.
    """

    def __init__(
        self,
        scores: Tensor,
        *,
        lengths: Tensor,
        max_tokens: int,
        num_positions: int,
        position: Callable[[], Tensor],
        merged: bool = False,
    ) -> None:
        self.scores, self.lengths, self.max_tokens = scores, lengths, max_tokens
        self.num_positions, self.merged, self._position = num_positions, merged, position

    @cached
    def valid(self) -> Tensor:
        """[S, M] bool, True where there is a candidate."""
        return torch.arange(self.scores.shape[1], device=self.lengths.device) < self.lengths[:, None]

    @cached
    def position(self) -> Tensor:
        """[S, M] index of the token in the original sequence."""
        return self._position()

    @property
    def full_length(self) -> int:
        """Candidates of a complete sequence; -1 if none can be complete."""
        return -1 if self.merged else self.max_tokens

    @cached
    def complete(self) -> Tensor:
        """[S] bool, True where nothing has been dropped yet."""
        return self.lengths == self.full_length


@dataclass(slots=True)
class Step:
    """What a block knows while it runs; `Reduction.merge` reads it.

    In ViT queries, keys and tokens are the same. MViT and CvT pool: their keys are cells of a coarser grid.
    """

    tokens: RaggedTokens  # the block's input, before its norm
    x: Tensor  # [T, C] the attention's input, normalised
    queries: RaggedTokens  # where the output tokens lie before any are dropped
    keys: RaggedTokens  # where keys and values lie
    k: Tensor  # [T, H, D] of the keys
    v: Tensor
    scale: float  # of the attention's logits
    kept: RaggedTokens  # the kept tokens; x is the block's input before the attention, the attention's output after it
    q: Tensor | None = None  # [T, H, D] of the queries, if projected before the selection, or after the attention
    bias: Tensor | None = None  # of the logits, [S, 1 or H, 1 or Mq, M]; known after the attention
    candidates: Candidates | None = None  # with scores, if the block selects
    mask: Tensor | None = None  # [S, M] bool over the queries, True where a token is kept; None: all are
    index: Tensor | None = None  # [T'] rows of `kept` among the queries; None: all
    kept_input: Tensor | None = None  # [T', C] the attention's input for the kept tokens, once they are projected
    # [T] int64, set by `merge`, at least if `follows`: the row of its result that absorbed each token of `tokens` (of
    # `kept`, with `after_attention`); -1: none.
    taken_by: Tensor | None = None

    @property
    def follows(self) -> bool:
        """Whether `ats/restore.py` needs to know where tokens go."""
        return self.tokens.places is not None


@dataclass(frozen=True)
class Reduction:
    """Base class. Subclasses add their options as fields with defaults."""

    block: int = 0  # index of the block in the network
    depth: int = 12  # number of blocks in the network
    stage: tuple[int, ...] = ()  # the blocks that share these options, ascending
    num_prefix_tokens: int = 1  # P
    has_cls: bool = True  # the first of the prefix tokens is CLS

    name: ClassVar[str] = ""  # the registered name
    section: ClassVar[str] = ""  # config section of the options that a class adds; by default its name in capitals
    title: ClassVar[str] = ""  # for tables: "ToMe"
    amount: ClassVar[str] = ""  # the option that sets how many tokens are removed, which `ats.calibrate` searches
    after_attention: ClassVar[bool] = False  # `merge` gets the attention's output, for which all tokens had queries
    makes_fused: ClassVar[bool] = False  # some of its output tokens have no position of their own
    graphable: ClassVar[bool] = True  # can be part of an exported or captured graph: no random numbers from the CPU
    score = SCORES[0]  # which significance score `select` gets
    share_frames = False  # the frames of a clip keep the same tokens

    @property
    def selects(self) -> bool:
        """Whether `select` is defined."""
        return type(self).select is not Reduction.select

    @property
    def merges(self) -> bool:
        """Whether `merge` is defined."""
        return type(self).merge is not Reduction.merge

    @property
    def drops(self) -> bool:
        """Whether some tokens are dropped without being merged into others."""
        return not self.merges

    @property
    def merging_option(self) -> str:
        """The option that makes it merge: "sampler", or one of its own options."""
        return "sampler"

    @property
    def size_factor(self) -> float | None:
        """Proportional attention: once tokens have sizes, this times log(size) is added to the keys' logits, in this
        block and later ones. None: keep what earlier blocks set.
        """
        return None

    def select(self, candidates: Candidates) -> Tensor:
        """[S, M] bool, True where a candidate is kept: at least one per sequence that has any, valid ones only, and
        independent of the rest of the batch.
        """
        raise NotImplementedError

    def merge(self, step: Step) -> RaggedTokens:
        """The kept tokens, `step.kept`, with the others merged into them."""
        raise NotImplementedError

    def limit(self, max_tokens: int) -> int:
        """The most tokens a sequence can have after this block if at most `max_tokens` come in; both include prefix
        tokens. It must depend on the configuration only.
        """
        return max_tokens

    def multiply_adds(self, num_in: Tensor, num_out: Tensor, *, head_dim: int, num_heads: int) -> Tensor | int:
        """Multiply-adds of this reduction on top of the block, [S], for `num_in` [S] tokens in and `num_out` [S] left.
        The block counts scoring.
        """
        return 0

    def scaled(self, scale: float, max_tokens: int, stagger: float) -> Reduction:
        """This reduction with its `amount` at a scale, for `ats.calibrate`. Cost must not fall as the scale grows.

        Args:
            scale: 0 keeps the fewest tokens, 1 is neutral; above 1, only sampling can keep more.
            max_tokens: the most tokens that can come in, prefix tokens included. stagger: in (0, 1), added before
                rounding down so that the blocks do not all step at the same scale.
        """
        raise NotImplementedError(f"{type(self).__name__} has no `scaled`, so no budget can be searched for it")

    def learning(self, found: dict[int, list[float]]) -> Reduction:
        """A version of this reduction, for `ats.calibrate`, that meets its amount on average over a batch instead of in
        every image, and appends to `found[block]` what it needs to do so on other images. By default, nothing to learn.
        """
        return self

    def learned(self, found: dict[int, list[float]]) -> Reduction:
        """This reduction with the values found by `learning`."""
        return self

    @classmethod
    def variants(cls) -> list[dict[str, Any]]:
        """Settings of options other than the amount that `ats.calibrate` may try at the same cost."""
        return []

    @classmethod
    def usual_blocks(cls, depth: int) -> list[int] | None:
        """The blocks its authors use in a network of `depth` blocks; None: those in the config."""
        return None

    @property
    def needs_cls(self) -> bool:
        """Whether it works only in networks with a CLS token."""
        return self.selects and self.score != "mean_attention"

    @property
    def setting(self) -> tuple[str, object]:
        """Name and value of the amount, for tables."""
        return self.amount.replace("_", " "), getattr(self, self.amount, "")

    @classmethod
    def check(cls, planned: Sequence[Reduction], naming: Naming) -> None:
        """Check that these reductions' options fit together; ranges are checked already. May also log warnings.

        Args:
            planned: the reductions of one stage, by ascending block.

        Raises:
            UserError: options that do not fit the network or each other.
        """
        first = planned[0]
        if first.needs_cls and not first.has_cls:
            what = f"{naming('sampler')} {cls.name}"
            if any(option.name == "score" for option in options_of(cls)):
                what, hint = f"{naming('score')} {first.score}", f"; use {naming('score')} mean_attention"
            else:
                names = [name for name, kind in REDUCTIONS.items() if not kind().needs_cls]
                hint = f"; choose from {', '.join(names)}, or sampling with {naming('score')} mean_attention"
            raise UserError(f"{what} needs a CLS token and this network has none{hint}.")


@dataclass(frozen=True)
class Scheduled(Reduction):
    """A reduction whose amount can vary over the blocks by a schedule."""

    section: ClassVar[str] = "ATS"

    schedule: str = option(
        "flat",
        "How the removed tokens are spread over ATS.BLOCKS. flat: the same amount in each block. late: in block l in "
        "proportion to ((l + 1) / depth)^2, with the same total.",
        choices=("flat", "late"),
    )

    @property
    def schedule_factor(self) -> float:
        """This block's amount divided by the stage's mean."""
        return self._weight(self.block) * len(self.stage) / sum(map(self._weight, self.stage)) if self.stage else 1.0

    def _weight(self, block: int) -> float:
        return ((block + 1) / self.depth) ** 2 if self.schedule == "late" else 1.0

    def scheduled(self) -> Reduction:
        """This reduction with its block's share of the stage's amount, which must be a number."""
        amount = getattr(self, self.amount)
        if self.schedule == "flat":
            return self
        if isinstance(getattr(type(self), self.amount), float):  # a share to keep
            return replace(self, **{self.amount: min(max(1 - (1 - amount) * self.schedule_factor, 1e-3), 1.0)})
        total, weights = amount * len(self.stage), [self._weight(block) for block in self.stage]
        place = self.stage.index(self.block)  # rounding below preserves the total
        before, after = (round(total * sum(weights[:end]) / sum(weights)) for end in (place, place + 1))
        return replace(self, **{self.amount: after - before})


REDUCTIONS: dict[str, type[Reduction]] = {}


def register(name: str) -> Callable[[type[Reduction]], type[Reduction]]:
    """Make a reduction available as `ATS.SAMPLER name` and `ats.patch(..., sampler=name)`."""

    def add(reduction: type[Reduction]) -> type[Reduction]:
        reduction.name = name
        for attribute, value in (("title", name), ("section", name.upper())):
            if attribute not in reduction.__dict__:
                setattr(reduction, attribute, value)
        REDUCTIONS[name] = reduction
        return reduction

    return add


class OptionOf(NamedTuple):
    """One option of a registered reduction."""

    name: str  # of the field and of the argument of `ats.patch`
    key: str  # in a config: "TOME.R"
    default: Any
    about: Option


def options_of(reduction: type[Reduction]) -> list[OptionOf]:
    """The options of a reduction, those of its base classes first."""
    owner: dict[str, Any] = {}
    for kind in reversed(reduction.__mro__):
        owner = dict.fromkeys(get_annotations(kind), kind) | owner  # the first class that declares it
    return [
        OptionOf(f.name, f"{owner[f.name].section}.{f.name.upper()}", f.default, f.metadata.get("option", Option()))
        for f in fields(reduction)
        if owner[f.name] is not Reduction
    ]
