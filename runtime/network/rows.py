"""A pass as a table of rows: what each one is, where it goes, and what it sees."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from layerpack.runtime.kv.slots import KvSlots

_LEAST_RUN = 8  # rows of one sequence, one after the other, that attention takes together


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What one sequence has in a pass: its next tokens, and nodes of a tree behind them.

    `path` are the slots of the sequence, those of `tokens`, its last ones, included. `tails` are
    the slots on the way to each node, its own last. Logits are asked of the last of `tokens`, if
    there are any, and of every node.
    """

    path: Sequence[int]
    tokens: Sequence[int]
    nodes: Sequence[int] = ()
    tails: Sequence[Sequence[int]] = ()

    @property
    def num_rows(self) -> int:
        """Tokens and nodes."""
        return len(self.tokens) + len(self.nodes)

    @property
    def num_asked(self) -> int:
        """Rows of logits."""
        return min(1, len(self.tokens)) + len(self.nodes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """The slots that each row sees, in order of position, its own last; int64, on the device.

    Row r sees `prefix[r]` slots of `path` from `starts[r]` on, then the first `lengths[r] -
    prefix[r]` of `tails[r]`: the tail of a row in a tree are the nodes on the way to it. `runs` are
    (first row, end) of rows without tails that follow each other in one sequence; the rows behind
    the last run stand for themselves.
    """

    path: torch.Tensor
    starts: torch.Tensor
    prefix: torch.Tensor
    tails: torch.Tensor
    lengths: torch.Tensor
    runs: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """`tokens`, `positions` and `slots` (where keys and values go) are (rows,), int64.

    `asked` are the rows whose logits are wanted, in order.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    seen: Seen
    asked: torch.Tensor
    kv: KvSlots


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Of a table: rows, the longest tail, entries of paths, rows whose logits are asked for."""

    rows: int
    tail: int
    path: int
    asked: int

    @property
    def column(self) -> int:
        """Numbers of a column: each begins at a multiple of 16 bytes, as kernels like it."""
        return _even(self.rows)

    @property
    def row_tail(self) -> int:
        """Numbers of a row's tail, the same way."""
        return _even(self.tail)

    def holds(self, other: Sizes) -> bool:
        """Whether a table of `other` sizes, filled up, is one of these."""
        return (
            self.rows >= other.rows
            and self.tail >= other.tail
            and self.path >= other.path
            and self.asked >= other.asked
        )


def _even(count: int) -> int:
    return count + count % 2


def sizes_of(parts: Sequence[Part]) -> Sizes:
    """The least that hold them."""
    return Sizes(
        rows=sum(part.num_rows for part in parts),
        tail=max((len(tail) for part in parts for tail in part.tails), default=1),
        path=sum(len(part.path) for part in parts),
        asked=sum(part.num_asked for part in parts),
    )


class Table:
    """The numbers of a pass in one tensor, which goes to the device as a whole."""

    def __init__(
        self, parts: Sequence[Part], sizes: Sizes, *, kv: KvSlots, runs: bool = True
    ) -> None:
        """Filled up to `sizes` with rows that write into a slot of nobody's, and see it alone.

        `runs` False: every row stands for itself.
        """
        together, rest, path = list[_Row](), list[_Row](), array("q")
        asked: list[list[_Row]] = []
        self.runs: list[tuple[int, int]] = []
        for part in parts:
            start, known = len(path), len(part.path) - len(part.tokens)
            path.extend(part.path)
            tokens = [
                _Row(token, slot, start, known + place + 1, ())
                for place, (token, slot) in enumerate(
                    zip(part.tokens, part.path[known:], strict=True)
                )
            ]
            nodes = [
                _Row(node, tail[-1], start, len(part.path), tail)
                for node, tail in zip(part.nodes, part.tails, strict=True)
            ]
            if runs and len(tokens) >= _LEAST_RUN:
                self.runs.append((len(together), len(together) + len(tokens)))
                together += tokens
            else:
                rest += tokens
            rest += nodes
            asked.append([*tokens[-1:], *nodes])
        rows = together + rest
        for place, row in enumerate(rows):
            row.place = place
        nobodys = _Row(0, kv.nobodys, 0, 0, (kv.nobodys,))
        rows += [nobodys] * (sizes.rows - len(rows))
        places = [row.place for part_rows in asked for row in part_rows]
        numbers = array("q")
        for column in (
            [row.token for row in rows],
            [row.prefix + len(row.tail) - 1 for row in rows],
            [row.slot for row in rows],
            [row.start for row in rows],
            [row.prefix for row in rows],
            [row.prefix + len(row.tail) for row in rows],
        ):
            numbers.extend(column)
            numbers.extend([0] * (sizes.column - len(rows)))
        for row in rows:
            numbers.extend(row.tail)
            numbers.extend([0] * (sizes.row_tail - len(row.tail)))
        numbers.extend(path)
        numbers.extend([0] * (sizes.path - len(path)))
        numbers.extend([*places, *[0] * (sizes.asked - len(places))])
        self.sizes, self.num_asked = sizes, len(places)
        self.numbers = torch.frombuffer(numbers, dtype=torch.int64)


class _Row:
    __slots__ = ("place", "prefix", "slot", "start", "tail", "token")

    def __init__(self, token: int, slot: int, start: int, prefix: int, tail: Sequence[int]) -> None:
        self.token, self.slot, self.start = token, slot, start
        self.prefix, self.tail, self.place = prefix, tail, 0


def rows_of(
    numbers: torch.Tensor, sizes: Sizes, runs: Sequence[tuple[int, int]], kv: KvSlots
) -> Rows:
    """Views of a table's numbers, wherever they are."""
    count = sizes.rows
    columns, rest = numbers[: 6 * sizes.column], numbers[6 * sizes.column :]
    tokens, positions, slots, starts, prefix, lengths = (
        column[:count] for column in columns.view(6, sizes.column).unbind()
    )
    tails, path, asked = rest.split([count * sizes.row_tail, sizes.path, sizes.asked])
    return Rows(
        tokens=tokens,
        positions=positions,
        slots=slots,
        seen=Seen(
            path=path,
            starts=starts,
            prefix=prefix,
            tails=tails.view(count, sizes.row_tail),
            lengths=lengths,
            runs=tuple(runs),
        ),
        asked=asked,
        kv=kv,
    )


def table_of_rows(
    kv: KvSlots, parts: Sequence[Part], *, device: torch.device, sizes: Sizes | None = None
) -> Rows:
    """The rows of a pass on `device`, filled up to `sizes`.

    Those of runs come first, whatever their part's place.
    """
    table = Table(parts, sizes or sizes_of(parts), kv=kv)
    return rows_of(table.numbers.to(device), table.sizes, table.runs, kv)
