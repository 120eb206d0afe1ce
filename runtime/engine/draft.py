"""A small model that proposes tokens, for the large one to check many of in one pass.

The draft is loaded and made to speak the same vocabulary; whatever it says, the text is that of the
large model alone.
Source: Leviathan et al., Fast Inference from Transformers via Speculative Decoding,
https://arxiv.org/abs/2211.17192.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from layerpack.formats.errors import CapacityError, SourceError
from layerpack.formats.text import first_line, is_repo_id
from layerpack.libraries.transformers_api import quiet
from layerpack.runtime.core.device_errors import is_device_error
from layerpack.runtime.engine.hub_reach import why_out_of_reach
from layerpack.runtime.network.row_network import RowNetwork, why_no_rows
from layerpack.runtime.plan.needs import cache_bytes
from layerpack.runtime.product.ways import Arithmetic


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """A draft model, resident on the large model's device. `name` is for messages."""

    name: str
    rows: RowNetwork
    tokenizer: Any

    @property
    def network(self) -> Any:
        """transformers' model."""
        return self.rows.network

    def check_tokens(self, tokenizer: Any) -> None:
        """Raises SourceError if the large model's `tokenizer` gives other tokens."""
        if self.tokenizer.get_vocab() != tokenizer.get_vocab():
            raise SourceError(
                f"draft {self.name}: its tokenizer has another vocabulary than the pack's; "
                "use a smaller model of the same family"
            )

    def check_rows(self) -> None:
        """Raises SourceError if it cannot try several tokens in a pass."""
        if (why := why_no_rows(self.network)) is not None:
            raise SourceError(f"draft {self.name}: cannot try several tokens at a time ({why})")

    def fit(self, vocab_size: int) -> None:
        """Let the draft take and give tokens of a vocabulary padded to `vocab_size` entries.

        Models of one family pad the same vocabulary to different sizes (Qwen2.5: 151,936 up to
        3B, 152,064 for 72B). The draft's logits are cut or filled up, a filled entry being
        infinitely unlikely; an id that its embedding lacks is read as its last entry.
        """
        text_config = self.network.config.get_text_config()
        have = text_config.vocab_size
        if vocab_size == have:
            return

        def fit_logits(_module: Any, _args: Any, logits: torch.Tensor) -> torch.Tensor:
            if vocab_size < have:
                return logits[..., :vocab_size]
            return nn.functional.pad(logits, (0, vocab_size - have), value=float("-inf"))

        def fit_ids(_module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (args[0].clamp(max=have - 1), *args[1:])

        self.network.get_output_embeddings().register_forward_hook(fit_logits)
        self.network.get_input_embeddings().register_forward_pre_hook(fit_ids, prepend=True)
        text_config.vocab_size = vocab_size
        self.network.config.vocab_size = vocab_size

    def cache_bytes(self, context_tokens: int) -> int:
        """Bytes of the draft's KV cache for the whole context."""
        config = self.network.config.get_text_config()
        return cache_bytes(
            config.to_dict(),
            num_layers=config.num_hidden_layers,
            element_bytes=self.network.dtype.itemsize,
            context_tokens=context_tokens,
        )


def load_draft(name: str, *, device: torch.device, dtype: torch.dtype) -> Draft:
    """A plain checkpoint, from a directory or the Hub, wholly on `device`.

    Where the Hub cannot be reached, from its local cache. Raises SourceError, CapacityError (the
    device has not enough memory for it).
    """
    if not (Path(name).exists() or is_repo_id(name)):
        raise SourceError(f"draft {name}: no such directory, and not the name of a Hub repository")
    transformers = quiet()
    unreachable = why_out_of_reach(name)
    from_here = unreachable is not None
    try:
        # Not `device_map`: transformers wants accelerate for it.
        network = transformers.AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, trust_remote_code=False, local_files_only=from_here
        )
        if network.device != device:
            network = network.to(device)
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            name, trust_remote_code=False, local_files_only=from_here
        )
    except torch.OutOfMemoryError as reason:
        raise CapacityError(
            f"draft {name}: the device has too little memory for it; use a smaller one"
        ) from reason
    except Exception as reason:  # the tokenizers package raises nothing more specific
        if is_device_error(reason):
            raise
        if unreachable is not None and isinstance(reason, OSError):
            raise SourceError(
                f"draft {name}: {unreachable}, the local cache lacks it, and there is no such "
                "directory here; check the name and the network"
            ) from reason
        line = first_line(reason)
        if Path(name).is_dir():
            line = line.replace(os.path.join(name, ""), "")  # the message begins with it
        # An OSError: the Hub was asked, as the name is of no directory, and gave nothing.
        missing = isinstance(reason, OSError) and not Path(name).exists()
        here = ", and there is no such directory here" if missing else ""
        raise SourceError(f"draft {name}: cannot be loaded ({line}){here}") from reason
    rows = RowNetwork(network.eval(), Arithmetic(), None, resident=True)
    return Draft(name=name, rows=rows, tokenizer=tokenizer)
