"""Versions that are too old are named, with the command that cures it, before anything is done with them."""

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import python

from lora_kernels import requirements
from lora_kernels.requirements import FLOORS, PIP, TooOldError, installed, missing, numbers, require

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it

ROOT = Path(__file__).parent.parent


def declared():
    """The floors of pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    return dict(re.match(r"([\w-]+)>=([\d.]+)", line).groups() for line in lines if not line.startswith("lora_kernels["))


def test_floors_are_those_that_are_installed_by_make_test_oldest():
    floors = declared()
    assert FLOORS.items() <= floors.items()
    locked = dict(re.findall(r"^([\w-]+)==(\S+)", (ROOT / "constraints" / "oldest.txt").read_text(), re.MULTILINE)[::-1])
    for name in floors.keys() - {"pre-commit", "ruff", "clang-format", "mypy"}:
        got, want = numbers(locked[name]), numbers(floors[name])
        assert got[: len(want)] == want and not any(got[len(want) :]), f"{name}: {locked[name]} for a floor of {floors[name]}"


def test_numbers_and_what_is_installed(monkeypatch):
    assert [numbers(v) for v in ("2.13.0+cpu", "3.6", "5.17.0.dev0", "?")] == [(2, 13, 0), (3, 6), (5, 17, 0), ()]
    assert numbers("2.9.1") < numbers("2.11")
    monkeypatch.setitem(sys.modules, "peft", SimpleNamespace(__version__="0.20.9"))
    assert installed("peft") == "0.20.9"
    assert missing("peft") == f"peft 0.21 or newer, found 0.20.9: {PIP} install 'peft>=0.21'"
    assert missing("peft", "0.20.9") is None
    with pytest.raises(
        TooOldError, match=r"^this needs no_such_package 2 or newer, which is not installed: .*pip install 'no_s"
    ):
        require("no_such_package", "this", "2")


@pytest.mark.parametrize(
    ("package", "name"),
    [("torch", "version"), ("transformers", "QLoRAQuantConfig"), ("peft", "enable_peft"), ("bitsandbytes", "accelerate")],
)
def test_too_old_to_import(package, name):
    """Whatever an old version would do, the name of the package that is too old is what comes out."""
    out = python(
        f"import sys, torch, types\nsys.modules[{package!r}] = types.SimpleNamespace(__version__='0.0.1')\n"
        f"try:\n    import lora_kernels as lk\n    lk.{name}\nexcept ImportError as e:\n    print(e)"
    )
    assert f"needs {package} {FLOORS[package]} or newer, found 0.0.1: " in out
    assert f"pip install '{package}>={FLOORS[package]}'" in out


def test_an_old_bitsandbytes_is_not_taken_for_none():
    """The loader of models of transformers would give other layers without it."""
    out = python(
        "import sys, torch, types\nsys.modules['bitsandbytes'] = types.SimpleNamespace(__version__='0.0.1')\n"
        "try:\n    import lora_kernels.integrations.quantizer\nexcept ImportError as e:\n    print(e)"
    )
    assert "needs bitsandbytes 0.50.2 or newer, found 0.0.1" in out


def test_the_command_line_says_it_in_a_line(monkeypatch, tmp_path):
    from typer.testing import CliRunner

    from lora_kernels.app import cli

    monkeypatch.setitem(requirements.FLOORS, "transformers", "99.1")
    done = CliRunner().invoke(cli.app, ["verify", str(tmp_path)])
    assert done.exit_code == 2
    assert re.fullmatch(
        r"error: .* needs transformers 99\.1 or newer, found 5\.\S+: .*pip install 'transformers>=99\.1'\n", done.stderr
    )
