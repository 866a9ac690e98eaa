"""Every environment variable that lora_kernels reads, its default and its meaning.

| variable | default | meaning |
| --- | --- | --- |
| `LORA_KERNELS_BACKEND` | unset | force one backend (`triton`, `native`, `reference`); a call it can't run raises |
| `LORA_KERNELS_CPU_ISA` | best the CPU has | native level: `portable`, `avx2`, `avx512`, `avx512bf16`, `amx` (read in csrc) |
| `LORA_KERNELS_BUILD` | `auto` | what `setup.py` compiles: `auto`, `cpu`, `cuda`, `none` (read in setup.py) |
| `LORA_KERNELS_CUDA_ARCHS` | see setup.py | compute capabilities to compile csrc/cuda for, as `80 90` (read in setup.py) |
| `LORA_KERNELS_TORCH` | the one installed | folders of the torch packages that csrc/ is compiled for (read in setup.py) |

The variables by which torchrun and `accelerate launch` introduce the processes of a run to each other (`RANK`, `LOCAL_RANK`,
`WORLD_SIZE`, `LOCAL_WORLD_SIZE`, `ACCELERATE_USE_*`) are read in `processes.py`, `threads.py` and `cli.py`.  Where
`OMP_NUM_THREADS`, `MKL_NUM_THREADS`, `OMP_WAIT_POLICY` or `GOMP_SPINCOUNT` is set, `threads.py` leaves that to the user.
"""

import functools
import os


@functools.cache
def backend() -> str | None:
    """The backend forced by `LORA_KERNELS_BACKEND`, or None; read once."""
    return os.environ.get("LORA_KERNELS_BACKEND") or None
