"""Writes docs/results.md, the README's summary and the pictures from the committed result files: no number is typed by hand."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..measure import ROOT
from ..suite import threads_text, write_text
from . import grid, overview, targets
from .names import GROUPS, SUITES, plain
from .overview import rivals, worst_mean_best
from .plot import Span, draw, draw_overview

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
README = ROOT / "README.md"
PAGE = ROOT / "docs/results.md"

READING = """A ratio is the time of the other over ours, both taken in one interleaved run: above 1 we are faster.  A cell
goes from the worst line of a suite to its best, with the geometric mean, and is **bold** where we lose; of several settings of
a rival the fastest on a line counts (the suite of every shape has one of bitsandbytes, its default).  What has no adapter
computes less than ours, y and dx but not h, dA and dB: it is the limit."""

INTRODUCTION = f"""# Results

`python -m bench report` writes this page from the files under `bench/results/`; `make bench` makes those anew.

{READING}

Every output was compared with float64 before it was timed.  The method: [benchmarks.md](benchmarks.md)."""

GRID = """Each table has `N x K` of the weight down and tokens, that is rows of x, across.  First come the lines on which we do
worst and best, with the operations that ours must do and the bytes that it must move, over those of the other.  Where they do
not explain a loss, [cpu.md](cpu.md) says what does."""

PICTURED = tuple(name for name in GROUPS if name != "plain torch")
"""Rivals in the picture of all suites."""


def document(results: Sequence[tuple[Path, dict[str, Any]]], folder: Path = PAGE.parent) -> str:
    """Everything, as Markdown that lies in `folder`."""
    parts = [INTRODUCTION]
    for device, here in _devices(results):
        found = [result for _, result in here]
        parts += [f"## {device}", _machine(found), _markdown(*overview.texts(found, "**")), _targets(found)]
        parts += [_details(path, result, folder) for path, result in here]
    return "\n\n".join(parts) + "\n"


def section(results: Sequence[tuple[Path, dict[str, Any]]]) -> str:
    """What stands between the README's markers: a table a device."""
    parts = [READING]
    for device, here in _devices(results):
        found = [result for _, result in here]
        parts += [f"**{device}**: {_machine(found)}", _markdown(*overview.texts(found, "**"))]
    return "\n\n".join(parts)


def pictures(results: Sequence[tuple[Path, dict[str, Any]]], folder: Path = PAGE.parent) -> None:
    """Draws one of each suite beside its results, and one of all suites of a device, light and dark, into `folder`."""
    for path, result in results:
        draw(result, path.with_suffix(".png"))
    for device, here in _devices(results):
        found = [result for _, result in here]
        groups = [n for n in PICTURED if sum(bool(worst_mean_best(r, GROUPS[n])) for r in found) > 1]
        rows = {SUITES[r["suite"]]: [_span(r, GROUPS[n]) for n in groups] for r in found}
        where = f"{device}, {found[0]['date'][:10]}"
        for dark in (False, True):
            name = f"overview-{here[0][0].parent.name}-{'dark' if dark else 'light'}.png"
            draw_overview(groups, rows, where, folder / name, dark)


def _devices(results: Sequence[tuple[Path, dict[str, Any]]]) -> Iterator[tuple[str, list[tuple[Path, dict[str, Any]]]]]:
    for device in dict.fromkeys(result["device"] for _, result in results):
        yield device, [(path, result) for path, result in results if result["device"] == device]


def _targets(results: list[dict[str, Any]]) -> str:
    rows = targets.texts(results)
    reached = sum(row[4] == "reached" for row in rows)
    text = _markdown(targets.HEADING, rows)
    summary = f"Targets, our time over theirs on the worst line: {reached} of {len(rows)} reached"
    return f"<details><summary>{summary}</summary>\n\n{text}\n\n</details>"


