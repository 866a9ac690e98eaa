"""Writes the README's section on speed and the pictures from the committed result files, so that no number is typed by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .plot import draw
from .suite import GRAPH, OURS, threads_text, time_text, write_text

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"

TITLES = {
    "train_step": "A training step of a whole model (forward, backward, AdamW)",
    "decode": "Generating one token after another",
    "train_layer": "Forward and backward of one linear layer",
    "forward": "Forward of one linear layer, from one token up",
    "dequantize": "NF4 with double quantization to bf16",
    "quantize": "bf16 to NF4 with double quantization",
    "decode_absmax": "Double-quantized scales to float32",
    "memory": "Peak memory of one forward and backward pass, weights not counted",
}
"""In the order in which the suites appear."""
HEADLINES = ("train_step", "decode")
"""Suites whose table is shown; the others fold theirs away below the picture."""
NAMES = {
    "dense": "frozen bf16 `nn.Linear`, no adapter",
    "dense+peft": "bf16 + PEFT",
    "torch": "plain torch",
    "bnb": "bitsandbytes",
    "bnb+peft": "bitsandbytes + PEFT",
    "bnb+peft-autocast": "bitsandbytes + PEFT, bf16 autocast",
    "bnb+peft-bf16": "bitsandbytes + PEFT, bf16 adapters",
    "bnb-inference": "bitsandbytes repacked for inference, no adapter",
    "bnb-inference+peft": "bitsandbytes repacked for inference + PEFT",
    "lorafusion": "LoRAFusion on 16-bit weights",
    "lorafusion-nf4": "LoRAFusion on weights dequantized by bitsandbytes",
    "unsloth": "Unsloth",
    "torchao": "torchao NF4",
}


def load(folder: Path = RESULTS) -> list[tuple[Path, dict[str, Any]]]:
    """All results, devices by name, suites in the order of TITLES."""
    found = [(path, json.loads(path.read_text())) for path in sorted(folder.rglob("*.json"))]
    order = list(TITLES)
    return sorted(
        ((p, r) for p, r in found if r.get("suite") in order), key=lambda f: (f[1]["device"], order.index(f[1]["suite"]))
    )


def section(results: list[tuple[Path, dict[str, Any]]], root: Path = ROOT) -> str:
    """Markdown between the markers."""
    parts = [
        "A ratio is the time of the other over ours, both taken in one interleaved run: above 1 we are faster, below 1 slower. "
        "Every output was compared with float64 first. `python -m bench run SUITE` repeats a table, `python -m bench report` "
        "writes this section."
    ]
    device = None
    for path, result in results:
        if result["device"] != device:
            device = result["device"]
            parts.append(f"### {device}\n\n{_machine(result)}")
        parts.append(_suite(path, result, root))
    return "\n\n".join(parts)


def _machine(result: dict[str, Any]) -> str:
    versions = [
        f"{n} {v}" for n, v in result["versions"].items() if v and n in ("torch", "triton", "bitsandbytes", "peft", "torchao")
    ]
    where = [threads_text(result)] if not result["driver"] else [f"driver {result['driver']}"]
    if isa := result.get("isa"):
        where.append(isa)
    return f"{', '.join([*where, *versions])}; {result['date'][:10]}, commit {result['commit']}."


def _suite(path: Path, result: dict[str, Any], root: Path) -> str:
    title = TITLES[result["suite"]]
    parts = [f"#### {title}"]
    if result.get("quick"):
        parts.append("**Quick run: too short to compare anything.**")
    table = _table(result)
    if result["suite"] in HEADLINES:
        parts.append(table)
    else:
        picture = path.with_suffix(".png")
        draw(result, picture)
        if picture.exists():
            parts.append(f"![{title}: ratio to each rival, by shape]({picture.relative_to(root).as_posix()})")
        parts.append(_extremes(result))
        parts.append(f"<details><summary>Table</summary>\n\n{table}\n\n</details>")
    return "\n\n".join(p for p in parts if p)


def rivals(result: dict[str, Any]) -> list[str]:
    """Rivals with a ratio on some line; on a GPU those timed in CUDA graphs, where no time of the host is counted."""
    names = list(result["summary"])
    graphs = [n for n in names if n.endswith(GRAPH)]
    return graphs or names


def _table(result: dict[str, Any]) -> str:
    names = rivals(result)
    ours = OURS + GRAPH if names and names[0].endswith(GRAPH) else OURS
    memory = result["suite"] == "memory"
    heads = ["", "ours", *(NAMES.get(n.removesuffix(GRAPH), n.removesuffix(GRAPH)) for n in names)]
    if not memory:
        heads.insert(2, "of ceiling")
    lines = ["| " + " | ".join(heads) + " |", "| --- " + "| ---: " * (len(heads) - 1) + "|"]
    for row in result["rows"]:
        mine = row["entries"].get(ours, {"status": "not run"})
        cells = [row["label"].replace("  ", " "), _ours(mine, memory)]
        if not memory:
            cells.append(f"{mine['of_ceiling']:.0%}" if "of_ceiling" in mine else "")
        for name in names:
            entry = row["entries"].get(name, {})
            cells.append(f"{entry['ratio']['median']:.2f}x" if "ratio" in entry else entry.get("status", "").partition(":")[0])
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _ours(entry: dict[str, Any], memory: bool) -> str:
    if entry["status"] != "ok":
        return f"**{entry['status'].partition(':')[0]}**"
    if memory:
        return f"{entry['peak'] / 1e6:.0f} MB"
    text = time_text(entry["seconds"]["median"])
    return f"{text}, {entry['tokens/s']:.0f} tokens/s" if "tokens/s" in entry else text


def _extremes(result: dict[str, Any]) -> str:
    lines = []
    for name in rivals(result):
        s, plain = result["summary"][name], NAMES.get(name.removesuffix(GRAPH), name.removesuffix(GRAPH))
        worst, best = (s[f"{end}_at"].replace("  ", " ") for end in ("worst", "best"))
        lines.append(
            f"- over {plain}: worst **{s['worst']:.2f}x** ({worst}), mean {s['mean']:.2f}x, best **{s['best']:.2f}x** ({best})"
        )
    return "\n".join(lines)


def update(readme: Path, text: str) -> None:
    """Replaces what stands between the markers.  Raises ValueError if they are not there."""
    old = readme.read_text(encoding="utf-8")
    if old.count(BEGIN) != 1 or old.count(END) != 1 or old.index(BEGIN) > old.index(END):
        raise ValueError(f"{readme} must hold the markers {BEGIN} and {END}, once each, in this order")
    new = old[: old.index(BEGIN) + len(BEGIN)] + f"\n{text}\n" + old[old.index(END) :]
    write_text(readme, new)
