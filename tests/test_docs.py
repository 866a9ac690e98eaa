"""The Markdown files name nothing that is not there: files, headings, make targets, commands, options, variables, messages."""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob(".github/**/*.md")])
IDS = [str(file.relative_to(ROOT)) for file in FILES]
each_file = pytest.mark.parametrize("file", FILES, ids=IDS)
TEXTS = {file: file.read_text(encoding="utf-8") for file in FILES}
pytestmark = pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="no docs in this distribution")

FOREIGN = {"--seed", "--no-build-isolation", "--index-url", "--benchmark-only"}
"""Options of pytest and pip that the text names by themselves."""


def code_blocks(text: str) -> list[str]:
    return re.findall(r"^```\w*\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def prose(text: str) -> str:
    """Without code blocks."""
    return re.sub(r"^```\w*\n.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def code(text: str) -> list[str]:
    """Every line of a code block, and what stands between backticks."""
    lines = [line for block in code_blocks(text) for line in block.splitlines()]
    return lines + re.findall(r"`([^`\n]+)`", prose(text))


def anchors(text: str) -> set[str]:
    """Of each heading, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_file
def test_links(file: Path) -> None:
    text = prose(TEXTS[file])
    found = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|srcset|href)="([^"]+)"', text)
    for link in found:
        if re.match(r"https?://|mailto:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (file.parent / name).resolve() if name else file
        assert target.exists(), f"{link} does not exist"
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), f"{link}: no such heading"


def test_make_targets() -> None:
    targets = set(re.findall(r"^([\w-]+):(?!=)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    pieces = [piece for text in TEXTS.values() for piece in code(text)]
    for workflow in ROOT.glob(".github/workflows/*.yml"):
        pieces += [line.removeprefix("run: ") for line in re.findall(r"run: make .*", workflow.read_text(encoding="utf-8"))]
    named = {target for piece in pieces for target in re.findall(r"(?:^|&& |; )make ([a-z][\w-]*)", piece)}
    assert {"test", "lint", "demo"} <= named
    assert named <= targets


def programs() -> dict[str, dict[str, set[str]]]:
    """Each command line's commands and their options."""
    typer = pytest.importorskip("typer")
    pytest.importorskip("psutil")
    from bench import cli as bench_cli
    from lora_kernels.app import cli

    found = {}
    for name, app in (("lora-kernels", cli.app), ("bench", bench_cli.app)):
        group: Any = typer.main.get_command(app)
        found[name] = {
            command: {option for p in c.params for option in (*p.opts, *p.secondary_opts) if option.startswith("--")}
            for command, c in group.commands.items()
        }
    return found


COMMAND = re.compile(r"(?:^|.*[\s/])(lora-kernels|-m lora_kernels\.cli|-m bench) +([a-z].*)$")


def commands(text: str) -> Iterator[tuple[str, str, list[str]]]:
    """(program, command, words after it) of each one in the text."""
    for piece in code(text):
        if match := COMMAND.match(piece):
            words = shlex.split(match[2], comments=True)
            yield "bench" if match[1] == "-m bench" else "lora-kernels", words[0], words[1:]


@each_file
def test_commands_and_options(file: Path) -> None:
    known = programs()
    for program, command, words in commands(TEXTS[file]):
        assert command in known[program], f"{program} has no command {command}"
        for word in words:
            if word.startswith("--"):
                option = word.partition("=")[0]
                assert option in known[program][command] | {"--help"}, f"{program} {command} has no option {option}"
    everywhere = {o for program in known.values() for options in program.values() for o in options} | FOREIGN
    for piece in re.findall(r"`(--[a-z][\w-]*)", prose(TEXTS[file])):
        assert piece in everywhere, f"{piece} is no option"


def test_the_commands_are_found() -> None:
    """Of a text, so that the test above can't pass by finding none."""
    block = "A=1 torchrun -m lora_kernels.cli merge X --out y  # z\npython -m bench report\n"
    text = f"Try `lora-kernels doctor`.\n```bash\n{block}```\n"
    assert sorted(commands(text)) == [
        ("bench", "report", []),
        ("lora-kernels", "doctor", []),
        ("lora-kernels", "merge", ["X", "--out", "y"]),
    ]
    assert sum(len(list(commands(t))) for t in TEXTS.values()) > 30


@each_file
def test_modules_and_tests(file: Path) -> None:
    for module in re.findall(r"-m (lora_kernels[\w.]+)", TEXTS[file]):
        assert importlib.util.find_spec(module.rstrip(".")) or module.endswith(".NAME"), module
    for name in re.findall(r"`(?:python )?((?:lora_kernels|docs|bench|tests|csrc|examples)/[\w/.-]+\.\w+)", TEXTS[file]):
        assert (ROOT / name).exists(), f"{name} does not exist"
    for name in re.findall(r"`(test_\w+\.py)", TEXTS[file]):
        assert len(list(ROOT.glob(f"tests/**/{name}"))) == 1, f"{name} is not one file under tests/"


@each_file
def test_environment_variables(file: Path) -> None:
    sources = [ROOT / "setup.py", *ROOT.glob("lora_kernels/*.py")]
    known = set(re.findall(r"LORA_KERNELS_[A-Z_]+", "".join(p.read_text(encoding="utf-8") for p in sources)))
    assert set(re.findall(r"LORA_KERNELS_[A-Z_]+", TEXTS[file])) <= known


def test_the_table_of_options_is_that_of_finetune() -> None:
    typer = pytest.importorskip("typer")
    pytest.importorskip("psutil")
    from lora_kernels.app import cli

    rows = dict(re.findall(r"^\| `(--[\w-]+)` \| ([^|]*?) ?\|", TEXTS[ROOT / "docs" / "finetune.md"], re.MULTILINE))
    command = typer.main.get_command(cli.app).commands["finetune"]
    options = {p.opts[0]: p for p in command.params if p.opts[0].startswith("--")}
    assert list(rows) == list(options)
    for name, option in options.items():
        default = "" if option.required or option.default is None else option.default
        assert rows[name] == {"True": "on", "False": "off"}.get(str(default), str(default)), name


def messages() -> list[str]:
    """The constant parts of every string in the sources: each side of a value in an f-string, joined over lines."""
    files = [*ROOT.glob("lora_kernels/**/*.py"), ROOT / "setup.py"]
    trees = [ast.parse(p.read_text(encoding="utf-8")) for p in files]
    texts = [node.value for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    return [t for t in texts if isinstance(t, str)] + [p.read_text(encoding="utf-8") for p in ROOT.glob("csrc/**/*.cpp")]


def test_messages_of_troubleshooting_are_in_the_sources() -> None:
    page = TEXTS[ROOT / "docs" / "troubleshooting.md"]
    table = page.partition("## What the package says")[2]
    quoted = re.findall(r"^\| `([^`]+)`", table, re.MULTILINE)
    assert len(quoted) > 25
    known = messages()
    for message in quoted:
        for part in filter(None, (p.strip() for p in message.split("..."))):
            assert any(part in text for text in known), f"{message}: nothing says {part!r}"
