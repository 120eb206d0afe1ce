"""The draft model that a pack is opened with: a checkpoint, or another pack held as a whole."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from layerpack.formats.errors import CapacityError
from layerpack.formats.manifest.facts import MANIFEST_NAME
from layerpack.formats.pack import Pack
from layerpack.libraries.dtypes import TORCH_DTYPES
from layerpack.runtime.core.slices import pass_slices
from layerpack.runtime.engine.draft import Draft, load_draft
from layerpack.runtime.engine.options import MOST_DRAFT_TOKENS
from layerpack.runtime.network.row_network import RowNetwork
from layerpack.runtime.open_options import OpenOptions
from layerpack.runtime.product.ways import Arithmetic
from layerpack.runtime.tokenizer import load_tokenizer


@contextlib.contextmanager
def open_draft(
    name: str,
    pack: Pack,
    device: torch.device,
    options: OpenOptions,
    open_pack: Callable[[Pack, OpenOptions], AbstractContextManager[Any]],
) -> Iterator[Draft]:
    """The draft, wholly on the device, checked to have the pack's tokens.

    `open_pack` is `opening.opened`. Raises what it does, and SourceError for an unusable draft.
    """
    with contextlib.ExitStack() as stack:
        if (Path(name) / MANIFEST_NAME).is_file():
            draft = _open_pack(name, stack, device, options, open_pack)
        else:
            draft = load_draft(name, device=device, dtype=TORCH_DTYPES[pack.manifest.model.dtype])
        draft.check_tokens(load_tokenizer(pack.path))
        draft.check_rows()
        yield draft


def _open_pack(
    name: str,
    stack: contextlib.ExitStack,
    device: torch.device,
    options: OpenOptions,
    open_pack: Callable[[Pack, OpenOptions], AbstractContextManager[Any]],
) -> Draft:
    pack = Pack.open(name)
    everything = len(pass_slices(pack))
    in_vram = everything if device.type == "cuda" else 0
    limits = replace(options.limits, vram_slices=in_vram, host_slices=everything)
    settings = replace(options, device=str(device), limits=limits, draft=None)
    try:
        model = stack.enter_context(open_pack(pack, settings))
    except CapacityError as reason:
        raise CapacityError(f"draft {name}: does not fit as a whole ({reason})") from reason
    # Its text is nobody's: the fastest products will do.
    rows = model.rows or RowNetwork(model.network, Arithmetic(), None)
    rows.product = None
    return Draft(name=name, rows=rows, tokenizer=load_tokenizer(pack.path))


def with_draft(options: OpenOptions, draft: Draft) -> OpenOptions:
    """The same, with room for the draft's KV cache and the logits of what it proposes."""
    cache_bytes = draft.cache_bytes(options.planned_kv_tokens)
    return replace(
        options,
        proposed_tokens=options.proposed_tokens or MOST_DRAFT_TOKENS,
        extra_vram_bytes=options.extra_vram_bytes + cache_bytes,
    )
