"""The tokenizer that comes with a pack."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from layerpack.formats.errors import PackError


def load_tokenizer(path: Path) -> Any:
    """transformers' tokenizer of the pack at `path`. Raises PackError."""
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as reason:  # damaged files break tokenizers in any way
        raise PackError(f"{path}: has no tokenizer that transformers can load") from reason
