"""Where tensors lie: end to end, weights on pages, whatever their number, size and order."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from layerpack.formats.blob import nf4
from layerpack.formats.blob.header import encode_header, parse_header
from layerpack.formats.blob.layout import Nf4Spec, PlainSpec, layout_blob
from layerpack.formats.manifest.rules import STORED_DTYPES
from layerpack.formats.units import DTYPE_BYTES, PAGE_BYTES, num_elements

SIDES = st.integers(1, 70) | st.sampled_from([64, 4096, 8192])
NF4_SPECS = st.builds(
    lambda shape, block_size, double_quant: (shape, block_size, double_quant),
    st.tuples(SIDES, SIDES),
    st.sampled_from(nf4.BLOCK_SIZES),
    st.booleans(),
)
PLAIN_SPECS = st.tuples(
    st.sampled_from(STORED_DTYPES), st.lists(st.integers(0, 70), max_size=3).map(tuple)
)


@settings(max_examples=100, deadline=None)
@given(st.lists(NF4_SPECS | PLAIN_SPECS, min_size=1, max_size=7))
def test_a_layout_obeys_the_format(drawn: list[tuple[object, ...]]) -> None:
    specs: list[Nf4Spec | PlainSpec] = []
    for index, facts in enumerate(drawn):
        name = f"model.layers.3.é{index}.weight"
        if len(facts) == 3:
            shape, block_size, double_quant = facts
            specs.append(
                Nf4Spec(
                    name=name,
                    shape=shape,  # type: ignore[arg-type]
                    block_size=block_size,  # type: ignore[arg-type]
                    double_quant=double_quant,  # type: ignore[arg-type]
                )
            )
        else:
            specs.append(PlainSpec(name=name, dtype=facts[0], shape=facts[1]))  # type: ignore[arg-type]
    layout = layout_blob(specs)
    assert layout.data_start_bytes % PAGE_BYTES == 0
    header = encode_header(layout.tensors, data_start_bytes=layout.data_start_bytes)
    assert len(header) == layout.data_start_bytes
    assert parse_header(header, file_bytes=layout.file_bytes, where="") == layout.tensors
    by_name = {entry.name: entry for entry in layout.tensors}
    position = layout.data_start_bytes
    for entry in layout.tensors:
        assert entry.offset_bytes == position
        assert entry.length_bytes == num_elements(entry.shape) * DTYPE_BYTES[entry.dtype]
        position = entry.end_bytes
    assert position == layout.file_bytes
    for spec in specs:
        if isinstance(spec, PlainSpec):
            assert by_name[spec.name].offset_bytes % DTYPE_BYTES[spec.dtype] == 0
            continue
        assert by_name[spec.name].offset_bytes % PAGE_BYTES == 0
        assert by_name[spec.name + nf4.STATE].end_bytes % PAGE_BYTES == 0
        assert by_name[spec.name + nf4.STATE].length_bytes >= nf4.STATE_RESERVED_BYTES
    order = [entry.name for entry in layout.tensors if entry.name.endswith(".weight")]
    quantised = [spec.name for spec in specs if isinstance(spec, Nf4Spec)]
    assert order[: len(quantised)] == quantised


def test_plain_tensors_stand_widest_first_else_as_given() -> None:
    specs = [
        PlainSpec(name=name, dtype=dtype, shape=(3,))
        for name, dtype in (("a", "U8"), ("b", "BF16"), ("c", "I64"), ("d", "F16"), ("e", "BOOL"))
    ]
    assert [entry.name for entry in layout_blob(specs).tensors] == ["c", "b", "d", "a", "e"]


def test_the_layout_of_a_72b_layer_wastes_nothing() -> None:
    shapes = [(8192, 8192), (1024, 8192), (1024, 8192), (8192, 8192), *[(29568, 8192)] * 3]
    layout = layout_blob(
        [
            Nf4Spec(name=f"w{i}.weight", shape=shape, block_size=64, double_quant=True)
            for i, shape in enumerate(shapes)
        ]
    )
    weights = sum(num_elements(shape) for shape in shapes)
    assert 452.7e6 < layout.file_bytes < 452.9e6
    assert 8 * layout.file_bytes / weights < 4.1275


def test_an_empty_blob_is_all_header() -> None:
    layout = layout_blob([])
    assert (layout.tensors, layout.file_bytes) == ((), layout.data_start_bytes)
