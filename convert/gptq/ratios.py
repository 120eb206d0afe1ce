"""Which scales are tried, on every device."""

from __future__ import annotations

RATIOS = (1.1, 1.05, 1.0, 0.95, 0.9, 0.85, 0.8, 0.75)
"""Of a block's largest weight."""
