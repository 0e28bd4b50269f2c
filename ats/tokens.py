"""RaggedTokens: a batch of token sequences of different lengths.

Three layouts hold them, `ATS.LAYOUT`:

* `packed`: one after the other, `x [T, C]`. Nothing is computed on air: padding to the longest sequence would cost what
  sampling saves. Pointwise layers (LayerNorm, Linear, MLP) run on `x` as it is; only attention and scoring ask the
  `Layout` where a sequence begins.
* `padded`: every sequence takes as many rows as the longest of the batch. What the others are measured against.
* `static`: every sequence takes as many rows as it has token slots. No shape depends on the data, so the network can be
  exported (`tools/export.py`), captured in a CUDA graph and compiled whole; `ATS.NUM_TOKENS` sets what it costs.

A token's numbers are the same in all three; rows of padding hold some token that was dropped, and no token looks at
them.

Shapes: S sequences, T rows in all, M rows of the longest sequence, C channels, P prefix tokens (CLS, distillation),
which come first in every sequence and are always kept.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ats import kernels
from ats.caching import cached

LAYOUTS = ("packed", "padded", "static")


class Layout:
    """Where the sequences lie in a tensor of T rows.

    Attributes:
        lengths: [S] int64, tokens per sequence.
        total: T. longest: M.
        kind: name in LAYOUTS.
        num_sequences: S.
        full: there is no padding.
        uniform: all sequences have M rows, so `pad` is a view.
    """

    def __init__(self, lengths: Tensor, *, total: int, longest: int, kind: str = "packed", full: bool = True) -> None:
        self.lengths = lengths
        self.num_sequences = lengths.shape[0]  # of a tensor, `len` would be the example's number to torch.export
        self.total = total
        self.longest = longest
        self.kind = kind
        self.full = full
        self.uniform = kind != "packed" or total == self.num_sequences * longest

    @classmethod
    def from_lengths(cls, lengths: Tensor, *, longest_of_none: int = 1) -> Layout:
        """The packed layout of sequences with these lengths [S]. On a GPU this waits for the numbers, once.

        Args:
            longest_of_none: `longest` where there is no sequence at all: samplers want columns.
        """
        if torch.compiler.is_compiling():  # a list of lengths would be compiled anew for every batch
            total, longest = torch.stack([lengths.sum(), lengths.max()]).tolist()
            return cls(lengths, total=total, longest=longest)
        sizes = lengths.tolist()
        layout = cls(lengths, total=sum(sizes), longest=max(sizes, default=longest_of_none))
        layout.sizes = sizes
        return layout

    @cached
    def start(self) -> Tensor:
        """[S] int64, the row of each sequence's first token."""
        if self.uniform:
            return torch.arange(0, self.total, self.longest, device=self.lengths.device)
        return self.lengths.cumsum(0) - self.lengths

    def first_rows(self, x: Tensor) -> Tensor:
        """[S, ...], the first row of each sequence's in x [T, ...]."""
        return x[:: self.longest] if self.uniform else x.index_select(0, self.start)

    @cached
    def offsets(self) -> Tensor:
        """[S + 1] int32, start of each packed sequence and T (`cu_seqlens` of variable-length attention)."""
        return torch.nn.functional.pad(self.lengths.cumsum(0), (1, 0)).to(torch.int32)

    @cached
    def mask(self) -> Tensor:
        """[S, M] bool, True where the padded layout holds a token."""
        return torch.arange(self.longest, device=self.lengths.device) < self.lengths[:, None]

    @cached
    def sequence(self) -> Tensor:
        """[T] int64, the sequence a row belongs to."""
        sequences = torch.arange(self.num_sequences, device=self.lengths.device)
        if self.uniform:
            return sequences.repeat_interleave(self.longest)
        return sequences.repeat_interleave(self.lengths, output_size=self.total)

    @cached
    def padded_index(self) -> Tensor:
        """[T] int64, the place of a packed token among S * M."""
        shift = torch.arange(self.num_sequences, device=self.lengths.device) * self.longest - self.start
        return torch.arange(self.total, device=self.lengths.device) + shift[self.sequence]

    @cached
    def sizes(self) -> list[int]:
        """Lengths as Python numbers; on a GPU this waits for them."""
        return self.lengths.tolist()

    def pad(self, x: Tensor, value: float = 0) -> Tensor:
        """[T, ...] -> [S, M, ...], `value` where there is no row. A view where the layout is uniform."""
        if self.uniform:
            return x.reshape(self.num_sequences, self.longest, *x.shape[1:])
        padded = x.new_full((self.num_sequences * self.longest, *x.shape[1:]), value)
        return padded.index_copy_(0, self.padded_index, x).reshape(self.num_sequences, self.longest, *x.shape[1:])

    def unpad(self, padded: Tensor) -> Tensor:
        """[S, M, ...] -> [T, ...]."""
        flat = padded.reshape(-1, *padded.shape[2:])
        return flat if self.uniform else flat.index_select(0, self.padded_index)


