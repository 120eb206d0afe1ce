"""An open model: the place where pack, plan, weights and transformers' definition come together."""

from __future__ import annotations

import contextlib
import functools
import threading
import time
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from layerpack.formats.errors import StreamError
from layerpack.formats.pack import Pack
from layerpack.runtime.core.device_errors import device_errors
from layerpack.runtime.engine.draft import Draft
from layerpack.runtime.engine.options import GenerateOptions
from layerpack.runtime.engine.prompt import Message
from layerpack.runtime.engine.text_stream import iterate
from layerpack.runtime.generate import Generation, run_generation
from layerpack.runtime.loading import Opening
from layerpack.runtime.machine.machine import Machine, pick_device
from layerpack.runtime.machine.vram_cap import capped_vram
from layerpack.runtime.network.ends import attach_ends
from layerpack.runtime.network.linear import bitsandbytes_functional
from layerpack.runtime.network.skeleton import build_skeleton, decoder_layers
from layerpack.runtime.network.warm_up import touch_linear, warming_up
from layerpack.runtime.network.weights import Weights
from layerpack.runtime.open_draft import open_draft, with_draft
from layerpack.runtime.open_options import OpenOptions
from layerpack.runtime.plan.memory_errors import memory_errors
from layerpack.runtime.plan.plan import Plan
from layerpack.runtime.planning import make_plan
from layerpack.runtime.setup_times import SetupTimes
from layerpack.runtime.tokenizer import load_tokenizer
from layerpack.runtime.trace.trace import NO_TRACE, Trace


