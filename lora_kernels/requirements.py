"""Which versions of other packages are too old: for the whole of lora_kernels, or for one thing that it does."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

FLOORS = {
    "torch": "2.11",
    "numpy": "2.0",
    "safetensors": "0.8",
    "triton": "3.6",
    "transformers": "5.17",
    "peft": "0.21",
    "accelerate": "1.10",
    "trl": "1.8",
    "datasets": "4.7",
    "bitsandbytes": "0.50.2",
}
"""The oldest versions that the tests pass with; pyproject.toml names the same."""


_pip = shutil.which("pip")
PIP = "pip" if _pip and Path(_pip).parent == Path(sys.executable).parent else f"{shlex.quote(sys.executable)} -m pip"
"""The pip of the Python that runs; the one on PATH may be another's."""


def numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: `2.13.0+cpu` is (2, 13, 0); a release candidate counts as its release."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, found[0].split("."))) if found else ()


def installed(package: str) -> str | None:
    """The version of `package` that runs or would be imported, or None; imports nothing."""
    running = getattr(sys.modules.get(package), "__version__", None)
    if running is not None:
        return str(running)
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def missing(package: str, needed: str | None = None) -> str | None:
    """What is wrong with the installed `package`, and the command that cures it, or None.

    Args:
        needed: the oldest version that will do; None for that of `FLOORS`.
    """
    needed, found = needed or FLOORS[package], installed(package)
    command = f"{PIP} install '{package}>={needed}'"
    if found is None:
        return f"{package} {needed} or newer, which is not installed: {command}"
    if numbers(found) < numbers(needed):
        return f"{package} {needed} or newer, found {found}: {command}"
    return None


class TooOldError(ImportError):
    """A package is missing or too old for what was asked of lora_kernels."""


def require(package: str, what: str, needed: str | None = None) -> None:
    """Raises TooOldError if `what` needs a newer `package` than the installed one (see `missing`)."""
    problem = missing(package, needed)
    if problem is not None:
        raise TooOldError(f"{what} needs {problem}")
