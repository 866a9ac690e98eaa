"""Importing the package is light: no extra, no device, no compiled code needed."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

from helpers import python

from lora_kernels.backends import native
from lora_kernels.requirements import PIP

REPORT = """
import json, sys, warnings
warnings.simplefilter("error")
import torch
before = set(sys.modules)
import lora_kernels as lk
new = {m.partition(".")[0] for m in set(sys.modules) - before}
"""


def report(code, **env):
    return json.loads(python(REPORT + code, **({"LORA_KERNELS_BACKEND": None} | env)).splitlines()[-1])


def test_no_extras():
    """Nothing but torch and safetensors is imported, and not the compiled backend either."""
    compiled = "any(m.startswith('lora_kernels._C') for m in sys.modules)"
    result = report(f"print(json.dumps([sorted(new), {compiled}, 'triton' in sys.modules]))")
    extras = {
        "transformers",
        "peft",
        "bitsandbytes",
        "triton",
        "typer",
        "rich",
        "matplotlib",
        "accelerate",
        "trl",
        "datasets",
        "gguf",
    }
    modules, compiled, triton = result
    assert not extras & set(modules)
    third_party = set(modules) - {"lora_kernels", "safetensors"}
    assert third_party <= set(__import__("sys").stdlib_module_names), third_party
    assert not compiled
    assert not triton


def test_testing_needs_no_extras():
    assert (
        report("import lora_kernels.testing; print(json.dumps('bitsandbytes' in sys.modules or 'pytest' in sys.modules))")
        is False
    )


def test_no_device_is_touched():
    """Neither at import nor when a CPU tensor is computed on: every way to ask for a GPU is made to fail first."""
    code = """
import json, torch
def refuse(*args, **kwargs):
    raise AssertionError("a device was touched")
names = "init _lazy_init is_available device_count current_device get_device_capability get_device_properties"
for name in names.split():
    setattr(torch.cuda, name, refuse)
import lora_kernels as lk
lk.quantize(torch.ones(2, 64)).dequantize()
print(json.dumps(torch.cuda.is_initialized()))
"""
    assert json.loads(python(code, LORA_KERNELS_BACKEND=None).splitlines()[-1]) is False


def test_default_device_does_not_move_the_tables():
    """The package may be imported inside `with torch.device("meta")`, as transformers does while it loads a model."""
    code = """
import torch
with torch.device("meta"):
    import lora_kernels as lk
print(lk.quantize(torch.ones(2, 64)).dequantize().sum().item())
"""
    assert float(python(code, LORA_KERNELS_BACKEND=None).splitlines()[-1]) == 128.0


NOTHING_COMPILED = """
import importlib, importlib.abc, pathlib
class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.startswith("lora_kernels._C"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
real = pathlib.Path.glob
pathlib.Path.glob = lambda self, pattern: iter(FILES) if "_C" in pattern else real(self, pattern)
warnings.simplefilter("always")
"""


def test_works_where_nothing_was_compiled():
    """Without the compiled library everything runs on the reference; one warning and `verify` say why, and what to do."""
    code = f"""
FILES = []
{NOTHING_COMPILED}
with warnings.catch_warnings(record=True) as caught:
    layer = lk.FusedQLoRALinear(64, 8, r=2)
    layer(torch.randn(3, 64)).sum().backward()
    (row,) = lk.verify(torch.nn.Sequential(layer)).rows
try:
    with lk.use_backend("native"):
        layer(torch.randn(3, 64))
except RuntimeError as e:
    error = str(e)
print(json.dumps([row.backend, row.fused, row.reason, error, [str(w.message) for w in caught]]))
"""
    backend, fused, reason, error, warned = report(code)
    assert (backend, fused) == ("reference", False)
    assert len(warned) == 1
    for text in (reason, error, *warned):
        assert f"is not built: {native.BUILD}" in text
    assert "native" in reason


def test_libraries_for_other_versions():
    """Where all that was compiled is for other versions of torch or Python, the import says so in one line."""
    code = f"""
FILES = [pathlib.Path("_C_torch2_11.cpython-39-x86_64-linux-gnu.so")]
{NOTHING_COMPILED}
with warnings.catch_warnings(record=True) as caught:
    importlib.reload(lk)
    lk.quantize(torch.ones(2, 64))
print(json.dumps([[str(w.message) for w in caught], torch.__version__, sys.version.split()[0]]))
""".replace("FILES = [pathlib", "import pathlib; FILES = [pathlib")
    (warned,), torch_version, python_version = report(code)
    for word in (torch_version, python_version, "_C_torch2_11.cpython-39", native.BUILD):
        assert word in warned
    assert "\n" not in warned


def test_library_that_does_not_load():
    """A compiled library that does not load is a reason and a warning, not a crash."""
    code = """
import importlib.abc
class Broken(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.startswith("lora_kernels._C"):
            raise ImportError("undefined symbol: _ZN2at")
sys.meta_path.insert(0, Broken())
from lora_kernels import backends
cpu = torch.device("cpu")
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    picked = backends.pick("qlora_linear", cpu).__name__
print(json.dumps([picked, dict(backends.choices("qlora_linear", cpu))["native"], *(str(w.message) for w in caught)]))
"""
    picked, reason, warned = report(code)
    assert picked.endswith("reference")
    for text in (reason, warned):
        assert "undefined symbol" in text
        assert f"build it again: {native.BUILD}" in text


def test_commands_that_cure_are_commands():
    """What a message tells to paste is understood by a shell, whatever the paths."""
    for command in (native.BUILD, native._BUILD_CUDA, f"{PIP} install torch"):
        words = shlex.split(command)
        assert subprocess.run(["bash", "-n", "-c", command], check=False).returncode == 0
        assert "install" in words
        assert Path(words[-1]).is_dir() or words[-1].startswith(("lora_kernels", "torch"))


def test_a_command_line_without_torch_is_one_line():
    code = """
import sys, types
sys.argv = ["/bin/lora-kernels", "doctor"]
sys.modules["torch"] = types.SimpleNamespace(__version__="2.5.0")
import lora_kernels.cli
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert done.stderr.startswith("error: lora_kernels needs torch 2.11 or newer, found 2.5.0: ")
    assert done.stderr.count("\n") == 1


def test_public_names():
    names = report("print(json.dumps([n for n in lk.__all__ if getattr(lk, n, None) is None]))")
    assert names == []
