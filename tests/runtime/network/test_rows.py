"""A token's bits depend on the tokens before it, and on nothing else."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from support.models.oracles import dense_linear, quantised_reference
from support.models.tiny import ARCHITECTURES
from support.runs.rows import in_a_tree, one_by_one, unequal_seeds
from transformers import AutoModelForCausalLM

from layerpack.convert.api import convert
from layerpack.runtime.kv.slots import KvSlots
from layerpack.runtime.model import Model
from layerpack.runtime.network.attention import plain_attend
from layerpack.runtime.network.rows import Part, table_of_rows
from layerpack.runtime.open_options import OpenOptions
from layerpack.runtime.plan.plan import Limits
from layerpack.runtime.product import ways as product
from layerpack.runtime.product.ways import ONE_BY_ONE, Product, gives_equal_bits, pick_product

PackOf = Callable[..., Path]
CPU = torch.device("cpu")
IDS = [random.Random(3).randrange(90) for _ in range(83)]  # more than a tile of keys


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_alone_in_pieces_and_in_trees(pack_of: PackOf, name: str) -> None:
    with Model.open(pack_of(name), OpenOptions(device="cpu")) as model:
        assert model.rows is not None, model.why_no_rows
        assert unequal_seeds(model.rows, IDS, range(3)) == []


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_wherever_the_layers_are(pack_of: PackOf, name: str) -> None:
    found = []
    for limits in (Limits(), Limits(host_slices=0, num_slots=2), Limits(host_slices=1)):
        with Model.open(pack_of(name), OpenOptions(device="cpu", limits=limits)) as model:
            assert model.rows is not None
            found.append(one_by_one(model.rows, IDS[:12]))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3"])
def test_no_farther_from_exact_arithmetic_than_transformers(pack_of: PackOf, name: str) -> None:
    pack = pack_of(name)
    reference = quantised_reference(pack)
    with torch.no_grad():
        theirs = reference(torch.tensor([IDS])).logits[0].double()
    exactly = AutoModelForCausalLM.from_config(reference.config, dtype=torch.float64).eval()
    for path, module in exactly.named_modules():
        if isinstance(module, torch.nn.Linear):
            stored = reference.get_submodule(path)
            dense = dense_linear(stored) if hasattr(stored.weight, "quant_state") else stored
            module.load_state_dict(dense.state_dict())
    rest = {k: v for k, v in reference.state_dict().items() if v.dtype == torch.bfloat16}
    exactly.load_state_dict(rest, strict=False)
    with torch.no_grad():
        exact = exactly(torch.tensor([IDS])).logits[0]
    with Model.open(pack, OpenOptions(device="cpu")) as model:
        assert model.rows is not None
        ours = one_by_one(model.rows, IDS).double()
    error, wanted = (ours - exact).norm(), (theirs - exact).norm()
    assert error <= 1.1 * wanted


def test_outside_a_pass_the_network_is_transformers(pack_of: PackOf) -> None:
    pack = pack_of("llama")
    ids = torch.tensor([IDS])
    with torch.no_grad():
        wanted = quantised_reference(pack)(ids).logits
    with Model.open(pack, OpenOptions(device="cpu")) as model, torch.no_grad():
        model.generate("hello")
        assert torch.equal(model.network(ids).logits, wanted)


def test_keys_in_another_order_are_found_out() -> None:
    """What a walk by the order of slots would give."""
    chance = torch.Generator().manual_seed(0)
    query, keys, values = (torch.randn((n, 2, 16), generator=chance) for n in (1, 200, 200))
    table = table_of_rows(KvSlots(200, CPU), [Part(path=range(200), tokens=[1])], device=CPU)
    attend = partial(plain_attend, query, keys, values, scaling=0.25, window=0, softcap=0.0)
    wanted = attend(table.seen)
    assert torch.equal(attend(table.seen), wanted)
    other = attend(replace(table.seen, path=table.seen.path.flip(0)))
    torch.testing.assert_close(other, wanted)
    assert not torch.equal(other, wanted)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "size"),
    [(9, 3, 64), (8, 8, 32), (4, 1, 80)],
)
def test_attention_of_a_row_alone_and_among_others(
    heads: int, kv_heads: int, size: int, threads: int
) -> None:
    chance = torch.Generator().manual_seed(size)
    query, keys, values = (
        torch.randn((90, count, size), generator=chance).bfloat16()
        for count in (heads, kv_heads, kv_heads)
    )
    slots, path = KvSlots(90, CPU), random.Random(size).sample(range(90), 90)
    attend = partial(plain_attend, scaling=size**-0.5, window=0, softcap=0.0)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for num_rows in (24, 90):
            part = Part(path=path[:num_rows], tokens=[1] * num_rows)
            table = table_of_rows(slots, [part], device=CPU)
            whole = attend(query[:num_rows], keys, values, table.seen)
            for begin in range(0, num_rows, 11):
                for end in (begin + 1, min(begin + 5, num_rows)):
                    part = Part(path=path[:end], tokens=[1] * (end - begin))
                    table = table_of_rows(slots, [part], device=CPU)
                    some = attend(query[begin:end], keys, values, table.seen)
                    assert torch.equal(some, whole[begin:end]), (num_rows, begin, end)
    finally:
        torch.set_num_threads(before)


def test_a_product_that_splits_k_by_the_rows_is_found_out() -> None:
    def split(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        parts = 1 if x.shape[0] < 16 else 2
        sums = [
            a.float() @ b.float().T
            for a, b in zip(x.chunk(parts, 1), weight.chunk(parts, 1), strict=True)
        ]
        return sum(sums[1:], sums[0]).to(x.dtype)

    way = Product(name="split", multiply=split)
    assert not gives_equal_bits(way, CPU, torch.bfloat16, (512, 4096))
    assert gives_equal_bits(ONE_BY_ONE, CPU, torch.bfloat16, (512, 4096))


@pytest.mark.parametrize("broken", [0, 1, 2])
def test_each_way_down_gives_one_text(
    pack_of: PackOf, monkeypatch: pytest.MonkeyPatch, broken: int
) -> None:
    """However many of the faster ways fail their test."""
    left = list(product.ways(CPU, torch.bfloat16))[broken:]
    monkeypatch.setattr(product, "ways", lambda *_: iter(left))
    product._pick.cache_clear()
    try:
        way = pick_product(CPU, torch.bfloat16, [(128, 64)])
        assert way.name == (left[0] if left else ONE_BY_ONE).name
        with Model.open(pack_of("llama"), OpenOptions(device="cpu")) as model:
            assert model.rows is not None and model.rows.product is not None
            assert model.rows.product.name == way.name
            alone = one_by_one(model.rows, IDS[:30])
            found = in_a_tree(model.rows, IDS[:30], 11, random.Random(1))
        assert torch.equal(found, alone[10:])
    finally:
        product._pick.cache_clear()


def test_a_window(checkpoint_of: PackOf, tmp_path: Path) -> None:
    for name in ("mistral", "gemma3"):
        pack = tmp_path / name
        convert(str(checkpoint_of(name, sliding_window=20)), pack)
        with torch.no_grad():
            wanted = quantised_reference(pack)(torch.tensor([IDS])).logits[0]
        with Model.open(pack, OpenOptions(device="cpu")) as model:
            assert model.rows is not None
            alone = one_by_one(model.rows, IDS)
            assert torch.equal(in_a_tree(model.rows, IDS, 40, random.Random(2)), alone[39:])
        torch.testing.assert_close(alone, wanted, rtol=0.03, atol=0.03)
