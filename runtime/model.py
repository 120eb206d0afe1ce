"""An open model: the place where pack, plan, weights and transformers' definition come together."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from layerpack.formats.errors import PackError
from layerpack.formats.nf4 import SUFFIXES
from layerpack.formats.pack import Pack
from layerpack.runtime import measure
from layerpack.runtime.bind import view_tensor
from layerpack.runtime.ends import EmbeddingRows, SlicedHead, embedding_matrix
from layerpack.runtime.generate import GenerateOptions, Generation, Message, run_generation
from layerpack.runtime.linear import bitsandbytes_functional
from layerpack.runtime.machine import Machine, pick_device
from layerpack.runtime.needs import estimate_needs
from layerpack.runtime.plan import Limits, Plan, plan, plan_cpu
from layerpack.runtime.skeleton import build_skeleton, decoder_layers
from layerpack.runtime.slices import Part, pass_slices
from layerpack.runtime.stored import tensor_bytes
from layerpack.runtime.trace import NO_TRACE, Trace
from layerpack.runtime.weights import Weights

DEFAULT_CONTEXT_TOKENS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenOptions:
    """How to open a model.

    `device`: auto, cpu, cuda or cuda:N. `context_tokens`: the most tokens, prompt included, that
    memory is set aside for. `direct`: force direct (True) or buffered (False) disk reads.
    `may_register`: whether mapped files may be registered with CUDA. `refresh`: measure the
    machine's links again. `extra_vram_bytes`: VRAM to leave for others, such as a draft's cache.
    """

    device: str = "auto"
    limits: Limits = field(default_factory=Limits)
    context_tokens: int = DEFAULT_CONTEXT_TOKENS
    direct: bool | None = None
    may_register: bool = True
    extra_vram_bytes: int = 0
    watchdog_s: float = 60.0
    refresh: bool = False
    attention: str = "sdpa"


@dataclass(frozen=True, slots=True, kw_only=True)
class SetupTimes:
    """Seconds that opening took, one part after the other.

    `network_s` is transformers being imported and building the model; weights are mapped,
    registered and loaded beside it, and `wait_for_weights_s` is what they took longer.
    """

    plan_s: float
    network_s: float
    wait_for_weights_s: float
    attach_s: float

    @property
    def total_s(self) -> float:
        """All of opening."""
        return self.plan_s + self.network_s + self.wait_for_weights_s + self.attach_s


class Model:
    """A pack that can generate. Make one with `Model.open`, in a with statement.

    `network` is transformers' model (its forward, config and generate all work); `plan` says
    where the weights are. One thread at a time.
    """

    def __init__(
        self, *, pack: Pack, plan: Plan, machine: Machine, network: Any, setup: SetupTimes
    ) -> None:
        self.pack = pack
        self.plan = plan
        self.machine = machine
        self.network = network
        self.setup = setup

    @classmethod
    @contextlib.contextmanager
    def open(
        cls, path: Path | str, options: OpenOptions = OpenOptions(), *, trace: Trace = NO_TRACE
    ) -> Iterator[Model]:
        """Open the pack at `path`; closing joins all threads and undoes all registrations.

        Raises PackError, CapacityError (what was asked for does not fit), StreamError.
        """
        pack = Pack.open(path)
        device = pick_device(options.device)
        if device.type == "cuda" and options.limits.vram_bytes is not None:
            _cap_vram(device, options.limits.vram_bytes)
        with contextlib.ExitStack() as stack:
            begin_s = time.perf_counter()
            machine, chosen = make_plan(pack, device, options)
            planned_s = time.perf_counter()
            # Mapping, registering and loading need no Python to speak of; importing transformers
            # is nothing but Python. Together they take as long as the slower one.
            with ThreadPoolExecutor(1, thread_name_prefix="layerpack-open") as pool:
                opening = pool.submit(
                    Weights,
                    pack=pack,
                    plan=chosen,
                    device=device,
                    trace=trace,
                    direct=options.direct,
                    may_register=options.may_register,
                    watchdog_s=options.watchdog_s,
                )
                try:
                    network = build_skeleton(pack, device=device, attention=options.attention)
                    bitsandbytes_functional()  # half a second to seconds of importing
                    network_s = time.perf_counter()
                finally:
                    weights = stack.enter_context(opening.result())
            loaded_s = time.perf_counter()
            weights.attach(decoder_layers(network, pack.manifest.model.layers_path))
            _attach_ends(network, pack, chosen, weights, device)
            setup = SetupTimes(
                plan_s=planned_s - begin_s,
                network_s=network_s - planned_s,
                wait_for_weights_s=loaded_s - network_s,
                attach_s=time.perf_counter() - loaded_s,
            )
            model = cls(pack=pack, plan=chosen, machine=machine, network=network, setup=setup)
            try:
                yield model
            finally:
                model.network = None  # its layers see the slots: let go of their memory

    @functools.cached_property
    def tokenizer(self) -> Any:
        """transformers' tokenizer of the pack. Raises PackError if there is none."""
        return load_tokenizer(self.pack.path)

    def generate(
        self,
        prompt: str | Sequence[Message],
        options: GenerateOptions = GenerateOptions(),
        *,
        on_text: Any = None,
    ) -> Generation:
        """Generate from a prompt (a text, or chat messages); waits.

        `on_text(piece)` is called with each piece of text as soon as it is certain. Ctrl-C ends
        the generation early: what there is comes back, with `finish` "interrupted". Raises
        PromptError, StreamError.
        """
        return run_generation(self.network, self.tokenizer, prompt, options, on_text=on_text)


