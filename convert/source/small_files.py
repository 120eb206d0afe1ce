"""A checkpoint's files beside its weights: which of them go into a pack as they are."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from pathlib import Path

from layerpack.formats.errors import SourceError

CONFIG_NAME = "config.json"
_COPIED = (
    "tokenizer*.json",
    "tokenizer*.model",
    "*.tiktoken",
    "tekken.json",
    "spiece.model",
    "sentencepiece*.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template*",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
    "USE_POLICY*",
)
QUANTISATION_NAMES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
"""Where modelopt, GPTQ and AWQ state what they did, if not in config.json. Not copied."""
_MAX_COPIED_BYTES = 256 << 20


def is_copied(name: str) -> bool:
    """Whether a checkpoint's file goes into the pack as it is: no weights, no code.

    Nor what a manifest cannot list, by its name.
    """
    if name.endswith(".py") or not name.isprintable():
        return False
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in _COPIED)


def copied_files(config_dir: Path) -> Iterable[tuple[str, bytes]]:
    """Name and bytes of each file to copy, by name. Raises SourceError."""
    for path in sorted(config_dir.iterdir()):
        if not path.is_file() or not is_copied(path.name):
            continue
        try:
            if path.stat().st_size > _MAX_COPIED_BYTES:
                raise SourceError(f"{path}: too large for what its name says it is")
            yield path.name, path.read_bytes()
        except OSError as reason:
            raise SourceError(f"{path}: cannot be read ({reason.strerror})") from reason
