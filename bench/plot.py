"""One picture a suite: how much faster ours is than each rival, line by line, and how close to the ceiling it comes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from .suite import GRAPH, OURS, threads_text

NAMES = {
    "dense": "frozen bf16\nnn.Linear,\nno adapter",
    "dense+peft": "bf16\n+ PEFT",
    "torch": "plain\ntorch",
    "bnb": "bitsandbytes",
    "bnb+peft": "bitsandbytes\n+ PEFT",
    "bnb+peft-autocast": "bitsandbytes\n+ PEFT,\nautocast",
    "bnb+peft-bf16": "bitsandbytes\n+ PEFT, bf16\nadapters",
    "bnb-inference": "bitsandbytes\nrepacked,\nno adapter",
    "bnb-inference+peft": "bitsandbytes\nrepacked\n+ PEFT",
    "torchao": "torchao",
    "unsloth": "Unsloth",
    "lorafusion": "LoRAFusion,\n16-bit weight",
    "lorafusion-nf4": "LoRAFusion\n+ bitsandbytes",
}
SATURATED = 4.0
"""Ratio from which on a cell is as blue (or as red, at its inverse) as it gets."""


def draw(result: dict[str, Any], path: Path) -> None:
    """Writes the picture of a result; nothing if no rival has a ratio."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    graphs = any(n.endswith(GRAPH) for n in result["summary"])
    suffix = GRAPH if graphs else ""  # in CUDA graphs no time of the host is counted
    rivals = [n for n in result["summary"] if n.endswith(suffix)]
    rows = [row for row in result["rows"] if any("ratio" in row["entries"].get(n, {}) for n in rivals)]
    if not rows:
        return
    memory = result["suite"] == "memory"
    width, height = 3.6 + 1.15 * len(rivals), 1.55 + 0.3 * len(rows)
    plt.rcParams.update({"font.size": 10.5})
    fig, (cells, bars) = plt.subplots(
        1, 2, figsize=(width, height), sharey=True, layout="constrained", width_ratios=[1.15 * len(rivals), 1.5]
    )
    _cells(cells, rows, rivals, plt.get_cmap("RdBu"))
    _bars(bars, rows, OURS + suffix, memory)
    where = "" if result["driver"] else f", {threads_text(result)}"
    what = "peak memory over ours" if memory else "time over ours, above 1 we are faster"
    fig.suptitle(
        f"{result['suite']}: {what}\n{result['device']}{where}{', CUDA graphs' if graphs else ''}",
        x=0.01,
        ha="left",
        fontsize=11.5,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=150)
    plt.close(fig)


def _cells(axis: Any, rows: list[dict[str, Any]], rivals: list[str], colors: Any) -> None:
    """A table colored by ratio: blue where ours wins, red where it loses, white at 1."""
    for y, row in enumerate(rows):
        for x, name in enumerate(rivals):
            entry = row["entries"].get(name, {})
            if "ratio" not in entry:
                axis.text(
                    x,
                    y,
                    "wrong" if entry.get("status", "").startswith("wrong") else "–",
                    ha="center",
                    va="center",
                    color="#888888",
                )
                continue
            value = entry["ratio"]["median"]
            depth = max(-1.0, min(1.0, math.log(value) / math.log(SATURATED)))
            axis.fill(
                [x - 0.5, x + 0.5, x + 0.5, x - 0.5],
                [y - 0.5, y - 0.5, y + 0.5, y + 0.5],
                color=colors(0.5 + 0.38 * depth),
                lw=0,
            )
            text = f"{value:.2f}" if value < 9.995 else f"{value:.0f}"
            axis.text(
                x,
                y,
                text,
                ha="center",
                va="center",
                weight="bold" if value < 1 else "normal",
                color="white" if abs(depth) > 0.8 else "black",
            )
    shapes = [row["label"].split()[0] for row in rows]
    for y in range(1, len(rows)):
        if shapes[y] != shapes[y - 1] and len(set(shapes)) < len(shapes):
            axis.axhline(y - 0.5, color="black", lw=0.6)
    axis.set_xlim(-0.5, len(rivals) - 0.5)
    axis.set_ylim(len(rows) - 0.5, -0.5)
    names = [n.removesuffix(GRAPH) for n in rivals]
    axis.set_xticks(range(len(rivals)), [NAMES.get(n, n) for n in names], fontsize=9)
    axis.set_yticks(range(len(rows)), [row["label"].replace("  ", "   ") for row in rows])
    axis.xaxis.tick_top()
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)


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
