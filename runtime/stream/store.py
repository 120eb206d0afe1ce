"""All slices of an open model: each in its tier, and the stream of those that move."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch

from layerpack.formats.errors import StreamError
from layerpack.formats.pack import Pack, raw_reader
from layerpack.formats.read import BufferedReader, Reader, open_reader
from layerpack.runtime.core.patience import Patience
from layerpack.runtime.core.slices import Extent
from layerpack.runtime.plan.plan import Plan, Tier
from layerpack.runtime.stream.host_tier import HostTier
from layerpack.runtime.stream.lane import CudaLane, HostLane, Lane
from layerpack.runtime.stream.mapped import populate
from layerpack.runtime.stream.memory_tier import load_memory
from layerpack.runtime.stream.pinned import PinnedBuffers
from layerpack.runtime.stream.ring import ReadRing
from layerpack.runtime.stream.stream import WeightStream
from layerpack.runtime.stream.vram_tier import load_vram
from layerpack.runtime.trace.gpu_clock import GpuClock
from layerpack.runtime.trace.layer_spans import LayerSpans
from layerpack.runtime.trace.trace import NO_TRACE, Trace


class Store:
    """Opened by a plan; a context manager.

    `resident[index]` are the bytes (uint8) of a slice that stays where it is computed with; all
    others come through `stream` into `slots`. `use(index)` lends either for the length of a with
    block. `resident_spans` times what is resident, for the trace.
    """

    def __init__(
        self,
        *,
        pack: Pack,
        plan: Plan,
        device: torch.device,
        patience: Patience,
        direct: bool | None = None,
        may_register: bool = True,
        trace: Trace = NO_TRACE,
    ) -> None:
        """Load what stays; waits. Raises StreamError, CapacityError, CancelledError."""
        self.plan = plan
        self._pack, self._device = pack, device
        self._patience, self._trace = patience, trace
        self._direct, self._may_register = direct, may_register
        self.resident: dict[int, torch.Tensor] = {}
        self.resident_spans = LayerSpans(trace)
        self.stream: WeightStream | None = None
        self.slots: list[torch.Tensor] = []
        self._stack = contextlib.ExitStack()
        with contextlib.ExitStack() as stack:
            self._open(stack)
            self._stack = stack.pop_all()

    def _open(self, stack: contextlib.ExitStack) -> None:
        reader = raw_reader(self._pack, open_reader(self.plan.slices[0].path, direct=self._direct))
        stack.callback(reader.close)
        in_host = self.plan.slices_in(Tier.HOST)
        host: dict[int, torch.Tensor] = {}
        if self._device.type == "cuda":
            tier = stack.enter_context(HostTier(self._device))
            tier.load(in_host, reader, may_register=self._may_register, patience=self._patience)
            host = tier.tensors
            in_vram = self.plan.slices_in(Tier.VRAM)
            with contextlib.closing(raw_reader(self._pack, BufferedReader())) as buffered:
                self.resident = load_vram(in_vram, buffered, self._device, self._patience)
        else:
            self.resident = load_memory(in_host, reader, self._patience)
        stack.callback(self.resident.clear)
        lane = self._lane() if self.plan.num_slots else None
        if self._trace.enabled and self._device.type == "cuda":
            copy_stream = lane.copy_stream if isinstance(lane, CudaLane) else None
            self._trace.clock = GpuClock(self._device, self._trace, copy_stream=copy_stream)
        if lane is None:
            return
        self.slots = lane.slots
        stack.callback(self.slots.clear)
        self.stream = stack.enter_context(
            WeightStream(
                slices=[part for part in self.plan.slices if part.index not in self.resident],
                host=host,
                lane=lane,
                make_ring=self._ring_factory(stack, reader),
                buffer_bytes=self.plan.buffer_bytes,
                patience=self._patience,
                trace=self._trace,
            )
        )

    def _lane(self) -> Lane:
        count, each_bytes = self.plan.num_slots, self.plan.slot_bytes
        if self._device.type == "cuda":
            return CudaLane(device=self._device, num_slots=count, slot_bytes=each_bytes)
        return HostLane(num_slots=count, slot_bytes=each_bytes)

    def _ring_factory(
        self, stack: contextlib.ExitStack, reader: Reader
    ) -> Callable[[Callable[[int], Extent]], ReadRing]:
        plan, trace = self.plan, self._trace
        buffers = PinnedBuffers(
            count=plan.num_buffers, each_bytes=plan.buffer_bytes, device=self._device
        )
        stack.callback(buffers.close)

        def on_read(extent: Extent, begin_s: float, end_s: float) -> None:
            trace.read(extent.title, begin_s, end_s, extent.length_bytes)

        def make(extent_of: Callable[[int], Extent]) -> ReadRing:
            return ReadRing(
                buffers=buffers.views,
                reader=reader,
                extent_of=extent_of,
                num_threads=plan.read_threads,
                on_read=on_read if trace.enabled else None,
            )

        return make

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @contextlib.contextmanager
    def use(self, index: int) -> Iterator[torch.Tensor]:
        """The bytes of slice `index` on the compute device, from here to the end of the block."""
        if index in self.resident:
            self.check_resident(index)
            self.resident_spans.begin(resident=True)
            yield self.resident[index]
            self.resident_spans.end(self.plan.slices[index].title)
            return
        if self.stream is None:
            raise StreamError("the model is closed; open it again")
        slot = self.stream.acquire(index)
        self.stream.begin()
        yield self.slots[slot]
        # Not in a finally: a broken pass leaves its slot taken, and the stream starts over.
        self.stream.release()

    def check_resident(self, index: int) -> None:
        """Before a use: have the bytes of a mapped slice in memory, and go on only if wanted.

        Raises StreamError where they cannot be read: an access would kill the process.
        """
        if (resident := self.resident.get(index)) is None:
            raise StreamError("the model is closed; open it again")
        self._patience.check()
        if self._device.type == "cpu":
            populate(resident, self.plan.slices[index].title)
