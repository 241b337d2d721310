"""Results as tables of text. Markdown is written here; the command line shows the same cells with rich."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import report
from .providers import PRODUCTS
from .report import Row


class Table(NamedTuple):
    """Cells below a heading; `words` columns at the left are text, the others numbers."""

    title: str
    head: list[str]
    rows: list[list[str]]
    words: int = 1

    def markdown(self) -> str:
        """Columns of numbers are aligned at the right."""
        line = ["---"] * self.words + ["---:"] * (len(self.head) - self.words)
        lines = [f"| {' | '.join(cells)} |" for cells in (self.head, *self.rows)]
        table = [lines[0], f"|{'|'.join(line)}|", *lines[1:]]
        return "\n".join([self.title, "", *table] if self.title else table)


def number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def time(milliseconds: float | None) -> str:
    if milliseconds is None:
        return "–"
    return f"{milliseconds:.{2 if milliseconds < 10 else 1 if milliseconds < 100 else 0}f}"


def _mebibytes(row: Row) -> str:
    found = (row["memory"] or {}).get("peak_extra_bytes")
    return number(None if found is None else found / 2**20, 0)


def bench_table(rows: list[Row], title: str = "") -> Table:
    """A line for each provider that was timed, with the workload and the mode in front where there are several."""
    timed = [row for row in rows if row["time_ms"]]
    several = [key for key in ("workload", "mode") if len({row[key] for row in timed}) > 1]
    products = [name for name in PRODUCTS if any(row["provider"] == name for row in timed)]
    head = [*several, "provider", "median ms", "quartiles", "× reference", *(f"/ {name}" for name in products)]
    lines = []
    for row in timed:
        times, rates, ratios = row["time_ms"], row["rates"], row["ratios"]
        cells = [*(row[key] for key in several), report.label(row["provider"])]
        cells += [time(times["median"]), f"{time(times['q1'])}–{time(times['q3'])}"]
        cells += [number(ratios["speedup_vs_reference"], 1)]
        cells += [number(ratios[f"time_vs_{name.replace('-', '_')}"], 2) for name in products]
        cells += [_mebibytes(row), number(rates["tflops"], 2), number(rates["gb_per_s"], 1)]
        lines.append(cells)
    return Table(title, [*head, "extra MiB", "TFLOP/s", "GB/s"], lines, len(several) + 1)


def kernel_table(rows: list[Row]) -> Table:
    """A line for each kernel of each provider that takes at least a hundredth of its time."""
    lines = []
    for row in rows:
        found = row["kernels"] or {}
        share = {name: ms / sum(found.values()) for name, ms in found.items()}
        lines += [
            [row["provider"], n[:70], f"{found[n]:.3f}", f"{100 * share[n]:.0f} %"] for n in found if share[n] > 0.01
        ]
    return Table("Kernels of one run", ["provider", "kernel", "ms", "share"], lines, 2)


def density_table(rows: list[Row]) -> Table:
    """A line for each density, a column for each provider's median; the reference's work does not depend on it."""
    names = list(dict.fromkeys(row["provider"] for row in rows if row["provider"] != "reference"))
    medians = {(row["density"], row["provider"]): report.median(row) for row in rows}
    head = ["active at 2⁻¹⁶", *(f"{name}, ms" for name in names)]
    densities = dict.fromkeys(row["density"] for row in rows)
    lines = [[f"{density:.1e}", *(time(medians.get((density, name))) for name in names)] for density in densities]
    return Table(f"Reference at any share: {number(report.reference_median(rows), 0)} ms.", head, lines, 0)


def accuracy_tables(rows: list[Row]) -> list[Table]:
    """Per dtype a table of ∂x / ∂w errors and one of loss errors and certificates; then the shares kept."""

    def errors(row: Row) -> str:
        text = f"{row['errors']['grad_x']:.0e} / {row['errors']['grad_w']:.0e}"
        return f"**{text}**" if row["within_rule"] else text

    def loss(row: Row) -> str:
        return f"{row['errors']['loss']:.0e}, {row['dropped']:.0e}"

    tables, first = [], rows[0]
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        own = [row for row in rows if row["dtype"] == dtype]
        bold = "; **bold**: within 4 × the reference's error + 1e-6, loss too" if dtype == "float32" else ""
        about = f"Embeddings {dtype}, weights float32, N={first['n']}, backend {first['backend']}"
        tables.append(_by_filter(f"{about}: error of ∂x / ∂w{bold}.", own, errors, ("grad_x", "grad_w")))
        about = f"Embeddings {dtype}: error of the loss, and the certificate `stats.dropped`."
        tables.append(_by_filter(about, own, loss, ("loss",)))
    own = [row for row in rows if row["dtype"] == first["dtype"]]
    return [*tables, _by_filter("Share of the pairs kept.", own, lambda row: f"{row['active']:.1e}", ())]


def _by_filter(title: str, rows: list[Row], cell: Callable[[Row], str], of_reference: tuple[str, ...]) -> Table:
    """A column for each filter, and one for the reference where its errors are named."""
    filters = list(dict.fromkeys(row["filter_eps"] for row in rows))
    head = ["geometry", "D", "C", *["reference"] * bool(of_reference), *map(report.filter_name, filters)]
    lines = []
    for key in dict.fromkeys((row["geometry"], row["d"], row["c"]) for row in rows):
        group = {row["filter_eps"]: row for row in rows if (row["geometry"], row["d"], row["c"]) == key}
        cells = [str(part) for part in key]
        if of_reference:
            errors = next(iter(group.values()))["reference"]
            cells.append(" / ".join(f"{errors[name]:.0e}" for name in of_reference) if errors else "–")
        lines.append([*cells, *("–" if group[f]["errors"] is None else cell(group[f]) for f in filters)])
    return Table(title, head, lines, len(head))


def plain_table(rows: list[Row]) -> Table:
    """The rows as they are: their keys are the head, texts come first, numbers have two digits."""
    cells = [[value if isinstance(value, str) else f"{value:.2g}" for value in row.values()] for row in rows]
    words = sum(isinstance(value, str) for value in rows[0].values()) if rows else 0
    return Table("", list(rows[0]) if rows else [], cells, words)


def write_table(rows: list[Row], settings: dict[str, Any], out: Path | None) -> None:
    """Prints rows that were computed on the CPU as they are, and writes a results file where there is an `out`."""
    print(plain_table(rows).markdown())
    if out is not None:
        report.save({**report.new_report("table", settings, torch.device("cpu")), "rows": rows}, out)
