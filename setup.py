"""Compiles csrc/ into `lora_kernels._C_torch<major>_<minor>`; everything else about the package is in pyproject.toml.

The binding uses torch's C++ interface, which changes with each minor version of torch: a module is for the torch and the
Python it was compiled for, and its name says which torch.  A package may hold several; `lora_kernels.backends.native` loads the
one of the torch that runs.

The torch compiled against is read as files (headers, libraries, version.py), never imported or downloaded: it is that of the
Python environment that is installed into, also where the build runs isolated from it.

LORA_KERNELS_BUILD says what is compiled:
    auto  the CPU code; with nvcc and an NVIDIA GPU on this machine, and a torch with CUDA, the CUDA code for that GPU too
    cpu   the CPU code
    cuda  both, for GPUs that need not be here
    none  nothing: the package then computes in Triton or in plain torch
What can't be compiled is an error that says what to do.
LORA_KERNELS_CUDA_ARCHS: compute capabilities such as "80 90"; default: in `auto` those of the GPUs here, in `cuda` those of
CUDA_ARCHS that nvcc knows.  nvcc is looked for in CUDA_HOME, CUDA_PATH and PATH.
LORA_KERNELS_TORCH: which torch packages to compile against, a module for each: their folders, separated as in PATH; may be
patterns, and start here, as build/torch-*/torch.
"""