def _markdown(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines: list[Sequence[str]] = [heading, ["---", *["---:"] * (len(heading) - 1)], *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _machine(results: Sequence[dict[str, Any]]) -> str:
    """What the results of one device were taken with: more than one version, commit or date are all named."""

    def all_of(values: Sequence[str]) -> str:
        return " and ".join(dict.fromkeys(values))

    first = results[0]
    shown = ("torch", "triton", "bitsandbytes", "peft", "torchao", "unsloth", "lorafusion")
    versions = {n: [r["versions"][n] for r in results if r["versions"].get(n)] for n in shown}
    where = [f"driver {first['driver']}"] if first["driver"] else [all_of([threads_text(r) for r in results])]
    if isa := first.get("isa"):
        where.append(isa)
    where += [f"{name} {all_of(values)}" for name, values in versions.items() if values]
    text = f"{', '.join(where)}; {all_of([r['date'][:10] for r in results])}, {all_of([_code(r) for r in results])}."
    if left := [f"{r['suite']} {line}" for r in results for line in r.get("left_out", [])]:
        text += f" Not measured for lack of time: {'; '.join(left)}."
    if quick := [r["suite"] for r in results if r.get("quick")]:
        text += f" **Quick runs, too short to compare anything: {', '.join(quick)}.**"
    return text


def _code(result: dict[str, Any]) -> str:
    commit = f"commit {result['commit']}" if result["commit"] else f"sources {result.get('sources', 'unknown')}"
    return f"**{commit} with uncommitted changes**" if result.get("dirty") else commit


def _details(path: Path, result: dict[str, Any], folder: Path) -> str:
    """Folded away: the picture, which holds every ratio, and the extremes of each rival."""
    picture = path.with_suffix(".png")
    title = SUITES[result["suite"]]
    parts = [f"<details><summary>{title}</summary>"]
    if result["summary"]:
        link = Path(os.path.relpath(picture, folder)).as_posix()
        parts.append(f"![{title}: ratio to each rival, by shape]({link})")
    if result["suite"] == "grid":
        parts.append(GRID)
        parts += [_table(grid.standing(result, name), grid.extremes(result, name)) for name in rivals(result)]
        parts += [_table(matrix.title, matrix.texts()) for matrix in grid.matrices(result)]
    else:
        parts.append(_extremes(result))
    return "\n\n".join([*parts, "</details>"])


def _table(title: str, texts: Iterator[list[str]]) -> str:
    heading, *rows = texts
    return f"{title[0].upper()}{title[1:]}:\n\n{_markdown(heading, [[_strong(cell) for cell in row] for row in rows])}"


def _strong(cell: str) -> str:
    return f"**{cell}**" if grid.lost(cell) else cell


def _extremes(result: dict[str, Any]) -> str:
    rows = []
    for name in rivals(result):
        s = result["summary"][name]
        worst, best = (f"{_strong(f'{s[end]:.2f}x')} {s[f'{end}_at']}".replace("  ", " ") for end in ("worst", "best"))
        rows.append([plain(name), *([f"{s['mean']:.2f}x"] if len(result["rows"]) == 1 else [worst, f"{s['mean']:.2f}x", best])])
    return _markdown(["over", "ratio"] if len(result["rows"]) == 1 else ["over", "worst", "mean", "best"], rows)


def update(readme: Path, text: str) -> None:
    """Replaces what stands between the markers.  Raises ValueError if they are not there."""
    old = readme.read_text(encoding="utf-8")
    if old.count(BEGIN) != 1 or old.count(END) != 1 or old.index(BEGIN) > old.index(END):
        raise ValueError(f"{readme} must hold the markers {BEGIN} and {END}, once each, in this order")
    new = old[: old.index(BEGIN) + len(BEGIN)] + f"\n{text}\n" + old[old.index(END) :]
    write_text(readme, new)


def _span(result: dict[str, Any], names: Sequence[str]) -> Span | None:
    found = worst_mean_best(result, names)
    return Span(*found) if found else None
