"""Short programs to start from.  Each runs as `python -m lora_kernels.examples.NAME ARGUMENTS`."""
