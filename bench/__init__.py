"""Side-by-side benchmarks of lora_kernels and of everything one would use instead.  docs/benchmarks.md has the method.

    python -m bench run SUITE... --device cpu|cuda --against all|names --save
    python -m bench report | targets | tune | profile OP SHAPE | compile-check --arch 80 90 100
    pytest bench --benchmark-only -k dequantize

From the bottom up, each imports only what stands before it:

    measure   the clock, the ceilings and the description of the machine
    suite     judges and times a line, in which several contenders solve one problem
    rivals/   the contenders for one layer
    suites/   the lines
    tools/    tuner, profiler and the checks of compiled kernels
    report/   tables, pictures and pages from results
    cli       the commands
"""
