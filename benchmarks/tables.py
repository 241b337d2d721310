"""`python -m benchmarks.tables README.md docs/*.md`: writes the tables of the documents from the results files.

A table stands between two comments, the first of which says what it is made from:

    <!-- table: benchmarks/results/cpu-random.json mode=both providers=reference,native -->
    <!-- end -->

`mode` is "both" and `providers` are all if left out; both may be several. `kernels=model` makes a table of each kernel's
time beside what `gpu_model` says instead. A file of errors gives all its tables, or those
of some `dtypes`. Below, a line names machine, versions, commit and date, so that no figure in a document was typed.
Exit status: 0; 1 with --check where a document is not what the files say; 2 for a file that is missing or not a result.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from benchmarks import gpu_model
from sface_kernels.bench import machine, report
from sface_kernels.bench.table import Table, accuracy_tables, bench_table, density_table, plain_table

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"(<!-- table: (\S+)((?: \w+=\S+)*) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def origin(path: str, result: dict[str, Any]) -> str:
    versions, commit = result["versions"], result["commit"] or "an unknown commit"
    made = f"{machine.title(result['machine'])}; torch {versions['torch']}; {result['date'][:10]}, commit {commit[:10]}"
    others = max((row.get("other_busy_cores") or 0 for row in result["rows"]), default=0)
    noise = f" Other processes used up to {others:.1f} cores meanwhile." if others > machine.BUSY_LIMIT else ""
    return f"`{path}`: {made}{commit[40:]}.{noise}"


def tables(result: dict[str, Any], chosen: dict[str, list[str]]) -> list[Table]:
    """Of the rows that have one of the values chosen for each name."""
    if result["kind"] == "table":
        return [plain_table(result["rows"])]
    if "kernels" in chosen:
        return [plain_table(gpu_model.beside(result["rows"]))]
    if result["kind"] != "accuracy":
        chosen = {"mode": ["both"], **chosen}
    rows = result["rows"]
    for name, some in chosen.items():
        key = name.removesuffix("s")
        if missing := set(some) - {str(row.get(key)) for row in result["rows"]}:
            raise report.ReportError(
                f"{name}: expected values of {key!r} in the rows, got {', '.join(sorted(missing))}"
            )
        rows = [row for row in rows if row[key] in some]
    if result["kind"] == "accuracy":
        return accuracy_tables(rows)
    return [density_table(rows) if report.is_density_sweep(rows) else bench_table(rows)]


def rewrite(text: str) -> str:
    """The document with every table as the results say."""

    def block(found: re.Match[str]) -> str:
        pairs = (option.split("=", 1) for option in found[3].split())
        result = report.load(ROOT / found[2])
        written = [table.markdown() for table in tables(result, {name: some.split(",") for name, some in pairs})]
        return "\n\n".join([found[1].rstrip(), *written, origin(found[2], result), found[5]])

    return BLOCK.sub(block, text)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tables", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("documents", type=Path, nargs="+")
    parser.add_argument("--check", action="store_true", help="change nothing, say what is out of date")
    options = parser.parse_args(arguments)
    stale = []
    for path in options.documents:
        try:
            before = path.read_text()
            after = rewrite(before)
        except (OSError, report.ReportError) as error:
            parser.error(str(error))
        if after != before:
            stale.append(path)
            print(f"{path}: {'is not what the results say' if options.check else 'rewritten'}")
            if not options.check:
                path.write_text(after)
    return 1 if stale and options.check else 0


if __name__ == "__main__":
    sys.exit(main())
