"""What a reduction is: the way one block of a network loses tokens. `register` makes one known under a name.

A reduction is a frozen dataclass whose fields are its options. It may define

* `select`: which of the block's tokens go on, by their significance scores. Decided before the attention, so only
  kept tokens query (A^s V, `models/block.py`);
* `merge`: what the tokens that go leave behind in those that stay; before the attention, or after it with
  `after_attention`;
* `limit` and `multiply_adds`: how many tokens may be left, and what finding them costs.

What it does not define costs nothing; `select` costs the scores. From the fields follow the config keys
(`ATS.NUM_TOKENS`, `TOME.R`), their checks and help texts, and the arguments of `ats.patch`; docs/EXTENDING.md writes
one in a page.

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
Naming = Callable[[str], str]  # the name of an option -> what the user typed for it: "r" -> "TOME.R"


class Candidates:
    """The tokens that one block may drop, S sequences padded to M.

    Args:
        scores: [S, M] significance scores, 0 where not valid.
        lengths: [S] int64 candidates of each sequence; they come first in its row.
        max_tokens: a sequence with this many candidates has not lost a token yet. A number of the configuration.
        num_positions: length of the sequence the network began with.
        position: computes the property.
        merged: tokens were merged in an earlier block, so that no sequence counts as complete.
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
        """[S, M] index of the token in the sequence the network began with."""
        return self._position()

    @property
    def full_length(self) -> int:
        """Candidates of a complete sequence; -1 if none can be complete."""
        return -1 if self.merged else self.max_tokens

    @cached
    def complete(self) -> Tensor:
        """[S] bool, nothing has been dropped yet."""
        return self.lengths == self.full_length


@dataclass(slots=True)
class Step:
    """What a block knows while it runs; `Reduction.merge` reads it.

    In ViT queries, keys and tokens are the same. MViT and CvT pool: their keys are cells of a coarser grid.
    """

    tokens: RaggedTokens  # the block's input, before its norm
    x: Tensor  # [T, C] what the attention reads of it, normalised
    queries: RaggedTokens  # where the output tokens lie before any is dropped
    keys: RaggedTokens  # where keys and values lie
    k: Tensor  # [T, H, D] of the keys
    v: Tensor
    scale: float  # of the attention's logits
    kept: RaggedTokens  # the tokens that go on; x is the block's input before the attention, its output after it
    q: Tensor | None = None  # [T, H, D] of the queries, if projected before the selection, or after the attention
    bias: Tensor | None = None  # of the logits, [S, 1 or H, 1 or Mq, M]; known after the attention
    candidates: Candidates | None = None  # with scores, if the block selects
    mask: Tensor | None = None  # [S, M] bool over the queries, True where a token goes on; None: all do
    index: Tensor | None = None  # [T'] rows of `kept` among the queries; None: all
    kept_input: Tensor | None = None  # [T', C] what the attention reads of the kept tokens, once they are projected
    # [T] int64, set by `merge`, at least where `follows`: the row of its result that took in each token of `tokens` (of
    # `kept`, with `after_attention`); -1: none.
    taken_by: Tensor | None = None

    @property
    def follows(self) -> bool:
        """Whether somebody wants to know where tokens go (`ats/restore.py`)."""
        return self.tokens.places is not None


