"""Pictures of results. `draw` makes the figures that the given reports have data for."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")  # files only: no display is needed and nothing opens
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from . import machine, report

STYLE: Any = {
    "font.size": 10,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "figure.dpi": 130,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "svg.hashsalt": "sface",  # the same file for the same data
}
FLOORS = {  # bare operations: their dashes, and what they are
    "mm-fp32": ((0, (6, 2, 1, 2)), "ONE fp32 product"),
    "mm-tf32": ((0, (4, 3)), "ONE TF32 product"),
    "mm-bf16": ((0, (1, 1.5)), "ONE bf16 product"),
    "read-w": ((0, (8, 3)), "reading w"),
    "write-w": ((0, (2, 4)), "writing as much as w"),
}
COLOURS = {"reference": "#f97316", "careful": "#a16207", "chunked": "#0d9488", "native": "#2563eb", "triton": "#16a34a"}
DASHES = {"": "-", "compiled": (0, (5, 2)), "2^-16": (0, (5, 2)), "0": (0, (1, 1.5))}
MARKERS = {"": "o", "compiled": "s", "2^-16": "s", "0": "^"}
FEW = 200  # a logarithmic axis that spans less has labels between the powers of ten
Row = dict[str, Any]


class Sweep(NamedTuple):
    """Rows that differ in one size and in the provider only."""

    title: str
    rows: list[Row]


def draw(reports: list[dict[str, Any]], mode: str) -> dict[str, Figure]:
    """Figures by name; of timed rows those of one mode."""
    rows = [
        {**row, "machine": machine.title(result["machine"]), "kind": result["kind"]}
        for result in reports
        for row in result["rows"]
    ]
    timed = [row for row in rows if row["kind"] != "accuracy" and row["mode"] == mode]
    bench = [row for row in timed if row["kind"] == "bench"]
    errors = [row for row in rows if row["kind"] == "accuracy" and row["errors"]]
    figures: dict[str, Figure] = {}
    with plt.rc_context(STYLE):
        for size, letter, name in (("c", "C", "classes"), ("n", "N", "samples")):
            sweeps = _sweeps(bench, size)
            label = f"{name}, {letter}"
            _add(figures, f"time_vs_{name}", sweeps, partial(_time, size=size, label=label))
            sweeps = [sweep for sweep in sweeps if any(_extra(row) for row in sweep.rows)]
            _add(figures, f"memory_vs_{name}", sweeps, partial(_memory, size=size, label=label))
        _add(figures, "ratio", _workloads(bench), _ratio)
        _add(figures, "density", _densities(timed), _density)
        for dtype in dict.fromkeys(row["dtype"] for row in errors):
            own = [row for row in errors if row["dtype"] == dtype]
            _add(figures, f"error_vs_filter_{dtype}", _geometries(own), _error)
    return figures


def _add(figures: dict[str, Figure], name: str, sweeps: list[Sweep], panel: Callable[[Axes, Sweep], None]) -> None:
    """A figure with one panel for each sweep, two side by side."""
    if not sweeps:
        return
    across = min(2, len(sweeps))
    down = -(-len(sweeps) // across)
    size = (7.4 if across == 1 else 5.6 * across, 4.4 * down)
    share = panel is _error  # heights that are to be compared
    figure, grid = plt.subplots(down, across, figsize=size, layout="constrained", squeeze=False, sharey=share)
    for axes, sweep in zip(grid.flat, sweeps, strict=False):
        panel(axes, sweep)
        axes.set_title(sweep.title + _noise(sweep.rows))
    for axes in list(grid.flat)[len(sweeps) :]:
        axes.set_visible(False)
    figures[name] = figure
    plt.close(figure)


def _noise(rows: list[Row]) -> str:
    others = max(row.get("other_busy_cores") or 0.0 for row in rows)
    return f"; others used up to {others:.1f} cores" if others > machine.BUSY_LIMIT else ""


def _groups(rows: list[Row], key: Callable[[Row], tuple[Any, ...]]) -> dict[tuple[Any, ...], list[Row]]:
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def _sweeps(rows: list[Row], size: str) -> list[Sweep]:
    """Groups with more than one value of `size`, in which everything else is the same."""
    fixed = [name for name in ("n", "c", "d") if name != size]
    keys = [*fixed, "geometry", "density_requested", "device", "dtype", "machine"]
    sweeps = []
    for own in _groups(rows, lambda row: tuple(row[key] for key in keys)).values():
        if len({row[size] for row in own}) > 1:
            sizes = ", ".join(f"{name.upper()}={own[0][name]:,}" for name in fixed)
            sweeps.append(Sweep(f"{sizes}, {own[0]['geometry']}, {own[0]['dtype']}\n{own[0]['machine']}", own))
    return sweeps


def _workloads(rows: list[Row]) -> list[Sweep]:
    groups = _groups(rows, lambda row: (row["workload"], row["device"], row["dtype"], row["machine"]))
    with_ratio = {key: own for key, own in groups.items() if any(_speedup(row) for row in own)}
    return [Sweep(f"{key[0]}, {key[2]}\n{key[3]}", own) for key, own in with_ratio.items()]


def _densities(rows: list[Row]) -> list[Sweep]:
    own = [row for row in rows if row["kind"] == "density"]
    groups = _groups(own, lambda row: (row["n"], row["c"], row["d"], row["dtype"], row["machine"]))
    return [Sweep(f"N={n}, C={c:,}, D={d}, {dtype}\n{where}", part) for (n, c, d, dtype, where), part in groups.items()]


def _geometries(rows: list[Row]) -> list[Sweep]:
    groups = _groups(rows, lambda row: (row["geometry"], row["d"], row["backend"], row["machine"]))
    return [Sweep(f"{g}, D={d}, backend {backend}\n{where}", own) for (g, d, backend, where), own in groups.items()]


def _style(provider: str) -> dict[str, Any]:
    """Colour by what it is, dashes and markers by the variant, so that they tell apart in grey too."""
    if provider in FLOORS:
        return {"color": "black", "linestyle": FLOORS[provider][0], "marker": "", "linewidth": 1.2}
    base, _, variant = provider.partition("@" if "@" in provider else "-")
    colour = COLOURS.get(base, "#7c3aed")
    return {"color": colour, "linestyle": DASHES.get(variant, "-."), "marker": MARKERS.get(variant, "d")}


def _name(provider: str) -> str:
    return f"floor: {FLOORS[provider][1]}" if provider in FLOORS else report.label(provider)


def _milliseconds(mode: str) -> str:
    return f"{'forward and backward' if mode == 'both' else mode}, ms"


def _lines(axes: Axes, sweep: Sweep, size: str, value: Callable[[Row], float | None]) -> None:
    """A line for each provider over `size`."""
    for provider in dict.fromkeys(row["provider"] for row in sweep.rows):
        # the last file's, where several hold this size
        found = {row[size]: value(row) for row in sweep.rows if row["provider"] == provider}
        points = sorted((x, y) for x, y in found.items() if y is not None)
        if points:
            axes.plot(*zip(*points, strict=True), label=_name(provider), markersize=4, **_style(provider))


def _log_axes(axes: Axes, xlabel: str, ylabel: str) -> None:
    axes.set(xscale="log", yscale="log", xlabel=xlabel, ylabel=ylabel)
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < FEW else (1,)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
    axes.grid(which="minor", alpha=0.12)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))


def _median(row: Row) -> float | None:
    return row["time_ms"]["median"] if row["time_ms"] else None


def _extra(row: Row) -> float | None:
    """MiB beyond inputs and gradients; a tenth stands for less, which a logarithmic axis has no place for."""
    found = (row["memory"] or {}).get("peak_extra_bytes")
    return None if found is None or row["provider"] in FLOORS else max(found / 2**20, 0.1)


def _speedup(row: Row) -> float | None:
    return row["ratios"]["speedup_vs_reference"]


def _sizes(axes: Axes, rows: list[Row], size: str) -> None:
    ticks = sorted({row[size] for row in rows})
    axes.set_xticks(ticks, [f"{x:,}" for x in ticks], rotation=20)
    axes.set_xticks([], minor=True)


def _time(axes: Axes, sweep: Sweep, size: str, label: str) -> None:
    _lines(axes, sweep, size, _median)
    _log_axes(axes, label, _milliseconds(sweep.rows[0]["mode"]))
    _sizes(axes, sweep.rows, size)


def _memory(axes: Axes, sweep: Sweep, size: str, label: str) -> None:
    _lines(axes, sweep, size, _extra)
    own = {row[size]: 4 * row["c"] * row["d"] / 2**20 for row in sweep.rows}
    where = sorted(own)
    axes.plot(where, [own[x] for x in where], label="∂w itself, returned", **_style("mm-fp32"))
    _log_axes(axes, label, "peak memory beyond inputs and gradients, MiB")
    _sizes(axes, sweep.rows, size)


def _ratio(axes: Axes, sweep: Sweep) -> None:
    """Bars of how many times faster than the reference, bare products hatched."""
    # the last file's, where several hold this workload
    found = {
        row["provider"]: row for row in sweep.rows if _speedup(row) and row["provider"] not in ("read-w", "write-w")
    }
    rows = list(found.values())
    names = [row["provider"] for row in rows]
    labels = [_name(name) for name in names]
    values = [_speedup(row) or 0.0 for row in rows]
    bars = axes.barh(labels, values, color=[_style(name)["color"] for name in names])
    for bar, name in zip(bars, names, strict=True):
        if name in FLOORS:
            bar.set(facecolor="white", edgecolor="black", hatch="////")
    axes.bar_label(bars, [f"{value:.1f}" for value in values], padding=3)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(f"times as fast as the reference, {_milliseconds(rows[0]['mode']).removesuffix(', ms')}")


def _density(axes: Axes, sweep: Sweep) -> None:
    """Times with quartiles over the share of active pairs; the reference's work does not depend on it."""
    rows = [row for row in sweep.rows if row["provider"] != "reference" and row["time_ms"] and row["density"] > 0]
    for provider in dict.fromkeys(row["provider"] for row in rows):
        own = [row for row in rows if row["provider"] == provider]
        where, style = [row["density"] for row in own], _style(provider)
        axes.plot(where, [row["time_ms"]["median"] for row in own], label=provider, markersize=4, **style)
        low, high = ([row["time_ms"][key] for row in own] for key in ("q1", "q3"))
        axes.fill_between(where, low, high, alpha=0.15, color=style["color"], linewidth=0)
    baseline = report.reference_median(sweep.rows)
    if baseline:
        axes.axhline(baseline, color=COLOURS["reference"], label="reference, at any share")
    _log_axes(axes, "share of active pairs at 2⁻¹⁶", _milliseconds(sweep.rows[0]["mode"]))


