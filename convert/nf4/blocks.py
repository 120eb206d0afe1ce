"""The 4-bit codes and absmax values of a weight: bitsandbytes' results, many times faster.

Three ways to the nearest of the 16 values, with the same result: a search through the 15 midpoints
(plain, and fast on a GPU); for CPUs, chunk by chunk so that the scratch memory stays in cache, a
table of 1025 cells of [-1, 1] that leaves one comparison an element; and for bfloat16, whose bits
tell all, nf4_bits.py.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch

from layerpack.convert.nf4.bits import bfloat16_codes
from layerpack.convert.nf4.staging import Staging
from layerpack.convert.nf4.torch_threads import one_torch_thread
from layerpack.formats.blob.nf4 import NF4_CODES, num_blocks, packed_bytes

_CPU_CHUNK = 1 << 18  # elements: about 3 MB of scratch, which a core's own cache nearly holds
_SHARE = 1 << 22  # elements that a worker takes at a time, a multiple of every block size
_GPU_SHARE = 1 << 24  # the same on a GPU, where each call costs more than its arithmetic
_MAX_GPU_WORKERS = 6  # they only keep copies going; more would add scratch, not speed
_HALF_CELLS = 512  # cells narrower than the gap between midpoints: at most one in each
_LEAST_ABSMAX = 1e-38  # bitsandbytes' bound: below it the reciprocal overflows
_ROUNDER = 2.0**23 + _HALF_CELLS
"""Added to a float32 below it, leaves the nearest integer, plus _HALF_CELLS, in the low bits."""


def encode_blocks(
    weight: torch.Tensor, *, block_size: int, device: torch.device, num_workers: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed codes (uint8, flat) and absmax (float32) of a 16- or 32-bit float weight, on the CPU.

    The weight may lie on the CPU (mapped, not pinned) or on `device`, a CPU or a CUDA one. Memory
    beyond the results is a few MB per CPU worker, about 200 MB of a GPU per worker. A block that
    holds NaN or infinity gets an absmax that is not finite, and codes that mean nothing. The device
    and the number of workers (None: as many as help) do not change a byte.
    """
    flat = weight.detach().reshape(-1)
    codes, absmax = _empty_results(flat.numel(), block_size)
    encoder = BlockEncoder(block_size=block_size, device=device)
    share_elements = _SHARE if device.type == "cpu" else _GPU_SHARE

    def work(begin: int) -> None:
        share = flat[begin : begin + share_elements]
        encoder.encode_into(
            share,
            codes[begin // 2 : packed_bytes((begin + share.numel(),))],
            absmax[begin // block_size : num_blocks((begin + share.numel(),), block_size)],
        )

    begins = range(0, flat.numel(), share_elements)
    num_workers = min(num_workers or useful_workers(device), len(begins))
    with one_torch_thread():
        if num_workers <= 1:
            for begin in begins:
                work(begin)
            return codes, absmax
        with ThreadPoolExecutor(num_workers, "quantise") as pool:
            list(pool.map(work, begins))
    return codes, absmax


def useful_workers(device: torch.device) -> int:
    """How many threads to encode with: one a core, fewer where a GPU does the arithmetic."""
    if hasattr(os, "sched_getaffinity"):
        num_cores = len(os.sched_getaffinity(0))
    else:
        num_cores = os.cpu_count() or 1
    return num_cores if device.type == "cpu" else min(num_cores, _MAX_GPU_WORKERS)


class BlockEncoder:
    """Encodes on one device. Threads may share it; each gets staging memory of its own."""

    def __init__(self, *, block_size: int, device: torch.device) -> None:
        self._block_size = block_size
        self._staging = Staging(device, _encode_whole) if device.type == "cuda" else None

    def encode(self, flat: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Packed codes and absmax, on the CPU, of a flat float tensor; waits for them."""
        pin = self._staging is not None
        codes, absmax = _empty_results(flat.numel(), self._block_size, pin=pin)
        self.encode_into(flat, codes, absmax)
        return codes, absmax

    def encode_into(self, flat: torch.Tensor, codes: torch.Tensor, absmax: torch.Tensor) -> None:
        """The same into tensors that are there. All but the last block must be whole."""
        block_size = self._block_size
        whole = flat.numel() - flat.numel() % block_size
        chunk = _CPU_CHUNK if self._staging is None else _GPU_SHARE
        for begin in range(0, whole, chunk):
            end = min(begin + chunk, whole)
            piece = flat[begin:end].view(-1, block_size)
            results = codes[begin // 2 : end // 2], absmax[begin // block_size : end // block_size]
            if self._staging is None:
                _encode_on_cpu(piece, *results)
            else:
                self._staging.encode(piece, *results)
        if whole < flat.numel():
            codes[whole // 2 :], absmax[-1] = _encode_rest(flat[whole:].cpu())


def search_codes(scaled: torch.Tensor) -> torch.Tensor:
    """Code of each float32 in [-1, 1], as uint8, by search. NaN gets some code."""
    return torch.bucketize(scaled, midpoints(scaled.device), out_int32=True).to(torch.uint8)


def table_codes(scaled: torch.Tensor) -> torch.Tensor:
    """The same as `search_codes`, for finite values (also an ulp outside [-1, 1]) on a CPU."""
    first, threshold, rounder = _table()
    # torch converts float32 to int32 an element at a time; adding and reading the bits is 10 times
    # faster. The product is exact, so a machine with fused multiply-add finds the same cells.
    cell = torch.add(rounder, scaled, alpha=_HALF_CELLS).view(torch.int32)
    cell.sub_(rounder.view(torch.int32) - _HALF_CELLS)
    return first.index_select(0, cell).add_(scaled > threshold.index_select(0, cell))


def pack_codes(codes: torch.Tensor, packed: torch.Tensor) -> None:
    """Two codes to a byte, the first in the high nibble; both are uint8, `codes` of even length."""
    pairs = codes.view(torch.int16)  # little-endian: the first code is the low byte
    packed.copy_((pairs << 4) | (pairs >> 8))


def _encode_on_cpu(blocks: torch.Tensor, codes: torch.Tensor, absmax: torch.Tensor) -> None:
    if blocks.dtype == torch.bfloat16:
        found = bfloat16_codes(blocks, search_codes)
        if found is not None:
            pack_codes(found[0], codes)
            absmax.copy_(found[1])
            return
    scaled, largest = _scaled(blocks)
    absmax.copy_(largest)
    if not torch.isfinite(largest).all():
        return  # the caller refuses the weight; NaN has no cell in the table
    pack_codes(table_codes(scaled.view(-1)), codes)


def _encode_whole(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and absmax of whole blocks, on the device that they are on, in one go.

    Plain torch arithmetic rather than bitsandbytes' kernel, whose reciprocal is approximate and
    whose code for an all-zero block differs: a pack must not depend on where it was made.
    """
    scaled, largest = _scaled(blocks)
    packed = torch.empty(scaled.numel() // 2, dtype=torch.uint8, device=scaled.device)
    pack_codes(search_codes(scaled.view(-1)), packed)
    return packed, largest


def _scaled(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 values divided by the absmax of their block (a row), and these absmax."""
    scaled = blocks.float()
    if scaled.data_ptr() == blocks.data_ptr():
        scaled = scaled.clone()  # float32 comes back as itself; scaling below is in place
    largest = scaled.abs().amax(1)
    scaled.mul_(largest.clamp_min(_LEAST_ABSMAX).reciprocal()[:, None])
    return scaled, largest


def _encode_rest(rest: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The last, partial block, divided by absmax as bitsandbytes does (elsewhere it multiplies)."""
    values = rest.float()
    largest = values.abs().max().clamp(min=_LEAST_ABSMAX)
    scaled = torch.clamp(values / largest, -1, 1)
    scaled = torch.nn.functional.pad(scaled, (0, scaled.numel() % 2))
    packed = torch.empty(scaled.numel() // 2, dtype=torch.uint8)
    pack_codes(search_codes(scaled), packed)
    return packed, largest


def _empty_results(
    count: int, block_size: int, *, pin: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        torch.empty(packed_bytes((count,)), dtype=torch.uint8, pin_memory=pin),
        torch.empty(num_blocks((count,), block_size), dtype=torch.float32, pin_memory=pin),
    )


@cache
def midpoints(device: torch.device) -> torch.Tensor:
    """The 15 float32 values between which of two codes is the nearer changes."""
    values = torch.tensor(NF4_CODES, dtype=torch.float32)
    return ((values[1:] + values[:-1]) / 2).to(device)


@cache
def _table() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Per cell: the code at its left edge, and the one midpoint that may lie in it. And _ROUNDER.

    Cell i reaches half a cell to either side of i / _HALF_CELLS - 1.
    """
    edges_of_codes = midpoints(torch.device("cpu"))
    edges = (torch.arange(2 * _HALF_CELLS + 1, dtype=torch.float32) - 0.5) / _HALF_CELLS - 1
    first = torch.bucketize(edges, edges_of_codes)
    never = torch.tensor([torch.inf])
    return first.to(torch.uint8), torch.cat([edges_of_codes, never])[first], torch.tensor(_ROUNDER)