@dataclass(frozen=True)
class Reduction:
    """Base class. Subclasses add their options as fields with defaults."""

    block: int = 0  # index of the block in the network
    depth: int = 12  # blocks of the network
    stage: tuple[int, ...] = ()  # the blocks that share these options, ascending
    num_prefix_tokens: int = 1  # P
    has_cls: bool = True  # the first of the prefix tokens is CLS

    name: ClassVar[str] = ""  # under which it is registered
    section: ClassVar[str] = ""  # config section of the options that a class adds; by default its name in capitals
    title: ClassVar[str] = ""  # for tables: "ToMe"
    amount: ClassVar[str] = ""  # the option that says how many tokens go, which `ats.calibrate` searches
    after_attention: ClassVar[bool] = False  # `merge` works on the attention's output; all tokens have queried
    makes_fused: ClassVar[bool] = False  # some tokens it leaves have no position of their own
    graphable: ClassVar[bool] = True  # can be part of an exported or captured graph: nothing is drawn on the CPU
    score = SCORES[0]  # which significance score `select` gets
    share_frames = False  # the frames of a clip keep the same tokens

    @property
    def selects(self) -> bool:
        """Whether `select` is defined."""
        return type(self).select is not Reduction.select

    @property
    def merges(self) -> bool:
        """Whether `merge` is."""
        return type(self).merge is not Reduction.merge

    @property
    def drops(self) -> bool:
        """Whether some tokens go without a trace in those that stay."""
        return not self.merges

    @property
    def merging_option(self) -> str:
        """The option that makes it merge: "sampler", or one of its own."""
        return "sampler"

    @property
    def size_factor(self) -> float | None:
        """Once tokens have sizes, log(size) times this is added to the logits of keys, in this block and those behind
        it (proportional attention); None: what the blocks before decided stays.
        """
        return None

    def select(self, candidates: Candidates) -> Tensor:
        """[S, M] bool, True where a candidate goes on: at least one of a sequence that has any, none that is not valid,
        and independent of the rest of the batch.
        """
        raise NotImplementedError

    def merge(self, step: Step) -> RaggedTokens:
        """The tokens that go on, `step.kept` with what they take over from the others."""
        raise NotImplementedError

    def limit(self, max_tokens: int) -> int:
        """The most tokens of a sequence behind this block if at most `max_tokens` come in; prefix tokens counted. It
        must follow from the configuration alone.
        """
        return max_tokens

    def multiply_adds(self, num_in: Tensor, num_out: Tensor, *, head_dim: int, num_heads: int) -> Tensor | int:
        """What this reduction computes on top of the block, [S], for sequences of `num_in` [S] tokens, `num_out` left.
        Scoring is counted by the block.
        """
        return 0

    def scaled(self, scale: float, max_tokens: int, stagger: float) -> Reduction:
        """This reduction with its `amount` at a scale: cost must not fall as the scale grows. For `ats.calibrate`.

        Args:
            scale: 0 keeps the fewest, 1 is the neutral setting; above 1 only sampling has more to give.
            max_tokens: candidates and prefix tokens that can come in. stagger: in (0, 1), to be added before rounding
                down: the blocks then step one after the other.
        """
        raise NotImplementedError(f"{type(self).__name__} has no `scaled`, so no budget can be searched for it")

    def learning(self, found: dict[int, list[float]]) -> Reduction:
        """This reduction as one that meets its amount over a batch, not in every image, and adds to `found[block]` what
        it needs to do so with other images. For `ats.calibrate`; by default there is nothing to learn.
        """
        return self

    def learned(self, found: dict[int, list[float]]) -> Reduction:
        """This reduction with what was found."""
        return self

    @classmethod
    def variants(cls) -> list[dict[str, Any]]:
        """Values of other options than the amount that `ats.calibrate` may try at the same cost."""
        return []

    @classmethod
    def usual_blocks(cls, depth: int) -> list[int] | None:
        """The blocks its authors use in a network of `depth` blocks; None: those of the config."""
        return None

    @property
    def needs_cls(self) -> bool:
        """Whether it works in networks with a CLS token alone."""
        return self.selects and self.score != "mean_attention"

    @property
    def setting(self) -> tuple[str, object]:
        """Name and value of the amount, for tables."""
        return self.amount.replace("_", " "), getattr(self, self.amount, "")

    @classmethod
    def check(cls, planned: Sequence[Reduction], naming: Naming) -> None:
        """Refuse or warn of what the options of these blocks' reductions ask for; ranges are checked already.

        Args:
            planned: of one stage, by ascending block.
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
    """A reduction whose amount can differ from block to block by a rule."""

    section: ClassVar[str] = "ATS"

    schedule: str = option(
        "flat",
        "How tokens that go are spread over ATS.BLOCKS. flat: the same amount in each. late: in block l in proportion "
        "to ((l + 1) / depth)^2, at the same total.",
        choices=("flat", "late"),
    )

    @property
    def schedule_factor(self) -> float:
        """This block's amount over the mean of the stage."""
        return self._weight(self.block) * len(self.stage) / sum(map(self._weight, self.stage)) if self.stage else 1.0

    def _weight(self, block: int) -> float:
        return ((block + 1) / self.depth) ** 2 if self.schedule == "late" else 1.0

    def scheduled(self) -> Reduction:
        """This reduction with the amount of its block, where the stage's amount is a number."""
        amount = getattr(self, self.amount)
        if self.schedule == "flat":
            return self
        if isinstance(getattr(type(self), self.amount), float):  # a share that stays
            return replace(self, **{self.amount: min(max(1 - (1 - amount) * self.schedule_factor, 1e-3), 1.0)})
        total, weights = amount * len(self.stage), [self._weight(block) for block in self.stage]
        place = self.stage.index(self.block)  # rounded so that the total is kept
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
        owner = dict.fromkeys(get_annotations(kind), kind) | owner  # whoever declares it first
    return [
        OptionOf(f.name, f"{owner[f.name].section}.{f.name.upper()}", f.default, f.metadata.get("option", Option()))
        for f in fields(reduction)
        if owner[f.name] is not Reduction
    ]
