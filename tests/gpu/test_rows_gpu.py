"""On a GPU, too, a token's bits depend on the tokens before it alone."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from support.models.tiny import ARCHITECTURES
from support.runs.rows import unequal_seeds

from layerpack.convert.api import convert
from layerpack.runtime.engine.options import GenerateOptions
from layerpack.runtime.kv.slots import KvSlots
from layerpack.runtime.model import Model
from layerpack.runtime.network.attention import plain_attend
from layerpack.runtime.network.rows import Part, table_of_rows
from layerpack.runtime.open_options import OpenOptions
from layerpack.runtime.plan.plan import Limits
from layerpack.runtime.product.least_rows import least_rows
from layerpack.runtime.product.ways import gives_equal_bits, ways

pytestmark = pytest.mark.gpu
PackOf = Callable[..., Path]
IDS = [random.Random(3).randrange(90) for _ in range(150)]
SHAPES = {"q": (8192, 8192), "k": (1024, 8192), "gate": (29568, 8192), "down": (8192, 29568)}


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("tier", ["vram", "host"])
def test_alone_in_pieces_and_in_trees(pack_of: PackOf, name: str, tier: str) -> None:
    limits = Limits(vram_slices=0) if tier == "host" else Limits()
    options = OpenOptions(device="cuda", limits=limits, same_bits=True)
    with Model.open(pack_of(name), options) as model:
        assert model.rows is not None and model.rows.product is not None
        assert model.rows.product.name == "in order of K"
        assert unequal_seeds(model.rows, IDS, range(4)) == []


@pytest.mark.parametrize("width", [64, 80, 128, 576, 896, 1536, 4096, 8192])
def test_means_are_equal_from_few_rows_on(width: int) -> None:
    device = torch.device("cuda", 0)
    least = least_rows(device, [width])
    rows = torch.randn((2048, width), device=device).square()
    wanted = rows.mean(-1)
    for count in (least, least + 1, 2 * least + 1, 100, 1000, 2000):
        assert torch.equal(rows[-count:].mean(-1), wanted[-count:]), (width, least, count)


def test_a_model_as_narrow_as_smollm2(checkpoint_of: PackOf, tmp_path: Path) -> None:
    """Of 40 texts of SmolLM2, 576 wide, three were others with a draft: torch's means."""
    shape = {"hidden_size": 576, "intermediate_size": 1536}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "num_hidden_layers": 12}
    convert(str(checkpoint_of("llama", **shape, **heads)), tmp_path / "pack")
    for limits in (Limits(), Limits(vram_slices=0)):
        options = OpenOptions(device="cuda", limits=limits, same_bits=True)
        with Model.open(tmp_path / "pack", options) as model:
            assert model.rows is not None
            assert unequal_seeds(model.rows, IDS, range(12)) == []


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_text_with_drafts_and_lookup_is_plain_text(pack_of: PackOf, name: str) -> None:
    pack = pack_of(name)
    limits = Limits(vram_slices=0)
    with Model.open(pack, OpenOptions(device="cuda", limits=limits, draft=str(pack))) as model:
        for number in range(10):
            plain = GenerateOptions(
                max_new_tokens=24,
                seed=number,
                temperature=float(number % 2),
                draft_tokens=0,
                look_up=False,
            )
            texts = {
                model.generate(f"text {number}", how).token_ids
                for how in (
                    plain,
                    replace(plain, draft_tokens=16),
                    replace(plain, draft_tokens=64, look_up=True),
                    replace(plain, look_up=True),
                )
            }
            assert len(texts) == 1, number


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_products_of_any_number_of_rows(shape: tuple[int, int]) -> None:
    device = torch.device("cuda", 0)
    way = next(ways(device, torch.bfloat16))
    assert way.name == "in order of K"
    assert gives_equal_bits(way, device, torch.bfloat16, shape)
    weight = torch.randn(shape, device=device, dtype=torch.bfloat16) * shape[1] ** -0.5
    x = torch.randn((2048, shape[1]), device=device, dtype=torch.bfloat16)
    bias = torch.randn(shape[0], device=device, dtype=torch.bfloat16)
    whole = way.multiply(x, weight, bias)
    for count in (1, 5, 16, 63, 64, 65, 200, 256, 700, 1500):
        assert torch.equal(way.multiply(x[-count:], weight, bias), whole[-count:]), count
    exact = x[:16].double() @ weight.double().T + bias.double()
    error = (whole[:16].double() - exact).norm() / exact.norm()
    theirs = torch.nn.functional.linear(x[:16], weight, bias).double()
    assert error <= 1.01 * (theirs - exact).norm() / exact.norm()


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "window", "cap"),
    [(64, 8, 128, 0, 0.0), (9, 3, 64, 100, 0.0), (8, 4, 80, 0, 30.0), (4, 4, 24, 7, 0.0)],
)
def test_attention_by_slots(heads: int, kv_heads: int, size: int, window: int, cap: float) -> None:
    from layerpack.runtime.network import attention_triton

    device = torch.device("cuda", 0)
    chance = random.Random(1)
    slots = chance.sample(range(3000), 3000)
    kv = KvSlots(3000, device)
    keys, values = (
        torch.randn((3000, kv_heads, size), device=device, dtype=torch.bfloat16) for _ in range(2)
    )
    query = torch.randn((1300, heads, size), device=device, dtype=torch.bfloat16)
    attend = partial(attention_triton.attend, scaling=size**-0.5, window=window, softcap=cap)
    path = slots[:1300]
    whole = table_of_rows(kv, [Part(path=path, tokens=[1] * 1300)], device=device)
    found = attend(query, keys, values, whole.seen)
    plain = plain_attend(
        query.float(),
        keys.float(),
        values.float(),
        whole.seen,
        scaling=size**-0.5,
        window=window,
        softcap=cap,
    )
    torch.testing.assert_close(found.float(), plain, rtol=0.03, atol=0.01)
    for begin, end in ((0, 1), (5, 6), (63, 66), (640, 1300), (1299, 1300)):
        one = Part(path=path[:end], tokens=[1] * (end - begin))
        part = table_of_rows(kv, [one], device=device)
        some = query[begin:end].contiguous()
        again = attend(some, keys, values, part.seen)
        assert torch.equal(again, found[begin:end]), (begin, end)
    # The last hundred as a chain of nodes behind the rest, some of them under way twice.
    tails = [path[1200 : 1201 + place] for place in range(100)]
    nodes_of = Part(path=path[:1200], tokens=[], nodes=[1] * 200, tails=[*tails, *tails[::-1]])
    tree = table_of_rows(kv, [nodes_of], device=device)
    rows = torch.cat([query[1200:], query[1200:].flip(0)]).contiguous()
    nodes = attend(rows, keys, values, tree.seen)
    assert torch.equal(nodes[:100], found[1200:])
    assert torch.equal(nodes[100:], found[1200:].flip(0))
