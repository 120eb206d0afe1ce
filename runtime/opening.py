"""What opening a model does, in order, and what closing it undoes."""

from __future__ import annotations

import contextlib
import functools
import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from layerpack.formats.errors import CapacityError, PackError, SourceError
from layerpack.formats.pack import Pack
from layerpack.formats.units import human_bytes
from layerpack.libraries import bitsandbytes_api
from layerpack.libraries.dtypes import TORCH_DTYPES
from layerpack.runtime.core.device_errors import device_errors
from layerpack.runtime.core.patience import Patience
from layerpack.runtime.core.progress import PassProgress
from layerpack.runtime.core.slices import head_weight
from layerpack.runtime.engine.draft import Draft
from layerpack.runtime.loading import Loading
from layerpack.runtime.machine.devices import capped_vram, pick_device
from layerpack.runtime.machine.machine import Machine
from layerpack.runtime.network.attach import attach
from layerpack.runtime.network.row_network import RowNetwork, use_arithmetic, why_no_rows
from layerpack.runtime.network.skeleton import build_skeleton
from layerpack.runtime.network.warm_up import touch_linear, warming_up
from layerpack.runtime.open_draft import open_draft, with_draft
from layerpack.runtime.open_options import OpenOptions
from layerpack.runtime.plan.plan import Plan, Tier
from layerpack.runtime.planning import measured, plan_for
from layerpack.runtime.product.free_rows import free_rows
from layerpack.runtime.product.least_rows import least_rows
from layerpack.runtime.product.ways import Arithmetic, Product, pick_product
from layerpack.runtime.stream.store import Store
from layerpack.runtime.tokenizer import load_tokenizer
from layerpack.runtime.trace.trace import NO_TRACE, Trace


@dataclass(frozen=True, slots=True, kw_only=True)
class SetupTimes:
    """Seconds that opening took, one part after the other.

    `draft_s` is loading the draft, where there is one. `network_s` is transformers being imported,
    the tokenizer loaded and the model built: weights are mapped, registered and loaded beside it,
    and `wait_for_weights_s` is what they took longer.
    """

    draft_s: float
    plan_s: float
    network_s: float
    wait_for_weights_s: float
    attach_s: float

    @property
    def total_s(self) -> float:
        """All of opening."""
        beside = self.network_s + self.wait_for_weights_s
        return self.draft_s + self.plan_s + beside + self.attach_s


@dataclass(slots=True, kw_only=True)
class Opened:
    """What is open. `tokenizer` is the PackError instead where the pack has none to load."""

    pack: Pack
    device: torch.device
    machine: Machine
    plan: Plan
    network: Any
    rows: RowNetwork | None
    why_no_rows: str | None
    tokenizer: Any
    draft: Draft | None
    free_rows: int
    progress: PassProgress
    setup: SetupTimes

    def need_tokenizer(self) -> Any:
        """transformers' tokenizer. Raises PackError if there is none."""
        if isinstance(self.tokenizer, Exception):
            raise self.tokenizer
        return self.tokenizer


@contextmanager
def opened(
    pack: Pack, options: OpenOptions, *, trace: Trace, patience: Patience
) -> Iterator[Opened]:
    """Open `pack`; leaving the block joins all threads and undoes all registrations.

    Raises what `Model.open` does. One thread enters, uses, and leaves.
    """
    device = pick_device(options.device)
    with contextlib.ExitStack() as stack:
        if device.type == "cuda":
            torch.cuda.set_device(device)  # each thread has a current device of its own
        with device_errors("while opening the model"):
            model = _open(stack, pack, device, options, trace, patience)
        try:
            yield model
        finally:
            # Its layers see the slots: let go of their memory, and of the draft's.
            if model.rows is not None:
                model.rows.close()
            if model.draft is not None:
                model.draft.rows.close()
            model.network = model.rows = model.draft = None


