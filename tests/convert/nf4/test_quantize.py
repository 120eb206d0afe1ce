"""The quantiser against bitsandbytes, which defines NF4: same codes, same absmax, same text."""

from __future__ import annotations

import statistics
from fractions import Fraction

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from layerpack.convert.nf4.bits import bfloat16_codes
from layerpack.convert.nf4.blocks import search_codes, table_codes
from layerpack.convert.nf4.double_quant import exact_mean, nest_absmax, nested_map
from layerpack.convert.nf4.quantize import quantize_nf4
from layerpack.formats.blob import nf4
from layerpack.formats.errors import SourceError

CPU = torch.device("cpu")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
F = pytest.importorskip("bitsandbytes.functional")


def make_weight(
    shape: tuple[int, ...], dtype: torch.dtype, seed: int, scale: float = 0.02
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * scale).to(dtype)


def oracle(weight: torch.Tensor, block_size: int) -> tuple[bytes, bytes]:
    codes, state = F.quantize_4bit(weight, blocksize=block_size, quant_type="nf4")
    return codes.cpu().numpy().tobytes(), state.absmax.cpu().numpy().tobytes()


def ours(weight: torch.Tensor, block_size: int, **options: object) -> tuple[bytes, bytes]:
    result = quantize_nf4(
        weight,
        name="w",
        block_size=block_size,
        double_quant=False,
        device=options.pop("device", CPU),  # type: ignore[arg-type]
        **options,  # type: ignore[arg-type]
    )
    return bytes(result.part("")), bytes(result.part(nf4.ABSMAX))


@given(
    rows=st.integers(1, 70),
    columns=st.integers(1, 300),
    dtype=st.sampled_from(DTYPES),
    block_size=st.sampled_from(nf4.BLOCK_SIZES),
    scale=st.sampled_from([1e-42, 1e-38, 3e-7, 0.02, 1.0, 6e4, 1e37]),
    zeroed=st.sampled_from([0.0, 0.5, 1.0]),
    seed=st.integers(0, 1 << 30),
)
@settings(max_examples=150, deadline=None)
@example(rows=1, columns=1, dtype=torch.float32, block_size=64, scale=1e-42, zeroed=0.0, seed=0)
def test_equals_bitsandbytes(
    rows: int,
    columns: int,
    dtype: torch.dtype,
    block_size: int,
    scale: float,
    zeroed: float,
    seed: int,
) -> None:
    weight = make_weight((rows, columns), dtype, seed, scale)
    weight.view(-1)[: int(weight.numel() * zeroed)] = 0
    if dtype == torch.float16 and scale > 1e4:
        weight = weight.nan_to_num()
    assert ours(weight, block_size) == oracle(weight, block_size)


@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_bitsandbytes_over_many_chunks_and_any_number_of_workers(dtype: torch.dtype) -> None:
    weight = make_weight((1031, 1024), dtype, seed=1)
    wanted = oracle(weight, 64)
    before = weight.clone()
    for num_workers in (1, 2, 5):
        assert ours(weight, 64, num_workers=num_workers) == wanted
    assert torch.equal(weight, before)


def test_quantising_leaves_the_number_of_torch_threads_alone() -> None:
    before = torch.get_num_threads()
    ours(make_weight((1024, 1024), torch.bfloat16, seed=1), 64, num_workers=2)
    assert torch.get_num_threads() == before


def test_table_and_search_agree_on_every_16_bit_value_and_around_every_midpoint() -> None:
    every = torch.arange(1 << 16).to(torch.int16).view(torch.bfloat16).float()
    values = torch.tensor(nf4.NF4_CODES)
    midpoints, cells = (values[1:] + values[:-1]) / 2, torch.arange(-1024, 1025) / 1024
    edges = torch.cat([midpoints, cells])
    near = edges.view(torch.int32)[:, None] + torch.arange(-300, 301, dtype=torch.int32)
    scaled = torch.cat([every, near.reshape(-1).view(torch.float32)])
    scaled = scaled[scaled.abs() <= 1 + 1e-6]
    assert scaled.numel() > 500_000
    assert torch.equal(table_codes(scaled), search_codes(scaled))


def from_bits(bits: torch.Tensor) -> torch.Tensor:
    return bits.to(torch.int16).view(torch.bfloat16)


@pytest.mark.parametrize("exponent", [8, 9, 60, 127, 200, 250, 251])
def test_codes_from_bits_are_those_of_the_arithmetic_for_every_pair(exponent: int) -> None:
    """Every mantissa of absmax with every weight down to its 600th part, and some beyond."""
    distances = torch.cat([torch.arange(-1200, 128), torch.arange(-30_000, -1200, 67)])
    for mantissa in range(128):
        largest = exponent * 128 + mantissa
        bits = largest - mantissa + distances
        bits = bits[(bits >= 0) & (bits <= largest)]
        bits = torch.cat([bits, bits - 32768])
        bits = torch.nn.functional.pad(bits, (0, -bits.numel() % 63)).view(-1, 63)
        blocks = from_bits(torch.nn.functional.pad(bits, (1, 0), value=largest))
        found = bfloat16_codes(blocks, search_codes)
        assert found is not None
        absmax = from_bits(torch.tensor([largest])).float()
        assert torch.equal(found[1], absmax.expand(len(blocks)))
        scaled = blocks.float() * absmax.reciprocal()
        assert torch.equal(found[0], search_codes(scaled.view(-1)))


@pytest.mark.parametrize("bits", [0, 1, 127, 7 * 128 + 127, 252 * 128, 255 * 128, 255 * 128 + 1])
def test_bits_are_left_to_the_arithmetic_where_they_do_not_tell(bits: int) -> None:
    blocks = make_weight((4, 64), torch.bfloat16, seed=2)
    blocks[2] = from_bits(torch.tensor([bits]))
    assert bfloat16_codes(blocks, search_codes) is None


