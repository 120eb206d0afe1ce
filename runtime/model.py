"""An open model: the place where pack, plan, weights and transformers' definition come together."""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from layerpack.formats.errors import CapacityError, PackError
from layerpack.formats.manifest import MANIFEST_NAME
from layerpack.formats.pack import Pack
from layerpack.runtime import measure
from layerpack.runtime.bind import TORCH_DTYPES
from layerpack.runtime.draft import DRAFT_TOKENS, Draft, load_draft
from layerpack.runtime.ends import attach_ends
from layerpack.runtime.generate import GenerateOptions, Generation, run_generation
from layerpack.runtime.linear import bitsandbytes_functional
from layerpack.runtime.machine import Machine, pick_device
from layerpack.runtime.memory_errors import memory_errors
from layerpack.runtime.needs import estimate_needs
from layerpack.runtime.opening import Opening
from layerpack.runtime.plan import Limits, Plan, plan, plan_cpu
from layerpack.runtime.prompt import Message
from layerpack.runtime.skeleton import build_skeleton, decoder_layers
from layerpack.runtime.slices import pass_slices
from layerpack.runtime.text_stream import iterate
from layerpack.runtime.trace import NO_TRACE, Trace
from layerpack.runtime.vram_cap import capped_vram
from layerpack.runtime.weights import Weights

DEFAULT_CONTEXT_TOKENS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenOptions:
    """How to open a model.

    `device`: auto, cpu, cuda or cuda:N. `context_tokens`: the most tokens, prompt included, that
    memory is set aside for. `direct`: force direct (True) or buffered (False) disk reads.
    `may_register`: whether mapped files may be registered with CUDA. `refresh`: measure the
    machine's links again. `draft`: a smaller model of the same family, a directory or Hub repo or
    pack, that proposes tokens; it stays on the device. `proposed_tokens`: the most that a draft
    or prompt lookup will propose in a pass. `extra_vram_bytes`: VRAM to leave for others.
    """

    device: str = "auto"
    limits: Limits = field(default_factory=Limits)
    context_tokens: int = DEFAULT_CONTEXT_TOKENS
    direct: bool | None = None
    may_register: bool = True
    draft: str | None = None
    proposed_tokens: int = 0
    extra_vram_bytes: int = 0
    watchdog_s: float = 60.0
    refresh: bool = False
    attention: str = "sdpa"


@dataclass(frozen=True, slots=True, kw_only=True)
class SetupTimes:
    """Seconds that opening took, one part after the other.

    `network_s` is transformers being imported and building the model; weights are mapped,
    registered and loaded beside it, and `wait_for_weights_s` is what they took longer.
    `draft_s` is loading the draft, where there is one.
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

    @classmethod
    @contextlib.contextmanager
    def open(
        cls, path: Path | str, options: OpenOptions = OpenOptions(), *, trace: Trace = NO_TRACE
    ) -> Iterator[Model]:
        """Open the pack at `path`; closing joins all threads and undoes all registrations.

        `trace` collects when each stage did what (see profile.py).

        Raises PackError, CapacityError (what was asked for does not fit), StreamError, and
        SourceError for a draft that cannot be used.
        """
        pack = Pack.open(path)
        device = pick_device(options.device)
        with contextlib.ExitStack() as stack:
            stack.enter_context(capped_vram(device, options.limits.vram_bytes))
            begin_s = time.perf_counter()
            draft = None
            if options.draft is not None:
                draft = stack.enter_context(_open_draft(options.draft, pack, device, options))
                options = _with_draft(options, draft)
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
            stack.callback(opening.close)
            opening.start()
            with memory_errors("opening the model", chosen):
                network = build_skeleton(pack, device=device, attention=options.attention)
                bitsandbytes_functional()  # half a second to seconds of importing
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
                network_s=network_s - planned_s,
                wait_for_weights_s=loaded_s - network_s,
                attach_s=time.perf_counter() - loaded_s,
            )
            if draft is not None:
                draft.fit(network.config.get_text_config().vocab_size)
            model = cls(
                pack=pack,
                plan=chosen,
                machine=machine,
                network=network,
                setup=setup,
                draft=draft,
                reserved_tokens=options.context_tokens if device.type == "cuda" else None,
                trace=trace,
            )
            try:
                yield model
            finally:
                # Its layers see the slots: let go of their memory, and of the draft's.
                model.network = model.draft = None

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

        Passes run in a thread, one piece ahead at most. A loop left early ends the generation;
        an iterator that is kept must be closed before the model is.
        """
        device = self.network.device

        def run(on_text: Callable[[str], None]) -> None:
            if device.type == "cuda":
                torch.cuda.set_device(device)  # each thread has a current device of its own
            self.generate(prompt, options, on_text=on_text)

        return iterate(run)


@contextlib.contextmanager
def _open_draft(
    name: str, pack: Pack, device: torch.device, options: OpenOptions
) -> Iterator[Draft]:
    """The draft, wholly on the device, checked to have the pack's tokens."""
    if not (Path(name) / MANIFEST_NAME).is_file():
        draft = load_draft(name, device=device, dtype=TORCH_DTYPES[pack.manifest.model.dtype])
        draft.check_tokens(load_tokenizer(pack.path))
        yield draft
        return
    everything = len(pass_slices(Pack.open(name)))
    limits = replace(options.limits, vram_slices=everything, host_slices=everything)
    settings = replace(options, device=str(device), limits=limits, draft=None)
    with contextlib.ExitStack() as stack:
        try:
            model = stack.enter_context(Model.open(name, settings))
        except CapacityError as reason:
            raise CapacityError(f"draft {name}: does not fit as a whole ({reason})") from reason
        draft = Draft(name=name, network=model.network, tokenizer=model.tokenizer)
        draft.check_tokens(load_tokenizer(pack.path))
        yield draft


def _with_draft(options: OpenOptions, draft: Draft) -> OpenOptions:
    """The same, with room for the draft's KV cache and the logits of what it proposes."""
    cache_bytes = draft.cache_bytes(options.context_tokens)
    return replace(
        options,
        proposed_tokens=options.proposed_tokens or DRAFT_TOKENS,
        extra_vram_bytes=options.extra_vram_bytes + cache_bytes,
    )


def make_plan(pack: Pack, device: torch.device, options: OpenOptions) -> tuple[Machine, Plan]:
    """Measure the machine (or recall it), decide where slices live.

    Raises CapacityError, StreamError.
    """
    machine = measure.probe_machine(
        device,
        pass_slices(pack),
        vram_cap_bytes=options.limits.vram_bytes,
        refresh=options.refresh,
        watchdog_s=options.watchdog_s,
    )
    return machine, plan_on(machine, pack, options)


def plan_on(machine: Machine, pack: Pack, options: OpenOptions) -> Plan:
    """Where slices live on `machine`, be it here or not. Raises CapacityError, PackError."""
    slices = pass_slices(pack)
    needs = estimate_needs(
        pack, context_tokens=options.context_tokens, proposed_tokens=options.proposed_tokens
    )
    needs = replace(needs, constant_bytes=needs.constant_bytes + options.extra_vram_bytes)
    decide = plan_cpu if machine.vram_free_bytes is None else plan
    return decide(slices, machine=machine, needs=needs, limits=options.limits)


def load_tokenizer(path: Path) -> Any:
    """transformers' tokenizer of the pack at `path`. Raises PackError."""
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as reason:  # damaged files break tokenizers in any way
        raise PackError(f"{path}: has no tokenizer that transformers can load") from reason


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
