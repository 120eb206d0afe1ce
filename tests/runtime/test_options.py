"""Options that mean nothing are refused where they are made, from Python, too."""

from __future__ import annotations

from typing import Any

import pytest

from layerpack.formats.errors import OptionError
from layerpack.runtime.engine.options import GenerateOptions
from layerpack.runtime.open_options import OpenOptions
from layerpack.runtime.plan.plan import Limits


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        (GenerateOptions, "max_new_tokens", 0),
        (GenerateOptions, "max_new_tokens", True),
        (GenerateOptions, "temperature", float("nan")),
        (GenerateOptions, "top_p", 1.5),
        (GenerateOptions, "top_k", -1),
        (GenerateOptions, "min_p", 1.01),
        (GenerateOptions, "seed", 1 << 64),
        (GenerateOptions, "draft_tokens", 1.0),
        (GenerateOptions, "prompt_lookup_tokens", 0),
        (OpenOptions, "context_tokens", 0),
        (OpenOptions, "context_tokens", 4096.0),
        (OpenOptions, "proposed_tokens", -1),
        (OpenOptions, "extra_vram_bytes", "1G"),
        (OpenOptions, "watchdog_s", 0),
        (OpenOptions, "watchdog_s", float("inf")),
        (Limits, "vram_bytes", -1),
        (Limits, "ram_bytes", 1.5),
        (Limits, "num_slots", 1),
        (Limits, "host_slices", -1),
        (Limits, "vram_slices", False),
    ],
)
def test_values_that_mean_nothing(kind: Any, name: str, value: object) -> None:
    with pytest.raises(OptionError, match=rf"^{name} "):
        kind(**{name: value})
