"""A compressed pack gives what the plain one gives, bit for bit, from every tier."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from support.packs.comparing import compressed
from support.runs.faults import Disk, nothing_left

from layerpack.convert import ConvertOptions, convert
from layerpack.formats.errors import StalledError, StreamError
from layerpack.formats.frames.table import Coding
from layerpack.formats.pack import Pack, raw_reader
from layerpack.formats.read import BufferedReader
from layerpack.formats.units import MIB
from layerpack.runtime import opening as opening_module
from layerpack.runtime.core.patience import CancelledError, Patience
from layerpack.runtime.core.slices import Kind, pass_slices
from layerpack.runtime.machine.machine import Machine
from layerpack.runtime.measure.decode import measure_decode
from layerpack.runtime.model import Model
from layerpack.runtime.open_options import OpenOptions
from layerpack.runtime.plan.compression import CompressionEffect
from layerpack.runtime.plan.plan import Limits
from layerpack.runtime.plan.policy import make_plan
from layerpack.runtime.planning import plan_for
from layerpack.runtime.stream.memory_tier import load_memory, tensor_bytes

CheckpointOf = Callable[..., Path]
IDS = torch.tensor([[7, 201, 33, 90, 90, 5, 250, 118, 64, 2, 19]])
WAYS = {
    "in memory": Limits(),
    "two slots": Limits(host_slices=0, num_slots=2),
    "mixed": Limits(host_slices=1, num_slots=2),
}
FRAME_BYTES = 32768  # smaller ones save no page and would be stored raw


@pytest.fixture(scope="module")
def both(
    checkpoint_of: CheckpointOf, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[Path, Path]]:
    """`both(name, **options)`: the same checkpoint as a plain and as a compressed pack."""

    def get(name: str, **options: bool) -> tuple[Path, Path]:
        folder, source = tmp_path_factory.mktemp(name), str(checkpoint_of(name))
        convert(source, folder / "plain", ConvertOptions(**options))  # type: ignore[arg-type]
        with compressed(FRAME_BYTES):
            chosen = ConvertOptions(zstd_level=1, **options)  # type: ignore[arg-type]
            convert(source, folder / "packed", chosen)
        return folder / "plain", folder / "packed"

    return get


Both = Callable[..., tuple[Path, Path]]


@pytest.mark.parametrize(
    ("name", "direct", "options"),
    [
        ("llama-tied", None, {}),
        ("llama-tied", False, {}),
        ("llama-odd", None, {"double_quant": False}),
        ("qwen2", None, {"nf4_head": True}),
        ("gemma3", None, {}),
    ],
    ids=str,
)
def test_the_same_logits_and_tokens(
    both: Both, name: str, direct: bool | None, options: dict[str, bool]
) -> None:
    plain, packed = both(name, **options)
    for title, limits in WAYS.items():
        opening = OpenOptions(device="cpu", limits=limits, direct=direct)
        with Model.open(plain, opening) as model, torch.no_grad():
            logits = model.network(IDS).logits
            tokens = model.network.generate(
                IDS, max_new_tokens=8, do_sample=False, disable_compile=True
            )
        with Model.open(packed, opening) as model, torch.no_grad():
            for _ in range(2):
                assert torch.equal(model.network(IDS).logits, logits), title
            again = model.network.generate(
                IDS, max_new_tokens=8, do_sample=False, disable_compile=True
            )
            assert torch.equal(again, tokens), title
            assert model.plan.compression is not None
            assert model.machine.decode_gb_s > 0


def test_every_coding_is_among_them(both: Both) -> None:
    packs = [Pack.open(both(name)[1]) for name in ("qwen2", "llama-tied")]
    tables = [blob.frames for pack in packs for blob in pack.manifest.blobs if blob.frames]
    codings = {frame.coding for table in tables for frame in table.frames[1:]}
    assert codings == set(Coding)


def test_pieces_end_with_frames_wherever_the_slice_begins(both: Both) -> None:
    pack = Pack.open(both("llama-tied")[1])
    for part in pass_slices(pack, max_head_bytes=3 * 4096):
        if part.kind is Kind.HEAD:  # tied: it lies in the embedding's blob, which is plain
            assert part.frames is None
            continue
        assert part.frames is not None
        extents = part.extents(2 * FRAME_BYTES)
        assert extents[0].offset_bytes == part.offset_bytes
        assert sum(extent.length_bytes for extent in extents) == part.length_bytes
        for before, after in itertools.pairwise(extents):
            assert after.offset_bytes == before.offset_bytes + before.length_bytes
            assert (after.offset_bytes - part.frames.first_bytes) % (2 * FRAME_BYTES) == 0
        end = part.stored.offset_bytes + part.stored.length_bytes
        assert part.stored.offset_bytes % 4096 == 0 and end <= part.path.stat().st_size


@pytest.mark.parametrize("frame_bytes", [8192, 32768])
def test_tensors_are_those_of_the_plain_pack(
    checkpoint_of: CheckpointOf, tmp_path: Path, frame_bytes: int
) -> None:
    source = str(checkpoint_of("qwen2-tied"))  # rows of 144 bytes, which no frame ends with
    convert(source, tmp_path / "plain")
    with compressed(frame_bytes):
        convert(source, tmp_path / "packed", ConvertOptions(zstd_level=3))
    plain, packed = Pack.open(tmp_path / "plain"), Pack.open(tmp_path / "packed")
    for blob, other in zip(plain.manifest.blobs, packed.manifest.blobs, strict=True):
        for entry in blob.tensors:
            wanted = tensor_bytes(plain, blob, entry)
            assert torch.equal(tensor_bytes(packed, other, entry), wanted), entry.name


def test_a_damaged_frame_is_an_error_of_ours(both: Both, tmp_path: Path) -> None:
    _, packed = both("llama")
    blob = Pack.open(packed).manifest.head
    assert blob.frames is not None
    path, chance, failed = packed / blob.file, random.Random(3), 0
    raw = path.read_bytes()
    opening = OpenOptions(device="cpu", limits=WAYS["two slots"])
    try:
        for _ in range(12):
            changed = bytearray(raw)
            for frame in blob.frames.frames[1:]:  # where a frame's own header is
                changed[frame.offset_bytes + chance.randrange(8)] ^= 1 << chance.randrange(8)
            path.write_bytes(changed)
            try:
                with Model.open(packed, opening) as model, torch.no_grad():
                    model.network(IDS)
            except StreamError as error:
                assert "run `layerpack verify`" in str(error)
                failed += 1
    finally:
        path.write_bytes(raw)
    assert failed > 5


def test_the_planner_weighs_disk_against_decoding(both: Both) -> None:
    slices = pass_slices(Pack.open(both("llama")[1]))

    def effect(disk_gb_s: float, decode_gb_s: float, **limits: int) -> CompressionEffect:
        machine = Machine(
            device="cpu",
            vram_free_bytes=None,
            host_free_bytes=4096 * MIB,
            link_gb_s=0.0,
            disk_gb_s=disk_gb_s,
            decode_gb_s=decode_gb_s,
        )
        chosen = make_plan(slices, machine=machine, limits=Limits(**limits))
        assert chosen.compression is not None
        assert chosen.pass_s == chosen.compression.compressed_s
        return chosen.compression

    slow_disk, fast_disk = effect(0.1, 9.0, host_slices=0), effect(7.0, 1.0, host_slices=0)
    assert slow_disk.pays and slow_disk.text.endswith("compression pays")
    assert slow_disk.stored_bytes < slow_disk.raw_bytes
    assert not fast_disk.pays and "`layerpack unpack` makes it faster" in fast_disk.text
    assert "nothing comes from disk" in effect(1.0, 1.0).text
    assert measure_decode(slices, seconds=0.02, num_threads=2) > 0


FAULTS = {
    "error": (StreamError, "EIO"),
    "short": (StreamError, "run `layerpack verify`"),
    "death": (StreamError, "a reader thread died: MemoryError"),
    "hang": (StalledError, "the disk does not answer"),
}


@pytest.mark.parametrize("kind", FAULTS)
@pytest.mark.parametrize("way", ["in memory", "two slots"])
def test_a_read_that_breaks_leaves_nothing(
    both: Both, monkeypatch: pytest.MonkeyPatch, kind: str, way: str
) -> None:
    _, packed = both("llama")
    disk = Disk(monkeypatch)
    opening = OpenOptions(device="cpu", limits=WAYS[way], direct=False, watchdog_s=0.4)

    def logits(num_passes: int = 1) -> torch.Tensor:
        with Model.open(packed, opening) as model, torch.no_grad():
            for number in range(num_passes):
                if number == 1:
                    disk.arm(kind)
                result: torch.Tensor = model.network(IDS).logits
            return result

    whole = logits()

    def then_arm(*arguments: Any) -> Any:
        result = plan_for(*arguments)
        if way == "in memory":
            disk.arm(kind, after=2)
        return result

    expected, words = FAULTS[kind]
    with monkeypatch.context() as patch, nothing_left(packed):
        patch.setattr(opening_module, "plan_for", then_arm)
        with pytest.raises(expected, match=words):
            logits(num_passes=50)  # more than the ring has read ahead
    disk.disarm()
    assert torch.equal(logits(), whole)


def test_loading_can_be_given_up(both: Both) -> None:
    pack, patience = Pack.open(both("llama")[1]), Patience()
    patience.cancel()
    slices = pass_slices(pack)[:3]
    with closing(raw_reader(pack, BufferedReader())) as reader, pytest.raises(CancelledError):
        load_memory(slices, reader, patience)
