"""RaggedTokens: a batch of token sequences of different lengths, and the trace of what each block did to them.

`ATS.LAYOUT` chooses among three layouts:

* `packed`: one sequence after the other, `x [T, C]`, without padding: padding to the longest sequence would cost what
  sampling saves. Pointwise layers (LayerNorm, Linear, MLP) run on `x` as it is; only attention and scoring ask the
  `Layout` where a sequence begins.
* `padded`: every sequence takes as many rows as the longest of the batch. A baseline for benchmarks.
* `static`: every sequence takes `max_tokens` rows. No shape depends on the data, so the network can be exported
  (`tools/export.py`), captured in a CUDA graph and compiled whole; `ATS.NUM_TOKENS` sets its cost.

All three compute the same values for a token. Padding rows hold some dropped token; no token attends to them.

Shapes: S sequences, T rows of all sequences together, M rows of the longest sequence, C channels, P prefix tokens (CLS,
distillation), which come first in every sequence and are always kept.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ats import kernels
from ats.compat import export_check
from ats.errors import UserError
from ats.lazy import cached

if TYPE_CHECKING:
    from ats.restore import Places

LAYOUTS: tuple[str, ...] = ("packed", "padded", "static")
SINGLE = "single"  # for adaptive exports: one packed sequence whose length depends on the image


class Layout:
    """Where the sequences lie in a tensor of T rows."""

    def __init__(self, lengths: Tensor, *, total: int, longest: int, kind: str = "packed", full: bool = True) -> None:
        self.lengths = lengths  # [S] int64, tokens per sequence
        self.num_sequences = lengths.shape[0]  # S; torch.export would bake `len` of a tensor into the graph
        self.total, self.longest = total, longest  # T, M
        self.kind = kind  # one of LAYOUTS, or SINGLE
        self.full = full  # there is no padding
        # Rows per sequence in a layout with padding, else 0.
        self.padded_rows = longest if kind in ("padded", "static") else 0
        self.uniform = kind != "packed" or total == self.num_sequences * longest  # M rows each, so `pad` is a view

    @classmethod
    def from_lengths(cls, lengths: Tensor, *, longest_of_none: int = 1) -> Layout:
        """The packed layout for sequences of these lengths [S]. On a GPU the host waits for the lengths, once.

        Args:
            longest_of_none: `longest` if there are no sequences; samplers need at least one column.
        """
        if torch.compiler.is_compiling():  # a list of lengths would recompile for every batch
            total, longest = torch.stack([lengths.sum(), lengths.max()]).tolist()
            return cls(lengths, total=total, longest=longest)
        sizes = lengths.tolist()
        layout = cls(lengths, total=sum(sizes), longest=max(sizes, default=longest_of_none))
        layout.sizes = sizes
        return layout

    @classmethod
    def single(cls, length: int, like: Tensor) -> Layout:
        """One sequence of this length, which is data-dependent in an exported graph.

        Args:
            like: a tensor on the device where `lengths` should be.
        """
        lengths = torch.full((1,), length, device=like.device)
        return cls(lengths, total=length, longest=length, kind=SINGLE)

    def of_lengths(self, lengths: Tensor | None, *, longest: int) -> Layout:
        """A layout of this kind for the same number of sequences.

        Args:
            lengths: [S]; None: all sequences have `longest` tokens, which needs no host wait on a GPU.
            longest: rows per sequence in a layout with padding.
        """
        if lengths is not None and self.kind == "packed":
            return Layout.from_lengths(lengths)
        full = lengths is None
        lengths = torch.full_like(self.lengths, longest) if lengths is None else lengths
        return Layout(lengths, total=self.num_sequences * longest, longest=longest, kind=self.kind, full=full)

    @cached
    def start(self) -> Tensor:
        """[S] int64, the row of each sequence's first token."""
        if self.kind == SINGLE:
            return torch.zeros_like(self.lengths)
        if self.uniform:
            return torch.arange(0, self.total, self.longest, device=self.lengths.device)
        return self.lengths.cumsum(0) - self.lengths

    def first_rows(self, x: Tensor) -> Tensor:
        """[S, ...], each sequence's first row of x [T, ...]."""
        if self.kind == SINGLE:
            return x[:1]
        return x[:: self.longest] if self.uniform else x.index_select(0, self.start)

    @cached
    def cu_seqlens(self) -> Tensor:
        """[S + 1] int32, the start of each packed sequence, then T, as variable-length attention expects."""
        return torch.nn.functional.pad(self.lengths.cumsum(0), (1, 0)).to(torch.int32)

    @cached
    def mask(self) -> Tensor:
        """[S, M] bool, True where the padded layout holds a token."""
        return torch.arange(self.longest, device=self.lengths.device) < self.lengths[:, None]

    @cached
    def sequence(self) -> Tensor:
        """[T] int64, the sequence each row belongs to."""
        sequences = torch.arange(self.num_sequences, device=self.lengths.device)
        if self.uniform:
            return sequences.repeat_interleave(self.longest)
        return sequences.repeat_interleave(self.lengths, output_size=self.total)

    @cached
    def padded_index(self) -> Tensor:
        """[T] int64, each packed token's row in the padded layout of S * M rows."""
        shift = torch.arange(self.num_sequences, device=self.lengths.device) * self.longest - self.start
        return torch.arange(self.total, device=self.lengths.device) + shift[self.sequence]

    @cached
    def sizes(self) -> list[int]:
        """Lengths as Python integers; on a GPU the host waits for them."""
        return self.lengths.tolist()

    def pad(self, x: Tensor, value: float = 0) -> Tensor:
        """[T, ...] -> [S, M, ...], with `value` where there is no row. A view if the layout is uniform."""
        if self.uniform:
            return x.reshape(self.num_sequences, self.longest, *x.shape[1:])
        padded = x.new_full((self.num_sequences * self.longest, *x.shape[1:]), value)
        return padded.index_copy_(0, self.padded_index, x).reshape(self.num_sequences, self.longest, *x.shape[1:])

    def unpad(self, padded: Tensor) -> Tensor:
        """[S, M, ...] -> [T, ...]."""
        flat = padded.reshape(-1, *padded.shape[2:])
        return flat if self.uniform else flat.index_select(0, self.padded_index)


