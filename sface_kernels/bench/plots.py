"""Pictures of results. `draw` makes the figures that the given reports have data for."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from . import machine, report
from .report import Row

STYLE: Any = {
    **{"font.size": 10, "axes.titlesize": 10, "legend.fontsize": 9, "legend.frameon": False, "figure.dpi": 130},
    **{"axes.grid": True, "grid.alpha": 0.25, "axes.spines.top": False, "axes.spines.right": False},
    "svg.hashsalt": "sface",  # the same file for the same data
}
FLOORS = {  # bare operations: their dashes, and what they are
    "mm-fp32": ((0, (6, 2, 1, 2)), "ONE fp32 product"),
    "mm-tf32": ((0, (4, 3)), "ONE TF32 product"),
    "mm-bf16": ((0, (1, 1.5)), "ONE bf16 product"),
    "mm3-bf16": ((0, (3, 1.5)), "THREE bf16 products"),
    "read-w": ((0, (8, 3)), "reading w"),
    "write-w": ((0, (2, 4)), "writing as much as w"),
}
COLOURS = {"reference": "#f97316", "careful": "#a16207", "chunked": "#0d9488", "native": "#2563eb", "triton": "#16a34a"}
DASHED = (0, (5, 2))
VARIANTS: dict[str, Any] = {
    "": ("-", "o"),
    "compiled": (DASHED, "s"),
    "2^-16": (DASHED, "s"),
    "0": ((0, (1, 1.5)), "^"),
}
MARKERS = {"sgd": "o", "head-sgd": "D", "adamw": "s", "head-adamw": "^"}  # of the optimizers of whole steps
FEW = 200  # a logarithmic axis that spans less has labels between the powers of ten
Panel = Callable[[Axes, list[Row]], None]


def draw(reports: list[dict[str, Any]], mode: str) -> dict[str, Figure]:
    """Figures by name; of timed rows those of one mode."""
    timed, errors = [], []
    for result in reports:
        rows = [{**row, "machine": machine.title(result["machine"])} for row in result["rows"]]
        if result["kind"] == "accuracy":
            errors += [row for row in rows if row["errors"]]
        else:
            timed += [row for row in rows if row["mode"] == mode]
    where, figures = ("dtype", "machine"), {}
    for size, letter, name in (("c", "C", "classes"), ("n", "N", "samples")):
        fixed = [one for one in ("n", "c", "d") if one != size]
        sweeps = _groups(timed, *fixed, "geometry", "density_requested", *where)
        sweeps = {key: rows for key, rows in sweeps.items() if len({row[size] for row in rows}) > 1}
        time = partial(_sizes, size=size, label=f"{name}, {letter}", value=report.median, ylabel=_milliseconds(mode))
        figures[f"time_vs_{name}"] = _figure(sweeps, time)
        sweeps = {key: rows for key, rows in sweeps.items() if any(map(_extra, rows))}
        about = "peak memory beyond inputs and gradients, MiB"
        memory = partial(_sizes, size=size, label=f"{name}, {letter}", value=_extra, ylabel=about)
        figures[f"memory_vs_{name}"] = _figure(sweeps, memory)
    workloads = _groups([row for row in timed if _speedup(row)], "workload", *where)
    densities = {k: rows for k, rows in _groups(timed, "n", "c", "d", *where).items() if report.is_density_sweep(rows)}
    figures["density"] = _figure(densities, _density)
    figures["ratio"] = _figure({} if densities else workloads, _ratio)
    for dtype, own in _groups(errors, "dtype").items():
        panels = _groups(own, "geometry", "d", "backend", "machine")
        figures[f"error_vs_filter_{dtype}"] = _figure(panels, _error, share=True)
    return {name: figure for name, figure in figures.items() if figure is not None}


def _groups(rows: list[Row], *keys: str) -> dict[str, list[Row]]:
    """Rows that have these in common, below a title that names them."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        sizes = {"n": f"N={row['n']:,}", "c": f"C={row['c']:,}", "d": f"D={row['d']}", "machine": f"\n{row['machine']}"}
        sizes["backend"] = f"backend {row.get('backend')}"
        named = [str(sizes.get(key, row[key])) for key in keys if row[key] is not None]
        groups.setdefault(", ".join(named).replace(", \n", "\n"), []).append(row)
    return groups


