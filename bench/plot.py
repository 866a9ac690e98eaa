"""One picture a suite: how much faster ours is than each rival, line by line, and how close to the ceiling it comes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .suite import GRAPH, OURS

COLORS = {  # one rival, one color, in every picture; the limit is grey
    "dense": "#8a8a8a",
    "dense+peft": "#4d4d4d",
    "torch": "#b07aa1",
    "bnb": "#e15759",
    "bnb+peft": "#e15759",
    "bnb+peft-autocast": "#f28e2b",
    "bnb+peft-bf16": "#edc948",
    "bnb-inference": "#76b7b2",
    "bnb-inference+peft": "#17808a",
    "unsloth": "#59a14f",
    "lorafusion": "#4e79a7",
    "torchao": "#9c755f",
}


def draw(result: dict[str, Any], path: Path) -> None:
    """Writes the picture of a result as a PNG (or what the suffix asks for)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    graphs = any(n.endswith(GRAPH) for row in result["rows"] for n in row["entries"])
    suffix = GRAPH if graphs else ""  # with CUDA graphs no time of the host is in the picture
    rows = [row for row in result["rows"] if any("ratio" in e for e in row["entries"].values())]
    rivals = [n for n in result["summary"] if n.endswith(suffix)]
    if not rows or not rivals:
        return
    memory = result["suite"] == "memory"
    plt.rcParams.update({"font.family": "DejaVu Sans", "font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    height = 1.9 + max(0.34, 0.16 * len(rivals)) * len(rows)
    fig, (left, right) = plt.subplots(
        1, 2, figsize=(11, height), sharey=True, gridspec_kw={"width_ratios": [4, 1], "wspace": 0.04}, layout="constrained"
    )
    positions = range(len(rows))
    left.axvspan(1e-3, 1, color="#e15759", alpha=0.06, lw=0)
    left.axvline(1, color="black", lw=1)
    low, high = 1.0, 1.0
    for k, name in enumerate(rivals):
        shift = (k - (len(rivals) - 1) / 2) * 0.7 / max(len(rivals), 1)
        found = [
            (y, row["entries"][name]["ratio"])
            for y, row in zip(positions, rows, strict=True)
            if "ratio" in row["entries"].get(name, {})
        ]
        ys, median = [y + shift for y, _ in found], [r["median"] for _, r in found]
        spread = [[r["median"] - r["q1"] for _, r in found], [r["q3"] - r["median"] for _, r in found]]
        color = COLORS.get(name.removesuffix(suffix) if suffix else name, "#333333")
        left.errorbar(
            median, ys, xerr=spread, fmt="o", ms=6, color=color, elinewidth=1.5, label=name.removesuffix(suffix or "\0")
        )
        for value, y in zip(median, ys, strict=True):
            left.annotate(
                f"{value:.2f}" if value < 10 else f"{value:.0f}",
                (value, y),
                (7, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
                color=color,
            )
        low, high = min([low, *median]), max([high, *median])
    left.set_xscale("log")
    left.set_xlim(low / 1.25, high * 1.35)
    left.xaxis.set_major_formatter(lambda v, _: f"{v:g}x")
    left.xaxis.set_minor_formatter(lambda v, _: f"{v:g}x" if high / low < 12 and f"{v:e}"[0] in "25" else "")
    left.set_yticks(list(positions), [row["label"] for row in rows])
    left.set_ylim(len(rows) - 0.5, -0.5)
    left.grid(axis="x", color="#dddddd", lw=0.8)
    left.set_axisbelow(True)
    left.set_xlabel(
        "peak memory over ours" if memory else "ours is faster by  (time of the other / ours; below 1 we are slower)"
    )
    left.legend(ncols=min(len(rivals), 4), loc="lower left", bbox_to_anchor=(0, 1.0), frameon=False, fontsize=9)
    _right(right, rows, positions, OURS + suffix, memory)
    versions, threads = result["versions"], result["threads"]
    where = f"{result['device']}, {threads} threads" if result["driver"] is None else f"{result['device']}"
    fig.suptitle(
        f"{result['suite']} on {where}, torch {versions['torch']}{', CUDA graphs' if graphs else ''}",
        x=0.01,
        ha="left",
        weight="bold",
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=150)
    plt.close(fig)


def _right(axis: Any, rows: list[dict[str, Any]], positions: range, ours: str, memory: bool) -> None:
    """Bars: share of the measured ceiling that ours reaches, or its peak in MB."""
    key, scale = ("peak", 1e-6) if memory else ("of_ceiling", 100)
    values = [scale * row["entries"].get(ours, {}).get(key, 0) for row in rows]
    axis.barh(list(positions), values, height=0.55, color="#4e79a7")
    for y, value in zip(positions, values, strict=True):
        axis.annotate(
            f"{value:.0f}" + (" MB" if memory else " %"),
            (value, y),
            (4, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
        )
    axis.set_xlim(0, max([*values, 1]) * 1.35 if memory else 125)
    axis.set_xlabel("our peak, MB" if memory else "ours, % of ceiling")
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x", color="#dddddd", lw=0.8)
    axis.set_axisbelow(True)