@dataclass
class RaggedTokens:
    """Sequences of tokens with their places in the sequences the network began with.

    Attributes:
        x: [T, C] tokens; in each sequence the prefix tokens first, then patches by ascending position.
        layout: where the sequences lie in x.
        position: [T] int64, index of the token in the original sequence; prefix tokens are 0 .. P - 1. Of a row of
            padding: N, which is no position; of a fused token: -1; of merged tokens that of one of them.
        num_prefix_tokens: P.
        num_positions: length N of the original sequences.
        slots: token slots: N at first, min(K, slots) after an ATS block. A number of the configuration, not of the
            data.
        group: how many consecutive sequences belong together: the frames of a clip; 1 for images.
        rotary: [N, h, 2D] sine and cosine of every original position, for blocks with rotary embedding; h is 1 or H.
        size: [T] how many original tokens each stands for where they are merged; patches are then in any order.
        key_bias: [S, M] added to the logits of every key, for sequences of one length.
        has_fused: some tokens are sums of others and stand nowhere.
    """

    x: Tensor
    layout: Layout
    position: Tensor
    num_prefix_tokens: int
    num_positions: int
    slots: int
    group: int = 1
    rotary: Tensor | None = None
    size: Tensor | None = None
    key_bias: Tensor | None = None
    has_fused: bool = False

    @classmethod
    def from_dense(cls, x: Tensor, num_prefix_tokens: int, *, group: int = 1, layout: str = "packed") -> RaggedTokens:
        """Dense sequences [S, N, C] as ragged ones; `x` is not copied."""
        num_sequences, length, _ = x.shape
        lengths = torch.full((num_sequences,), length, device=x.device)
        layout = Layout(lengths, total=num_sequences * length, longest=length, kind=layout)
        position = torch.arange(length, device=x.device).repeat(num_sequences)
        return cls(x.flatten(0, 1), layout, position, num_prefix_tokens, length, length, group)

    def with_x(self, x: Tensor) -> RaggedTokens:
        """The same tokens with other values [T, C'], and what has been looked up of their places (`cached`)."""
        tokens = object.__new__(type(self))
        for name in type(self).__dataclass_fields__:  # torch.compile of PyTorch 2.11 cannot go over `__dict__`
            setattr(tokens, name, getattr(self, name))
        for name in ("grid_index", "row_at_position"):  # the `cached` ones below: one left out is looked up anew
            if name in self.__dict__:
                setattr(tokens, name, self.__dict__[name])
        tokens.x = x
        return tokens

    def prefix(self) -> Tensor:
        """[S, P, C], the prefix tokens."""
        return self.x[self.prefix_index()].unflatten(0, (self.layout.num_sequences, self.num_prefix_tokens))

    def prefix_index(self) -> Tensor:
        """[S * P] int64, where the prefix tokens lie in x."""
        start = self.layout.start
        return (start[:, None] + torch.arange(self.num_prefix_tokens, device=start.device)).flatten()

    def keep(self, mask: Tensor, *, slots: int) -> tuple[RaggedTokens, Tensor]:
        """The tokens marked in `mask` [S, M] (all prefix tokens True, padding False), and their indices [T'] in the old
        x.

        The one place where a shape depends on the data, unless the layout is static: on a GPU it waits once.
        """
        if not torch.compiler.is_compiling() and self.layout.num_sequences == 0:  # an empty batch
            return replace(self, slots=slots), self.position
        native = kernels.kept_rows(mask, self.position, self.layout.lengths) if self.layout.kind == "packed" else None
        if native is not None:
            index, position, lengths = native
            layout = Layout.from_lengths(lengths)
        elif self.layout.kind == "packed":
            layout = Layout.from_lengths(mask.sum(dim=1))
            marked = self.layout.unpad(mask)
            # Their number is known: where asking for it again is a wait or a cut in the graph, it is not.
            known = mask.is_cuda or torch.compiler.is_compiling()
            index = (marked.nonzero_static(size=layout.total) if known else marked.nonzero()).squeeze(1)
            position = self.position.index_select(0, index)
        else:
            lengths = mask.sum(dim=1)
            longest = slots if self.layout.kind == "static" else int(lengths.max())
            # A stable sort moves the kept tokens to the front and leaves them in their order.
            order = mask.logical_not().to(torch.uint8).sort(dim=1, stable=True).indices[:, :longest]
            index = (order + self.layout.start[:, None]).flatten()
            total = lengths.shape[0] * longest
            layout = Layout(lengths, total=total, longest=longest, kind=self.layout.kind, full=False)
            position = torch.where(layout.mask.flatten(), self.position[index], self.num_positions)
        kept = replace(self, x=self.x.index_select(0, index), layout=layout, position=position, slots=slots)
        return kept, index

    def to_grid(self, x: Tensor | None = None, value: float = 0) -> Tensor:
        """Dense [S, N, ...] with every token at its original position and `value` where it was dropped. A view if none
        was. Fused tokens have no position and are left out.

        Args:
            x: [T, ...] values to place, by default the tokens themselves.
        """
        x = self.x if x is None else x
        num_sequences = self.layout.num_sequences
        size = num_sequences * self.num_positions
        if not self.layout.full:  # padding goes to a column of its own, which is cut off
            columns = self.num_positions + 1
            index = self.layout.sequence * columns + self.position
            grid = x.new_full((num_sequences * columns, *x.shape[1:]), value).index_copy(0, index, x)
            return grid.unflatten(0, (num_sequences, columns))[:, : self.num_positions]
        if self.has_fused:
            placed = (self.position >= 0).nonzero().squeeze(1)
            grid = x.new_full((size, *x.shape[1:]), value).index_copy(0, self.grid_index[placed], x[placed])
        elif self.layout.total == size:
            grid = x
        elif x.requires_grad:  # backward this is a plain gather
            grid = x.new_full((size, *x.shape[1:]), value).index_copy(0, self.grid_index, x)
        else:  # half the time, but backward all dropped positions would add to one row
            grid = torch.cat([x, x.new_full((1, *x.shape[1:]), value)]).index_select(0, self.row_at_position)
        return grid.unflatten(0, (num_sequences, self.num_positions))

    def from_grid(self, grid: Tensor) -> Tensor:
        """[S, N, ...] -> [T, ...], the values at the positions of the tokens."""
        return grid.flatten(0, 1).index_select(0, self.grid_index)

    @cached
    def grid_index(self) -> Tensor:
        """[T] int64, the place of a token in the original dense layout, counted over S * N."""
        return self.layout.sequence * self.num_positions + self.lookup()

    def lookup(self) -> Tensor:
        """[T] int64, `position` for tables of N rows: padding, which has none, reads the last."""
        return self.position if self.layout.full else self.position.clamp(max=self.num_positions - 1)

    @cached
    def row_at_position(self) -> Tensor:
        """[S * N] int64, the row of x that holds the token of a place in the original dense layout; T where it was
        dropped.
        """
        rows = self.grid_index.new_full((len(self.layout.lengths) * self.num_positions,), self.layout.total)
        return rows.index_copy(0, self.grid_index, torch.arange(self.layout.total, device=rows.device))


