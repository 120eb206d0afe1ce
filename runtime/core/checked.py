"""Values of options that mean something; others are refused in one line."""

from __future__ import annotations

import math

from layerpack.formats.errors import OptionError


def require_whole(name: str, value: object, least: int, most: int | None = None) -> None:
    """Raises OptionError unless `value` is a whole number from `least` to `most`."""
    if type(value) is not int or value < least or (most is not None and value > most):
        bounds = f"from {least} on" if most is None else f"from {least} to {most}"
        raise OptionError(f"{name} {value!r}: give a whole number {bounds}")


def require_wholes(options: object, least: dict[str, int]) -> None:
    """The same for several fields; None, which leaves the choice to layerpack, will do."""
    for name, smallest in least.items():
        if (value := getattr(options, name)) is not None:
            require_whole(name, value, smallest)


def is_number(value: object) -> bool:
    """Whether it is a finite int or float, and no bool."""
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]
