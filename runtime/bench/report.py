"""What `layerpack bench` found: figures per row, as a table, as JSON, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from layerpack.formats.errors import TargetError


@dataclass(frozen=True, slots=True, kw_only=True)
class RowResult:
    """One row, measured. Bytes and seconds are those of one pass through the whole model.

    `link_bytes` went from host memory to the device, `disk_bytes` came from the disk;
    `moved_bytes` is what the row's way had to bring to the place of use. `timed_layers` is None
    where all layers were timed, else the figures are scaled up by bytes from so many.
    """

    name: str
    switches: str
    median_s: float
    min_s: float
    max_s: float
    passes: int
    moved_bytes: int
    link_bytes: int
    disk_bytes: int
    timed_layers: int | None
    note: str

    @property
    def gb_s(self) -> float:
        """Bytes moved over the median."""
        return self.moved_bytes / 1e9 / self.median_s


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftOut:
    """A row that was not measured."""

    name: str
    switches: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Everything. Bandwidths are the best of those measured between the rows; None: not crossed."""

    machine: dict[str, Any]
    pack: str
    num_layers: int
    context_tokens: int
    link_gb_s: float | None
    disk_gb_s: float | None
    rows: tuple[RowResult, ...]
    left_out: tuple[LeftOut, ...]
    interrupted: bool = field(default=False)

    def limit_s(self, row: RowResult) -> float | None:
        """Bytes over bandwidth of the slowest link that the row crosses; None if there is none."""
        terms = [
            moved / (gb_s * 1e9)
            for moved, gb_s in (
                (row.link_bytes, self.link_gb_s),
                (row.disk_bytes, self.disk_gb_s),
            )
            if moved and gb_s
        ]
        return max(terms, default=None)

    def ratio(self, row: RowResult) -> float | None:
        """Seconds per pass over the limit."""
        limit_s = self.limit_s(row)
        return None if limit_s is None else row.median_s / limit_s

    def to_json(self) -> dict[str, Any]:
        """A JSON object: the fields of this class, each row with `gb_s`, `limit_s` and `ratio`."""
        rows = [
            asdict(row) | {"gb_s": row.gb_s, "limit_s": self.limit_s(row), "ratio": self.ratio(row)}
            for row in self.rows
        ]
        return {"benchmark": "layerpack bench"} | asdict(self) | {"rows": rows}

    def table(self) -> str:
        """For people: one line a row, what the rows are, what was left out and why."""
        links = [
            f"{name} {gb_s:.2f} GB/s"
            for name, gb_s in (("link", self.link_gb_s), ("disk", self.disk_gb_s))
            if gb_s
        ]
        lines = [
            f"{self.pack}, {self.num_layers} layers, {self.context_tokens} tokens in the cache; "
            f"{self.machine['device']}; {', '.join(links) or 'no link measured'}",
            "",
            *_aligned([_HEAD, *(self._cells(row) for row in self.rows)]),
            "",
            _LEGEND,
            "",
            *(f"{row.name}: {row.switches}{_noted(row)}" for row in self.rows),
        ]
        if self.left_out:
            lines += ["", "left out:"]
            lines += [f"{row.name}: {row.reason}" for row in self.left_out]
        if self.interrupted:
            lines += ["", "interrupted; later rows were not measured"]
        return "\n".join(lines)

    def _cells(self, row: RowResult) -> tuple[str, ...]:
        limit_s, ratio = self.limit_s(row), self.ratio(row)
        return (
            row.name,
            f"{row.median_s:.3f}{'*' if row.timed_layers else ''}",
            f"{row.min_s:.3f}-{row.max_s:.3f}",
            str(row.passes),
            f"{row.moved_bytes / 1e9:.2f}",
            f"{row.gb_s:.2f}",
            "-" if limit_s is None else f"{limit_s:.3f}",
            "-" if ratio is None else f"{ratio:.2f}",
        )

    def plot(self, path: Path) -> None:
        """Draw seconds per step, with each row's limit, to a PNG file. Raises TargetError."""
        figure_class = plotting()
        rows = list(reversed(self.rows))
        figure = figure_class(figsize=(9, 1.5 + 0.35 * max(len(rows), 1)), layout="constrained")
        axes = figure.add_subplot()
        places = range(len(rows))
        axes.barh(
            places,
            [row.median_s for row in rows],
            color=["#4878a8" if "layerpack" in row.switches else "#b0b0b0" for row in rows],
        )
        for place, row in zip(places, rows, strict=True):
            axes.text(row.median_s, place, f" {row.median_s:.3g}", va="center", fontsize=8)
            if (limit_s := self.limit_s(row)) is not None:
                axes.plot([limit_s, limit_s], [place - 0.4, place + 0.4], color="#c03028")
        axes.set_yticks(places, [row.name for row in rows])
        axes.set_xscale("log")
        axes.margins(x=0.15)
        axes.set_xlabel("seconds per step (log); red: bytes over the slowest link's bandwidth")
        axes.set_title(f"{self.pack} on {self.machine['device']}", fontsize=9)
        try:
            figure.savefig(path, format="png", dpi=150)
        except OSError as reason:
            raise TargetError(f"{path}: cannot be written ({reason.strerror})") from reason


def plotting() -> Any:
    """matplotlib's Figure, without any window. Raises TargetError naming the extra to install."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise TargetError(
            "--plot needs the package matplotlib; pip install layerpack[plot]"
        ) from None
    return Figure


_HEAD = ("row", "s/step", "min-max", "passes", "GB", "GB/s", "limit s", "ratio")
_LEGEND = (
    "limit s: bytes over the bandwidth of the slowest link; ratio: s/step over it; "
    "*: scaled up from a few layers"
)


def _noted(row: RowResult) -> str:
    return f" ({row.note})" if row.note else ""


def _aligned(table: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(cells[column]) for cells in table) for column in range(len(table[0]))]
    return [
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        for cells in table
    ]
