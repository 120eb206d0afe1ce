"""`layerpack bench` on a CUDA device: every row computes the same, and none leaves a trace."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from layerpack.formats.pack import Pack
from layerpack.runtime.bench.network import open_network
from layerpack.runtime.bench.options import BenchOptions
from layerpack.runtime.bench.rows import ROWS, Method, Row
from layerpack.runtime.bench.run import run_bench
from layerpack.runtime.bench.sample import sixteen_bit_pack
from layerpack.runtime.model import Model
from layerpack.runtime.open_options import OpenOptions
from layerpack.runtime.plan.plan import Limits

pytestmark = pytest.mark.gpu

PackOf = Callable[..., Path]
IDS = torch.tensor([[7, 201, 33, 90, 90, 5, 250, 118, 64, 2, 19]])
METHODS = [row for row in ROWS if isinstance(row.way, Method)]
SMALL = BenchOptions(device="cuda", context_tokens=8, passes=2, num_layers=2)


@pytest.mark.parametrize("row", METHODS, ids=lambda row: row.name)
def test_every_method_computes_what_the_model_computes(
    pack_of: PackOf, tmp_path: Path, row: Row
) -> None:
    assert isinstance(row.way, Method)
    path = pack_of("llama")
    pack = Pack.open(path)
    count = pack.manifest.model.num_layers
    used = sixteen_bit_pack(pack, tmp_path, num_layers=count) if row.way.sixteen_bit else pack
    device = torch.device("cuda", 0)
    options = OpenOptions(
        device="cuda",
        limits=Limits(vram_slices=0),
        context_tokens=64,
        attention=row.way.attention,
    )
    with torch.no_grad():
        with Model.open(path, options) as model:
            expected = model.network(IDS.cuda()).logits
        with open_network(used, row.way, device, num_layers=count, cold=False) as network:
            found = [network(IDS.cuda()).logits for _ in range(10)]
    # lm_head in one part or in several, weights decoded here or in the kernel: bf16 rounding.
    torch.testing.assert_close(found[0], expected, rtol=0.05, atol=0.15)
    assert all(torch.equal(logits, found[0]) for logits in found)  # no pass overtook its copies


def test_all_rows_run_and_nothing_is_left(pack_of: PackOf, tmp_path: Path) -> None:
    path = pack_of("llama")
    before = 0
    for _ in range(2):  # the first run leaves what libraries allocate once
        before = torch.cuda.memory_allocated()
        report = run_bench(path, SMALL)
    assert {row.name for row in report.left_out} <= {"disk"}  # where direct reads are not possible
    assert {row.name for row in report.rows} >= {row.name for row in ROWS} - {"disk"}
    assert report.link_gb_s is not None and report.link_gb_s > 0
    for row in report.rows:
        assert (report.ratio(row) is None) == (row.name == "vram")  # everything fits
        assert row.link_bytes == row.moved_bytes
    assert torch.cuda.memory_allocated() <= before + (1 << 20)
    assert not [t.name for t in threading.enumerate() if t.name.startswith("layerpack")]
    report.plot(tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_the_bound_of_vram_ends_with_the_run(pack_of: PackOf) -> None:
    rows = ("nf4-dual-head", "vram")
    report = run_bench(
        pack_of("llama"),
        BenchOptions(device="cuda", context_tokens=8, passes=1, vram_bytes=2 << 30, rows=rows),
    )
    assert [row.name for row in report.rows] == list(rows)
    # More than the bound can be had again.
    free, _ = torch.cuda.mem_get_info()
    if free > 4 << 30:
        assert torch.empty(3 << 30, dtype=torch.uint8, device="cuda").numel() == 3 << 30
