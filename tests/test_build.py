"""What setup.py finds and refuses before it compiles anything; nothing here compiles."""

import importlib.util
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from lora_kernels.backends import native

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="needs the source tree")

ISOLATED = """
# as in an isolated build: the packages of the environment are not to be seen, those beside this file are
import sys, sysconfig
hidden = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
sys.path[:] = [p for p in sys.path if p not in hidden]
"""


def site(tmp_path: Path) -> Path:
    """A folder with setuptools alone."""
    folder = tmp_path / "site"
    folder.mkdir()
    packages = Path(importlib.util.find_spec("setuptools").origin).parents[1]
    for part in (*packages.glob("setuptools*"), packages / "_distutils_hack"):
        (folder / part.name).symlink_to(part)
    return folder


def build(tmp_path: Path, **environment: str) -> str:
    """What `setup.py build_ext` says on standard error in an isolated build; it must fail, and leave nothing behind."""
    folder, out = site(tmp_path), tmp_path / "out"
    (folder / "sitecustomize.py").write_text(ISOLATED)
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(out), "--build-temp", str(out)]
    env = os.environ | {"PYTHONPATH": str(folder), "LORA_KERNELS_BUILD": "cpu", "CXX": ""} | environment
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode != 0, done.stdout
    assert "Traceback" not in done.stderr
    assert not out.exists()
    return done.stderr


def torch_folder(tmp_path: Path, version: str) -> str:
    folder = tmp_path / version / "torch"
    folder.mkdir(parents=True)
    (folder / "version.py").write_text(f"__version__ = '{version}'\ncuda: Optional[str] = None\n")
    return str(folder)


def test_torch_of_the_environment_is_found_from_an_isolated_build(tmp_path):
    """All goes well as far as the compiler, which is missing."""
    assert "no C++ compiler 'no-such-compiler'" in build(tmp_path, CXX="no-such-compiler")


def test_no_torch(tmp_path):
    from venv import EnvBuilder

    EnvBuilder(symlinks=True).create(tmp_path / "empty")
    env = os.environ | {"PYTHONPATH": str(site(tmp_path)), "LORA_KERNELS_BUILD": "auto"}
    command = [str(tmp_path / "empty" / "bin" / "python"), "setup.py"]
    done = subprocess.run([*command, "build_ext"], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert f"there is no torch to be seen in {tmp_path / 'empty'}" in done.stderr
    for words in ("pip install torch", "LORA_KERNELS_TORCH=", "LORA_KERNELS_BUILD=none"):
        assert words in done.stderr
    done = subprocess.run([*command, "--name"], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.stdout.strip().endswith("lora_kernels"), "what compiles nothing needs no torch"


def test_torch_that_is_too_old(tmp_path):
    said = build(tmp_path, LORA_KERNELS_TORCH=torch_folder(tmp_path, "2.8.1+cu126"))
    assert "torch 2.8.1+cu126" in said
    assert "is too old, 2.11 or newer is needed: pip install --upgrade" in said


def test_folder_that_is_no_torch(tmp_path):
    assert f"{tmp_path} is not the folder of a torch package" in build(tmp_path, LORA_KERNELS_TORCH=str(tmp_path))


def test_two_torches_of_one_minor_version(tmp_path):
    folders = [torch_folder(tmp_path, v) for v in ("2.13.0", "2.13.1+cpu")]
    said = build(tmp_path, LORA_KERNELS_TORCH=os.pathsep.join(folders))
    assert f"LORA_KERNELS_TORCH must name one torch of each minor version, got {folders[0]} and {folders[1]}" in said


def test_a_module_for_each_torch(tmp_path):
    """Named after the minor version, which is what the package looks for when it runs."""
    code = """
import setuptools
setuptools.setup = lambda ext_modules, **rest: print([e.name for e in ext_modules])
exec(open("setup.py").read(), {"__file__": "setup.py"})
"""

    def modules(folders: str) -> str:
        env = os.environ | {"LORA_KERNELS_TORCH": folders, "LORA_KERNELS_BUILD": "cpu"}
        command = [sys.executable, "-c", code]
        return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True).stdout.strip()

    two = os.pathsep.join(torch_folder(tmp_path, v) for v in ("2.12.1", "2.100a1+git"))
    assert modules(two) == "['lora_kernels._C_torch2_12', 'lora_kernels._C_torch2_100']"
    assert modules("") == f"[{native.MODULE!r}]"


def test_setuptools_that_is_too_old():
    code = "import setuptools; setuptools.__version__ = '65.5.0'; exec(open('setup.py').read(), {'__file__': 'setup.py'})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "setuptools 65.5.0 is too old to build it, 77 or newer is needed: pip install --upgrade" in done.stderr
    assert "Traceback" not in done.stderr


def test_no_cuda_compiler(tmp_path):
    compiler = tmp_path / "bin" / "c++"
    compiler.parent.mkdir()
    compiler.touch(0o755)
    said = build(tmp_path, LORA_KERNELS_BUILD="cuda", PATH=str(compiler.parent), CUDA_HOME="", CUDA_PATH="")
    assert "nvcc is neither in CUDA_HOME" in said
    assert "LORA_KERNELS_BUILD=cpu" in said


def test_unknown_mode(tmp_path):
    assert "LORA_KERNELS_BUILD must be auto, cpu, cuda or none, got 'gpu'" in build(tmp_path, LORA_KERNELS_BUILD="gpu")


def test_source_distribution_holds_what_its_tests_need(tmp_path):
    code = "import setuptools.build_meta as b, sys; print(b.build_sdist(sys.argv[1]))"
    env = os.environ | {"LORA_KERNELS_BUILD": "none"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, env=env, capture_output=True, text=True, check=True
    )
    archive = tmp_path / done.stdout.split()[-1]
    with tarfile.open(archive) as tar:
        held = {name.partition("/")[2] for name in tar.getnames()}
    folders = ("csrc", "lora_kernels", "tests", "bench", "docs", "constraints")
    files = [p.relative_to(ROOT) for folder in folders for p in (ROOT / folder).rglob("*") if p.is_file()]
    ours = {p.as_posix() for p in files if p.suffix not in (".so", ".pyc")}
    assert ours <= held, sorted(ours - held)
    assert {"Makefile", "README.md", "LICENSE", "pyproject.toml", "setup.py", ".pre-commit-config.yaml"} <= held
    assert not [name for name in held if name.endswith((".so", ".pyc"))]
