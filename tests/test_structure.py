"""Imports go downwards and in no circle, what is private stays at home, and no test file imports another."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from pathlib import Path

import pytest
import structure
from structure import CORE, EXCEPTIONS, LAYERS, Arrow, Graph

ROOT = Path(__file__).parent.parent
TESTS = sorted([*ROOT.glob("tests/**/test_*.py"), *ROOT.glob("bench/**/test_*.py")])
BESIDE = sorted({*ROOT.glob("tests/**/*.py")} - {*TESTS})
"""What tests share."""


@pytest.fixture(scope="module")
def graph() -> Graph:
    return structure.draw(ROOT)


def none_of(found: Iterable[object]) -> None:
    """Fails with a line for each."""
    lines = list(map(str, found))
    assert not lines, "\n".join(["", *lines])


def test_every_module_has_a_layer(graph: Graph) -> None:
    none_of(m for m in graph.lines if structure.layer_of(m) is None)


def test_every_layer_has_a_module(graph: Graph) -> None:
    """Names that LAYERS and EXCEPTIONS no longer need."""
    inner = {(m.split(".") + ["__init__"])[1] for m in graph.lines}
    none_of(name for layers in LAYERS.values() for layer in layers for name in layer.split() if name not in inner)
    assert set(EXCEPTIONS) <= {(a.source, a.target) for a in graph.arrows}


def test_imports_go_downwards(graph: Graph) -> None:
    none_of(a for a in structure.upward(graph) if (a.source, a.target) not in EXCEPTIONS)


def test_no_circle(graph: Graph) -> None:
    none_of(" <-> ".join(circle) for circle in structure.circles(graph))


def test_private_names_stay_at_home(graph: Graph) -> None:
    none_of(f"{who} takes {what}" for who, what in sorted(graph.private))


def test_the_core_knows_no_application(graph: Graph) -> None:
    core = tuple(f"lora_kernels.{name}" for layer in CORE for name in layer.split())
    above = ("lora_kernels.integrations", "lora_kernels.app", "lora_kernels.cli", "lora_kernels.examples")
    none_of(a for a in graph.arrows if a.source.startswith(core) and a.target.startswith(above))


def test_triton_needs_no_other_backend(graph: Graph) -> None:
    triton, room = "lora_kernels.backends.triton", "lora_kernels.backends."
    found = [a for a in graph.arrows if a.source.startswith(triton) and a.target.startswith(room)]
    none_of(a for a in found if not a.target.startswith(triton))


@pytest.mark.parametrize("file", [*TESTS, *BESIDE], ids=lambda f: str(f.relative_to(ROOT)))
def test_no_file_imports_a_test(file: Path) -> None:
    """What two of them use is in helpers.py, fixtures in conftest.py, which no file imports."""
    others = {"conftest", *(t.stem for t in TESTS)}
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            found += [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Import):
            found += [part for alias in node.names for part in alias.name.split(".")]
    none_of(sorted(others & set(found)))


def test_the_graph_is_right(tmp_path: Path) -> None:
    """Of a small checkout in which every rule is broken."""
    files = {
        "__init__": "from .nn import Layer",
        "formats": "from . import nn\nif TYPE_CHECKING:\n    from .ops import Op\nelse:\n    import lora_kernels.env",
        "nn": "import lora_kernels.formats as f\nfrom .formats import _table, table as _t\nf._other, f.__doc__, f.table._x",
        "ops": "def f():\n    import lora_kernels.backends.triton.tiles\n    lora_kernels.backends.triton._y",
        "env": "",
        "backends/__init__": "from ..requirements import x",
        "backends/triton/__init__": "from .tiles import T",
        "backends/triton/tiles": "from ..reference import z\nfrom ... import env",
        "backends/reference": "",
        "stray": "import torch",
    }
    for name, text in files.items():
        path = tmp_path / f"lora_kernels/{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    graph = structure.draw(tmp_path)

    def arrow(source: str, target: str, typing: bool = False) -> Arrow:
        return Arrow(*(f"lora_kernels.{name}".rstrip(".") for name in (source, target)), typing)

    up = [arrow("formats", "nn"), arrow("formats", "ops", True)]
    assert graph.arrows == {
        *up,
        arrow("", "nn"),
        arrow("formats", "env"),
        arrow("nn", "formats"),
        arrow("ops", "backends.triton.tiles"),
        arrow("backends", ""),  # there is no lora_kernels/requirements.py
        arrow("backends.triton", "backends.triton.tiles"),
        arrow("backends.triton.tiles", "backends.reference"),
        arrow("backends.triton.tiles", "env"),
    }
    assert structure.upward(graph) == [arrow("backends", ""), *up]
    assert structure.circles(graph) == [["lora_kernels.formats", "lora_kernels.nn"]]
    assert graph.private == {
        ("lora_kernels.nn", "lora_kernels.formats._other"),
        ("lora_kernels.nn", "lora_kernels.formats._table"),
        ("lora_kernels.ops", "lora_kernels.backends.triton._y"),
    }
    assert [m for m in graph.lines if structure.layer_of(m) is None] == ["lora_kernels.stray"]