class Model:
    """A pack that can generate. Make one with `Model.open`, in a with statement.

    `network` is transformers' model (its forward, config and generate all work); `plan` says
    where the weights are; `draft` is what was asked for when opening; `reserved_tokens` is the
    longest sequence that memory was set aside for, None on a CPU. One thread at a time.
    """

    def __init__(
        self,
        *,
        pack: Pack,
        plan: Plan,
        machine: Machine,
        network: Any,
        setup: SetupTimes,
        draft: Draft | None = None,
        reserved_tokens: int | None = None,
        trace: Trace = NO_TRACE,
    ) -> None:
        self.pack = pack
        self.plan = plan
        self.machine = machine
        self.network = network
        self.setup = setup
        self.draft = draft
        self.reserved_tokens = reserved_tokens
        self._trace = trace
        self._streams: weakref.WeakSet[Generator[str, None, None]] = weakref.WeakSet()

    @classmethod
    @contextlib.contextmanager
    def open(
        cls,
        path: Path | str | Pack,
        options: OpenOptions = OpenOptions(),
        *,
        trace: Trace = NO_TRACE,
        meanwhile: Callable[[], object] | None = None,
    ) -> Iterator[Model]:
        """Open the pack at `path`; closing joins all threads and undoes all registrations.

        A Pack that is open already is not read again. `trace` collects when each stage did what
        (see profile.py). `meanwhile()` is called while weights are being loaded: what it does costs
        no time of its own. What it raises ends the opening.

        Raises PackError, CapacityError (what was asked for does not fit), StreamError, and
        SourceError for a draft that cannot be used.
        """
        pack = path if isinstance(path, Pack) else Pack.open(path)
        device = pick_device(options.device)
        with contextlib.ExitStack() as stack:
            with device_errors("while opening the model"):
                model = cls._opened(stack, pack, device, options, trace, meanwhile)
            try:
                yield model
            finally:
                try:
                    model._end_streams()
                finally:
                    # Its layers see the slots: let go of their memory, and of the draft's.
                    model.network = model.draft = None

    @classmethod
    def _opened(
        cls,
        stack: contextlib.ExitStack,
        pack: Pack,
        device: torch.device,
        options: OpenOptions,
        trace: Trace,
        meanwhile: Callable[[], object] | None,
    ) -> Model:
        """All that `open` does; what it must undo is given to `stack`."""
        stack.enter_context(capped_vram(device, options.limits.vram_bytes))
        begin_s = time.perf_counter()
        draft = None
        if options.draft is not None:
            draft = stack.enter_context(
                open_draft(options.draft, pack, device, options, open_pack=cls.open)
            )
            options = with_draft(options, draft)
        drafted_s = time.perf_counter()
        machine, chosen = make_plan(pack, device, options)
        planned_s = time.perf_counter()
        # Mapping, registering and loading need no Python to speak of; importing transformers
        # is nothing but Python. Together they take as long as the slower one.
        opening = Opening(
            functools.partial(
                _open_weights,
                pack=pack,
                plan=chosen,
                device=device,
                options=options,
                trace=trace,
            )
        )
        # Twice: Ctrl-C may come as the first one begins, and the second then does all of it.
        stack.callback(opening.close)
        stack.callback(opening.close)
        opening.start()
        with memory_errors("opening the model", chosen):
            with warming_up(device):
                if meanwhile is not None:
                    meanwhile()
                meanwhile_s = time.perf_counter()
                network = build_skeleton(pack, device=device, attention=options.attention)
                bitsandbytes_functional()  # half a second to seconds of importing
                touch_linear(device)
            network_s = time.perf_counter()
            weights = opening.result()
            loaded_s = time.perf_counter()
            weights.attach(decoder_layers(network, pack.manifest.model.layers_path))
            attach_ends(
                network,
                pack,
                device,
                slices=chosen.slices,
                use=weights.use,
                reader=weights.reader,
            )
        setup = SetupTimes(
            draft_s=drafted_s - begin_s,
            plan_s=planned_s - drafted_s,
            meanwhile_s=meanwhile_s - planned_s,
            network_s=network_s - meanwhile_s,
            wait_for_weights_s=loaded_s - network_s,
            attach_s=time.perf_counter() - loaded_s,
        )
        if draft is not None:
            draft.fit(network.config.get_text_config().vocab_size)
        return cls(
            pack=pack,
            plan=chosen,
            machine=machine,
            network=network,
            setup=setup,
            draft=draft,
            reserved_tokens=options.context_tokens if device.type == "cuda" else None,
            trace=trace,
        )

    @functools.cached_property
    def tokenizer(self) -> Any:
        """transformers' tokenizer of the pack. Raises PackError if there is none."""
        return load_tokenizer(self.pack.path)

    def generate(
        self,
        prompt: str | Sequence[Message],
        options: GenerateOptions = GenerateOptions(),
        *,
        on_text: Callable[[str], None] | None = None,
    ) -> Generation:
        """Generate from a prompt (a text, or chat messages); waits.

        `on_text(piece)` is called with each piece of text as soon as it is certain. Ctrl-C ends
        the generation early: what there is comes back, with `finish` "interrupted". Raises
        PromptError, StreamError.
        """
        self._require_open()
        return run_generation(
            self.network,
            self.tokenizer,
            prompt,
            options,
            layers_path=self.pack.manifest.model.layers_path,
            reserved_tokens=self.reserved_tokens,
            draft=self.draft,
            on_text=on_text,
            trace=self._trace,
        )

    def stream(
        self, prompt: str | Sequence[Message], options: GenerateOptions = GenerateOptions()
    ) -> Iterator[str]:
        """The text piece by piece, each as soon as it is certain; raises what `generate` does.

        Passes run in a thread, one piece ahead at most. A loop left early ends the generation, as
        does closing the model.
        """
        self._require_open()
        device = self.network.device

        @device_errors("in a pass")
        def run(on_text: Callable[[str], None]) -> None:
            if device.type == "cuda":
                torch.cuda.set_device(device)  # each thread has a current device of its own
            self.generate(prompt, options, on_text=on_text)

        pieces = iterate(run)
        self._streams.add(pieces)
        return pieces

    def _require_open(self) -> None:
        if self.network is None:
            raise StreamError("the model is closed; open it again")

    def _end_streams(self) -> None:
        """Those that somebody, the frames of an error for one, still holds; waits."""
        for pieces in list(self._streams):
            with contextlib.suppress(ValueError):  # another thread reads it at this moment
                pieces.close()


def _open_weights(
    cancelled: threading.Event,
    *,
    pack: Pack,
    plan: Plan,
    device: torch.device,
    options: OpenOptions,
    trace: Trace,
) -> Weights:
    return Weights(
        pack=pack,
        plan=plan,
        device=device,
        trace=trace,
        direct=options.direct,
        may_register=options.may_register,
        watchdog_s=options.watchdog_s,
        cancelled=cancelled,
    )