def _figure(panels: dict[str, list[Row]], panel: Panel, share: bool = False) -> Figure | None:
    """One panel for each title, two side by side; `share` where heights are to be compared."""
    if not panels:
        return None
    across = min(2, len(panels))
    down = -(-len(panels) // across)
    size = (7.4 if across == 1 else 5.6 * across, 4.4 * down)
    with matplotlib.style.context(STYLE, after_reset=True):  # reset: not the user's fonts, sizes or LaTeX
        figure = Figure(figsize=size, layout="constrained")  # not pyplot's: that would start the user's backend
        grid = figure.subplots(down, across, squeeze=False, sharey=share)
        for axes in grid.flat[len(panels) :]:
            axes.set_visible(False)
        for axes, (title, rows) in zip(grid.flat, panels.items(), strict=False):
            panel(axes, rows)
            others = max(row.get("other_busy_cores") or 0.0 for row in rows)
            noise = f"; others used up to {others:.1f} cores" if others > machine.BUSY_LIMIT else ""
            axes.set_title(title + noise)
    return figure


def _style(provider: str) -> dict[str, Any]:
    """Colour by what it is, dashes and markers by the variant, so that they tell apart in grey too."""
    if provider in FLOORS:
        dashes, what = FLOORS[provider]
        return {"label": f"floor: {what}", "color": "black", "linestyle": dashes, "marker": "", "linewidth": 1.2}
    loss, _, optimizer = provider.partition("+")
    base, _, variant = loss.partition("@" if "@" in loss else "-")
    dashes, marker = VARIANTS.get(variant, ("-.", "d"))
    return {
        "label": report.label(provider),
        "color": COLOURS.get(base, "#7c3aed"),
        "linestyle": dashes,
        "marker": MARKERS.get(optimizer, marker),
    }


def _milliseconds(mode: str) -> str:
    return f"{'forward and backward' if mode == 'both' else mode}, ms"


def _extra(row: Row) -> float | None:
    """MiB beyond inputs and gradients; a tenth stands for less, which a logarithmic axis has no place for."""
    found = (row["memory"] or {}).get("peak_extra_bytes")
    return None if found is None or row["provider"] in FLOORS else max(found / 2**20, 0.1)


def _speedup(row: Row) -> float | None:
    return row["ratios"]["speedup_vs_reference"]


def _log_axes(axes: Axes, xlabel: str, ylabel: str) -> None:
    axes.set(xscale="log", yscale="log", xlabel=xlabel, ylabel=ylabel)
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < FEW else (1,)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
    axes.grid(which="minor", alpha=0.12)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))


def _sizes(
    axes: Axes, rows: list[Row], size: str, label: str, value: Callable[[Row], float | None], ylabel: str
) -> None:
    """A line for each provider over `size`, and in a picture of memory one for ∂w."""
    for provider in dict.fromkeys(row["provider"] for row in rows):
        # the last file's, where several hold this size
        found = {row[size]: value(row) for row in rows if row["provider"] == provider}
        points = sorted((x, y) for x, y in found.items() if y is not None)
        if points:
            axes.plot(*zip(*points, strict=True), markersize=4, **_style(provider))
    ticks = sorted({row[size] for row in rows})
    if value is _extra:
        own = {row[size]: 4 * row["c"] * row["d"] / 2**20 for row in rows}
        axes.plot(ticks, [own[x] for x in ticks], **{**_style("mm-fp32"), "label": "∂w itself, returned"})
    _log_axes(axes, label, ylabel)
    axes.set_xticks(ticks, [f"{x:,}" for x in ticks], rotation=20)
    axes.set_xticks([], minor=True)


def _ratio(axes: Axes, rows: list[Row]) -> None:
    """Bars of how many times faster than the reference, bare products hatched."""
    # the last file's, where several hold this workload
    found = {row["provider"]: _speedup(row) or 0.0 for row in rows if row["provider"] not in ("read-w", "write-w")}
    styles = [_style(name) for name in found]
    bars = axes.barh(
        [style["label"] for style in styles], list(found.values()), color=[style["color"] for style in styles]
    )
    for bar, name in zip(bars, found, strict=True):
        if name in FLOORS:
            bar.set(facecolor="white", edgecolor="black", hatch="////")
    axes.bar_label(bars, [f"{value:.1f}" for value in found.values()], padding=3)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(f"times as fast as the reference, {_milliseconds(rows[0]['mode']).removesuffix(', ms')}")


def _density(axes: Axes, rows: list[Row]) -> None:
    """Times with quartiles over the share of active pairs; the reference's work does not depend on it."""
    timed = [row for row in rows if row["provider"] != "reference" and row["time_ms"] and row["density"] > 0]
    for provider in dict.fromkeys(row["provider"] for row in timed):
        own, style = [row for row in timed if row["provider"] == provider], _style(provider)
        low, middle, high = ([row["time_ms"][key] for row in own] for key in ("q1", "median", "q3"))
        where = [row["density"] for row in own]
        axes.plot(where, middle, markersize=4, **style)
        axes.fill_between(where, low, high, alpha=0.15, color=style["color"], linewidth=0)
    if baseline := report.reference_median(rows):
        axes.axhline(baseline, color=COLOURS["reference"], label="reference, at any share")
    _log_axes(axes, "share of active pairs at 2⁻¹⁶", _milliseconds(rows[0]["mode"]))


def _error(axes: Axes, rows: list[Row]) -> None:
    """Errors of ∂x and ∂w over the filter, those of the reference as thin lines at their height."""
    filters = sorted({row["filter_eps"] for row in rows}, reverse=True)
    for number, c in enumerate(sorted({row["c"] for row in rows})):
        own = {row["filter_eps"]: row for row in rows if row["c"] == c}
        where = [i for i, eps in enumerate(filters) if eps in own]
        for name, sign, dash in (("grad_x", "∂x", "-"), ("grad_w", "∂w", (0, (4, 2)))):
            style: Any = {"color": f"C{number}", "linestyle": dash}
            values = [own[filters[i]]["errors"][name] for i in where]
            axes.plot(where, values, marker="o", markersize=3, label=f"{sign}, C={c:,}", **style)
            if reference := next(iter(own.values()))["reference"]:
                axes.axhline(reference[name], linewidth=0.7, alpha=0.6, **style)
    axes.set(yscale="log", xlabel="filter_eps", ylabel="relative error (thin: the reference's)")
    powers = (report.filter_name(eps).partition("^") for eps in filters)
    axes.set_xticks(range(len(filters)), [f"${base}^{{{power}}}$" if power else base for base, _, power in powers])
    axes.legend(fontsize=8)