def make_plan(pack: Pack, device: torch.device, options: OpenOptions) -> tuple[Machine, Plan]:
    """Measure the machine (or recall it), decide where slices live. Raises CapacityError."""
    slices = pass_slices(pack)
    machine = measure.probe_machine(
        device, slices, vram_cap_bytes=options.limits.vram_bytes, refresh=options.refresh
    )
    if device.type == "cpu":
        return machine, plan_cpu(slices, machine=machine, limits=options.limits)
    needs = estimate_needs(pack, context_tokens=options.context_tokens)
    needs = replace(needs, constant_bytes=needs.constant_bytes + options.extra_vram_bytes)
    return machine, plan(slices, machine=machine, needs=needs, limits=options.limits)


def load_tokenizer(path: Path) -> Any:
    """transformers' tokenizer of the pack at `path`. Raises PackError."""
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as reason:  # damaged files break tokenizers in any way
        raise PackError(f"{path}: has no tokenizer that transformers can load") from reason


def _cap_vram(device: torch.device, vram_bytes: int) -> None:
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, vram_bytes / total), device)


def _attach_ends(
    network: Any, pack: Pack, chosen: Plan, weights: Weights, device: torch.device
) -> None:
    """Embedding rows, sliced lm_head, and the few other weights outside the layers."""
    model = pack.manifest.model
    matrix = embedding_matrix(pack, weights.reader)
    embedding = network.get_input_embeddings()
    if device.type == "cpu" and isinstance(matrix, torch.Tensor):
        embedding._parameters["weight"] = nn.Parameter(matrix, requires_grad=False)
    else:
        EmbeddingRows(embedding, matrix, device)
    elsewhere = {model.embedding, model.head}
    elsewhere |= {model.head + suffix for suffix in SUFFIXES}
    for blob in (pack.manifest.embedding, pack.manifest.head):
        for entry in blob.tensors:
            if entry.name in elsewhere:
                continue
            raw = tensor_bytes(pack, blob, entry)
            owner, _, leaf = entry.name.rpartition(".")
            network.get_submodule(owner)._parameters[leaf] = nn.Parameter(
                view_tensor(raw, entry, entry.offset_bytes).to(device, copy=True),
                requires_grad=False,
            )
    old_head = network.get_output_embeddings()
    head = SlicedHead(
        pack=pack,
        slices=[part for part in chosen.slices if part.part is Part.HEAD],
        use=weights.use,
        bias=getattr(old_head, "bias", None),
        device=device,
    )
    for name, module in list(network.named_modules()):
        if module is old_head:
            network.set_submodule(name, head)
