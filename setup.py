"""Builds `lora_kernels._C` from csrc/; everything else about the package is in pyproject.toml.

LORA_KERNELS_BUILD: `auto` (default: the CPU code; without a working compiler a warning, and the package runs in plain torch),
`cpu` (the same, but a failure is an error), `none` (compile nothing), `cuda` (not part of this version).
"""

import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
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
ON_X86 = platform.machine().lower() in ("x86_64", "amd64") and sys.platform != "win32"


def build_mode() -> str:
    mode = os.environ.get("LORA_KERNELS_BUILD") or "auto"
    if mode not in ("auto", "cpu", "cuda", "none"):
        raise SystemExit(f"LORA_KERNELS_BUILD must be auto, cpu, cuda or none, got {mode!r}")
    if mode == "cuda":
        raise SystemExit("LORA_KERNELS_BUILD=cuda: the CUDA sources are not part of this version; use auto, cpu or none")
    return mode


def warn(reason: object) -> None:
    print(
        f"\n*** lora_kernels: the C++ extension was NOT built ({reason}).\n"
        "*** The package works without it, in plain torch and slower.  It needs a C++ compiler (g++ or clang++) and torch at\n"
        "*** build time: pip install --no-build-isolation -e .   LORA_KERNELS_BUILD=cpu makes a failure an error.\n",
        file=sys.stderr,
        flush=True,
    )


def extension_arguments(mode: str) -> dict:
    """The arguments of `setup` that compile csrc/."""
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension, get_cxx_compiler
    except ImportError as e:
        if mode == "cpu":
            raise
        warn(e)
        return {}

    class Build(BuildExtension):
        def build_extensions(self) -> None:
            try:
                if ON_X86:
                    self.extensions[0].extra_objects += self.compile_isa_files(get_cxx_compiler())
                super().build_extensions()
            except Exception as e:
                if mode == "cpu":
                    raise
                warn(f"{type(e).__name__}: {e}")
                self.extensions.clear()  # an editable install would look for their files

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
        depends=[*isa_sources, *(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/**/*.h"))],
    )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": Build}}


mode = build_mode()
setup(**({} if mode == "none" else extension_arguments(mode)))