@dataclass(repr=False)
class RaggedTokens:
    """Sequences of tokens, each token with its position in the original sequence at the network's input.

    In x, each sequence starts with its prefix tokens. Patches follow by ascending position, or in any order once tokens
    have been merged or fused.
    """

    x: Tensor  # [T, C]
    layout: Layout  # where the sequences lie in x
    # [T] int64, index of the token in the original sequence; prefix tokens are 0 .. P - 1. Padding has N, a fused token
    # -1, a merged token the position of one of its parts.
    position: Tensor
    num_prefix_tokens: int  # P
    num_positions: int  # length N of the original sequences
    max_tokens: int  # upper bound on lengths by configuration, not data: N, then min(K, max_tokens) per ATS block
    frames_per_clip: int = 1  # consecutive sequences that belong together
    grid: tuple[int, int, int] | None = None  # (T, H, W) of the positions, for networks that pool or convolve them
    rotary: Tensor | None = None  # [N, h, 2D] sine and cosine of every original position; h is 1 or H
    size: Tensor | None = None  # [T] how many original tokens each one stands for, once tokens are merged
    key_bias: Tensor | None = None  # [T] added to each key's logits
    places: Places | None = None  # what stands for each original position, if features are to be restored
    has_fused: bool = False  # some tokens are sums of others and have no position
    record: BlockRecord | None = None  # of the last ATS block; it links to the earlier ones

    @classmethod
    def from_dense(
        cls,
        x: Tensor,
        num_prefix_tokens: int,
        *,
        frames_per_clip: int = 1,
        layout: str = "packed",
        grid: tuple[int, int, int] | None = None,
    ) -> RaggedTokens:
        """Wrap dense sequences [S, N, C]; `x` is not copied."""
        num_sequences, length, _ = x.shape
        lengths = torch.full((num_sequences,), length, device=x.device)
        places = Layout(lengths, total=num_sequences * length, longest=length, kind=layout)
        position = torch.arange(length, device=x.device).repeat(num_sequences)
        return cls(x.flatten(0, 1), places, position, num_prefix_tokens, length, length, frames_per_clip, grid)

    def __repr__(self) -> str:
        layout = self.layout
        return (
            f"RaggedTokens({list(self.x.shape)}, {layout.num_sequences} sequences of at most {layout.longest} of "
            f"{self.num_positions} tokens, {layout.kind})"
        )

    @classmethod
    def __torch_function__(cls, function: object, *_: object, **__: object) -> None:
        """Refuse torch functions: they need a tensor."""
        raise UserError(
            "A module without ATS got the tokens of blocks with ATS. Their lengths differ: read tokens.x, or "
            "tokens.to_grid(). If no hook of yours did this, blocks were replaced or shared between models after "
            "ats.patch: ats.unpatch(model), and patch again."
        )

    def with_x(self, x: Tensor) -> RaggedTokens:
        """The same tokens with other values [T, C']. Keeps the indices already computed (`cached`)."""
        tokens = object.__new__(type(self))
        for name in type(self).__dataclass_fields__:  # torch.compile of PyTorch 2.11 cannot iterate over `__dict__`
            setattr(tokens, name, getattr(self, name))
        for name in ("grid_index", "row_at_position"):  # the `cached` ones below; a missing one is recomputed
            if name in self.__dict__:
                setattr(tokens, name, self.__dict__[name])
        tokens.x = x
        return tokens

    @property
    def trace(self) -> tuple[BlockRecord, ...]:
        """What each ATS block has done so far, in order."""
        records, record = [], self.record
        while record is not None:
            index = record.source.index
            kept = None if record.kept is None else replace(record.kept, block=index)
            records.append(replace(record, block=index, kept=kept, previous=None, source=None))
            record = record.previous
        return tuple(reversed(records))

    def prefix(self) -> Tensor:
        """The prefix tokens, [S, P, C]."""
        return self.x[self.prefix_index()].unflatten(0, (self.layout.num_sequences, self.num_prefix_tokens))

    def prefix_index(self) -> Tensor:
        """[S * P] int64, where the prefix tokens lie in x."""
        start = self.layout.start
        return (start[:, None] + torch.arange(self.num_prefix_tokens, device=start.device)).flatten()

    def keep(self, mask: Tensor, *, max_tokens: int) -> tuple[RaggedTokens, Tensor]:
        """The tokens marked in `mask` [S, M] (all prefix tokens True, padding False), and their indices [T'] in x.

        The only data-dependent shape, unless the layout is static. On a GPU the host waits once.
        """
        if not torch.compiler.is_compiling() and self.layout.num_sequences == 0:  # an empty batch
            return replace(self, max_tokens=max_tokens), self.position
        native = kernels.kept_rows(mask, self.position, self.layout.lengths) if self.layout.kind == "packed" else None
        if native is not None:
            index, position, lengths = native
            layout = Layout.from_lengths(lengths)
        elif self.layout.kind == SINGLE:
            index = mask[0].nonzero().squeeze(1)
            num_kept = index.shape[0]
            export_check(num_kept > self.num_prefix_tokens)  # reductions keep a candidate; the exporter cannot know
            export_check(num_kept <= self.layout.total)
            layout = Layout.single(num_kept, index)
            position = self.position.index_select(0, index)
        elif self.layout.kind == "packed":
            layout = Layout.from_lengths(mask.sum(dim=1))
            marked = self.layout.unpad(mask)
            # The count is known. Asking for it again would be a host wait or a graph break.
            known = mask.is_cuda or torch.compiler.is_compiling()
            index = (marked.nonzero_static(size=layout.total) if known else marked.nonzero()).squeeze(1)
            position = self.position.index_select(0, index)
        else:
            lengths = mask.sum(dim=1)
            longest = max_tokens if self.layout.kind == "static" else int(lengths.max())
            # A stable sort moves the kept tokens to the front in order.
            order = mask.logical_not().to(torch.uint8).sort(dim=1, stable=True).indices[:, :longest]
            index = (order + self.layout.start[:, None]).flatten()
            total = lengths.shape[0] * longest
            layout = Layout(lengths, total=total, longest=longest, kind=self.layout.kind, full=False)
            position = torch.where(layout.mask.flatten(), self.position[index], self.num_positions)
        of_rows: dict[str, Any] = {"x": self.x.index_select(0, index), "position": position}
        if self.size is not None:
            of_rows["size"] = self.size.index_select(0, index)
        if self.key_bias is not None:
            of_rows["key_bias"] = self.key_bias.index_select(0, index)
        return replace(self, layout=layout, max_tokens=max_tokens, **of_rows), index

    def to_grid(self, x: Tensor | None = None, value: float = 0) -> Tensor:
        """Dense [S, N, ...] with every token at its original position, and `value` where tokens were dropped. A view if
        none were. Fused tokens have no position and are left out.

        Args:
            x: [T, ...] values to place, by default the tokens themselves.
        """
        x = self.x if x is None else x
        num_sequences = self.layout.num_sequences
        size = num_sequences * self.num_positions
        if self.has_fused or not self.layout.full:  # rows without a position go to an extra column, cut off below
            columns = self.num_positions + 1
            column = torch.where(self.position < 0, self.num_positions, self.position)
            index = self.layout.sequence * columns + column
            grid = x.new_full((num_sequences * columns, *x.shape[1:]), value).index_copy(0, index, x)
            return grid.unflatten(0, (num_sequences, columns))[:, : self.num_positions]
        if self.layout.total == size and self.size is None:  # merging reorders tokens
            grid = x
        elif x.requires_grad:  # its backward is a plain gather
            grid = x.new_full((size, *x.shape[1:]), value).index_copy(0, self.grid_index, x)
        else:  # half the time, but the backward would add all dropped positions to one row
            grid = torch.cat([x, x.new_full((1, *x.shape[1:]), value)]).index_select(0, self.row_at_position)
        return grid.unflatten(0, (num_sequences, self.num_positions))

    def from_grid(self, grid: Tensor) -> Tensor:
        """[S, N, ...] -> [T, ...], the values at the tokens' positions."""
        return grid.flatten(0, 1).index_select(0, self.grid_index)

    @cached
    def grid_index(self) -> Tensor:
        """[T] int64, each token's row in the original dense layout of S * N rows."""
        return self.layout.sequence * self.num_positions + self.lookup()

    def lookup(self) -> Tensor:
        """[T] int64, `position` as an index into tables of N rows. Padding and fused tokens read an arbitrary row."""
        has_all = self.layout.full and not self.has_fused
        return self.position if has_all else self.position.clamp(0, self.num_positions - 1)

    @cached
    def row_at_position(self) -> Tensor:
        """[S * N] int64, for each row of the original dense layout the row of x with its token; T if dropped."""
        size = len(self.layout.lengths) * self.num_positions
        index = self.grid_index
        if self.has_fused or not self.layout.full:
            index = torch.where((self.position < 0) | (self.position == self.num_positions), size, index)
        rows = index.new_full((size + 1,), self.layout.total)
        return rows.index_copy(0, index, torch.arange(self.layout.total, device=rows.device))[:size]


