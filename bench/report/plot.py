"""One picture a suite: how much faster ours is than each rival, line by line, and how close to the ceiling it comes.  One
picture of all suites: from the worst line to the best."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..suite import GRAPH, OURS, threads_text
from . import grid
from .names import SUITES, plain

SATURATED = 4.0
"""Ratio from which on a cell is as blue (or as red, at its inverse) as it gets."""


def draw(result: dict[str, Any], path: Path) -> None:
    """Writes the picture of a result; nothing if no rival has a ratio."""
    if not result["summary"]:
        return
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 10.5})
    fig = _draw_grid(result, plt) if result["suite"] == "grid" else _draw_lines(result, plt)
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=110)
    plt.close(fig)


def _title(fig: Any, result: dict[str, Any], more: str = "") -> None:
    what = "peak memory over ours" if result["suite"] == "memory" else "time over ours, above 1 we are faster"
    where = "" if result["driver"] or result["suite"] == "grid" else f", {threads_text(result)}"
    fig.suptitle(f"{SUITES[result['suite']]}\n{what}; {result['device']}{where}{more}", x=0.01, ha="left", fontsize=11.5)


def _draw_lines(result: dict[str, Any], plt: Any) -> Any:
    graphs = any(n.endswith(GRAPH) for n in result["summary"])
    suffix = GRAPH if graphs else ""  # in CUDA graphs no time of the host is counted
    rivals = [n for n in result["summary"] if n.endswith(suffix)]
    rows = [row for row in result["rows"] if any("ratio" in row["entries"].get(n, {}) for n in rivals)]
    width, height = 4.2 + 1.25 * len(rivals), 1.6 + 0.3 * len(rows)
    fig, (cells, bars) = plt.subplots(
        1, 2, figsize=(width, height), sharey=True, layout="constrained", width_ratios=[1.25 * len(rivals), 1.5]
    )
    _cells(cells, rows, rivals, plt.get_cmap("RdBu"))
    _bars(bars, rows, OURS + suffix, result["suite"] == "memory")
    _title(fig, result, ", CUDA graphs" if graphs else "")
    return fig


def _draw_grid(result: dict[str, Any], plt: Any) -> Any:
    """A panel for each pass, number of threads and rival."""
    panels = grid.matrices(result)
    down = len({panel.rival for panel in panels})
    across = len(panels) // down
    height = 0.9 + 0.32 * len(panels[0].shapes)
    fig, axes = plt.subplots(
        down,
        across,
        figsize=(1.3 + 0.58 * len(panels[0].tokens) * across, 0.6 + height * down),
        layout="constrained",
        squeeze=False,
    )
    for axis, panel in zip(axes.flat, panels, strict=True):
        for y, cells in enumerate(panel.cells):
            for x, value in enumerate(cells):
                _cell(axis, x, y, value, plt.get_cmap("RdBu"), fontsize=9)
        _frame(axis, [str(M) for M in panel.tokens], panel.shapes)
        axis.set_title(panel.title.replace(", against ", "\nagainst "), fontsize=10)
    for axis in axes[:, 1:].flat:
        axis.set_yticklabels([])
    _title(fig, result, "; tokens across")
    return fig


def _cell(axis: Any, x: int, y: int, value: float | None, colors: Any, missing: str = "–", **font: Any) -> None:
    """Blue where ours wins, red and bold where it loses, white at 1."""
    if value is None:
        axis.text(x, y, missing, ha="center", va="center", color="#888888", **font)
        return
    depth = max(-1.0, min(1.0, math.log(value) / math.log(SATURATED)))
    left, right, top, bottom = x - 0.5, x + 0.5, y - 0.5, y + 0.5
    axis.fill([left, right, right, left], [top, top, bottom, bottom], color=colors(0.5 + 0.38 * depth), lw=0)
    font |= {"weight": "bold" if value < 1 else "normal", "color": "white" if abs(depth) > 0.8 else "black"}
    axis.text(x, y, f"{value:.2f}" if value < 9.995 else f"{value:.0f}", ha="center", va="center", **font)


def _frame(axis: Any, across: list[str], down: list[str]) -> None:
    axis.set_xlim(-0.5, len(across) - 0.5)
    axis.set_ylim(len(down) - 0.5, -0.5)
    axis.set_xticks(range(len(across)), across, fontsize=9)
    axis.set_yticks(range(len(down)), down)
    axis.xaxis.tick_top()
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)


def _cells(axis: Any, rows: list[dict[str, Any]], rivals: list[str], colors: Any) -> None:
    for y, row in enumerate(rows):
        for x, name in enumerate(rivals):
            entry = row["entries"].get(name, {})
            wrong = entry.get("status", "").startswith("wrong")
            _cell(axis, x, y, entry["ratio"]["median"] if "ratio" in entry else None, colors, "wrong" if wrong else "–")
    shapes = [row["label"].split()[0] for row in rows]
    for y in range(1, len(rows)):
        if shapes[y] != shapes[y - 1] and len(set(shapes)) < len(shapes):
            axis.axhline(y - 0.5, color="black", lw=0.6)
    names = [textwrap.fill(plain(n), 13, break_long_words=False) for n in rivals]
    _frame(axis, names, [row["label"].replace("  ", "   ") for row in rows])


def _bars(axis: Any, rows: list[dict[str, Any]], ours: str, memory: bool) -> None:
    """Share of the measured ceiling that ours reaches, or its peak in MB."""
    key, scale, unit = ("peak", 1e-6, "MB") if memory else ("of_ceiling", 100, "%")
    values = [scale * row["entries"].get(ours, {}).get(key, 0) for row in rows]
    axis.barh(range(len(rows)), values, height=0.6, color="#9aa7b5")
    for y, value in enumerate(values):
        axis.annotate(f"{value:.0f} {unit}", (0, y), (3, 0), textcoords="offset points", va="center", fontsize=9.5)
    axis.set_xlim(0, max(values) * 1.05 if memory else 100)
    axis.set_xticks([axis.get_xlim()[1] / 2], ["our peak" if memory else "ours, of the\nmeasured\nceiling"], fontsize=9)
    axis.xaxis.tick_top()
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    axis.spines["left"].set_visible(True)


# ---- all suites


class Span(NamedTuple):
    """Ratios of a suite to a rival: of its worst line, the geometric mean of all, of its best."""

    worst: float
    mean: float
    best: float


LIGHT = {"back": "#ffffff", "text": "#1f2328", "faint": "#d1d9e0", "win": "#0969da", "loss": "#cf222e"}
DARK = {"back": "#0d1117", "text": "#f0f6fc", "faint": "#3d444d", "win": "#58a6ff", "loss": "#ff7b72"}
"""Of the two themes in which GitHub shows a README."""


def draw_overview(rivals: Sequence[str], rows: Mapping[str, Sequence[Span | None]], where: str, path: Path, dark: bool) -> None:
    """Writes a picture with a panel for each rival and a row for each suite: a line from the worst ratio to the best, on one
    scale, both ends written out in the same size.

    Args:
        rivals: names of the panels.
        rows: by the name of a suite, a span for each rival, or None where they were not compared.
        where: machine and date, for the heading.
        dark: for a dark page.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colors = DARK if dark else LIGHT
    spans = [span for row in rows.values() for span in row if span]
    if not spans:
        return
    low, high = min(0.5, *(s.worst for s in spans)), max(2.0, *(s.best for s in spans))
    style = {"font.size": 9.5, "text.color": colors["text"], "figure.facecolor": colors["back"]}
    with plt.rc_context(style):
        fig, panels = plt.subplots(
            1, len(rivals), figsize=(9.2, 1.25 + 0.44 * len(rows)), sharey=True, layout="constrained", squeeze=False
        )
        for x, (panel, rival) in enumerate(zip(panels[0], rivals, strict=True)):
            panel.set_facecolor(colors["back"])
            panel.set_xscale("log")
            panel.set_xlim(low / 2.5, high * 3)  # room for the numbers
            panel.axvline(1, color=colors["text"], lw=1)
            for y, row in enumerate(rows.values()):
                panel.axhline(y + 0.5, color=colors["faint"], lw=0.5)
                if span := row[x]:
                    _span(panel, y, span, colors)
            panel.set_title(textwrap.fill(rival, 24), fontsize=10, color=colors["text"])
            panel.set_xticks([1], ["1"], color=colors["text"])
            panel.minorticks_off()
            panel.tick_params(length=0)
            panel.spines[:].set_visible(False)
        names = [textwrap.fill(name, 36) for name in rows]
        panels[0][0].set_yticks(range(len(rows)), names, color=colors["text"])
        panels[0][0].set_ylim(len(rows) - 0.5, -0.5)
        heading = "Time (or memory) of the other over ours, from the worst case to the best: above 1 we win"
        fig.suptitle(f"{heading}\n{where}", x=0.01, ha="left", fontsize=10.5)
        path.parent.mkdir(parents=True, exist_ok=True)
        fig.savefig(path, dpi=180)
        plt.close(fig)


def _span(panel: Any, y: int, span: Span, colors: Mapping[str, str]) -> None:
    """The part below 1 in the colour of a loss."""
    if span.worst < 1:
        panel.plot([span.worst, min(span.best, 1)], [y, y], color=colors["loss"], lw=3, solid_capstyle="butt")
    if span.best > 1:
        panel.plot([max(span.worst, 1), span.best], [y, y], color=colors["win"], lw=3, solid_capstyle="butt")
    for value, side in [(span.worst, -1), (span.best, 1)][span.worst == span.best :]:
        text = f"{value:.2f}" if value < 9.995 else f"{value:.0f}"
        color = colors["loss" if float(text) < 1 else "win"]
        panel.plot(value, y, "o", color=color, ms=6)
        panel.annotate(
            text,
            (value, y),
            (7 * side, 0),
            textcoords="offset points",
            ha="right" if side < 0 else "left",
            va="center_baseline",
            color=color,
            weight="bold",
            bbox={"facecolor": colors["back"], "edgecolor": "none", "pad": 1},
        )