import os
import platform
import re
import shutil
import site
import subprocess
import sys
import sysconfig
from glob import glob
from importlib.util import find_spec
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.absolute()
CSRC = ROOT / "csrc"
FLAGS = ["-O3", "-g0", "-DNDEBUG", "-fPIC", "-ffp-contract=off", "-fvisibility=hidden"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c"]
# One object a level, each with its own flags; no other file may see them (csrc/cpu/kernels.h says why).
LEVEL_FLAGS = {
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": AVX512,
    "avx512bf16": [*AVX512, "-mavx512vbmi", "-mavx512bf16"],
}
# One of each generation: the code of sm_80 runs on 86, 87 and 89, that of sm_100 on 103, that of sm_120 on 121.  The newest
# comes as PTX too, which the driver compiles for what is newer still.
CUDA_ARCHS = (75, 80, 90, 100, 120)
ON_X86 = platform.machine().lower() in ("x86_64", "amd64")
WITHOUT = "LORA_KERNELS_BUILD=none installs without compiled code; the package then computes in Triton or plain torch."


def oldest(package: str) -> str:
    """The oldest version of a package that pyproject.toml allows."""
    return re.search(rf'"{package}>=([\d.]+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8")).group(1)


def build_mode() -> str:
    mode = os.environ.get("LORA_KERNELS_BUILD") or "auto"
    if mode not in ("auto", "cpu", "cuda", "none"):
        raise SystemExit(f"LORA_KERNELS_BUILD must be auto, cpu, cuda or none, got {mode!r}")
    return mode


def numbers(version: str) -> tuple[int, int]:
    """Major and minor version."""
    return tuple(int(n) for n in re.match(r"(\d+)(?:\.(\d+))?", version).groups(0))


class Torch:
    """A torch package, as its files tell.

    Raises:
        RuntimeError: it is older than this package supports, or a folder is none.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        file = folder / "version.py"
        text = file.read_text(encoding="utf-8") if file.is_file() else ""
        found = re.search(r"^__version__ = '([^']+)'", text, re.MULTILINE)
        if found is None:
            raise RuntimeError(f"{folder} is not the folder of a torch package: it has no version.py that names a version")
        self.version = found.group(1)
        self.with_cuda = re.search(r"^cuda\b[^=]*= '", text, re.MULTILINE) is not None
        needed = oldest("torch")
        if numbers(self.version) < numbers(needed):
            raise RuntimeError(
                f"torch {self.version} in {folder.parent} is too old, {needed} or newer is needed: "
                f'pip install --upgrade "torch>={needed}"'
            )
        self.name = "_C_torch{}_{}".format(*numbers(self.version))

    @classmethod
    def all(cls) -> "list[Torch]":
        """Those of LORA_KERNELS_TORCH, or the one of the environment."""
        if given := os.environ.get("LORA_KERNELS_TORCH"):
            patterns = [str(ROOT / word) for word in given.split(os.pathsep)]
            all_given = [cls(Path(folder)) for pattern in patterns for folder in sorted(glob(pattern)) or [pattern]]
            for torch in all_given:
                if len(alike := [t for t in all_given if t.name == torch.name]) > 1:
                    folders = " and ".join(str(t.folder) for t in alike)
                    raise RuntimeError(f"LORA_KERNELS_TORCH must name one torch of each minor version, got {folders}")
            return all_given
        for folder in cls.folders():
            if (folder / "version.py").is_file():
                return [cls(folder)]
        raise RuntimeError(
            f"there is no torch to be seen in {sys.prefix}, and the C++ code is compiled for one: pip install torch, "
            "then the same command again.  Where torch is there and the build does not see it (uv, PYTHONPATH): "
            f"LORA_KERNELS_TORCH=\"$(python -c 'import torch; print(*torch.__path__)')\" before the command.  {WITHOUT}"
        )

    @staticmethod
    def folders() -> "list[Path]":
        """Where torch may be.  An isolated build by pip does not see the packages beside it, but runs their Python."""
        spec = find_spec("torch")
        found = [Path(spec.origin).parent] if spec and spec.origin else []
        sites = [sysconfig.get_path("platlib"), sysconfig.get_path("purelib")]
        user = [site.getusersitepackages()] if site.ENABLE_USER_SITE else []
        configuration = Path(sys.prefix, "pyvenv.cfg")  # in the order of sys.path
        if not configuration.is_file():
            sites = [*user, *sites, *site.getsitepackages()]
        elif "include-system-site-packages = true" in configuration.read_text(encoding="utf-8"):
            base = sysconfig.get_path("platlib", vars={"base": sys.base_prefix, "platbase": sys.base_prefix})
            sites += [*user, base, *site.getsitepackages([sys.base_prefix])]
        return found + [Path(s, "torch") for s in sites]


class Nvcc:
    """The CUDA compiler.

    Raises:
        RuntimeError: there is none, or it does not know an architecture that is asked for.
    """

    def __init__(self, default_archs: "list[int]") -> None:
        path = self.find()
        if path is None:
            raise RuntimeError(
                "nvcc is neither in CUDA_HOME nor in CUDA_PATH nor on PATH: install the CUDA toolkit, or leave the CUDA "
                "code out with LORA_KERNELS_BUILD=cpu"
            )
        self.path = path
        known = {int(n) for n in re.findall(r"compute_(\d+)\b", self.output("--list-gpu-arch"))}
        asked = os.environ.get("LORA_KERNELS_CUDA_ARCHS") or ""
        words = asked.replace(",", " ").replace(";", " ").split()
        bad = [w for w in words if not w.isdigit() or int(w) not in known]
        if bad:
            raise RuntimeError(
                f"LORA_KERNELS_CUDA_ARCHS must be some of {' '.join(map(str, sorted(known)))} for {path}, got {asked!r}"
            )
        self.archs = sorted(set(map(int, words)) or known.intersection(default_archs))
        if not self.archs:
            raise RuntimeError(
                f"{path} knows none of the compute capabilities {' '.join(map(str, default_archs))}: install a newer CUDA "
                "toolkit, or leave the CUDA code out with LORA_KERNELS_BUILD=cpu"
            )
        self.version = re.search(r"release ([\d.]+)", self.output("--version")).group(1)

    @staticmethod
    def find() -> "str | None":
        homes = [Path(os.environ[name]) / "bin" for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
        return next(filter(None, (shutil.which("nvcc", path=str(p)) for p in homes)), shutil.which("nvcc"))

    def output(self, *arguments: str) -> str:
        done = subprocess.run([self.path, *arguments], capture_output=True, text=True, check=True)
        return done.stdout + done.stderr

    def flags(self) -> "list[str]":
        archs = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in self.archs]
        newest = self.archs[-1]
        ptx = f"-gencode=arch=compute_{newest},code=compute_{newest}"
        return ["-O3", "-std=c++17", *archs, ptx, "-Xcompiler=-fPIC,-fvisibility=hidden"]

    def library_folders(self) -> "list[str]":
        """Where the CUDA runtime is; nvcc may be a script far from it."""
        line = re.search(r"LIBRARIES=(.*)", self.output("--dryrun", "-c", "x.cu"))
        return re.findall(r'-L([^"]+)"', line.group(1)) if line else []


def gpus_here() -> "list[int]":
    """Compute capabilities of the NVIDIA GPUs of this machine, as 90 for 9.0."""
    if (program := shutil.which("nvidia-smi")) is None:
        return []
    query = [program, "--query-gpu=compute_cap", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, check=False)
    return sorted({int(major + minor) for major, minor in re.findall(r"^(\d+)\.(\d)$", done.stdout, re.MULTILINE)})


class Objects:
    """Files to compile, written to one build.ninja; ninja compiles those whose sources or flags have changed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rules = [
            "rule compile\n  command = $compiler -MD -MF $out.d -c $in -o $out\n  description = compile $in\n"
            "  depfile = $out.d\n  deps = gcc\n"
        ]

    def add(self, sources: "list[Path]", compiler: "list[str]", folder: str) -> "list[str]":
        """The objects of `sources`, files of csrc/, which will lie in a subfolder as those lie in csrc/."""
        objects = []
        for source in sources:
            target = self.folder / folder / source.relative_to(CSRC).with_suffix(".o")
            self.rules.append(f"build {self.path(target)}: compile {self.path(source)}\n  compiler = {self.shell(compiler)}\n")
            objects.append(str(target))
        return objects

    def compile(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "build.ninja").write_text("\n".join(self.rules), encoding="utf-8")
        if shutil.which("ninja") is None and find_spec("ninja") is None:
            raise RuntimeError("there is no ninja, which compiles csrc/: pip install ninja")
        ninja = [shutil.which("ninja")] if shutil.which("ninja") else [sys.executable, "-m", "ninja"]
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        if subprocess.run([*ninja, *jobs], cwd=self.folder, check=False).returncode:
            raise RuntimeError(f"compiling csrc/ failed, see above; on Linux it takes g++ or what does the same.  {WITHOUT}")

    @staticmethod
    def path(path: Path) -> str:
        return str(path).replace("$", "$$").replace(":", "$:").replace(" ", "$ ")

    @staticmethod
    def shell(words: "list[str]") -> str:
        return " ".join("'" + w.replace("'", "'\\''").replace("$", "$$") + "'" for w in words)


class Build(build_ext):
    """Every module of the package.  Files in csrc/ see torch; the objects of its folders do not, and all modules share them."""

    def run(self) -> None:
        if not self.inplace:  # what an earlier build for other versions left would go into the wheel
            for file in Path(self.build_lib, "lora_kernels").glob("_C*.so"):
                file.unlink()
        try:
            super().run()
        except RuntimeError as e:  # without a traceback, which would hide it
            raise SystemExit(f"\n*** lora_kernels: {e}\n") from None

    def build_extensions(self) -> None:
        if sys.platform == "win32":
            raise RuntimeError(f"the C++ code is not written for Windows.  {WITHOUT}")
        if isinstance(TORCHES, RuntimeError):
            raise TORCHES
        compiler = (os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), "c++")).split()
        if shutil.which(compiler[0]) is None:
            raise RuntimeError(
                f"there is no C++ compiler {compiler[0]!r} on PATH: install g++ (or name one in CXX).  {WITHOUT}"
            )
        openmp = ["-fopenmp"] if sys.platform.startswith("linux") else []
        plain = [*compiler, *FLAGS, "-std=c++17", *(["-DLORA_KERNELS_X86"] if ON_X86 else [])]
        extra, ldflags = os.environ.get("CXXFLAGS", "").split(), os.environ.get("LDFLAGS", "").split()
        shared_library = ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared"]
        objects = Objects(ROOT / "build" / f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}")
        levels = {CSRC / "cpu" / "levels" / f"{level}.cpp": flags for level, flags in LEVEL_FLAGS.items()}
        shared = objects.add(
            [p for p in sorted((CSRC / "cpu").rglob("*.cpp")) if p not in levels], [*plain, *openmp, *extra], "."
        )
        for source, flags in levels.items() if ON_X86 else ():
            shared += objects.add([source], [*plain, *flags, *extra], ".")
        libraries, library_dirs, macros = ["c10", "torch", "torch_cpu", "torch_python"], [], []
        if nvcc := self.nvcc():
            shared += objects.add(sorted((CSRC / "cuda").glob("*.cu")), [nvcc.path, *nvcc.flags()], ".")
            libraries += ["cudart_static", "dl", "rt", "pthread"]
            library_dirs += nvcc.library_folders()
            macros += [f'-DLORA_KERNELS_CUDA="{" ".join(map(str, nvcc.archs))}+ptx"', f'-DLORA_KERNELS_NVCC="{nvcc.version}"']
        own = {}
        for extension, torch in zip(self.extensions, TORCHES, strict=True):
            include = torch.folder / "include"
            folders = [f"-isystem{include}", f"-isystem{include}/torch/csrc/api/include", f"-I{sysconfig.get_path('include')}"]
            names = [f"-DTORCH_EXTENSION_NAME={torch.name}", f'-DLORA_KERNELS_TORCH="{torch.version}"']
            flags = [*plain, "-std=c++20", *openmp, *macros, *names, *folders, *extra]
            own[extension.name] = objects.add(sorted(CSRC.glob("*.cpp")), flags, torch.name)
        objects.compile()
        for extension, torch in zip(self.extensions, TORCHES, strict=True):
            target = Path(self.get_ext_fullpath(extension.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            folders = [f"-L{folder}" for folder in (torch.folder / "lib", *library_dirs)]
            words = [*compiler, *shared_library, *own[extension.name], *shared, *folders, *(f"-l{name}" for name in libraries)]
            if subprocess.run([*words, *openmp, *ldflags, "-o", str(target)], check=False).returncode:
                raise RuntimeError(f"linking {target.name} failed, see above.  {WITHOUT}")

    def nvcc(self) -> "Nvcc | None":
        if MODE == "cuda":
            return Nvcc(list(CUDA_ARCHS))
        wanted = MODE == "auto" and Nvcc.find() and all(torch.with_cuda for torch in TORCHES)
        return Nvcc(archs) if wanted and (archs := gpus_here()) else None


if numbers(setuptools.__version__) < numbers(needed := oldest("setuptools")):
    raise SystemExit(
        f"\n*** lora_kernels: setuptools {setuptools.__version__} is too old to build it, {needed} or newer is needed: "
        f'pip install --upgrade "setuptools>={needed}"\n'
    )
MODE = build_mode()
TORCHES: "list[Torch] | RuntimeError" = []
if MODE != "none":
    try:
        TORCHES = Torch.all()
    except RuntimeError as e:  # a source distribution needs none; `Build` says it
        TORCHES = e
names = ["_C"] if isinstance(TORCHES, RuntimeError) else [torch.name for torch in TORCHES]
setup(ext_modules=[Extension(f"lora_kernels.{name}", []) for name in names], cmdclass={"build_ext": Build})
