"""Draw seconds per token by tool and memory: `python docs/picture.py` writes docs/tokens.svg.

The figures are those of README.md and docs/performance.md, each with its machine and command there.
"""

from __future__ import annotations

import html
import math
from pathlib import Path

ROWS: tuple[tuple[str, float | None, bool], ...] = (
    ("72B, 8 GiB of VRAM, 16 GB of memory, disk of 1.7 GB/s", None, False),
    ("llama.cpp", 33.0, False),
    ("layerpack", 12.6, True),
    ("the same card, the whole model in memory", None, False),
    ("AirLLM", 41.6, False),
    ("RabbitLLM", 30.3, False),
    ("llama.cpp", 1 / 1.93, False),
    ("layerpack", 1 / 1.43, True),
    ("layerpack, a draft that is right 4 times a pass", 0.1747, True),
    ("the same, 16 answers at a time", None, False),
    ("llama.cpp", 1 / 6.1, False),
    ("layerpack", 1 / 21.96, True),
    ("96 answers at a time", None, False),
    ("layerpack", 1 / 127.84, True),
)
_LEAST_S, _MOST_S = 0.005, 60.0
_LEFT, _WIDTH, _ROW = 290, 380, 22


def draw() -> str:
    """The picture as SVG: a bar for each row, on a logarithmic scale."""
    height = _ROW * len(ROWS) + 40
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_LEFT + _WIDTH + 80} {height}" '
        'font-family="sans-serif" font-size="13" role="img">',
        "<title>Seconds per token of a 72B model, by tool and memory</title>",
        '<rect width="100%" height="100%" fill="#ffffff"/>',
    ]
    for tick in (0.01, 0.1, 1, 10):
        x = _x(tick)
        lines.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="8" y2="{height - 26}" stroke="#d8dee4"/>'
            f'<text x="{x:.1f}" y="{height - 10}" text-anchor="middle" fill="#57606a">'
            f"{tick:g} s</text>"
        )
    for place, (label, seconds, is_ours) in enumerate(ROWS):
        y = 10 + place * _ROW
        if seconds is None:
            text = html.escape(label)
            lines.append(f'<text x="8" y="{y + 15}" font-weight="bold">{text}</text>')
            continue
        lines.append(
            f'<text x="{_LEFT - 8}" y="{y + 15}" text-anchor="end">{html.escape(label)}</text>'
            f'<rect x="{_LEFT}" y="{y + 3}" width="{_x(seconds) - _LEFT:.1f}" height="{_ROW - 6}" '
            f'fill="{"#0969da" if is_ours else "#afb8c1"}"/>'
            f'<text x="{_x(seconds) + 6:.1f}" y="{y + 15}">{seconds:.2g} s</text>'
        )
    return "\n".join([*lines, "</svg>", ""])


def _x(seconds: float) -> float:
    share = math.log(seconds / _LEAST_S) / math.log(_MOST_S / _LEAST_S)
    return _LEFT + _WIDTH * share


if __name__ == "__main__":
    Path(__file__).with_name("tokens.svg").write_text(draw(), encoding="utf-8")