def _power(filter_eps: float) -> str:
    base, _, exponent = report.filter_name(filter_eps).partition("^")
    return f"${base}^{{{exponent}}}$" if exponent else base


def _error(axes: Axes, sweep: Sweep) -> None:
    """Errors of ∂x and ∂w over the filter, those of the reference as thin lines at their height."""
    filters = sorted({row["filter_eps"] for row in sweep.rows}, reverse=True)
    for number, c in enumerate(sorted({row["c"] for row in sweep.rows})):
        own = {row["filter_eps"]: row for row in sweep.rows if row["c"] == c}
        colour = f"C{number}"
        for name, sign, dash in (("grad_x", "∂x", "-"), ("grad_w", "∂w", (0, (4, 2)))):
            where = [i for i, eps in enumerate(filters) if eps in own]
            values = [own[filters[i]]["errors"][name] for i in where]
            axes.plot(where, values, color=colour, linestyle=dash, marker="o", markersize=3, label=f"{sign}, C={c:,}")
            reference = next(iter(own.values()))["reference"]
            if reference:
                axes.axhline(reference[name], color=colour, linestyle=dash, linewidth=0.7, alpha=0.6)
    axes.set(yscale="log", xlabel="filter_eps", ylabel="relative error (thin: the reference's)")
    axes.set_xticks(range(len(filters)), [_power(eps) for eps in filters])
    axes.legend(fontsize=8)
