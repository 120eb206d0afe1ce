"""What layerpack/libraries/gguf_api.py takes from inside transformers and gguf is there."""

from __future__ import annotations

import inspect

import pytest
from transformers import modeling_gguf_pytorch_utils as inside

from layerpack.convert.gguf.metadata import ARCHITECTURES

gguf = pytest.importorskip("gguf")


@pytest.mark.parametrize(
    "name",
    [
        "GGUF_TO_TRANSFORMERS_MAPPING",
        "TENSOR_PROCESSORS",
        "TensorProcessor",
        "get_gguf_hf_weights_map",
        "load_gguf_checkpoint",
    ],
)
def test_transformers_still_has(name: str) -> None:
    """modeling_gguf_pytorch_utils, which is no public module."""
    assert hasattr(inside, name)


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES - {"mistral"}))
def test_each_architecture_is_mapped(architecture: str) -> None:
    """GGUF_TO_TRANSFORMERS_MAPPING["config"], and the gguf package's names of tensors."""
    assert architecture in inside.GGUF_TO_TRANSFORMERS_MAPPING["config"]
    assert architecture in gguf.MODEL_ARCH_NAMES.values()


def test_a_processor_takes_these_arguments() -> None:
    """TensorProcessor.process(weights, name, tensor_key_mapping, parsed_parameters) -> .weights."""
    known = inspect.signature(inside.TensorProcessor.process).parameters
    assert {"weights", "name"} <= set(known) and "kwargs" in known
    assert inside.TensorProcessor(config={}).process(weights=1, name="a").weights == 1


def test_a_reader_says_where_things_are() -> None:
    """GGUFReader.data_offset, .fields, .tensors, and GGML_QUANT_SIZES, dequantize."""
    source = inspect.getsource(gguf.GGUFReader)
    assert "self.data_offset" in source and "self.tensors" in source and "self.fields" in source
    assert callable(gguf.dequantize) and gguf.GGML_QUANT_SIZES
    assert callable(gguf.get_tensor_name_map)
