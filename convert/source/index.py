"""Which safetensors files a checkpoint consists of: one, those that its index names, or all."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

from layerpack.convert.source.protocol import SourceTensor
from layerpack.formats.errors import SourceError
from layerpack.formats.jsontext import parse_json

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
ADAPTER_NAME = "adapter_config.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_NUMBERED = re.compile(r"(.*-)(\d+)-of-(\d+)(\.safetensors)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """The `files`, in order. `mapped`: tensor name -> file where an index says so, else empty."""

    files: tuple[str, ...]
    mapped: Mapping[str, str]


def which_weights(
    names: Collection[str], read_index: Callable[[], bytes], *, where: str
) -> Weights:
    """The weights among a checkpoint's file names.

    With both the single file and an index, as transformers does, the file: a checkpoint that was
    saved anew in one keeps the index of its former shards. Shards without an index are all read.
    Raises SourceError if there are none, saying so plainly where there is something else.
    """
    if SINGLE_NAME in names:
        return Weights(files=(SINGLE_NAME,), mapped={})
    if INDEX_NAME in names:
        mapped = _weight_map(read_index(), where=f"{where}: {INDEX_NAME}")
        return Weights(files=tuple(sorted(set(mapped.values()))), mapped=mapped)
    found = [name for name in names if name.endswith(".safetensors")]
    adapters = [name for name in found if name.startswith("adapter_")]
    shards = sorted(set(found) - set(adapters))
    if shards:
        shards = [name for name in shards if name.startswith("model")] or shards
        _refuse_gaps(shards, where)
        return Weights(files=tuple(shards), mapped={})
    if adapters or ADAPTER_NAME in names:
        raise SourceError(
            f"{where}: a LoRA adapter, not a model; merge it into its base model first (peft: "
            "merge_and_unload), and convert what comes out"
        )
    pickles = sorted(name for name in names if name.endswith(_PICKLES))
    if pickles:
        raise SourceError(
            f"{where}: weights only as pickle ({pickles[0]}), which can run code and is never "
            "read; save the checkpoint as safetensors first"
        )
    raise SourceError(
        f"{where}: no {SINGLE_NAME} and no {INDEX_NAME} in it; name a Hugging Face checkpoint"
    )


def merge_tensors(
    found: Mapping[str, Iterable[SourceTensor]], mapped: Mapping[str, str], *, where: str
) -> dict[str, SourceTensor]:
    """All tensors of the files by name; where one stands twice, that which the index names.

    Raises SourceError if no index tells, or one names a tensor that is not there.
    """
    tensors: dict[str, SourceTensor] = {}
    for file, entries in found.items():
        for tensor in entries:
            if mapped.get(tensor.name, file) != file:
                continue
            if tensor.name in tensors:
                raise SourceError(
                    f"{where}: tensor {tensor.name} is in {tensors[tensor.name].file} and in "
                    f"{file}, and no {INDEX_NAME} says which counts; keep one of them"
                )
            tensors[tensor.name] = tensor
    for name, file in mapped.items():
        if name not in tensors:
            raise SourceError(
                f"{where}: {INDEX_NAME}: tensor {name} should be in {file} but is not; "
                "download the checkpoint again"
            )
    return tensors


def _weight_map(raw: bytes, *, where: str) -> dict[str, str]:
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


def _refuse_gaps(shards: list[str], where: str) -> None:
    """Raises SourceError if the names count files that are not there."""
    for shard in shards:
        if (match := _NUMBERED.fullmatch(shard)) is None:
            continue
        start, digits, count, end = match.groups()
        for number in range(1, int(count) + 1):
            name = f"{start}{number:0{len(digits)}}-of-{count}{end}"
            if name not in shards:
                raise SourceError(f"{where}: {name} is missing, and no {INDEX_NAME} is there")