@dataclass
class KeptTokens:
    """What one ATS block kept: an entry of the trace.

    Attributes:
        block: index of the block in the network.
        num_tokens: [S] int64, tokens kept by each sequence, prefix tokens counted.
        rows: their original positions, sequence after sequence: [T] int64, or [S, M] with padding behind them.
        num_prefix_tokens: P.
    """

    block: int
    num_tokens: Tensor
    rows: Tensor
    num_prefix_tokens: int

    @classmethod
    def of(cls, tokens: RaggedTokens, block: int) -> KeptTokens:
        """The entry for the tokens that left ATS block `block`."""
        layout = tokens.layout
        rows = tokens.position if layout.full else layout.pad(tokens.position)
        return cls(block, layout.lengths, rows, tokens.num_prefix_tokens)

    @property
    def position(self) -> Tensor:
        """[T] int64, the original positions, packed."""
        if self.rows.ndim == 1:
            return self.rows
        return self.rows[torch.arange(self.rows.shape[1], device=self.rows.device) < self.num_tokens[:, None]]

    @property
    def patches(self) -> list[Tensor]:
        """For each sequence the indices of its kept patches in the original grid (row major, prefix tokens not
        counted), ascending.
        """
        num_prefix = self.num_prefix_tokens
        positions = self.position.split(self.num_tokens.tolist())
        return [p[p >= num_prefix].sort().values - num_prefix for p in positions]