@dataclass(repr=False)
class KeptTokens:
    """What one ATS block kept: an entry of the trace."""

    block: int  # index of the block in the network
    num_tokens: Tensor  # [S] int64, tokens kept per sequence, prefix tokens included
    rows: Tensor  # their original positions, sequence after sequence: [T] int64, or [S, M], padded at the end
    num_prefix_tokens: int  # P

    @classmethod
    def of(cls, tokens: RaggedTokens, block: int) -> KeptTokens:
        """The entry for the tokens that left ATS block `block`."""
        layout = tokens.layout
        rows = tokens.position if layout.full else layout.pad(tokens.position)
        return cls(block, layout.lengths, rows, tokens.num_prefix_tokens)

    def __repr__(self) -> str:
        """Short: how many tokens, not which."""
        counts = self.num_tokens.tolist()
        shown = ", ".join(map(str, counts[:8])) + (f", ... ({len(counts)} in all)" if len(counts) > 8 else "")
        return f"KeptTokens(block={self.block}, num_tokens=[{shown}])"

    @property
    def position(self) -> Tensor:
        """[T] int64, the original positions, packed."""
        if self.rows.ndim == 1:
            return self.rows
        return self.rows[torch.arange(self.rows.shape[1], device=self.rows.device) < self.num_tokens[:, None]]

    @property
    def patches(self) -> list[Tensor]:
        """For each sequence, the ascending indices of its kept patches in the original grid (row major, without prefix
        tokens).
        """
        num_prefix = self.num_prefix_tokens
        positions = self.position.split(self.num_tokens.tolist())
        return [p[p >= num_prefix].sort().values - num_prefix for p in positions]

    def compact(self, features: Tensor) -> CompactTokens:
        """Only these tokens of dense features [S, N, C] (video: [B, T, N, C]), so that the next stage, such as a
        language model, gets fewer. Fused tokens have no place in dense features and are left out.
        """
        positions = [own[own >= 0].sort().values for own in self.position.split(self.num_tokens.tolist())]
        position = pad_sequence(positions, batch_first=True, padding_value=-1)
        mask = position >= 0
        features = features.flatten(0, -3) if features.ndim > 3 else features
        index = position.clamp_min(0)[..., None].expand(-1, -1, features.shape[-1])
        return CompactTokens(features.gather(1, index).masked_fill(~mask[..., None], 0), position, mask)


