"""The gguf package without doing again what it did: transformers asks it for the same many times.

Reading a GGUF file's metadata takes a Python loop over every entry of the vocabulary, seconds for
large ones. transformers does it for the config and again for the tokenizer, and builds the map of
all tensor names once for each module of the model.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
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
