"""The two ends of the model: embedding rows on the way in, lm_head by row ranges on the way out.

Neither is a matrix that must lie on the device. A pass needs as many embedding rows as it has
tokens; lm_head's row ranges take turns in the slots that layers use.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from layerpack.formats.blob import nf4
from layerpack.formats.blob.nf4 import Nf4State
from layerpack.formats.manifest.facts import Blob
from layerpack.formats.pack import Pack
from layerpack.formats.read import Reader
from layerpack.runtime.core.dtypes import TORCH_DTYPES
from layerpack.runtime.core.slices import Part, Slice, head_weight
from layerpack.runtime.network.bind import make_state, offset_tensor, view_tensor
from layerpack.runtime.network.linear import bitsandbytes_functional, nf4_linear
from layerpack.runtime.stream.mapped import populate
from layerpack.runtime.stream.stored import FramedMatrix, tensor_bytes

SliceContext = Callable[[int], contextlib.AbstractContextManager[torch.Tensor]]
"""`with use(index) as storage:` the slice's bytes (uint8) on the compute device."""


class EmbeddingRows:
    """Feeds an embedding module the rows of the tokens at hand, from a mapped or compressed file.

    The module keeps its own forward (some models scale in it); it sees a weight of as many rows
    as there are tokens, and positions in it for ids.
    """

    def __init__(
        self, module: nn.Module, matrix: torch.Tensor | FramedMatrix, device: torch.device
    ) -> None:
        self._matrix = matrix
        self._device = device
        module._parameters["weight"] = nn.Parameter(
            torch.empty((1, matrix.shape[1]), dtype=matrix.dtype, device=device),
            requires_grad=False,
        )
        # Only gradients know it, and it may lie beyond the few rows that a pass sees.
        module.padding_idx = None  # type: ignore[assignment]
        module.register_forward_pre_hook(self._gather)

    def _gather(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        ids = args[0]
        tokens = ids.reshape(-1).cpu()
        if isinstance(self._matrix, torch.Tensor):
            for token in tokens.unique().tolist():
                populate(self._matrix[token].view(torch.uint8), "embedding")
        rows = self._matrix[tokens].to(self._device)
        module._parameters["weight"] = nn.Parameter(rows, requires_grad=False)
        places = torch.arange(rows.shape[0], device=self._device).view(ids.shape)
        return (places, *args[1:])


class SlicedHead(nn.Module):
    """lm_head computed by row ranges: input (…, hidden), output (…, vocabulary)."""

    def __init__(
        self,
        *,
        pack: Pack,
        slices: Sequence[Slice],
        use: SliceContext,
        bias: torch.Tensor | None,
        device: torch.device,
    ) -> None:
        super().__init__()
        blob, weight, num_rows = head_weight(pack)
        self.out_features = num_rows
        self.bias = bias
        self._slices = tuple(slices)
        self._use = use
        self._dtype = TORCH_DTYPES[pack.manifest.model.dtype]
        # Made once: a state's offset is a copy to the device, for which the host would wait.
        self._states: dict[int, Any] = {}
        if (state := blob.nf4.get(weight.name)) is not None:
            self.in_features = state.shape[1]
            constants = _head_constants(pack, blob, weight.name, device)
            offset = offset_tensor(state, device)
            for part in slices:
                assert part.rows is not None
                self._states[part.index] = _rows_state(state, constants, offset, part.rows)
        else:
            self.in_features = weight.shape[1]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits in the input's dtype."""
        if len(self._slices) == 1:
            with self._use(self._slices[0].index) as storage:
                return self.part(x, storage, self._slices[0], self.bias)
        out = torch.empty((*x.shape[:-1], self.out_features), dtype=x.dtype, device=x.device)
        for part in self._slices:
            assert part.rows is not None
            first, last = part.rows
            bias = None if self.bias is None else self.bias[first:last]
            with self._use(part.index) as storage:
                out[..., first:last] = self.part(x, storage, part, bias)
        return out

    def part(
        self, x: torch.Tensor, storage: torch.Tensor, part: Slice, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """Logits (…, rows of `part`) from the slice's bytes."""
        raw = storage[: part.length_bytes]
        if (state := self._states.get(part.index)) is None:
            weight = raw.view(self._dtype).view(-1, self.in_features)
            return nn.functional.linear(x, weight, bias)
        return nf4_linear(x, raw.view(-1, 1), state, bias, self._dtype)


def _head_constants(
    pack: Pack, blob: Blob, name: str, device: torch.device
) -> dict[str, torch.Tensor]:
    constants = {}
    for suffix in (nf4.ABSMAX, nf4.QUANT_MAP, nf4.NESTED_ABSMAX, nf4.NESTED_QUANT_MAP):
        entry = next((e for e in blob.tensors if e.name == name + suffix), None)
        if entry is not None:
            raw = tensor_bytes(pack, blob, entry)
            # A clone is aligned to its element, wherever the bytes lay in the file.
            constants[suffix] = raw.clone().view(TORCH_DTYPES[entry.dtype]).to(device)
    return constants


def _rows_state(
    state: Nf4State,
    constants: dict[str, torch.Tensor],
    offset: torch.Tensor | None,
    rows: tuple[int, int],
) -> Any:
    """The QuantState of a row range; it begins on a block and, if nested, on a nested block."""
    functional = bitsandbytes_functional()
    in_features = state.shape[1]
    first = rows[0] * in_features // state.block_size
    last = nf4.num_blocks((rows[1], in_features), state.block_size)

    def part(suffix: str) -> torch.Tensor:
        whole = constants[suffix]
        if suffix == nf4.ABSMAX:
            return whole[first:last]
        if suffix == nf4.NESTED_ABSMAX:
            nested = nf4.NESTED_BLOCK_SIZE
            return whole[first // nested : -(-last // nested)]
        return whole

    result = make_state(functional, state, part)
    result.shape = torch.Size((rows[1] - rows[0], in_features))
    result.offset = offset
    return result


def embedding_matrix(pack: Pack, reader: Reader) -> torch.Tensor | FramedMatrix:
    """The embedding (vocabulary, hidden): only rows in use are read, by mapping or `reader`."""
    blob = pack.manifest.embedding
    entry = blob.tensor(pack.manifest.model.embedding)
    if blob.frames is not None:
        return FramedMatrix(pack.blob_path(blob), blob.frames, entry, reader)
    return view_tensor(tensor_bytes(pack, blob, entry), entry, entry.offset_bytes)


def attach_ends(
    network: Any,
    pack: Pack,
    device: torch.device,
    *,
    slices: Sequence[Slice],
    use: SliceContext,
    reader: Reader,
) -> None:
    """Embedding rows, lm_head by its slices, and the few other weights outside the layers.

    `use` lends the bytes of one of `slices` on `device`; `reader` reads raw bytes of any blob, for
    as long as the network is in use.
    """
    model = pack.manifest.model
    matrix = embedding_matrix(pack, reader)
    embedding = network.get_input_embeddings()
    EmbeddingRows(embedding, matrix, device)
    elsewhere = {model.embedding, model.head}
    elsewhere |= {model.head + suffix for suffix in nf4.SUFFIXES}
    for blob in (pack.manifest.embedding, pack.manifest.head):
        for entry in blob.tensors:
            if entry.name in elsewhere:
                continue
            raw = tensor_bytes(pack, blob, entry)
            owner, _, leaf = entry.name.rpartition(".")
            network.get_submodule(owner)._parameters[leaf] = nn.Parameter(
                view_tensor(raw, entry, entry.offset_bytes).to(device, copy=True),
                requires_grad=False,
            )
    old_head = network.get_output_embeddings()
    head = SlicedHead(
        pack=pack,
        slices=[part for part in slices if part.part is Part.HEAD],
        use=use,
        bias=getattr(old_head, "bias", None),
        device=device,
    )
    for name, module in list(network.named_modules()):
        if module is old_head:
            network.set_submodule(name, head)