@pytest.mark.parametrize("dtype", DTYPES)
def test_double_quantisation_equals_bitsandbytes_given_the_same_offset(dtype: torch.dtype) -> None:
    weight = make_weight((999, 768), dtype, seed=3)
    result = quantize_nf4(weight, name="w", device=CPU)
    _, plain = F.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    offset = result.state.nested_offset
    assert offset is not None
    assert offset == pytest.approx(float(plain.absmax.mean()), rel=1e-6)
    codes, state = F.quantize_blockwise(plain.absmax - offset, blocksize=256)
    assert bytes(result.part(nf4.ABSMAX)) == codes.numpy().tobytes()
    assert bytes(result.part(nf4.NESTED_ABSMAX)) == state.absmax.numpy().tobytes()
    assert bytes(result.part(nf4.NESTED_QUANT_MAP)) == state.code.numpy().tobytes()
    assert bytes(result.part(nf4.QUANT_MAP)) == plain.code.numpy().tobytes()


def test_map_equals_bitsandbytes() -> None:
    assert torch.equal(nested_map(), F.create_dynamic_map())


@given(
    values=st.lists(st.floats(0, 2.0**100, width=32), min_size=1, max_size=600),
    spread=st.booleans(),
)
@settings(deadline=None)
def test_nested_codes_equal_bitsandbytes(values: list[float], spread: bool) -> None:
    absmax = torch.tensor(values)
    if spread:
        absmax = absmax.log1p()
    codes, nested, offset = nest_absmax(absmax)
    wanted, state = F.quantize_blockwise(absmax - offset, blocksize=256)
    usable = ((state.absmax == 0) | (state.absmax > 1e-37)).repeat_interleave(256)[: len(values)]
    assert torch.equal(codes[usable], wanted[usable])
    assert torch.equal(nested, state.absmax)


def test_double_quantised_weight_dequantises_like_bitsandbytes_own() -> None:
    weight = make_weight((256, 320), torch.bfloat16, seed=4)
    result = quantize_nf4(weight, name="w", device=CPU)
    assert result.state == nf4.Nf4State(
        shape=(256, 320), block_size=64, dtype="BF16", nested_offset=result.state.nested_offset
    )
    state = F.QuantState(
        absmax=result.tensors[nf4.ABSMAX],
        shape=torch.Size((256, 320)),
        code=result.tensors[nf4.QUANT_MAP],
        blocksize=64,
        quant_type="nf4",
        dtype=torch.bfloat16,
        offset=torch.tensor(result.state.nested_offset),
        state2=F.QuantState(
            absmax=result.tensors[nf4.NESTED_ABSMAX],
            code=result.tensors[nf4.NESTED_QUANT_MAP],
            blocksize=256,
            dtype=torch.float32,
        ),
    )
    back = F.dequantize_4bit(result.tensors[""].view(-1, 1), state)
    codes, own = F.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    wanted = F.dequantize_4bit(codes, own)
    assert torch.equal(result.tensors[""], codes.view(-1))
    assert (back.float() - wanted.float()).norm() < 1e-5 * wanted.float().norm()
    assert (back.float() - weight.float()).norm() < 0.1 * weight.float().norm()


@given(
    values=st.lists(st.floats(0, 3.4028234663852886e38, width=32), min_size=1, max_size=300),
    shuffled=st.randoms(use_true_random=False),
)
@settings(deadline=None)
def test_mean_does_not_depend_on_the_order_and_is_close_to_exact(
    values: list[float], shuffled: object
) -> None:
    mean = exact_mean(torch.tensor(values))
    again = list(values)
    shuffled.shuffle(again)  # type: ignore[attr-defined]
    assert exact_mean(torch.tensor(again)) == mean
    wanted = float(statistics.mean(map(Fraction, values)))
    assert mean == pytest.approx(wanted, rel=2**-23, abs=2**-149)


def test_equal_absmax_nest_to_the_offset_alone() -> None:
    for value in (0.0, 0.5, 1e-41):
        codes, nested, offset = nest_absmax(torch.full((300,), value))
        assert offset == torch.tensor(value)
        assert not nested.any()
        assert not codes.any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 40_000, -1])
def test_refuses_values_that_are_not_finite_by_name(bad: float, place: int) -> None:
    weight = make_weight((101, 1001), torch.float32, seed=5)
    weight.view(-1)[place] = bad
    with pytest.raises(SourceError, match=r"tensor model\.q\.weight holds NaN or infinite"):
        quantize_nf4(weight, name="model.q.weight", device=CPU)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [32, 64, 4096])
@pytest.mark.parametrize("columns", [8192, 8191])
def test_gpu_equals_cpu_byte_for_byte(dtype: torch.dtype, block_size: int, columns: int) -> None:
    cuda = torch.device("cuda")
    weight = make_weight((2500, columns), dtype, seed=6)
    weight[:3] = 0
    weight[3] *= 1e-36
    wanted = ours(weight, block_size)
    assert ours(weight, block_size, device=cuda) == wanted
    assert ours(weight.to(cuda), block_size, device=cuda) == wanted
    nested = quantize_nf4(weight, name="w", block_size=block_size, device=cuda)
    assert nested.state == quantize_nf4(weight, name="w", block_size=block_size, device=CPU).state


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES)
def test_gpu_equals_bitsandbytes_own_kernel_on_ordinary_weights(dtype: torch.dtype) -> None:
    cuda = torch.device("cuda")
    weight = make_weight((4096, 4096), dtype, seed=7).to(cuda)
    assert ours(weight, 64, device=cuda) == oracle(weight, 64)
