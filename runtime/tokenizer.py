"""The tokenizer that comes with a pack."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from layerpack.formats.errors import PackError
from layerpack.formats.text import first_line
from layerpack.libraries import transformers_api


def load_tokenizer(path: Path) -> Any:
    """transformers' tokenizer of the pack at `path`. Raises PackError."""
    names = sorted(file.name for file in path.glob("*token*"))
    try:
        return transformers_api.load_tokenizer(path)
    except Exception as reason:  # damaged files break tokenizers in any way
        found = f"{', '.join(names)}: {first_line(reason)}" if names else "it holds none"
        raise PackError(
            f"{path}: has no tokenizer that transformers can load ({found})"
        ) from reason
