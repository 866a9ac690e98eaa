# demo, test, test-levels, bench and lint work from a fresh clone: the first one run makes .venv, installs and builds.
PYTHON ?= python3
# Installed first, so that nothing pulls a larger build of torch; 2.13.0 is a CPU build on the machines without a GPU.
TORCH ?= torch==2.13.0
BIN := .venv/bin
MODEL := demo/SmolLM2-135M-Instruct
INSTALLED := .venv/.installed
# These targets run on the CPU, and the CUDA code takes minutes to compile: `make gpu` is for machines that need it.
export LORA_KERNELS_BUILD ?= cpu
# Those that compute in the CPU kernels, for test-levels; TESTS=tests takes all.
KERNEL_TESTS := native quantize dequantize decode_absmax formats qlora_linear qlora_linear_group nn model training bitsandbytes
TESTS ?= $(KERNEL_TESTS:%=tests/test_%.py)
SOURCES := setup.py pyproject.toml $(shell find csrc -type f)

.PHONY: demo test test-levels lint format bench gpu clean

demo: $(INSTALLED)
	$(BIN)/lora-kernels demo

test: $(INSTALLED)
	$(BIN)/python -m pytest

# On each instruction set that this CPU has; `test` runs on the best.
test-levels: $(INSTALLED)
	levels=$$($(BIN)/python -c "from lora_kernels.backends.native import extension; print(*extension().cpu_levels())") || exit 1; for level in $$levels; do \
	    LORA_KERNELS_CPU_ISA=$$level $(BIN)/python -m pytest $(TESTS) || exit 1; \
	done

# Against every rival that is importable; SmolLM2-135M itself where `make demo` left it, else random weights of its shape.
bench: $(INSTALLED)
	$(BIN)/python -m bench run all --device cpu $(if $(wildcard $(MODEL)),--model $(MODEL)) --minutes 9 --save
	$(BIN)/python -m bench report

# On a GPU machine, in the Python that has its torch and Triton.  A failed test does not keep the suites from running: they
# refuse what is wrong on their own.  Results are files under bench/results/, the table of all suites and targets comes last.
gpu:
	status=0; $(PYTHON) -m pytest -q tests/test_gpu.py tests/test_triton.py || status=$$?; \
	$(PYTHON) -m bench run all --device cuda --minutes 5.5 --save || status=$$?; exit $$status

lint: $(INSTALLED)
	PATH="$(CURDIR)/$(BIN):$$PATH" pre-commit run --all-files

format: $(INSTALLED)
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .
	find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format -i

$(INSTALLED): $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/pip install --quiet --disable-pip-version-check "setuptools>=77" wheel ninja pybind11
	$(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation -e ".[all,dev]"
	touch $@

clean:
	rm -rf .venv build demo lora_kernels/*.so *.egg-info
