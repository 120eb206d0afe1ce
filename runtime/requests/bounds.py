"""What a model's requests may take, and what its passes have carried."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """`context` is the model's, `reserved` the longest sequence that memory was set aside for.

    None where there is no bound. `kv_tokens` are set aside for all sequences together.
    `rows_are_free`: the device waits for weights longer than some more tokens take; `free_rows`: so
    many, where that was measured.
    """

    context: int | None
    reserved: int | None
    kv_tokens: int
    rows_are_free: bool
    free_rows: int


@dataclass(slots=True, kw_only=True)
class Counts:
    """What a scheduler has done so far, for whoever watches."""

    passes: int = 0
    pass_s: float = 0.0
    rows: int = 0
    free_rows: int = 0
    generated_tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    proposed_tokens: int = 0
    accepted_tokens: int = 0
    running: int = 0
