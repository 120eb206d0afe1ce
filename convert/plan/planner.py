"""From a checkpoint's headers to a plan: what goes into which blob, in which order. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from layerpack.convert.options import DEFAULT_BLOCK_SIZE, ConvertOptions
from layerpack.convert.plan.naming import Names, check_shapes, match_names, tied_copy
from layerpack.convert.plan.plan import Action, BlobPlan, ConversionPlan, Item
from layerpack.convert.plan.storage import Storage
from layerpack.convert.plan.structure import Parameter, Structure
from layerpack.convert.source.protocol import SourceTensor
from layerpack.formats.blob import nf4
from layerpack.formats.blob.layout import Nf4Spec, PlainSpec, layout_blob
from layerpack.formats.errors import SourceError, UnsupportedError
from layerpack.formats.frames.coding import zstd_library
from layerpack.formats.frames.table import FRAMES_SUFFIX
from layerpack.formats.manifest.facts import Compression, Quantization, Role
from layerpack.formats.units import num_elements
from layerpack.libraries.dtypes import FLOAT_DTYPES


def plan_conversion(
    structure: Structure,
    storage: Storage,
    tensors: Mapping[str, SourceTensor],
    files: Sequence[str],
    options: ConvertOptions,
    *,
    where: str,
) -> ConversionPlan:
    """The plan for a checkpoint's headers. Raises SourceError or UnsupportedError, by name."""
    planner = _Planner(structure, storage, tensors, options, where)
    if options.zstd_level is not None and not 1 <= options.zstd_level <= 22:
        raise UnsupportedError(f"zstd level {options.zstd_level} is not one of 1 to 22")
    suffix = "" if options.zstd_level is None else FRAMES_SUFFIX
    groups: list[tuple[Role, int | None, str, tuple[Parameter, ...]]]
    # A pass reads few rows of it, by mapping: it stays plain.
    groups = [(Role.EMBEDDING, None, "embed.safetensors", structure.before)]
    for index, layer in enumerate(structure.layers):
        groups.append((Role.LAYER, index, f"layer-{index:03d}.safetensors{suffix}", layer))
    groups.append((Role.HEAD, None, f"head.safetensors{suffix}", structure.after))
    blobs = tuple(
        planner.blob(role, index, file, parameters) for role, index, file, parameters in groups
    )
    rank = {file: place for place, file in enumerate(files)}
    last = [max(rank[file] for file in blob.source_files) for blob in blobs]
    return ConversionPlan(
        structure=structure,
        storage=storage,
        quantization=planner.quantization(),
        blobs=blobs,
        write_order=tuple(sorted(range(len(blobs)), key=lambda place: (last[place], place))),
        notes=(*storage.notes, *_left_out(structure, planner.names)),
        compression=None
        if options.zstd_level is None
        else Compression(level=options.zstd_level, library=zstd_library()),
    )


def _left_out(structure: Structure, names: Names) -> Iterator[str]:
    if structure.whole is not None:
        yield (
            f"the text model of {structure.whole} alone becomes the pack; {len(names.others)} "
            "tensors of its other parts are left out"
        )
    if names.skipped:
        yield f"{len(names.skipped)} tensors are left out for --skip: {names.skipped[0]} …"


