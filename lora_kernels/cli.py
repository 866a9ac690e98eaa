"""The command line under the name by which `torchrun -m lora_kernels.cli` starts it; it lies in `lora_kernels.app.cli`."""

from .app.cli import app, main

__all__ = ["app", "main"]

if __name__ == "__main__":
    main()
