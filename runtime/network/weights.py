"""The weights of an open model: where each slice is, and hooks that bring it in time."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from layerpack.formats.errors import StreamError
from layerpack.formats.pack import Pack, raw_reader
from layerpack.formats.read import BufferedReader, Reader, open_reader
from layerpack.runtime.core.interrupts import deferred_interrupts
from layerpack.runtime.core.pieces import Piece
from layerpack.runtime.core.slices import Part
from layerpack.runtime.network.bind import LayerBinder, PlaceViews, place_views
from layerpack.runtime.plan.plan import Plan, Tier
from layerpack.runtime.stream.host import HostStore, PinnedBuffers
from layerpack.runtime.stream.lane import CudaLane, HostLane, Lane
from layerpack.runtime.stream.mapped import advise_needed, populate
from layerpack.runtime.stream.resident import load_resident
from layerpack.runtime.stream.ring import ReadRing
from layerpack.runtime.stream.stored import slices_in_memory
from layerpack.runtime.stream.stream import WeightStream
from layerpack.runtime.trace.gpu_clock import GpuClock
from layerpack.runtime.trace.layer_spans import LayerSpans
from layerpack.runtime.trace.trace import Trace

_READ_AHEAD_LAYERS = 2


class Weights:
    """Slices in their tiers, and the stream of those that move. A context manager.

    Loading stops, with StreamError, once `cancelled` is set. `use(index)` lends a slice's bytes
    on the compute device for the length of a with block; `attach` makes each decoder layer do
    that around its own forward. `reader` reads raw bytes of any blob through the page cache,
    until the end.
    """

    def __init__(
        self,
        *,
        pack: Pack,
        plan: Plan,
        device: torch.device,
        trace: Trace,
        direct: bool | None = None,
        may_register: bool = True,
        watchdog_s: float = 60.0,
        cancelled: threading.Event | None = None,
    ) -> None:
        self._pack = pack
        self._plan = plan
        self._device = device
        self._trace = trace
        self._spans = LayerSpans(trace)
        self._watchdog_s = watchdog_s
        self._cancelled = cancelled or threading.Event()
        self._resident: dict[int, torch.Tensor] = {}
        self._views: dict[tuple[int, Any], PlaceViews] = {}
        self._lane: Lane | None = None
        self._stream: WeightStream | None = None
        self._stack = contextlib.ExitStack()
        with contextlib.ExitStack() as opening:
            self._open(opening, direct, may_register)
            self._stack = opening.pop_all()

    def _open(self, opening: contextlib.ExitStack, direct: bool | None, may_register: bool) -> None:
        plan, on_gpu = self._plan, self._device.type == "cuda"
        reader = raw_reader(self._pack, open_reader(plan.slices[0].path, direct=direct))
        opening.callback(reader.close)
        self.reader = raw_reader(self._pack, BufferedReader())
        opening.callback(self.reader.close)
        host: dict[int, torch.Tensor] = {}
        if on_gpu:
            store = opening.enter_context(HostStore(self._device))
            store.load(
                plan.slices_in(Tier.HOST),
                reader,
                may_register=may_register,
                watchdog_s=self._watchdog_s,
                cancelled=self._cancelled,
            )
            host = store.tensors
            self._resident = load_resident(
                plan.slices_in(Tier.VRAM),
                self.reader,
                self._device,
                watchdog_s=self._watchdog_s,
                cancelled=self._cancelled,
            )
        else:
            self._resident = slices_in_memory(
                plan.slices_in(Tier.HOST),
                reader,
                watchdog_s=self._watchdog_s,
                cancelled=self._cancelled,
            )
        opening.callback(self._resident.clear)
        streamed = [part for part in plan.slices if part.index not in self._resident]
        if not streamed:
            self._time_device(None)
            return
        self._lane = (
            CudaLane(device=self._device, num_slots=plan.num_slots, slot_bytes=plan.slot_bytes)
            if on_gpu
            else HostLane(num_slots=plan.num_slots, slot_bytes=plan.slot_bytes)
        )
        self._time_device(self._lane)
        pinned = PinnedBuffers(
            count=plan.num_pieces, each_bytes=plan.piece_bytes, device=self._device
        )
        opening.callback(pinned.close)
        self._stream = opening.enter_context(
            WeightStream(
                slices=streamed,
                host=host,
                lane=self._lane,
                make_ring=_ring_factory(pinned, reader, plan.read_threads, self._trace),
                piece_bytes=plan.piece_bytes,
                watchdog_s=self._watchdog_s,
                trace=self._trace,
            )
        )

    def _time_device(self, lane: Lane | None) -> None:
        if self._trace.enabled and self._device.type == "cuda":
            copy_stream = lane.copy_stream if isinstance(lane, CudaLane) else None
            self._trace.clock = GpuClock(self._device, self._trace, copy_stream=copy_stream)

    def __enter__(self) -> Weights:
        return self

    def __exit__(self, *_: object) -> None:
        with deferred_interrupts():
            self._views.clear()
            self._stack.close()

    @contextlib.contextmanager
    def use(self, index: int) -> Iterator[torch.Tensor]:
        """The bytes of slice `index` on the compute device, from here to the end of the block."""
        title = self._plan.slices[index].title
        if (resident := self._resident.get(index)) is not None:
            self._check_mapped(index)
            self._spans.begin(resident=True)
            yield resident
            self._spans.end(title)
            return
        assert self._lane is not None
        slot = self._acquire(index, title)
        self._spans.begin(resident=False)
        yield self._lane.slots[slot]
        # Not in a finally: a broken pass leaves its slot taken, and the stream starts over.
        self._release(title)

    def _acquire(self, index: int, title: str) -> int:
        assert self._stream is not None
        self._spans.await_bytes()
        slot = self._stream.acquire(index)
        self._spans.arrived(title)
        return slot

    def _release(self, title: str) -> None:
        assert self._stream is not None
        self._spans.end(title)
        self._stream.release()

    def attach(self, layers: nn.ModuleList) -> None:
        """Bind resident layers for good; give every other layer hooks that bind and release."""
        path = self._pack.manifest.model.layers_path
        for part in self._plan.slices:
            if part.part is not Part.LAYER:
                continue
            blob = self._pack.manifest.layers[part.number]
            prefix = f"{path}.{part.number}."
            layer = layers[part.number]
            binder = LayerBinder(layer, blob, prefix=prefix, device=self._device)
            base = blob.data_start_bytes
            if (storage := self._resident.get(part.index)) is not None:
                views = place_views(storage, blob, prefix=prefix, base_bytes=base)
                binder.bind(views)
                if self._device.type == "cpu":
                    layer.register_forward_pre_hook(self._ahead_hook(part.index))
                if self._trace.enabled:
                    self._time_resident(layer, part.title)
                continue
            assert self._lane is not None
            for slot, slot_storage in enumerate(self._lane.slots):
                key = (slot, binder.signature)
                if key not in self._views:
                    self._views[key] = place_views(
                        slot_storage, blob, prefix=prefix, base_bytes=base
                    )
            binder.bind(self._views[0, binder.signature])
            layer.register_forward_pre_hook(self._bind_hook(part.index, part.title, binder))
            layer.register_forward_hook(self._release_hook(part.title))

    def _check_mapped(self, index: int) -> None:
        """On a CPU: have the bytes of a mapped slice in memory, or raise StreamError."""
        if self._device.type != "cpu":
            return
        if (resident := self._resident.get(index)) is None:
            raise StreamError("the model is closed; open it again")
        populate(resident, self._plan.slices[index].title)

    def _ahead_hook(self, index: int) -> Any:
        ahead = [
            self._resident[following]
            for following in range(index + 1, index + 1 + _READ_AHEAD_LAYERS)
            if following in self._resident
        ]

        def hook(*_: Any) -> None:
            for tensor in ahead:
                advise_needed(tensor)
            self._check_mapped(index)

        return hook

    def _time_resident(self, layer: nn.Module, title: str) -> None:
        layer.register_forward_pre_hook(lambda *_: self._spans.begin(resident=True))
        layer.register_forward_hook(lambda *_: self._spans.end(title))

    def _bind_hook(self, index: int, title: str, binder: LayerBinder) -> Any:
        def hook(*_: Any) -> None:
            slot = self._acquire(index, title)
            begin_s = time.perf_counter()
            binder.bind(self._views[slot, binder.signature])
            self._trace.bind(title, begin_s, time.perf_counter())
            self._spans.begin(resident=False)

        return hook

    def _release_hook(self, title: str) -> Any:
        return lambda *_: self._release(title)


def _ring_factory(pinned: PinnedBuffers, reader: Reader, num_threads: int, trace: Trace) -> Any:
    def on_read(piece: Piece, begin_s: float, end_s: float) -> None:
        trace.read(piece.title, begin_s, end_s, piece.length_bytes)

    def make(piece_of: Any) -> ReadRing:
        return ReadRing(
            buffers=pinned.views,
            reader=reader,
            piece_of=piece_of,
            num_threads=num_threads,
            on_read=on_read if trace.enabled else None,
        )

    return make
