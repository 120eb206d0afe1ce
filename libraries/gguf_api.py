"""transformers' knowledge of GGUF files, and the gguf package without doing again what it did.

transformers reads a file's metadata for the config and again for the tokenizer, a Python loop over
every entry of the vocabulary each time, and builds the map of all tensor names once for each module
of the model.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_LOCK = threading.Lock()


@contextmanager
def each_thing_once(gguf: Any) -> Iterator[None]:
    """In the block a file is parsed once, and a name map built once; one thread at a time.

    What is at hand out of it is shared: nobody may change it.
    """
    with _LOCK:
        reader, name_map = gguf.GGUFReader, gguf.get_tensor_name_map
        once = functools.cache(reader)
        gguf.GGUFReader = lambda path, *mode: once(os.path.realpath(path), *mode)
        gguf.get_tensor_name_map = functools.cache(name_map)
        try:
            yield
        finally:
            gguf.GGUFReader, gguf.get_tensor_name_map = reader, name_map


def parsed_metadata(path: Path) -> dict[str, Any]:
    """What transformers makes of a file's metadata: `config`, `tokenizer`, `tokenizer_config`.

    Raises whatever it raises for a damaged file, or one of an architecture that it does not know.
    """
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    parsed: dict[str, Any] = load_gguf_checkpoint(str(path), return_tensors=False)
    return parsed


def keys_in_config(architecture: str) -> frozenset[str]:
    """The keys of an architecture, without its name, whose values `parsed_metadata` has."""
    from transformers.modeling_gguf_pytorch_utils import GGUF_TO_TRANSFORMERS_MAPPING

    mapping = GGUF_TO_TRANSFORMERS_MAPPING["config"].get(architecture, {})
    return frozenset(key for key, name in mapping.items() if name is not None)


def tensor_processor(architecture: str, config: dict[str, Any]) -> Any:
    """What undoes the reordering by llama.cpp's converter, by its method `process`."""
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

    return TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=config)


def tensor_names(model: Any, processor: Any) -> dict[str, str]:
    """A GGUF file's name of each tensor to the model's."""
    from transformers.modeling_gguf_pytorch_utils import get_gguf_hf_weights_map

    names: dict[str, str] = get_gguf_hf_weights_map(model, processor)
    return names


def load_tokenizer(directory: Path, name: str) -> Any:
    """The tokenizer that the file `name` in `directory` describes."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory, gguf_file=name, trust_remote_code=False)
