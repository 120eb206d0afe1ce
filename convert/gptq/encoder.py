"""Rows of weights to codes and scales as a calibration has them; the same bytes on every device."""

from __future__ import annotations

import functools
import math
import threading
import time
from collections.abc import Callable
from collections.abc import Set as AbstractSet

import torch

from layerpack.convert.finite import all_finite
from layerpack.convert.gptq.ratios import RATIOS
from layerpack.convert.nf4.blocks import midpoints, pack_codes
from layerpack.formats.blob.nf4 import NF4_CODES
from layerpack.formats.calibration.calibration import Calibration
from layerpack.formats.calibration.inputs import Inputs
from layerpack.formats.errors import UnsupportedError

_KEPT = 4  # inputs made ready: those of the weights that are under way
_SAMPLE_ROWS = 256
_SHARE = 1 << 24
"""Elements that are encoded at a time: some 200 MB of a GPU. GGUF tensors come whole."""
Encode = Callable[[torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]


class CalibratedEncoder:
    """Encodes on one device. Threads may share it."""

    def __init__(
        self,
        calibration: Calibration,
        names: AbstractSet[str],
        *,
        block_size: int,
        device: torch.device,
    ) -> None:
        """`names`: of the weights that it is for, in the pack.

        Raises UnsupportedError if the library that compiles the arithmetic is not there.
        """
        self._calibration, self._names, self._block_size = calibration, names, block_size
        # A GPU without Triton (Windows) leaves the work to the CPU: the bytes are the same.
        if device.type == "cuda" and _has_triton():
            make: Callable[[Inputs], Encode] = functools.partial(_OnGpu, device)
        else:
            _require_numba()
            make = _OnCpu
        self._lock = threading.Lock()
        self._ready = functools.lru_cache(_KEPT)(
            lambda name: _Once(lambda: make(calibration.inputs(name)))
        )

    def encode(self, name: str, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Packed codes (uint8, flat) and scales (float32, flat), on the CPU, of a weight's rows.

        `rows` (rows, in): floats of 16 or 32 bits on the CPU; `name`: the weight's in the pack, one
        that the calibration knows. If any is NaN or infinite, some scale is not finite. Raises
        CalibrationError.
        """
        with self._lock:
            ready = self._ready(self._calibration.users[name])
        encode = ready.get()
        shares = rows.split(max(1, _SHARE // rows.shape[1]))
        found = [encode(share, self._block_size) for share in shares]
        if len(found) > 1:
            return torch.cat([codes for codes, _ in found]), torch.cat([s for _, s in found])
        return found[0]

    def knows(self, name: str) -> bool:
        """Whether a weight is to be encoded here."""
        return name in self._names

    def element_s(self, name: str, num_columns: int) -> float:
        """How long an element of a weight takes one worker, measured on a few rows."""
        rows = torch.randn(_SAMPLE_ROWS, num_columns)
        self.encode(name, rows[:1])  # compiles
        begin_s = time.perf_counter()
        self.encode(name, rows)
        return (time.perf_counter() - begin_s) / rows.numel()


class _Once:
    """Made by the thread that needs it first, while others that need it wait."""

    def __init__(self, make: Callable[[], Encode]) -> None:
        self._make, self._lock = make, threading.Lock()
        self._made: Encode | None = None

    def get(self) -> Encode:
        with self._lock:
            if self._made is None:
                self._made = self._make()
            return self._made


class _OnCpu:
    """Encodes weights of certain inputs."""

    def __init__(self, inputs: Inputs) -> None:
        # numpy takes ten times as long for it.
        feedback = torch.from_numpy(inputs.feedback).float()
        self._inputs = inputs.importance, inputs.order, feedback.numpy()

    def __call__(self, rows: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        from layerpack.convert.gptq.on_cpu import encode_tiles  # late: half a second

        num_rows, num_columns = rows.shape
        packed = torch.empty(num_rows, num_columns // 2, dtype=torch.uint8)
        scales = torch.empty(num_rows, num_columns // block_size)
        weight = rows.contiguous().float()
        if all_finite(weight):
            args = weight.numpy(), *self._inputs, block_size, packed.numpy(), scales.numpy()
            encode_tiles(*args)
        else:
            scales.fill_(math.nan)
        return packed.flatten(), scales.flatten()


class _OnGpu:
    """The same on a GPU; each thread has a stream of its own."""

    _own = threading.local()

    def __init__(self, device: torch.device, inputs: Inputs) -> None:
        self._device = device
        with torch.cuda.stream(self._stream()):
            self._tensors: dict[str, torch.Tensor] = {
                "importance": torch.from_numpy(inputs.importance).to(device),
                "order": torch.from_numpy(inputs.order).to(device),
                "feedback": torch.from_numpy(inputs.feedback).to(device).float(),
                "ratios": torch.tensor(RATIOS, device=device),
                "middles": midpoints(device),
                "values": torch.tensor(NF4_CODES, dtype=torch.float32, device=device),
            }
        self._stream().synchronize()  # other threads use them in their own

    def __call__(self, rows: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        from layerpack.convert.gptq.on_gpu import encode_columns

        with torch.cuda.stream(self._stream()):
            weight = rows.to(self._device, non_blocking=True)
            codes, scales = encode_columns(weight, block_size, **self._tensors)
            scales.masked_fill_(~torch.isfinite(weight).all(), math.nan)
            packed = torch.empty(codes.numel() // 2, dtype=torch.uint8, device=self._device)
            pack_codes(codes.view(-1), packed)
            found = [_pinned_copy(tensor) for tensor in (packed, scales.flatten())]
        self._stream().synchronize()
        return found[0], found[1]

    def _stream(self) -> torch.cuda.Stream:
        streams: dict[torch.device, torch.cuda.Stream]
        streams = self._own.__dict__.setdefault("streams", {})
        if self._device not in streams:
            streams[self._device] = torch.cuda.Stream(self._device)
        return streams[self._device]


def _pinned_copy(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)


def _has_triton() -> bool:
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


def _require_numba() -> None:
    try:
        import numba  # noqa: F401
    except ImportError as reason:
        raise UnsupportedError(
            "a calibration is used on a CPU with numba, which is not installed: pip install "
            "'layerpack[calibration]'"
        ) from reason
