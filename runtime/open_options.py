"""How a model is to be opened."""

from __future__ import annotations

from dataclasses import dataclass, field

from layerpack.formats.errors import OptionError
from layerpack.runtime.core.checked import is_number, require_wholes
from layerpack.runtime.plan.plan import Limits

DEFAULT_CONTEXT_TOKENS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenOptions:
    """How to open a model.

    `device`: auto, cpu, cuda or cuda:N. `context_tokens`: the most tokens, prompt included, that
    memory is set aside for; runs end there. None: 4,096, which on a CPU bounds no run, only what
    the plan counts with.

    `kv_tokens`: the tokens of all sequences at a time together, where many share the passes; None:
    those of one.

    `direct`: force direct (True) or buffered (False) disk reads. `may_register`: whether mapped
    files may be registered with CUDA. `refresh`: measure the machine's links again. `draft`: a
    smaller model of the same family, a directory or Hub repo or pack, that proposes tokens; it
    stays on the device. `proposed_tokens`: the most that a draft or prompt lookup will propose in a
    pass. `extra_vram_bytes`: VRAM to leave for others. `attention`: which of transformers'
    implementations to use (None: its own choice). `same_bits`: let a model that lies in VRAM as a
    whole compute single tokens as it does many; others do anyway.
    """

    device: str = "auto"
    limits: Limits = field(default_factory=Limits)
    context_tokens: int | None = None
    kv_tokens: int | None = None
    direct: bool | None = None
    may_register: bool = True
    draft: str | None = None
    proposed_tokens: int = 0
    extra_vram_bytes: int = 0
    watchdog_s: float = 60.0
    refresh: bool = False
    attention: str | None = None
    same_bits: bool = False

    def __post_init__(self) -> None:
        """Raises OptionError for values that mean nothing."""
        require_wholes(
            self, {"context_tokens": 1, "kv_tokens": 1, "proposed_tokens": 0, "extra_vram_bytes": 0}
        )
        if not is_number(self.watchdog_s) or self.watchdog_s <= 0:
            raise OptionError(f"watchdog_s {self.watchdog_s!r}: give a number above 0")

    @property
    def planned_kv_tokens(self) -> int:
        """Tokens of the KV cache that the plan counts with."""
        return self.kv_tokens or self.planned_tokens

    @property
    def planned_tokens(self) -> int:
        """What the plan counts with."""
        return self.context_tokens or DEFAULT_CONTEXT_TOKENS
