"""Which safetensors files a checkpoint consists of: one, or those that its index names."""

from __future__ import annotations

from collections.abc import Collection

from layerpack.formats.errors import SourceError
from layerpack.formats.jsontext import parse_json

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


def weight_map(raw: bytes, *, where: str) -> dict[str, str]:
    """Tensor name -> file name out of an index's bytes. Raises SourceError."""
    try:
        document = parse_json(raw)
    except ValueError as reason:
        raise SourceError(f"{where}: not valid JSON ({reason})") from None
    entries = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(entries, dict) or not entries:
        raise SourceError(f'{where}: no "weight_map" in it')
    for tensor, file in entries.items():
        if not isinstance(file, str) or "/" in file or "\\" in file or file in ("", ".", ".."):
            raise SourceError(f"{where}: tensor {tensor} is mapped to {file!r}, not to a file name")
        if not file.endswith(".safetensors"):
            raise SourceError(f"{where}: tensor {tensor} lies in {file}; only safetensors are read")
    return entries


def which_weights(names: Collection[str], *, where: str) -> str:
    """The single file or the index among a checkpoint's file names; with both, as transformers
    does, the file: a checkpoint that was saved anew in one keeps the index of its former shards.

    Raises SourceError if there is neither, saying so plainly where there is only a pickle.
    """
    for wanted in (SINGLE_NAME, INDEX_NAME):
        if wanted in names:
            return wanted
    singles = sorted(name for name in names if name.endswith(".safetensors"))
    if len(singles) == 1:
        return singles[0]
    pickles = sorted(name for name in names if name.endswith(_PICKLES))
    if pickles:
        raise SourceError(
            f"{where}: weights only as pickle ({pickles[0]}), which can run code and is never "
            "read; save the checkpoint as safetensors first"
        )
    raise SourceError(
        f"{where}: no {SINGLE_NAME} and no {INDEX_NAME} in it; name a Hugging Face checkpoint"
    )


def check_complete(mapped: dict[str, str], present: dict[str, str], *, where: str) -> None:
    """Every tensor of an index against the files' own headers. Raises SourceError."""
    for tensor, file in mapped.items():
        if present.get(tensor) != file:
            raise SourceError(
                f"{where}: tensor {tensor} should be in {file} but is not; "
                "download the checkpoint again"
            )
