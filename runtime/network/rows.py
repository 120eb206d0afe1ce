"""A pass as a table of rows: what each one is, where it goes, and what it sees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from layerpack.runtime.kv.slots import KvSlots


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """The slots that each row sees, in order of position, its own last; int32, on the device.

    Row r sees the first `prefix[r]` of `path`, then the first `lengths[r] - prefix[r]` of
    `tails[r]`: the tail of a row in a tree are the nodes on the way to it.
    """

    path: torch.Tensor
    prefix: torch.Tensor
    tails: torch.Tensor
    lengths: torch.Tensor
    has_tails: bool


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


def table_of_rows(
    kv: KvSlots,
    path: Sequence[int],
    tokens: Sequence[int],
    nodes: Sequence[int],
    tails: Sequence[Sequence[int]],
    *,
    device: torch.device,
) -> Rows:
    """The rows of a sequence's next tokens, and of nodes of a tree behind them.

    `path` are the slots of the sequence, those of `tokens`, its last ones, included. `nodes` are
    tokens, `tails` the slots on the way to each, its own last. Logits are asked of the last of
    `tokens`, if there are any, and of every node.
    """
    known = len(path) - len(tokens)
    prefix = [*range(known + 1, len(path) + 1), *[len(path)] * len(nodes)]
    lengths = [*prefix[: len(tokens)], *(len(path) + len(tail) for tail in tails)]
    width = max(map(len, tails), default=1)
    padded = [[0] * width] * len(tokens) + [[*tail, *[0] * (width - len(tail))] for tail in tails]

    def on_device(values: object, dtype: torch.dtype) -> torch.Tensor:
        tensor = torch.tensor(values, dtype=dtype)
        return tensor if device.type == "cpu" else tensor.to(device)

    return Rows(
        tokens=on_device([*tokens, *nodes], torch.int64),
        positions=on_device([length - 1 for length in lengths], torch.int64),
        slots=on_device([*path[known:], *(tail[-1] for tail in tails)], torch.int64),
        seen=Seen(
            path=on_device(list(path), torch.int32),
            prefix=on_device(prefix, torch.int32),
            tails=on_device(padded, torch.int32),
            lengths=on_device(lengths, torch.int32),
            has_tails=bool(nodes),
        ),
        asked=on_device(range(max(0, len(tokens) - 1), len(lengths)), torch.int64),
        kv=kv,
    )
