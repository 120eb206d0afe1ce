"""Numbers on the command line: finite ones in a range, and what may seed a generator."""

from __future__ import annotations

import math
from typing import Any

import click


class FiniteRange(click.FloatRange):
    """A `click.FloatRange` that refuses `nan`, which no bound does, and `inf`."""

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        """The number; a usage error otherwise."""
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number", param, ctx)
        return number


POSITIVE = FiniteRange(min=0, min_open=True)
SEED = click.IntRange(0, 2**64 - 1)
"""What torch.manual_seed takes, but for negative numbers, which are other names of these."""
