"""Builds `lora_kernels._C` from csrc/; everything else about the package is in pyproject.toml.

LORA_KERNELS_BUILD says what is compiled:
    auto  the CPU code, and the CUDA code if there is an nvcc, whatever torch's build and without need of a GPU; what fails is
          left out with a warning (the package then runs in plain torch or Triton)
    cpu   the CPU code; a failure is an error
    cuda  both; a failure, or no nvcc, is an error
    none  nothing
LORA_KERNELS_CUDA_ARCHS: compute capabilities such as "80 90"; default: those of CUDA_ARCHS that nvcc knows.
nvcc is looked for in CUDA_HOME, CUDA_PATH and PATH.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
FLAGS = ["-O3", "-g0", "-ffp-contract=off", "-fvisibility=hidden"]  # torch adds the -std that its headers need
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c"]
# One object a level, each with its own flags; no other file may see them (csrc/cpu/kernels.h says why).
ISA_FLAGS = {
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": AVX512,
    "avx512bf16": [*AVX512, "-mavx512vbmi", "-mavx512bf16"],
}
# One of each generation: the code of sm_80 runs on 86, 87 and 89, that of sm_100 on 103, that of sm_120 on 121.  The newest
# comes as PTX too, which the driver compiles for what is newer still.
CUDA_ARCHS = (75, 80, 90, 100, 120)
ON_X86 = platform.machine().lower() in ("x86_64", "amd64") and sys.platform != "win32"


def build_mode() -> str:
    mode = os.environ.get("LORA_KERNELS_BUILD") or "auto"
    if mode not in ("auto", "cpu", "cuda", "none"):
        raise SystemExit(f"LORA_KERNELS_BUILD must be auto, cpu, cuda or none, got {mode!r}")
    return mode


def warn(part: str, needs: str, mode: str, reason: object) -> None:
    print(
        f"\n*** lora_kernels: the {part} was NOT built ({reason}).\n"
        f"*** The package works without it, slower.  It needs {needs} at build time:\n"
        f"*** pip install --no-build-isolation -e .   LORA_KERNELS_BUILD={mode} makes a failure an error.\n",
        file=sys.stderr,
        flush=True,
    )


class Nvcc:
    """The CUDA compiler.

    Raises:
        RuntimeError: there is none, or it does not know an architecture that is asked for.
    """

    def __init__(self) -> None:
        path = self.find()
        if path is None:
            raise RuntimeError("nvcc is neither in CUDA_HOME nor on PATH")
        self.path = path
        known = {int(n) for n in re.findall(r"compute_(\d+)\b", self.output("--list-gpu-arch"))}
        asked = os.environ.get("LORA_KERNELS_CUDA_ARCHS") or ""
        words = asked.replace(",", " ").replace(";", " ").split()
        bad = [w for w in words if not w.isdigit() or int(w) not in known]
        if bad:
            raise RuntimeError(
                f"LORA_KERNELS_CUDA_ARCHS must be some of {' '.join(map(str, sorted(known)))} for {path}, got {asked!r}"
            )
        self.archs = sorted(set(map(int, words)) or known.intersection(CUDA_ARCHS))
        self.version = re.search(r"release ([\d.]+)", self.output("--version")).group(1)

    @staticmethod
    def find() -> str | None:
        homes = [Path(os.environ[name]) / "bin" for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
        return next(filter(None, (shutil.which("nvcc", path=str(p)) for p in homes)), shutil.which("nvcc"))

    def output(self, *arguments: str) -> str:
        done = subprocess.run([self.path, *arguments], capture_output=True, text=True, check=True)
        return done.stdout + done.stderr

    def flags(self) -> list[str]:
        archs = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in self.archs]
        host = "/MD,/EHsc" if sys.platform == "win32" else "-fPIC,-fvisibility=hidden"
        newest = self.archs[-1]
        return ["-O3", "-std=c++17", *archs, f"-gencode=arch=compute_{newest},code=compute_{newest}", f"-Xcompiler={host}"]

    def library_folders(self) -> list[str]:
        """Where the CUDA runtime is; nvcc may be a script far from it."""
        line = re.search(r"LIBRARIES=(.*)", self.output("--dryrun", "-c", "x.cu"))
        return re.findall(r'(?:-L|/LIBPATH:)([^"]+)"', line.group(1)) if line else []

    def compile(self, folder: Path) -> list[str]:
        """Objects of csrc/cuda; ninja compiles those whose sources or flags have changed."""
        folder.mkdir(parents=True, exist_ok=True)
        suffix = "obj" if sys.platform == "win32" else "o"
        sources = sorted(ROOT.glob("csrc/cuda/*.cu"))
        escaped = [str(p).replace("$", "$$").replace(":", "$:").replace(" ", "$ ") for p in sources]
        (folder / "build.ninja").write_text(
            f'rule nvcc\n  command = "{self.path}" {" ".join(self.flags())} -MD -MF $out.d -c $in -o $out\n'
            "  depfile = $out.d\n  deps = gcc\n"
            + "".join(f"build {p.stem}.{suffix}: nvcc {e}\n" for p, e in zip(sources, escaped, strict=True))
        )
        ninja = [shutil.which("ninja")] if shutil.which("ninja") else [sys.executable, "-m", "ninja"]
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        subprocess.run([*ninja, *jobs], cwd=folder, check=True)
        return [str(folder / f"{p.stem}.{suffix}") for p in sources]


def extension_arguments(mode: str) -> dict:
    """The arguments of `setup` that compile csrc/."""

    def warn_all(reason: object) -> None:
        warn("C++ extension", "a C++ compiler (g++ or clang++) and torch", "cpu", reason)

    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension, get_cxx_compiler
    except ImportError as e:
        if mode != "auto":
            raise
        warn_all(e)
        return {}

    class Build(BuildExtension):
        def build_extensions(self) -> None:
            extension = self.extensions[0]
            with_cuda = mode == "cuda" or (mode == "auto" and Nvcc.find() is not None)
            try:
                self.build_one(deepcopy(extension), with_cuda)
            except Exception as e:
                if mode != "auto":
                    raise
                if not with_cuda:
                    return self.build_nothing(e)
                warn("CUDA code", "nvcc", "cuda", f"{type(e).__name__}: {e}")
                try:
                    self.build_one(extension, False)
                except Exception as e:
                    self.build_nothing(e)

        def build_nothing(self, reason: Exception) -> None:
            warn_all(f"{type(reason).__name__}: {reason}")
            self.extensions.clear()  # an editable install would look for their files

        def build_one(self, extension: CppExtension, with_cuda: bool) -> None:
            self.extensions[:] = [extension]
            if with_cuda:
                self.add_cuda(extension)
            if ON_X86:
                extension.extra_objects += self.compile_isa_files(get_cxx_compiler())
            super().build_extensions()

        def add_cuda(self, extension: CppExtension) -> None:
            nvcc = Nvcc()
            self.force = True  # link even if all that is new since the last build is the wish for CUDA
            extension.extra_objects += nvcc.compile(ROOT / "build" / "cuda")  # kept: the folder of pip is a new one each time
            archs = f"{' '.join(map(str, nvcc.archs))}+ptx"
            extension.define_macros += [("LORA_KERNELS_CUDA", f'"{archs}"'), ("LORA_KERNELS_NVCC", f'"{nvcc.version}"')]
            extension.library_dirs += nvcc.library_folders()
            extension.libraries += ["cudart_static"] + ([] if sys.platform == "win32" else ["dl", "rt", "pthread"])

        def compile_isa_files(self, compiler: str) -> list[str]:
            folder = Path(self.build_temp).absolute() / "isa"
            folder.mkdir(parents=True, exist_ok=True)

            def compile_one(level: str) -> str:
                source, target = f"csrc/cpu/isa_{level}.cpp", folder / f"{level}.o"
                command = [
                    *compiler.split(),
                    *FLAGS,
                    "-std=c++17",
                    "-fPIC",
                    "-DLORA_KERNELS_X86",
                    *ISA_FLAGS[level],
                    "-c",
                    source,
                    "-o",
                    str(target),
                ]
                subprocess.run(command, cwd=ROOT, check=True)
                return str(target)

            jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
            with ThreadPoolExecutor(max(1, jobs)) as pool:
                return list(pool.map(compile_one, ISA_FLAGS))

    isa_sources = [f"csrc/cpu/isa_{level}.cpp" for level in ISA_FLAGS]
    sources = [str(p.relative_to(ROOT)) for p in [*ROOT.glob("csrc/*.cpp"), *ROOT.glob("csrc/cpu/*.cpp")]]
    windows, openmp = sys.platform == "win32", sys.platform.startswith("linux")
    extension = CppExtension(
        "lora_kernels._C",
        sorted(set(sources) - set(isa_sources)),
        define_macros=[("LORA_KERNELS_X86", None)] if ON_X86 else [],
        extra_compile_args=["/O2"] if windows else [*FLAGS, *(["-fopenmp"] if openmp else [])],
        extra_link_args=["-fopenmp"] if openmp else [],
        depends=[*isa_sources, *(str(p.relative_to(ROOT)) for p in [*ROOT.glob("csrc/**/*.h"), *ROOT.glob("csrc/cuda/*")])],
    )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": Build}}


mode = build_mode()
setup(**({} if mode == "none" else extension_arguments(mode)))
