"""Side-by-side benchmarks of lora_kernels and of everything one would use instead.  docs/benchmarks.md has the method.

    python -m bench run SUITE... --device cpu|cuda --against all|names --save
    python -m bench report | targets | tune | profile OP SHAPE | compile-check --arch 80 90 100
    pytest bench --benchmark-only -k dequantize

From the bottom up: `cases` has the shapes, `rivals` the contenders, `measure` the clock, `suite` judges and times a line;
`bench_weight`, `bench_layer`, `bench_model` and `bench_memory` are the suites; `report`, `plot`, `grid` and `targets` read
results.
"""
