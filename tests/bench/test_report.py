"""Tables, targets, pictures and pages from results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from made_results import entries, result_of

from bench.report import grid, names, overview, page, targets
from bench.report.plot import Span, draw_overview
from bench.suite import OURS


def test_overview_takes_the_fastest_setting_of_a_rival_and_marks_a_loss() -> None:
    rows = [
        {"label": "a", "entries": entries(dense=0.5) | entries(**{"bnb+peft": 3.0, "bnb+peft-autocast": 2.0})},
        {"label": "b", "entries": entries(dense=2.0) | entries(**{"bnb+peft": 8.0, "bnb+peft-autocast": 9.0})},
    ]
    heading, [cells] = overview.texts([result_of("train_layer", rows)], "**")
    found = dict(zip(heading, cells, strict=True))
    assert found["ours"] == "2 lines"
    assert found["bf16 nn.Linear, no adapter"] == "**0.50x** to 2.00x, mean 1.00x"
    assert found["bitsandbytes (+ PEFT), best setting"] == "2.00x to 8.00x, mean 4.00x"
    assert "Unsloth" not in found


def test_targets_are_decided_by_the_worst_line() -> None:
    rows = [
        {"label": f"4096x4096  M={M}", "M": M, "N": 4096, "K": 4096, "r": 16, "entries": entries(dense=ratio)}
        for M, ratio in ((16, 2.0), (512, 1.25), (2048, 1.0))
    ]
    verdicts = [v for v in targets.check([result_of("train_layer", rows)]) if v.measured is not None]
    assert [(v.target.most, v.measured, v.reached) for v in verdicts] == [(0.75, 0.5, True), (0.95, 1.0, False)]
    assert verdicts[1].at == "4096x4096 M=2048"


def test_grid_has_a_cell_for_every_shape_and_number_of_tokens() -> None:
    rows = [
        {"what": "forward", "threads": 1, "N": N, "K": 8, "M": M, "label": "", "entries": entries(dense=M / N)}
        for N, M in ((4, 1), (4, 2), (5, 2))
    ]
    [matrix] = grid.matrices(result_of("grid", rows))
    assert list(matrix.texts()) == [["", "M=1", "M=2"], ["4x8", "0.25x", "0.50x"], ["5x8", "", "0.40x"]]


def test_grid_shows_the_worst_lines_first_with_their_work() -> None:
    def entry(seconds: float, **ratio: float) -> dict[str, Any]:
        times = {"seconds": {"median": seconds}, "GFLOP/s": 3 / seconds, "GB/s": 2 / seconds}
        return times | ({"ratio": {"q1": 0.1, "q3": 9, **ratio}} if ratio else {})

    rows = [{"label": f"M={r}", "entries": {OURS: entry(1e-3), "dense": entry(2e-3, median=r)}} for r in (2.0, 0.5, 1.5)]
    result = result_of("grid", rows)
    assert grid.standing(result, "dense") == "against bf16 nn.Linear, no adapter: faster on 2 of 3 lines, mean 1.14x"
    _, worst, best = grid.extremes(result, "dense")
    assert worst == ["M=0.5", "0.50x [0.10, 9.00]", "1.00 ms", "2.00 ms", "1.00 of theirs", "1.00 of theirs"]
    assert best[0] == "M=2.0"
    text = page._table(grid.standing(result, "dense"), grid.extremes(result, "dense"))
    assert "| M=0.5 | **0.50x [0.10, 9.00]** | 1.00 ms |" in text
    assert "| M=2.0 | 2.00x [0.10, 9.00] |" in text


def test_overview_draws_every_suite_in_both_themes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setattr(page, "draw_overview", lambda *args: drawn.append(args))
    rows = [{"label": "a", "entries": entries(dense=0.5, torch=9.0)}, {"label": "b", "entries": entries(dense=2.0)}]
    found = [
        (tmp_path / "abacus" / f"{name}.json", result_of(name, rows) | {"device": "Abacus", "date": "2026-01-02T03"})
        for name in ("train_layer", "forward")
    ]
    monkeypatch.setattr(page, "draw", lambda result, path: None)
    page.pictures(found, tmp_path)
    for groups, spans, where, path, dark in drawn:
        assert groups == ["bf16 nn.Linear, no adapter"]  # plain torch is in the tables alone
        assert spans == {names.SUITES[name]: [(0.5, 1.0, 2.0)] for name in ("train_layer", "forward")}
        assert where == "Abacus, 2026-01-02"
        assert path == tmp_path / f"overview-abacus-{'dark' if dark else 'light'}.png"
    assert len(drawn) == 2


@pytest.mark.parametrize("dark", [False, True])
def test_overview_is_a_picture(tmp_path: Path, dark: bool) -> None:
    rows = {
        "a suite": [Span(0.5, 0.8, 2.0), None],
        "one line": [None, Span(1.5, 1.5, 1.5)],
        "losses": [Span(0.1, 0.2, 0.9), None],
    }
    draw_overview(["one", "two"], rows, "here", tmp_path / "all.png", dark)
    assert (tmp_path / "all.png").stat().st_size > 10_000


def test_readme_and_page_hold_the_committed_results() -> None:
    """After a new measurement `python -m bench report` must be run."""
    found = overview.load()
    readme = page.README.read_text(encoding="utf-8")
    assert readme.partition(page.BEGIN)[2].partition(page.END)[0].strip() == page.section(found)
    assert page.PAGE.read_text(encoding="utf-8") == page.document(found)