def _open(
    stack: contextlib.ExitStack,
    pack: Pack,
    device: torch.device,
    options: OpenOptions,
    trace: Trace,
    patience: Patience,
) -> Opened:
    stack.enter_context(capped_vram(device, options.limits.vram_bytes))
    times_s = [time.perf_counter()]

    def done() -> None:
        times_s.append(time.perf_counter())

    draft = None
    if options.draft is not None:
        open_pack = functools.partial(opened, trace=NO_TRACE, patience=patience)
        draft = stack.enter_context(open_draft(options.draft, pack, device, options, open_pack))
        options = with_draft(options, draft)
    done()
    machine = measured(pack, device, options, patience)
    plan = plan_for(machine, pack, options)
    done()
    # Mapping, registering and loading need no Python to speak of; importing transformers
    # is nothing but Python. Together they take as long as the slower one.
    store = functools.partial(
        Store,
        pack=pack,
        plan=plan,
        device=device,
        patience=patience,
        direct=options.direct,
        may_register=options.may_register,
        trace=trace,
    )
    loading = Loading(store, patience)
    stack.callback(loading.close)
    with _memory_errors(plan):
        with warming_up(device):
            tokenizer = _tokenizer(pack)
            network = build_skeleton(pack, device=device, attention=options.attention)
            bitsandbytes_api.functional()  # half a second to seconds of importing
            touch_linear(device)
            product = pick_product(device, TORCH_DTYPES[pack.manifest.model.dtype], _shapes(pack))
        done()
        loaded = loading.result()
        done()
        progress = PassProgress(pack.manifest.model.num_layers)
        attach(network, pack, loaded, device, trace, progress)
    arithmetic = Arithmetic()
    use_arithmetic(network, arithmetic)
    # Nothing streamed could hide the decoding of a whole weight for a single row.
    whole = device.type == "cuda" and not plan.streamed_bytes
    arithmetic.lone_rows_in_kernel = whole and not options.same_bits
    why_not = why_no_rows(network)
    if why_not is not None and draft is not None:
        raise SourceError(f"draft {draft.name}: {pack.path} cannot check its tokens ({why_not})")
    rows, free = None, 0
    if why_not is None:
        # A profile is of layers, which a recorded pass has none of.
        recordable = whole and not trace.enabled
        rows = RowNetwork(
            network,
            arithmetic,
            product,
            resident=recordable,
            least_rows=least_rows(device, _widths_of_norms(network)),
        )
    done()
    if draft is not None:
        draft.fit(network.config.get_text_config().vocab_size)
        free = min(_free_rows(product, pack, device, plan), 1 + options.proposed_tokens)
    spans = [after - before for before, after in itertools.pairwise(times_s)]
    return Opened(
        pack=pack,
        device=device,
        machine=machine,
        plan=plan,
        network=network,
        rows=rows,
        why_no_rows=why_not,
        tokenizer=tokenizer,
        draft=draft,
        free_rows=free,
        progress=progress,
        setup=SetupTimes(
            draft_s=spans[0],
            plan_s=spans[1],
            network_s=spans[2],
            wait_for_weights_s=spans[3],
            attach_s=spans[4],
        ),
    )


def _widths_of_norms(network: Any) -> list[int]:
    """Of whole rows, and of heads, which some models norm as well."""
    widths = {
        weight.shape[0]
        for module in network.modules()
        if "norm" in type(module).__name__.lower()
        for weight in module.parameters(recurse=False)
        if weight.dim() == 1
    }
    return sorted(widths) or [1]


def _free_rows(product: Product, pack: Pack, device: torch.device, plan: Plan) -> int:
    return free_rows(
        product,
        max(_shapes(pack)[:-1], key=lambda shape: shape[0] * shape[1]),
        num_parameters=pack.manifest.model.num_parameters,
        device=device,
        dtype=TORCH_DTYPES[pack.manifest.model.dtype],
        pass_s=plan.pass_s,
    )


def _shapes(pack: Pack) -> list[tuple[int, int]]:
    """Of the weights (out, in) that a pass multiplies with."""
    found = {shape for blob in pack.manifest.layers for shape in blob.matrices}
    found |= {(state.shape[0], state.shape[1]) for state in pack.manifest.head.nf4.values()}
    _, head, num_rows = head_weight(pack)
    return [(shape[0], shape[1]) for shape in found] + [(num_rows, head.shape[-1])]


def _tokenizer(pack: Pack) -> Any:
    try:
        return load_tokenizer(pack.path)
    except PackError as reason:
        return reason


@contextmanager
def _memory_errors(plan: Plan) -> Iterator[None]:
    """torch's OutOfMemoryError although the plan fitted: somebody else took some meanwhile."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise CapacityError(
            "the device ran out of memory while opening the model: "
            f"{human_bytes(plan.bytes_in(Tier.VRAM))} of resident layers and {plan.num_slots} "
            f"slots of {human_bytes(plan.slot_bytes)} were to fit into "
            f"{human_bytes(plan.vram_bytes)}; end what else uses the device, or lower --vram"
        ) from error
