"""All files of a pack beside its blobs and its manifest, and what to tell the user of them."""

from __future__ import annotations

import codecs
import tempfile
from dataclasses import dataclass
from pathlib import Path

from layerpack.convert.output.checkpoint_files import config_json, index_json
from layerpack.convert.plan.plan import ConversionPlan
from layerpack.convert.source.index import INDEX_NAME
from layerpack.convert.source.small_files import CONFIG_NAME, copied_files
from layerpack.formats import lfs
from layerpack.formats.machine_faults import raise_machine_fault
from layerpack.formats.text import first_line
from layerpack.libraries import transformers_api

_GENERATION_NAME = "generation_config.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class SmallFiles:
    """Bytes by name, and `notes` for the user, a line each."""

    files: dict[str, bytes]
    notes: tuple[str, ...]


def small_files(plan: ConversionPlan, config_dir: Path, *, scratch: Path) -> SmallFiles:
    """What is copied from the checkpoint's `config_dir`, config and index.

    What cannot be used is left out, and told; a byte order mark, which is no part of JSON, is taken
    off. `scratch` is a directory for a moment's use. Raises SourceError.
    """
    files, notes = {}, []
    for name, raw in copied_files(config_dir):
        data, problem = raw, None
        if name.endswith(".json"):
            data = raw.removeprefix(codecs.BOM_UTF8)
        if lfs.is_pointer(data):
            problem = lfs.REMEDY
        elif name == _GENERATION_NAME:
            problem = transformers_api.generation_config_problem(data)
        if problem is None:
            files[name] = data
        else:
            notes.append(f"{name} is left out: {problem}")
    files |= {CONFIG_NAME: config_json(plan), INDEX_NAME: index_json(plan)}
    if (problem := _tokenizer_problem(files, scratch)) is not None:
        notes.append(
            f"there is no tokenizer that transformers can load ({problem}); `layerpack generate` "
            "needs one: add it to the checkpoint, and convert again"
        )
    return SmallFiles(files=files, notes=tuple(notes))


def _tokenizer_problem(files: dict[str, bytes], scratch: Path) -> str | None:
    scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=scratch, prefix="tokenizer-") as alone:
        for name, data in files.items():
            (Path(alone) / name).write_bytes(data)
        try:
            transformers_api.load_tokenizer(Path(alone))
        except Exception as reason:  # damaged files break tokenizers in any way
            raise_machine_fault(reason)
            return first_line(reason).replace(alone, "its files")
    return None