class CompactTokens(NamedTuple):
    """Kept tokens of every sequence by ascending position, padded to the longest sequence, M."""

    x: Tensor  # [S, M, C]; zeros for padding
    position: Tensor  # [S, M] int64, in the dense sequence, where prefix tokens are 0 .. P - 1; -1 for padding
    mask: Tensor  # [S, M] bool, False for padding


@dataclass
class BlockRecord:
    """What one ATS block did, whether or not it samples. The block needs these numbers anyway, so recording is free.

    Counts are [S] int64, prefix tokens included. In ViT the first three are equal.
    """

    block: int  # index of the block in the network
    num_in: Tensor  # tokens in
    num_queries: Tensor  # before any were dropped
    num_keys: Tensor
    num_out: Tensor  # tokens out
    max_tokens: int = 0  # of the tokens out, see `RaggedTokens`
    rows_in: int = 0  # rows per sequence in a layout with padding, before and after the block; 0: no padding
    rows_out: int = 0
    reduction: Any = None  # `ats.reduction.Reduction` of the block; None: it keeps all tokens
    idle: bool = False  # the reduction had nothing to merge, and computed nothing
    kept: KeptTokens | None = None  # None without a reduction
    candidates: Any = None  # `ats.reduction.Candidates` with scores, if `ATSBlock.record_scores` is set
    places: Places | None = None  # after the block, if `ATSBlock.record_places` is set
    # During the forward pass: the previous record, and the ATSBlock, whose index `RaggedTokens.trace` fills in. A tuple
    # of records, or the index itself, would make torch.compile recompile for every block.
    previous: BlockRecord | None = None
    source: Any = None

    def with_padding(self) -> BlockRecord:
        """This record counting rows instead of tokens, because the block computes padding too."""
        if not self.rows_out:
            return self
        rows_in, rows_out = (torch.full_like(self.num_in, rows) for rows in (self.rows_in, self.rows_out))
        return replace(self, num_in=rows_in, num_queries=rows_in, num_keys=rows_in, num_out=rows_out)


class Trace(list[KeptTokens]):
    """What a forward pass did: a list with one `KeptTokens` for every block with a reduction, in order.

    Attributes:
        records: one per ATS block, including those that keep everything.
    """

    def __init__(self, records: Iterable[BlockRecord] = ()) -> None:
        self.records = tuple(records)
        super().__init__(record.kept for record in self.records if record.kept is not None)
