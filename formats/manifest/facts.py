"""The index manifest, `layerpack.json`: what a pack is, and where every tensor of it lies.

docs/format.md is the normative description. `manifest_json.py` reads and writes it.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from enum import Enum

from layerpack.formats.blob.header import TensorEntry
from layerpack.formats.blob.nf4 import SUFFIXES, Nf4State
from layerpack.formats.frames.table import FRAMES_SUFFIX, FrameTable
from layerpack.formats.units import num_elements

MANIFEST_NAME = "layerpack.json"
UNFINISHED_SUFFIX = ".layerpack-partial"
"""After a pack's name: the directory beside it in which `layerpack convert` is making it."""
FORMAT_VERSION = 1


class Role(str, Enum):
    """What a blob is for."""

    EMBEDDING = "embedding"
    LAYER = "layer"
    HEAD = "head"


@dataclass(frozen=True, slots=True, kw_only=True)
class FileEntry:
    """A file of the source, or a small one beside the blobs: config, tokenizer, index.

    `digest` is `xxh3_128:…`; of a source file, `sha256:…` where the Hub states that.
    """

    name: str
    file_bytes: int
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceRecord:
    """Where the weights came from. `kind`: hub, directory or gguf; `revision`: a commit or None."""

    kind: str
    id: str
    revision: str | None
    files: tuple[FileEntry, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """The parts of the model's structure that a pack depends on.

    `layers_path` names the module list of the decoder layers (`model.layers`); `embedding` and
    `head` the weights of the input embedding and of lm_head (the same name when tied).
    """

    architecture: str
    layers_path: str
    num_layers: int
    dtype: str
    embedding: str
    head: str
    num_parameters: int

    @property
    def tied(self) -> bool:
        """Whether lm_head is the embedding."""
        return self.head == self.embedding


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibrated:
    """What the codes of `num_weights` weights were chosen by: see formats/calibration.py."""

    digest: str
    text: str
    num_tokens: int
    num_weights: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """How linear weights of the layers are stored; `head` says whether lm_head is, too.

    `calibration` None: each code is the nearest, each scale the largest weight of its block.
    """

    block_size: int
    double_quant: bool
    head: bool
    calibration: Calibrated | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Compression:
    """How the blobs are compressed: zstd's `level`, by `library`, the version of zstd.

    Another version may give other bytes for the same weights, never other weights.
    """

    level: int
    library: str


@dataclass(frozen=True, kw_only=True)  # no slots: what is derived is kept
class Blob:
    """One file of tensors. `layer` is set for Role.LAYER only.

    `nf4` maps the name of each quantised weight to its state, so that a reader needs to open no
    blob before it streams it. `frames` is set where the file is compressed: `file_bytes` and
    `digest` are those of the file as it is, the tensors' offsets those of its raw bytes.
    """

    role: Role
    layer: int | None
    file: str
    file_bytes: int
    digest: str
    tensors: tuple[TensorEntry, ...]
    nf4: dict[str, Nf4State] = field(default_factory=dict)
    frames: FrameTable | None = None

    @property
    def raw_bytes(self) -> int:
        """Size of the plain safetensors file, whether the blob is stored so or compressed."""
        return self.file_bytes if self.frames is None else self.frames.raw_bytes

    @property
    def ratio(self) -> float:
        """Stored bytes over raw bytes: 1 where nothing is compressed."""
        return self.file_bytes / self.raw_bytes

    @property
    def raw_file(self) -> str:
        """Name of the plain safetensors file."""
        return self.file.removesuffix(FRAMES_SUFFIX)

    @property
    def data_start_bytes(self) -> int:
        """Offset of the first tensor: where a read that leaves out the header begins."""
        return self.tensors[0].offset_bytes if self.tensors else self.raw_bytes

    @functools.cached_property
    def constants(self) -> frozenset[str]:
        """Names of the tensors that belong to a quantised weight: absmax, maps, state."""
        return frozenset(name + suffix for name in self.nf4 for suffix in SUFFIXES)

    @functools.cached_property
    def matrices(self) -> tuple[tuple[int, int], ...]:
        """Shapes of the weights that are matrices, (out, in), in NF4 or not."""
        plain = [
            entry.shape
            for entry in self.tensors
            if entry.name not in self.nf4 and entry.name not in self.constants
        ]
        shapes = [*(state.shape for state in self.nf4.values()), *plain]
        return tuple((shape[0], shape[1]) for shape in shapes if len(shape) == 2)

    @property
    def num_parameters(self) -> int:
        """Weights in the blob, quantised or not; quantisation constants are not counted."""
        count = sum(num_elements(state.shape) for state in self.nf4.values())
        for entry in self.tensors:
            if entry.name not in self.nf4 and entry.name not in self.constants:
                count += num_elements(entry.shape)
        return count

    def tensor(self, name: str) -> TensorEntry:
        """The entry of tensor `name`. Raises KeyError."""
        for entry in self.tensors:
            if entry.name == name:
                return entry
        raise KeyError(name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """All of `layerpack.json`. `blobs` are in the order of use: embedding, layers, head.

    `files` are all the others that belong to the pack, this one left out. `compression` is None
    for a plain pack, `quantization` for one whose weights all have 16 bits.
    """

    producer: str
    source: SourceRecord
    model: Model
    quantization: Quantization | None
    blobs: tuple[Blob, ...]
    files: tuple[FileEntry, ...] = ()
    compression: Compression | None = None

    @property
    def embedding(self) -> Blob:
        """The blob of the input embedding."""
        return self.blobs[0]

    @property
    def layers(self) -> tuple[Blob, ...]:
        """The blobs of the decoder layers, in order."""
        return self.blobs[1:-1]

    @property
    def head(self) -> Blob:
        """The blob of the final norm and, unless tied, lm_head."""
        return self.blobs[-1]

    @property
    def total_bytes(self) -> int:
        """Bytes of all blobs, as they are stored."""
        return sum(blob.file_bytes for blob in self.blobs)

    @property
    def raw_bytes(self) -> int:
        """Bytes of all blobs, uncompressed."""
        return sum(blob.raw_bytes for blob in self.blobs)
