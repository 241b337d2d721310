"""`python -m benchmarks.tables README.md docs/*.md`: writes the tables of the documents from the results files.

A table stands between two comments, the first of which says what it is made from:

    <!-- table: benchmarks/results/cpu-random.json mode=both providers=reference,native -->
    <!-- end -->

`mode` is "both" and `providers` are all if left out; both may be several. A file of errors gives all its tables, or those
of some `dtypes`. Below, a line names machine, versions, commit and date, so that no figure in a document was typed.
Exit status: 0; 1 with --check where a document is not what the files say; 2 for a file that is missing or not a result.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from sface_kernels.bench import machine, report

from .accuracy import markdown as accuracy_tables
from .arguments import Parser

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"(<!-- table: (\S+)((?: \w+=\S+)*) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
PRODUCTS = ("mm-fp32", "mm-tf32", "mm-bf16")


def bench_table(rows: list[dict[str, Any]]) -> list[str]:
    """A line for each provider that was timed, with the workload and the mode in front where there are several."""
    timed = [row for row in rows if row["time_ms"]]
    several = [key for key in ("workload", "mode") if len({row[key] for row in timed}) > 1]
    products = [name for name in PRODUCTS if any(row["provider"] == name for row in timed)]
    hot = any(row["hot_ms"] for row in timed)
    head = [*several, "provider", "median ms", "quartiles", *["hot ms"] * hot, "× reference"]
    head += [*(f"/ {name}" for name in products), "extra MiB", "TFLOP/s", "GB/s"]
    lines = [_line(head), "|" + "---|" * (1 + len(several)) + "---:|" * (len(head) - 1 - len(several))]
    for row in timed:
        time, rates, ratios = row["time_ms"], row["rates"], row["ratios"]
        cells = [*(row[key] for key in several), report.label(row["provider"])]
        cells += [_time(time["median"]), f"{_time(time['q1'])}–{_time(time['q3'])}"]
        cells += [_time(row["hot_ms"]["median"]) if row["hot_ms"] else "–"] * hot
        cells += [_number(ratios["speedup_vs_reference"], 1)]
        cells += [_number(ratios[f"time_vs_{name.replace('-', '_')}"], 2) for name in products]
        cells += [_mebibytes(row["memory"]), f"{rates['tflops']:.2f}", f"{rates['gb_per_s']:.1f}"]
        lines.append(_line(cells))
    return lines


def density_table(rows: list[dict[str, Any]]) -> list[str]:
    """A line for each density, a column for each provider's median, and the reference's in the heading."""
    names = list(dict.fromkeys(row["provider"] for row in rows if row["provider"] != "reference"))
    reference = report.reference_median(rows)
    head = ["active at 2⁻¹⁶", *(f"{name}, ms" for name in names)]
    lines = [_line(head), "|" + "---:|" * len(head)]
    for density in dict.fromkeys(row["density"] for row in rows):
        own = {row["provider"]: row for row in rows if row["density"] == density}
        medians = [own[name]["time_ms"]["median"] if own.get(name, {}).get("time_ms") else None for name in names]
        lines.append(_line([f"{density:.1e}", *("–" if value is None else _time(value) for value in medians)]))
    return [*lines, "", f"Reference at any share: {_number(reference, 0)} ms."]


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _time(milliseconds: float) -> str:
    return f"{milliseconds:.{2 if milliseconds < 10 else 1 if milliseconds < 100 else 0}f}"


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _mebibytes(memory: dict[str, Any] | None) -> str:
    return f"{memory['peak_extra_bytes'] / 2**20:.0f}" if memory and "peak_extra_bytes" in memory else "–"


def origin(path: str, result: dict[str, Any]) -> str:
    versions, commit = result["versions"], result["commit"] or "an unknown commit"
    made = f"{machine.title(result['machine'])}; torch {versions['torch']}; {result['date'][:10]}, commit {commit[:10]}"
    others = max((row.get("other_busy_cores") or 0 for row in result["rows"]), default=0)
    noise = f" Other processes used up to {others:.1f} cores meanwhile." if others > machine.BUSY_LIMIT else ""
    return f"`{path}`: {made}{commit[40:]}.{noise}"


def block(path: str, options: str) -> str:
    """What belongs between the two comments."""
    chosen = dict(option.split("=", 1) for option in options.split())
    result = report.load(ROOT / path)
    if result["kind"] == "accuracy":
        dtypes = chosen["dtypes"].split(",") if "dtypes" in chosen else {row["dtype"] for row in result["rows"]}
        rows = [row for row in result["rows"] if row["dtype"] in dtypes]
        return "\n".join(["", accuracy_tables(rows), "", origin(path, result), "", ""])
    modes = chosen.get("mode", "both").split(",")
    rows = [row for row in result["rows"] if row["mode"] in modes]
    if "providers" in chosen:
        names = chosen["providers"].split(",")
        rows = [row for row in rows if row["provider"] in names]
    table = density_table(rows) if result["kind"] == "density" else bench_table(rows)
    return "\n".join(["", *table, "", origin(path, result), "", ""])


def rewrite(text: str) -> str:
    """The document with every table as the results say."""
    return BLOCK.sub(lambda found: found[1] + block(found[2], found[3]) + found[5], text)


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(prog="tables", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("documents", type=Path, nargs="+")
    parser.add_argument("--check", action="store_true", help="change nothing, say what is out of date")
    options = parser.parse_args(sys.argv[1:] if arguments is None else arguments)
    stale = []
    for path in options.documents:
        try:
            before = path.read_text()
            after = rewrite(before)
        except (OSError, report.ReportError) as error:
            parser.error(str(error))
        if after != before:
            stale.append(path)
            if not options.check:
                path.write_text(after)
    for path in stale:
        print(f"{path}: {'is not what the results say' if options.check else 'rewritten'}")
    return 1 if stale and options.check else 0


if __name__ == "__main__":
    sys.exit(main())
