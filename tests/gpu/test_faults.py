"""On a CUDA device: full memory, broken reads, Ctrl-C; nothing stays registered or allocated."""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import Disk, after_interrupt, nothing_left

from layerpack.formats.errors import CapacityError, StreamError
from layerpack.formats.units import MIB
from layerpack.runtime import host, model, opening, weights
from layerpack.runtime.generate import GenerateOptions
from layerpack.runtime.mapped import map_slice
from layerpack.runtime.model import Model
from layerpack.runtime.open_options import OpenOptions
from layerpack.runtime.plan import Limits, Tier
from layerpack.runtime.planning import make_plan
from layerpack.runtime.slices import Slice

pytestmark = pytest.mark.gpu

IDS = torch.tensor([[7, 201, 33, 90, 5]])
TIERS = {
    "VRAM": Limits(),
    "host": Limits(vram_slices=0),
    "disk": Limits(vram_slices=0, host_slices=0),
    "mixed": Limits(vram_slices=1, host_slices=1),
}
tiers = pytest.mark.parametrize("tier", TIERS)


@pytest.fixture(scope="module")
def made(checkpoint_of: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pack whose layers are too large for torch's pool of small blocks."""
    from layerpack.convert.api import convert
    from layerpack.convert.options import ConvertOptions

    source = checkpoint_of("llama", hidden_size=1024, intermediate_size=6144)
    out = tmp_path_factory.mktemp("packs") / "large"
    convert(str(source), out, ConvertOptions())
    logits_of(out, options("mixed"))  # cuBLAS takes its workspace for good
    return out


@pytest.fixture
def pack(made: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(made, tmp_path / "pack"))


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Addresses that are registered with CUDA, really."""
    addresses: set[int] = set()
    register, unregister = host._register, host._unregister

    def note(tensor: torch.Tensor, flags: int) -> int:
        code = register(tensor, flags)
        if not code:
            addresses.add(tensor.data_ptr())
        return code

    def forget(address: int) -> None:
        unregister(address)
        addresses.remove(address)

    monkeypatch.setattr(host, "_register", note)
    monkeypatch.setattr(host, "_unregister", forget)
    return addresses


@pytest.fixture(autouse=True)
def same_vram_after(made: Path) -> Iterator[None]:
    """Every test gives back what it took."""
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    yield
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_allocated() <= before + 2 * MIB


def options(tier: str, **fields: Any) -> OpenOptions:
    return OpenOptions(
        device="cuda", limits=TIERS[tier], context_tokens=64, watchdog_s=5.0, **fields
    )


def logits_of(pack: Path, how: OpenOptions) -> torch.Tensor:
    with Model.open(pack, how) as opened, torch.no_grad():
        found: torch.Tensor = opened.network(IDS.cuda()).logits.cpu()
    return found


@tiers
def test_a_device_that_fills_up_while_opening_says_so(
    pack: Path, monkeypatch: pytest.MonkeyPatch, registered: set[int], tier: str
) -> None:
    whole = logits_of(pack, options(tier))
    taken: list[torch.Tensor] = []

    def then_fill(*arguments: Any) -> Any:
        result = make_plan(*arguments)
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(1e-9)  # what somebody else takes is gone, too
        for size_bytes in (1 << 20, 1 << 14, 512):  # what this process has taken, but not in use
            with contextlib.suppress(torch.OutOfMemoryError):
                while True:
                    taken.append(torch.empty(size_bytes, dtype=torch.uint8, device="cuda"))
        return result

    try:
        with monkeypatch.context() as patch, nothing_left(pack, within_s=60):
            patch.setattr(model, "make_plan", then_fill)
            with pytest.raises(CapacityError, match="the device ran out of memory while"):
                logits_of(pack, options(tier))
    finally:
        taken.clear()
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert not registered
    assert torch.equal(logits_of(pack, options(tier)), whole)


@tiers
def test_a_device_that_fills_up_in_a_pass_says_so(
    pack: Path, registered: set[int], tier: str
) -> None:
    with nothing_left(pack, within_s=60), Model.open(pack, options(tier)) as opened:
        wanted = GenerateOptions(max_new_tokens=4, raw=True)
        whole = opened.generate("hello", wanted).token_ids

        def fill(*_: object) -> None:
            torch.empty(1 << 50, dtype=torch.uint8, device="cuda")

        hook = opened.network.model.layers[1].mlp.register_forward_pre_hook(fill)
        with pytest.raises(StreamError, match="the device ran out of memory in a pass"):
            opened.generate("hello", wanted)
        hook.remove()
        assert opened.generate("hello", wanted).token_ids == whole
    assert not registered


@pytest.mark.parametrize("kind", ["error", "short", "death"])
@pytest.mark.parametrize("tier", ["disk", "mixed"])
def test_a_broken_read_in_a_pass_ends_it(
    pack: Path, monkeypatch: pytest.MonkeyPatch, registered: set[int], tier: str, kind: str
) -> None:
    disk = Disk(monkeypatch)
    whole = logits_of(pack, options(tier))
    with (
        nothing_left(pack, within_s=60),
        Model.open(pack, options(tier, direct=False)) as opened,
        torch.no_grad(),
    ):
        assert torch.equal(opened.network(IDS.cuda()).logits.cpu(), whole)
        disk.arm(kind)
        with pytest.raises(StreamError):
            for _ in range(60):  # what was read ahead is used up first
                opened.network(IDS.cuda())
        disk.disarm()
        assert torch.equal(opened.network(IDS.cuda()).logits.cpu(), whole)
    assert not registered


@pytest.mark.parametrize("tier", ["VRAM", "mixed"])
def test_a_broken_read_of_resident_layers_ends_opening(
    pack: Path, monkeypatch: pytest.MonkeyPatch, registered: set[int], tier: str
) -> None:
    disk = Disk(monkeypatch)
    logits_of(pack, options(tier))

    def then_break(*arguments: Any) -> Any:
        result = make_plan(*arguments)
        disk.arm("error", after=2)  # the first read asks whether direct reads are possible
        return result

    with monkeypatch.context() as patch, nothing_left(pack, within_s=60):
        patch.setattr(model, "make_plan", then_break)
        with pytest.raises(StreamError, match="EIO"):
            logits_of(pack, options(tier))
    disk.disarm()
    assert not registered
    logits_of(pack, options(tier))


def test_a_file_that_shrinks_before_it_is_registered_is_named(
    pack: Path, monkeypatch: pytest.MonkeyPatch, registered: set[int]
) -> None:

    def then_truncate(part: Slice) -> torch.Tensor:
        mapped = map_slice(part)
        if part.index == 2:
            os.truncate(part.path, 4096)
        return mapped

    monkeypatch.setattr(host, "map_slice", then_truncate)
    with nothing_left(pack, within_s=60), pytest.raises(StreamError, match="become shorter"):
        logits_of(pack, options("host"))
    assert not registered


PHASES = {
    "pinning": (weights, "PinnedBuffers", "disk"),
    "registering": (host, "_register", "host"),
    "loading residents": (weights, "load_resident", "VRAM"),
    "building the skeleton": (model, "build_skeleton", "mixed"),
    "waiting for weights": (opening.Opening, "result", "mixed"),
    "binding": (weights.Weights, "attach", "mixed"),
}


@pytest.mark.parametrize("phase", PHASES)
def test_ctrl_c_while_opening_leaves_nothing(
    pack: Path, monkeypatch: pytest.MonkeyPatch, registered: set[int], phase: str
) -> None:
    where, name, tier = PHASES[phase]
    whole = logits_of(pack, options(tier))
    with monkeypatch.context() as patch, nothing_left(pack, within_s=60):
        patch.setattr(where, name, after_interrupt(getattr(where, name)))
        with pytest.raises(KeyboardInterrupt):
            logits_of(pack, options(tier))
    assert not registered
    assert torch.equal(logits_of(pack, options(tier)), whole)


@tiers
def test_ctrl_c_in_a_pass_and_while_closing(
    pack: Path, monkeypatch: pytest.MonkeyPatch, registered: set[int], tier: str
) -> None:
    wanted = GenerateOptions(max_new_tokens=6, raw=True)
    with (
        nothing_left(pack, within_s=60),
        pytest.raises(KeyboardInterrupt),
        Model.open(pack, options(tier)) as opened,
    ):
        whole = opened.generate("hello", wanted).token_ids
        calls: list[int] = []

        def count(*_: object) -> None:
            calls.append(1)
            if len(calls) == 3:
                os.kill(os.getpid(), signal.SIGINT)

        hook = opened.network.model.layers[1].mlp.register_forward_pre_hook(count)
        broken = opened.generate("hello", wanted)
        hook.remove()
        assert broken.finish == "interrupted"
        assert broken.token_ids == whole[: len(broken.token_ids)]
        assert opened.generate("hello", wanted).token_ids == whole
        closed = after_interrupt(weights.Weights.__exit__)
        monkeypatch.setattr(weights.Weights, "__exit__", closed)
    assert not registered


def test_a_cap_on_vram_ends_with_the_model(pack: Path) -> None:
    limits = Limits(vram_bytes=1 << 30)
    capped = OpenOptions(device="cuda", limits=limits, context_tokens=64)
    with Model.open(pack, capped), pytest.raises(torch.OutOfMemoryError):
        torch.empty(2 << 30, dtype=torch.uint8, device="cuda")
    torch.empty(2 << 30, dtype=torch.uint8, device="cuda")


OTHER_PROCESS = """
import sys
import torch
from layerpack.runtime.model import Model
from layerpack.runtime.open_options import OpenOptions
from layerpack.runtime.plan import Limits
limits = Limits(vram_slices=0, host_slices=2)
options = OpenOptions(device="cuda", limits=limits, context_tokens=64)
with Model.open(sys.argv[1], options) as model, torch.no_grad():
    ids = torch.tensor([[7, 201, 33, 90, 5]], device="cuda")
    print(model.network(ids).logits.float().sum().item(), flush=True)
    sys.stdin.readline()
"""


def test_two_processes_register_one_pack(pack: Path) -> None:
    how = OpenOptions(device="cuda", limits=Limits(vram_slices=0, host_slices=2), context_tokens=64)
    command = [sys.executable, "-c", OTHER_PROCESS, str(pack)]
    with (
        Model.open(pack, how) as opened,
        torch.no_grad(),
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as other,
    ):
        assert opened.plan.tiers.count(Tier.HOST) == 2
        assert other.stdout is not None
        line = other.stdout.readline()
        mine = opened.network(IDS.cuda()).logits
        _, errors = other.communicate("go on\n", timeout=60)
        assert other.returncode == 0, errors
        assert float(line) == mine.float().sum().item()
