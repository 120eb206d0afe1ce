"""The rows of `layerpack bench`: each computes what the model computes, and none leaves a trace."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from layerpack.formats.errors import DiskFullError
from layerpack.formats.pack import Pack
from layerpack.runtime.bench import sample as bench_sample
from layerpack.runtime.bench.loaders import HostRead, PrefetchLoader
from layerpack.runtime.bench.network import open_network
from layerpack.runtime.bench.options import BenchOptions
from layerpack.runtime.bench.report import LeftOut, Report, RowResult
from layerpack.runtime.bench.rows import ROWS, Method, Ours, Pinning, Row
from layerpack.runtime.bench.run import run_bench
from layerpack.runtime.bench.sample import sixteen_bit_pack
from layerpack.runtime.model import Model
from layerpack.runtime.open_options import OpenOptions

PackOf = Callable[..., Path]
IDS = torch.tensor([[7, 201, 33, 90, 90, 5, 250, 118, 64, 2, 19]])
CPU = torch.device("cpu")
HERE = [row for row in ROWS if row.why_not("cpu") is None]
METHODS = [
    Method(sixteen_bit=bits, prefetchers=threads, pinning=Pinning.NONE, head_resident=resident)
    for bits in (True, False)
    for threads in (0, 1, 2)
    for resident in (True, False)
]
SMALL = BenchOptions(device="cpu", context_tokens=8, passes=2)


def layerpack_threads() -> set[str]:
    return {t.name for t in threading.enumerate() if t.name.startswith("layerpack")}


@pytest.mark.parametrize("name", ["llama", "llama-odd", "llama-tied", "llama-biased", "gemma3"])
def test_every_method_computes_what_the_model_computes(
    pack_of: PackOf, tmp_path: Path, name: str
) -> None:
    path = pack_of(name)
    pack = Pack.open(path)
    count = pack.manifest.model.num_layers
    decoded = sixteen_bit_pack(pack, tmp_path, num_layers=count)
    with Model.open(path, OpenOptions(device="cpu")) as model, torch.no_grad():
        expected = model.network(IDS).logits
    for method in METHODS:
        for cold in (False, True):
            used = decoded if method.sixteen_bit else pack
            with (
                open_network(used, method, CPU, num_layers=count, cold=cold) as network,
                torch.no_grad(),
            ):
                for _ in range(2):  # the second pass begins with what was loaded in the first
                    assert torch.equal(network(IDS).logits, expected), (method, cold)
    assert not layerpack_threads()


@pytest.mark.parametrize("row", [r for r in HERE if isinstance(r.way, Ours)], ids=lambda r: r.name)
def test_every_row_of_ours_computes_the_same(pack_of: PackOf, row: Row) -> None:
    assert isinstance(row.way, Ours)
    path = pack_of("llama-tied")
    attention = row.way.attention
    options = OpenOptions(device="cpu", limits=row.way.limits(None, None), direct=row.way.direct)
    with torch.no_grad():
        with Model.open(path, OpenOptions(device="cpu", attention=attention)) as model:
            expected = model.network(IDS).logits
        with Model.open(path, replace(options, attention=attention)) as model:
            assert torch.equal(model.network(IDS).logits, expected)


def test_the_first_layers_alone_are_the_first_layers(pack_of: PackOf, tmp_path: Path) -> None:
    pack = Pack.open(pack_of("llama"))
    method = Method(sixteen_bit=True, prefetchers=2, pinning=Pinning.NONE)
    decoded = sixteen_bit_pack(pack, tmp_path, num_layers=2)
    assert len(list(tmp_path.iterdir())) == 2
    with Model.open(pack.path, OpenOptions(device="cpu")) as model, torch.no_grad():
        del model.network.model.layers[2:]
        expected = model.network(IDS).logits
    with (
        open_network(decoded, method, CPU, num_layers=2, cold=False) as network,
        torch.no_grad(),
    ):
        assert torch.equal(network(IDS).logits, expected)


def test_a_run_measures_all_rows_that_make_sense_and_leaves_nothing(
    pack_of: PackOf, tmp_path: Path
) -> None:
    path = pack_of("llama")
    seen: list[str] = []
    told: list[RowResult | LeftOut] = []
    files = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else None
    options = replace(SMALL, num_layers=2, scratch=tmp_path)
    report = run_bench(
        path, options, on_row=lambda row: seen.append(row.name), on_outcome=told.append
    )
    assert seen == [row.name for row in HERE] == [row.name for row in report.rows]
    assert {row.name for row in report.left_out} == {row.name for row in ROWS} - set(seen)
    assert all("CUDA" in row.reason for row in report.left_out)
    assert [outcome.name for outcome in told] == [row.name for row in ROWS]
    assert set(told) == {*report.rows, *report.left_out}
    for row in report.rows:
        assert 0 < row.min_s <= row.median_s <= row.max_s
        assert row.passes == 2 and row.link_bytes == 0
        assert row.timed_layers == (None if "layerpack" in row.switches else 2)
        assert (report.ratio(row) is not None) == (row.name in ("disk", "disk-buffered"))
    assert json.loads(json.dumps(report.to_json()))["rows"][0]["name"] == seen[0]
    assert not list(tmp_path.iterdir())
    assert not layerpack_threads()
    if files is not None:
        assert len(os.listdir("/proc/self/fd")) <= files


def test_bytes_are_those_of_the_whole_pass(pack_of: PackOf) -> None:
    path = pack_of("llama")
    pack = Pack.open(path)
    names = ("bf16-sync-pageable", "nf4-sync-pageable", "host", "disk")
    report = run_bench(path, replace(SMALL, passes=1, num_layers=1, rows=names))
    moved = {row.name: row.moved_bytes for row in report.rows}
    layers = sum(sum(e.length_bytes for e in blob.tensors) for blob in pack.manifest.layers)
    head = pack.manifest.head.tensor(pack.manifest.model.head).length_bytes
    assert moved["bf16-sync-pageable"] == 2 * sum(b.num_parameters for b in pack.manifest.layers)
    assert moved["nf4-sync-pageable"] == layers + head == moved["disk"]
    assert moved["host"] == 0  # mapped, used in place


def test_layers_beyond_the_memory_come_from_the_disk(pack_of: PackOf) -> None:
    rows = ("nf4-sync-pageable",)
    report = run_bench(pack_of("llama"), replace(SMALL, passes=1, ram_bytes=1000, rows=rows))
    (row,) = report.rows
    assert row.disk_bytes == row.moved_bytes > 0
    assert "out of the page cache" in row.note
    assert report.ratio(row) is not None


def test_ctrl_c_gives_what_was_measured(pack_of: PackOf, tmp_path: Path) -> None:
    def stop(row: Row) -> None:
        if row.name == "nf4-sync-pageable":
            raise KeyboardInterrupt

    report = run_bench(pack_of("llama"), replace(SMALL, passes=1, scratch=tmp_path), on_row=stop)
    assert report.interrupted
    assert [row.name for row in report.rows] == ["bf16-sync-pageable", "bf16-async-pageable"]
    assert "interrupted" in report.table()
    assert not list(tmp_path.iterdir())


def test_each_row_is_told_before_the_next_one_begins(pack_of: PackOf) -> None:
    told: list[str] = []
    report = run_bench(
        pack_of("llama"),
        replace(SMALL, passes=1, rows=("host", "host-copied", "disk")),
        on_row=lambda row: told.append(f"{row.name} begins"),
        on_outcome=lambda outcome: told.append(f"{outcome.name} {type(outcome).__name__}"),
    )
    assert told == [
        "host begins",
        "host RowResult",
        "host-copied LeftOut",
        "disk begins",
        "disk RowResult",
    ]
    assert len(report.rows) == 2


def test_a_row_that_fails_does_not_end_the_others(
    pack_of: PackOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_sample, "_SPARE_BYTES", 1 << 60)
    rows = ("bf16-sync-pageable", "host")
    report = run_bench(pack_of("llama"), replace(SMALL, passes=1, rows=rows, scratch=tmp_path))
    assert [row.name for row in report.rows] == ["host"]
    (failed,) = [row for row in report.left_out if row.name == rows[0]]
    assert "--layers" in failed.reason and "\n" not in failed.reason
    assert not list(tmp_path.iterdir())


def test_no_room_for_16_bit_layers_is_found_before_writing(
    pack_of: PackOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_sample, "_SPARE_BYTES", 1 << 60)
    with pytest.raises(DiskFullError, match="2 layers at 16 bits"):
        sixteen_bit_pack(Pack.open(pack_of("llama")), tmp_path, num_layers=2)
    assert not list(tmp_path.iterdir())


def test_prefetching_stays_within_its_threads(pack_of: PackOf) -> None:
    pack = Pack.open(pack_of("llama"))
    paths = [pack.blob_path(blob) for blob in pack.manifest.layers]
    read: list[Path] = []

    class Counted(HostRead):
        def __call__(self, path: Path) -> dict[str, torch.Tensor]:
            read.append(path)
            return super().__call__(path)

    loader = PrefetchLoader(paths, Counted(pinning=Pinning.NONE, cold=False), CPU, num_threads=2)
    try:
        for turn in range(5):
            tensors = loader.load(turn % len(paths))
            name = next(iter(tensors))
            assert f"layers.{turn % len(paths)}." in name
            assert len(read) <= turn + 3  # this one, and two ahead
    finally:
        loader.close()
    assert not layerpack_threads()


def row_result(name: str, seconds: float, **fields: int) -> RowResult:
    bytes_ = {"moved_bytes": 0, "link_bytes": 0, "disk_bytes": 0} | fields
    return RowResult(
        name=name,
        switches="layerpack: somewhere",
        median_s=seconds,
        min_s=seconds,
        max_s=seconds,
        passes=1,
        timed_layers=None,
        note="",
        **bytes_,
    )


def report_of(*rows: RowResult) -> Report:
    return Report(
        machine={"device": "a device"},
        pack="a pack",
        num_layers=2,
        context_tokens=0,
        link_gb_s=10.0,
        disk_gb_s=2.0,
        rows=rows,
        left_out=(),
    )


def test_the_limit_is_the_slowest_link_that_is_crossed() -> None:
    both = row_result("both", 3.0, moved_bytes=10**10, link_bytes=10**10, disk_bytes=4 * 10**9)
    link = row_result("link", 1.5, moved_bytes=10**10, link_bytes=10**10)
    none = row_result("none", 1.0)
    report = report_of(both, link, none)
    assert [report.limit_s(row) for row in report.rows] == [2.0, 1.0, None]
    assert [report.ratio(row) for row in report.rows] == [1.5, 1.5, None]
    assert "1.50" in next(line for line in report.table().splitlines() if line.startswith("both"))


@pytest.mark.parametrize("names", [(), ("one",), ("one", "two")])
def test_the_picture_is_a_png(tmp_path: Path, names: tuple[str, ...]) -> None:
    path = tmp_path / "x.png"
    report_of(*(row_result(name, 2.0, moved_bytes=8, link_bytes=8) for name in names)).plot(path)
    raw = path.read_bytes()
    assert raw.startswith(b"\x89PNG\r\n\x1a\n") and raw.endswith(b"IEND\xaeB`\x82")
