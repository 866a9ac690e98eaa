"""The import graph of the packages, drawn from the sources alone: nothing is imported.  test_structure.py judges it.

    python tests/structure.py [CHECKOUT]      rooms, arrows, circles, private names and the longest files

An arrow goes from a module to one that it imports anywhere in its file, at its top or inside a function.  Imports under
`if TYPE_CHECKING` are arrows of their own kind: they may not go upwards either, but close no circle.  What is loaded by name
(`importlib.import_module`: the backends, the integrations that `lora_kernels` opens lazily) makes no arrow.
"""

from __future__ import annotations

import ast
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

PACKAGES = ("lora_kernels", "bench")

LAYERS: Mapping[str, Sequence[str]] = {
    "lora_kernels": (
        "version env requirements",
        "formats",
        "layer",
        "backends",
        "ops",
        "autograd",
        "packed nn grouping",
        "model report adapter_files processes allocator testing",
        "integrations",
        "app cli",
        "__init__",  # the library as its user sees it; nothing in it but the examples may import it
        "examples",
    ),
    "bench": (
        "__init__ measure",
        "suite",
        "rivals",
        "suites",
        "tools report",
        "cli __main__ test_suites",
    ),
}
"""From the bottom up, modules and folders of each package.  A module imports from its own layer and from those below it."""

CORE = LAYERS["lora_kernels"][: LAYERS["lora_kernels"].index("integrations")]
"""What computes: it knows nothing of Hugging Face, of training or of the command line."""

EXCEPTIONS: Mapping[tuple[str, str], str] = {}
"""Arrows (from, to) that are allowed to break a rule, each with its reason."""


@dataclass(frozen=True, order=True)
class Arrow:
    """`source` imports `target`; `typing` if only for annotations."""

    source: str
    target: str
    typing: bool = False

    def __str__(self) -> str:
        return f"{self.source} -> {self.target}" + " (typing)" * self.typing


@dataclass
class Graph:
    """What `draw` found.

    Attributes:
        lines: of each module, by its full name.
        arrows: one from a module to another, however often it imports it.
        private: (module, the `module._name` of another module that it takes).
    """

    lines: dict[str, int] = field(default_factory=dict)
    arrows: set[Arrow] = field(default_factory=set)
    private: set[tuple[str, str]] = field(default_factory=set)

    def targets(self, module: str) -> set[str]:
        """What it imports when it runs."""
        return {a.target for a in self.arrows if a.source == module and not a.typing}


def draw(root: Path) -> Graph:
    """The graph of the packages in a checkout."""
    files = {}
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    graph = Graph()
    for module, path in files.items():
        source = path.read_text(encoding="utf-8")
        graph.lines[module] = source.count("\n")
        _Reader(module, path.name == "__init__.py", files, graph).visit(ast.parse(source))
    return graph


class _Reader(ast.NodeVisitor):
    """Adds the arrows and private names of one module."""

    def __init__(self, module: str, is_package: bool, known: Mapping[str, Path], graph: Graph) -> None:
        self.module, self.known, self.graph = module, known, graph
        self.package = module if is_package else module.rpartition(".")[0]
        self.typing = False
        self.names: dict[str, str] = {}  # what a local name stands for, where that is a module of the packages

    def visit_If(self, node: ast.If) -> None:
        self.visit(node.test)
        before, self.typing = self.typing, self.typing or "TYPE_CHECKING" in ast.unparse(node.test)
        for statement in node.body:
            self.visit(statement)
        self.typing = before
        for statement in node.orelse:
            self.visit(statement)

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self._arrow(self._longest(alias.name))
            bound = alias.name if alias.asname else alias.name.partition(".")[0]
            if bound in self.known:
                self.names[alias.asname or bound] = bound

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if node.level:
            here = self.package.split(".")
            base = ".".join([*here[: len(here) - node.level + 1], *([node.module] if node.module else [])])
        else:
            base = node.module or ""
        for alias in node.names:
            inner = f"{base}.{alias.name}"
            if inner in self.known:
                self._arrow(inner)
                self.names[alias.asname or alias.name] = inner
            else:
                self._arrow(self._longest(base))
            self._private(base, alias.name)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if owner := self._module_of(node.value):
            self._private(owner, node.attr)
        self.generic_visit(node)

    def _module_of(self, node: ast.expr) -> str | None:
        """The module that an expression such as `lk.backends.native` stands for."""
        if isinstance(node, ast.Name):
            return self.names.get(node.id)
        if isinstance(node, ast.Attribute) and (owner := self._module_of(node.value)):
            inner = f"{owner}.{node.attr}"
            return inner if inner in self.known else None
        return None

    def _longest(self, name: str) -> str | None:
        while name and name not in self.known:
            name = name.rpartition(".")[0]
        return name or None

    def _arrow(self, target: str | None) -> None:
        if target and target != self.module:
            self.graph.arrows.add(Arrow(self.module, target, self.typing))

    def _private(self, owner: str, name: str) -> None:
        if owner in self.known and owner != self.module and name.startswith("_") and not name.endswith("__"):
            self.graph.private.add((self.module, f"{owner}.{name}"))