class _Planner:
    def __init__(
        self,
        structure: Structure,
        storage: Storage,
        tensors: Mapping[str, SourceTensor],
        options: ConvertOptions,
        where: str,
    ) -> None:
        self._structure, self._storage, self._tensors = structure, storage, tensors
        self._where = where
        names = tensors.keys() - storage.constants
        self.names = match_names(structure, names, skip=options.skip, where=where)
        self._found = self.names.found
        self._tied_copy = tied_copy(structure, tensors)
        kept = [p for p in structure.parameters if self._found[p.name] + nf4.STATE in tensors]
        self._kept = {p.name: self._kept_spec(p) for p in kept}
        shapes = {
            name: tensor.shape
            for name, tensor in tensors.items()
            if name + nf4.STATE not in tensors
        }
        check_shapes(structure, self._found, shapes, where)
        if self._tied_copy is not None:
            copy = {structure.embedding: self._tied_copy}
            check_shapes(structure, self._found | copy, shapes, where)
        self._block_size, self._double_quant = self._quantisation(options)
        self._nf4 = options.nf4
        if self._kept and not self._nf4:
            raise UnsupportedError(
                f"{where}: already NF4; 16 bits can be had of the 16-bit checkpoint alone"
            )
        self._head = options.nf4_head or structure.head in self._kept
        if options.nf4_head and structure.tied:
            raise UnsupportedError(
                f"{where}: lm_head is the embedding in this model, so it cannot be NF4; "
                "leave out --head nf4"
            )

    def quantization(self) -> Quantization | None:
        if not self._nf4:
            return None
        return Quantization(
            block_size=self._block_size, double_quant=self._double_quant, head=self._head
        )

    def blob(
        self, role: Role, layer: int | None, file: str, parameters: Sequence[Parameter]
    ) -> BlobPlan:
        items = {parameter.name: self._item(parameter) for parameter in parameters}
        layout = layout_blob([item.spec for item in items.values()])
        ordered = [items[entry.name] for entry in layout.tensors if entry.name in items]
        return BlobPlan(
            role=role,
            layer=layer,
            file=file,
            layout=layout,
            items=tuple(ordered),
            source_files=tuple(
                dict.fromkeys(
                    self._tensors[name].file for item in ordered for name in self._read(item)
                )
            ),
        )

    def _read(self, item: Item) -> list[str]:
        """Names of the checkpoint's tensors that an item is made from."""
        if item.action is Action.KEEP:
            return [item.source + part.removeprefix(item.spec.name) for part in item.part_names]
        names = [item.source] if item.same_as is None else [item.source, item.same_as]
        scales = [scale.name for name in names if (scale := self._storage.scales.get(name))]
        return names + scales

    def _item(self, parameter: Parameter) -> Item:
        source = self._found[parameter.name]
        dtype = self._structure.dtype if parameter.floating else self._tensors[source].dtype
        spec: PlainSpec | Nf4Spec
        if parameter.name in self._kept:
            action, spec = Action.KEEP, self._kept[parameter.name]
        elif self._to_quantise(parameter):
            action = Action.QUANTISE
            spec = Nf4Spec(
                name=parameter.name,
                shape=parameter.shape,
                block_size=self._block_size,
                double_quant=self._double_quant,
            )
        else:
            action = Action.COPY
            spec = PlainSpec(name=parameter.name, dtype=dtype, shape=parameter.shape)
        same_as = self._tied_copy if parameter.name == self._structure.embedding else None
        if action is not Action.KEEP:
            for name in filter(None, (source, same_as)):
                self._check_dtype(parameter, self._tensors[name])
        item = Item(
            action=action, source=source, spec=spec, dtype=dtype, source_bytes=0, same_as=same_as
        )
        source_bytes = sum(self._tensors[name].length_bytes for name in self._read(item))
        return replace(item, source_bytes=source_bytes)

    def _to_quantise(self, parameter: Parameter) -> bool:
        if not self._nf4 or not parameter.linear or parameter in self._structure.before:
            return False
        if parameter.name == self._structure.head:
            return self._head
        # An NF4 checkpoint's own choice of what stays in 16 bits is kept.
        return parameter not in self._structure.after and not self._storage.nf4

    def _check_dtype(self, parameter: Parameter, tensor: SourceTensor) -> None:
        if not parameter.floating:
            return
        if tensor.dtype not in FLOAT_DTYPES and tensor.name not in self._storage.scales:
            raise UnsupportedError(
                f"{self._where}: tensor {tensor.name} is {tensor.dtype} without scales, from which "
                "layerpack cannot make 16-bit weights"
            )

    def _kept_spec(self, parameter: Parameter) -> Nf4Spec:
        """How an NF4 weight is stored in the checkpoint, from the shapes of its parts."""
        source = self._found[parameter.name]
        absmax = self._tensors.get(source + nf4.ABSMAX)
        if absmax is None or not parameter.linear or not self._storage.nf4:
            raise SourceError(
                f"{self._where}: {source} is not a whole NF4 weight of a linear layer"
            )
        double_quant = source + nf4.NESTED_ABSMAX in self._tensors
        for block_size in sorted(nf4.BLOCK_SIZES, key=lambda size: size != DEFAULT_BLOCK_SIZE):
            parts = nf4.parts(
                source, parameter.shape, block_size=block_size, double_quant=double_quant
            )
            if all(self._has(name, dtype, shape) for name, dtype, shape in parts):
                return Nf4Spec(
                    name=parameter.name,
                    shape=parameter.shape,
                    block_size=block_size,
                    double_quant=double_quant,
                )
        raise SourceError(
            f"{self._where}: the parts of the NF4 weight {source} do not fit the shape "
            f"{list(parameter.shape)} at any block size"
        )

    def _has(self, name: str, dtype: str, shape: tuple[int, ...]) -> bool:
        tensor = self._tensors.get(name)
        if tensor is None or tensor.dtype != dtype:
            return False
        return name.endswith(nf4.STATE) or num_elements(tensor.shape) == num_elements(shape)

    def _quantisation(self, options: ConvertOptions) -> tuple[int, bool]:
        """Block size and double quantisation: as asked, else as the checkpoint has, else 64, on."""
        kept = {(spec.block_size, spec.double_quant) for spec in self._kept.values()}
        if len(kept) > 1:
            raise UnsupportedError(
                f"{self._where}: NF4 weights of several block sizes in one model"
            )
        have = next(iter(kept), (DEFAULT_BLOCK_SIZE, True))
        asked = (
            have[0] if options.block_size is None else options.block_size,
            have[1] if options.double_quant is None else options.double_quant,
        )
        if kept and asked != have:
            raise UnsupportedError(
                f"{self._where}: already NF4 with block size {have[0]}, double quantisation "
                f"{'on' if have[1] else 'off'}, and kept so; leave those options out"
            )
        if asked[0] not in nf4.BLOCK_SIZES:
            raise UnsupportedError(f"block size {asked[0]} is not one of {nf4.BLOCK_SIZES}")
        return asked
