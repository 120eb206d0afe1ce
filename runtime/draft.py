"""A small model that proposes tokens, for the large one to check many of in one pass.

transformers' assisted generation does the proposing and checking; with greedy decoding the text is
that of the large model alone. Here the draft is loaded, and made to speak the same vocabulary.
Source: Leviathan et al., Fast Inference from Transformers via Speculative Decoding,
https://arxiv.org/abs/2211.17192.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from layerpack.formats.errors import SourceError


def load_draft(name: str, device: torch.device) -> tuple[Any, Any]:
    """(model, tokenizer) of a checkpoint directory or Hub repo, wholly on `device`, in 16 bits.

    A pack is a checkpoint, too. Raises SourceError.
    """
    import transformers

    transformers.logging.set_verbosity_error()
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            name, dtype="auto", device_map={"": device}, trust_remote_code=False
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, ImportError, RuntimeError) as reason:
        line = (str(reason).strip().splitlines() or [repr(reason)])[0]
        raise SourceError(f"--draft {name}: cannot be loaded ({line})") from reason
    return model.eval(), tokenizer


def fit_draft(draft: Any, draft_tokenizer: Any, *, network: Any, tokenizer: Any) -> None:
    """Make `draft` usable beside `network`. Raises SourceError if they name tokens differently.

    Models of one family pad the same vocabulary to different sizes (Qwen2.5: 151,936 up to 3B,
    152,064 for 72B). The draft's logits are cut or filled to the large model's number; a filled
    entry is never proposed.
    """
    if draft_tokenizer.get_vocab() != tokenizer.get_vocab():
        raise SourceError(
            "--draft: its tokenizer has another vocabulary than the pack's; "
            "use a smaller model of the same family"
        )
    wanted = network.config.get_text_config().vocab_size
    have = draft.config.get_text_config().vocab_size
    if wanted == have:
        return

    def fit(_module: Any, _args: Any, logits: torch.Tensor) -> torch.Tensor:
        if wanted < have:
            return logits[..., :wanted]
        return nn.functional.pad(logits, (0, wanted - have), value=float("-inf"))

    draft.get_output_embeddings().register_forward_hook(fit)
    draft.config.get_text_config().vocab_size = wanted
    draft.config.vocab_size = wanted


def draft_cache_bytes(draft: Any, context_tokens: int) -> int:
    """Bytes of the draft's KV cache for the whole context."""
    config = draft.config.get_text_config()
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    width = torch.empty((), dtype=draft.dtype).element_size()
    return int(2 * config.num_hidden_layers * kv_heads * head_dim * width * context_tokens)