def layer_of(module: str) -> int | None:
    """Its number in LAYERS, from the bottom; None for a module that has no place there."""
    package, _, inner = module.partition(".")
    names = [layer.split() for layer in LAYERS[package]]
    first = inner.partition(".")[0] or "__init__"
    return next((i for i, layer in enumerate(names) if first in layer), None)


def upward(graph: Graph) -> list[Arrow]:
    """Arrows within a package to a higher layer, and all from the package to what only measures it."""
    found = []
    for arrow in sorted(graph.arrows):
        here, there = arrow.source.partition(".")[0], arrow.target.partition(".")[0]
        if here != there:
            if PACKAGES.index(here) < PACKAGES.index(there):
                found.append(arrow)
            continue
        low, high = layer_of(arrow.source), layer_of(arrow.target)
        if low is not None and high is not None and low < high:
            found.append(arrow)
    return found


def circles(graph: Graph) -> list[list[str]]:
    """Groups of modules of which each imports every other, directly or not."""
    reach = {module: _reachable(graph, module) for module in graph.lines}
    groups = {
        tuple(sorted(m for m in reach[module] if module in reach[m])) for module in graph.lines if module in reach[module]
    }
    return [list(group) for group in sorted(groups)]


def _reachable(graph: Graph, start: str) -> set[str]:
    seen: set[str] = set()
    todo = [start]
    while todo:
        new = graph.targets(todo.pop()) - seen
        seen |= new
        todo += new
    return seen


def room_of(module: str, graph: Graph) -> str:
    """The folder that a module lies in."""
    is_package = any(other.startswith(f"{module}.") for other in graph.lines)
    return module if is_package else module.rpartition(".")[0]


def report(graph: Graph) -> Iterator[str]:
    """The graph in numbers and names, for people."""
    modules, lines = Counter(room_of(m, graph) for m in graph.lines), Counter[str]()
    for module, n in graph.lines.items():
        lines[room_of(module, graph)] += n
    yield f"rooms: {len(modules)}"
    for room in sorted(modules):
        yield f"  {room}: {modules[room]} modules, {lines[room]} lines"
    yield f"arrows: {sum(not a.typing for a in graph.arrows)}, and {sum(a.typing for a in graph.arrows)} for annotations alone"
    homeless = [m for m in graph.lines if layer_of(m) is None]
    for title, found in (
        ("upward arrows", list(map(str, upward(graph)))),
        ("circles", [" <-> ".join(c) for c in circles(graph)]),
        ("private names of another module", [f"{who} takes {what}" for who, what in sorted(graph.private)]),
        ("modules in no layer", homeless),
    ):
        yield f"{title}: {len(found)}"
        yield from (f"  {line}" for line in found)
    yield "longest files:"
    for module, n in sorted(graph.lines.items(), key=lambda item: -item[1])[:5]:
        yield f"  {n} {module}"


if __name__ == "__main__":
    print(*report(draw(Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent.parent))), sep="\n")
