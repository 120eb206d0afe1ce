"""What a conversion is about, noted in its journal for whoever looks at it before it is done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard

from layerpack.formats.blob.header import is_size
from layerpack.formats.manifest import facts as pack

if TYPE_CHECKING:  # both bring in torch, which a look at a journal does without
    from layerpack.convert.plan.plan import ConversionPlan
    from layerpack.convert.source.protocol import Source


@dataclass(frozen=True, slots=True, kw_only=True)
class Outline:
    """The source, its files' digests left empty, and the blobs to be: file -> bytes, in order.

    `place` is where the source really is.
    """

    source: pack.SourceRecord
    place: str
    architecture: str
    blobs: dict[str, int]

    def fields(self) -> dict[str, Any]:
        """A JSON object that `parse_outline` reads."""
        return {
            "kind": self.source.kind,
            "id": self.source.id,
            "place": self.place,
            "revision": self.source.revision,
            "files": {file.name: file.file_bytes for file in self.source.files},
            "architecture": self.architecture,
            "blobs": self.blobs,
        }


def outline_of(plan: ConversionPlan, source: Source) -> Outline:
    """The outline of a planned conversion."""
    files = {file.name: file.file_bytes for file in source.files}
    return Outline(
        source=_source(source.kind, source.id, source.revision, files),
        place=source.place,
        architecture=plan.structure.architecture,
        blobs={blob.file: blob.layout.file_bytes for blob in plan.blobs},
    )


def parse_outline(fields: Mapping[str, Any]) -> Outline | None:
    """The outline in a journal, or None if it has none that is whole."""
    kind, name, revision = fields.get("kind"), fields.get("id"), fields.get("revision")
    files, blobs = fields.get("files"), fields.get("blobs")
    place, architecture = fields.get("place"), fields.get("architecture")
    if not (isinstance(kind, str) and isinstance(name, str)):
        return None
    if not (isinstance(place, str) and isinstance(architecture, str)):
        return None
    if not (_are_sizes(files) and _are_sizes(blobs)):
        return None
    return Outline(
        source=_source(kind, name, revision if isinstance(revision, str) else None, files),
        place=place,
        architecture=architecture,
        blobs=blobs,
    )


def _source(
    kind: str, name: str, revision: str | None, files: Mapping[str, int]
) -> pack.SourceRecord:
    return pack.SourceRecord(
        kind=kind,
        id=name,
        revision=revision,
        files=tuple(
            pack.FileEntry(name=file, file_bytes=file_bytes, digest="")
            for file, file_bytes in files.items()
        ),
    )


def _are_sizes(value: Any) -> TypeGuard[dict[str, int]]:
    return isinstance(value, dict) and all(map(is_size, value.values()))
