"""Makes a data set from the standard library of the running Python: signature and name -> what it does.

Run by path in a Python of its own (`python docstrings.py FILE`), as it imports every public module of the standard library.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import json
import pkgutil
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

SKIPPED = re.compile(
    r"(_|antigravity$|this$|idlelib|turtledemo|turtle$|lib2to3|ensurepip|test$|venv$|tkinter|msilib|nt$|winreg$|winsound$)"
    r"|.*\.(_|test|tests|__main__)"
)
"""Modules that open windows, do something on import, or are private or tests."""
QUESTION = "What does this Python {kind} do?\n\n{name}{signature}"


def modules() -> Iterator[ModuleType]:
    """Every importable public module of the standard library, in the order of their names."""
    for name in sorted(sys.stdlib_module_names):
        if SKIPPED.match(name):
            continue
        module = _import(name)
        if module is None:
            continue
        yield module
        paths = getattr(module, "__path__", None)
        if paths is not None:
            found = pkgutil.walk_packages(paths, f"{name}.", onerror=lambda _: None)
            for info in sorted((i for i in found if not SKIPPED.match(i.name)), key=lambda i: i.name):
                submodule = _import(info.name)
                if submodule is not None:
                    yield submodule


def _import(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(name)
    except BaseException:  # what a module of another platform raises, SystemExit included
        return None


def members(module: ModuleType) -> Iterator[tuple[str, str, Any]]:
    """(kind, name, object) of the public functions, classes and methods that a module defines."""
    for name, value in sorted(vars(module).items()):
        owner = getattr(value, "__module__", None) or module.__name__
        if name.startswith("_") or not callable(value) or owner.lstrip("_") != module.__name__.lstrip("_"):
            continue
        if not inspect.isclass(value):
            yield "function", f"{module.__name__}.{name}", value
            continue
        yield "class", f"{module.__name__}.{name}", value
        for method in sorted(vars(value)):
            member = getattr(value, method, None)
            if not method.startswith("_") and callable(member) and not inspect.isclass(member):
                yield "method", f"{module.__name__}.{name}.{method}", member


def pair(kind: str, name: str, value: Any) -> tuple[str, str] | None:
    """Question and answer, or None where there is no signature or no description of 4 to 60 words."""
    try:
        signature = re.sub(r" at 0x[0-9a-f]+", "", str(inspect.signature(value)))
        doc = value.__doc__ if inspect.isclass(value) else inspect.getdoc(value)
    except Exception:  # signatures are computed by code of the modules
        return None
    answer = " ".join(inspect.cleandoc(doc).split("\n\n")[0].split()) if isinstance(doc, str) else ""
    if not 4 <= len(answer.split()) <= 60 or len(signature) > 150 or not answer.isascii() or "(" in answer.split()[0]:
        return None
    return QUESTION.format(kind=kind, name=name, signature=signature), answer


def pairs() -> Iterator[tuple[str, str]]:
    """All pairs; no answer comes twice, so that none can be both trained on and held out."""
    answers = set()
    for module in modules():
        for kind, name, value in members(module):
            found = pair(kind, name, value)
            if found is not None and found[1] not in answers:
                answers.add(found[1])
                yield found


def main(file: str) -> None:
    """Writes the pairs as JSONL of chat messages."""
    sys.path[:] = [p for p in sys.path if Path(p) != Path(__file__).parent]
    warnings.simplefilter("ignore")
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        found = list(pairs())
    with Path(file).open("w") as out:
        for question, answer in found:
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            out.write(json.dumps({"messages": messages}) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
