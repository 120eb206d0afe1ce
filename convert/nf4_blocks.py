"""The 4-bit codes and absmax values of a weight: bitsandbytes' results, several times faster.

Two ways to the nearest of the 16 values, with the same result for every float32: a search through
the 15 midpoints (plain, and fast on a GPU), and a table of 1024 cells of [-1, 1] that leaves one
comparison per element (for CPUs, chunk by chunk so that the scratch memory stays in cache).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch

from layerpack.formats.nf4 import NF4_CODES, num_blocks, packed_bytes

_CPU_CHUNK = 1 << 18  # elements: about 3 MB of scratch, which a core's own cache nearly holds
_GPU_CHUNK = 1 << 23  # elements: about 100 MB of scratch on the device
_HALF_CELLS = 512  # cells narrower than the gap between midpoints: at most one in each
_LEAST_ABSMAX = 1e-38  # bitsandbytes' bound: below it the reciprocal overflows


def encode_blocks(
    weight: torch.Tensor, *, block_size: int, device: torch.device, num_workers: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed codes (uint8, flat) and absmax (float32) of a 16- or 32-bit float weight, on the CPU.

    The weight may lie on the CPU (mapped, not pinned) or on `device`, a CPU or a CUDA one. Memory
    beyond the results is a few MB per CPU worker, or about 200 MB on a GPU. A block that holds NaN
    or infinity gets an absmax that is not finite, and codes that mean nothing. The device and the
    number of workers (None: all cores) do not change a byte.
    """
    flat = weight.detach().reshape(-1)
    codes = torch.empty(packed_bytes(tuple(weight.shape)), dtype=torch.uint8)
    absmax = torch.empty(num_blocks(tuple(weight.shape), block_size), dtype=torch.float32)
    whole = flat.numel() - flat.numel() % block_size
    if device.type == "cuda" and whole:
        _encode_on_gpu(flat[:whole], codes, absmax, block_size, device)
    elif whole:
        _encode_on_cpu(flat[:whole], codes, absmax, block_size, num_workers or _num_cores())
    if whole < flat.numel():
        codes[whole // 2 :], absmax[-1] = _encode_rest(flat[whole:].cpu())
    return codes, absmax


def search_codes(scaled: torch.Tensor) -> torch.Tensor:
    """Code of each float32 in [-1, 1], as uint8, by search. NaN gets some code."""
    return torch.bucketize(scaled, _midpoints(scaled.device), out_int32=True).to(torch.uint8)


def table_codes(scaled: torch.Tensor) -> torch.Tensor:
    """The same as `search_codes`, for finite values (also an ulp outside [-1, 1]) on a CPU."""
    first, threshold = _table()
    cell = scaled.add(1.0).mul_(_HALF_CELLS).to(torch.int32)
    return first.index_select(0, cell).add_(scaled > threshold.index_select(0, cell))


def _encode_on_cpu(
    flat: torch.Tensor,
    codes: torch.Tensor,
    absmax: torch.Tensor,
    block_size: int,
    num_workers: int,
) -> None:
    def work(begin: int, end: int) -> None:
        blocks = flat[begin:end].view(-1, block_size).float()
        if blocks.data_ptr() == flat[begin:end].data_ptr():
            blocks = blocks.clone()  # float32 comes back as itself; scaling below is in place
        largest = blocks.abs().amax(1)
        absmax[begin // block_size : end // block_size] = largest
        if not torch.isfinite(largest).all():
            return  # the caller refuses the weight; NaN has no cell in the table
        blocks.mul_(largest.clamp_min(_LEAST_ABSMAX).reciprocal_()[:, None])
        pack_codes(table_codes(blocks.view(-1)), codes[begin // 2 : end // 2])

    pieces = list(_pieces(flat.numel(), _CPU_CHUNK))
    num_workers = min(num_workers, len(pieces))
    if num_workers <= 1:
        for begin, end in pieces:
            work(begin, end)
        return
    before = torch.get_num_threads()
    try:
        # One torch thread in each worker: otherwise every one starts a team of its own.
        with ThreadPoolExecutor(
            num_workers, "quantise", initializer=torch.set_num_threads, initargs=(1,)
        ) as pool:
            list(pool.map(work, *zip(*pieces, strict=True)))
    finally:
        torch.set_num_threads(before)


def _encode_on_gpu(
    flat: torch.Tensor,
    codes: torch.Tensor,
    absmax: torch.Tensor,
    block_size: int,
    device: torch.device,
) -> None:
    """Two staging slots by turns: while one is computed, the host fills the other.

    Plain torch arithmetic rather than bitsandbytes' kernel, whose reciprocal is approximate and
    whose code for an all-zero block differs: a pack must not depend on where it was made.
    """
    chunk = min(_GPU_CHUNK, flat.numel())
    slots = [_Slot(chunk, block_size, flat.dtype, device) for _ in range(2)]
    for turn, (begin, end) in enumerate(_pieces(flat.numel(), chunk)):
        slot = slots[turn % 2]
        slot.drain()
        slot.submit(
            flat[begin:end],
            codes[begin // 2 : end // 2],
            absmax[begin // block_size : end // block_size],
        )
    for slot in slots:
        slot.drain()


class _Slot:
    """Pinned staging for one chunk and a stream of its own: IDLE -submit-> BUSY -drain-> IDLE."""

    def __init__(
        self, chunk: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._block_size = block_size
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._weight = torch.empty(chunk, dtype=dtype, pin_memory=True)
        self._codes = torch.empty(chunk // 2, dtype=torch.uint8, pin_memory=True)
        self._absmax = torch.empty(chunk // block_size, dtype=torch.float32, pin_memory=True)
        self._targets: tuple[torch.Tensor, torch.Tensor] | None = None

    def submit(self, weight: torch.Tensor, codes: torch.Tensor, absmax: torch.Tensor) -> None:
        """Queue the work on `weight`; the results reach `codes` and `absmax` at the next drain."""
        count = weight.numel()
        if weight.device.type == "cpu":
            weight = self._weight[:count].copy_(weight)
        else:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            blocks = weight.to(self._device, non_blocking=True).view(-1, self._block_size).float()
            largest = blocks.abs().amax(1)
            scaled = blocks * largest.clamp_min(_LEAST_ABSMAX).reciprocal()[:, None]
            packed = torch.empty(count // 2, dtype=torch.uint8, device=self._device)
            pack_codes(search_codes(scaled.view(-1)), packed)
            self._codes[: count // 2].copy_(packed, non_blocking=True)
            self._absmax[: largest.numel()].copy_(largest, non_blocking=True)
        self._targets = codes, absmax

    def drain(self) -> None:
        """Wait for the queued work, if any, and hand its results over."""
        if self._targets is None:
            return
        self._stream.synchronize()
        codes, absmax = self._targets
        codes.copy_(self._codes[: codes.numel()])
        absmax.copy_(self._absmax[: absmax.numel()])
        self._targets = None


def pack_codes(codes: torch.Tensor, packed: torch.Tensor) -> None:
    """Two codes to a byte, the first in the high nibble; both are uint8, `codes` of even length."""
    pairs = codes.view(torch.int16)  # little-endian: the first code is the low byte
    packed.copy_((pairs << 4) | (pairs >> 8))


def _encode_rest(rest: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The last, partial block, divided by absmax as bitsandbytes does (elsewhere it multiplies)."""
    values = rest.float()
    largest = values.abs().max().clamp(min=_LEAST_ABSMAX)
    scaled = torch.clamp(values / largest, -1, 1)
    scaled = torch.nn.functional.pad(scaled, (0, scaled.numel() % 2))
    packed = torch.empty(scaled.numel() // 2, dtype=torch.uint8)
    pack_codes(search_codes(scaled), packed)
    return packed, largest


def _pieces(count: int, chunk: int) -> Iterator[tuple[int, int]]:
    for begin in range(0, count, chunk):
        yield begin, min(begin + chunk, count)


@cache
def _midpoints(device: torch.device) -> torch.Tensor:
    values = torch.tensor(NF4_CODES, dtype=torch.float32)
    return ((values[1:] + values[:-1]) / 2).to(device)


@cache
def _table() -> tuple[torch.Tensor, torch.Tensor]:
    """Per cell: the code at its left edge, and the one midpoint that may lie in it."""
    midpoints = _midpoints(torch.device("cpu"))
    edges = torch.arange(2 * _HALF_CELLS + 1, dtype=torch.float32) / _HALF_CELLS - 1
    first = torch.bucketize(edges, midpoints)
    never = torch.tensor([torch.inf])
    return first.to(torch.uint8), torch.cat([midpoints, never])[first]


def _num_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
