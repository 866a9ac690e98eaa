# demo, test, test-levels, bench and lint work from a fresh clone: the first one run makes .venv, installs and builds.
#
# Installed are the versions of constraints/python3.X.txt, the same today and in a year; `make lock` writes these files anew.
# test-oldest and test-latest run the same tests with the oldest versions that pyproject.toml allows and with the newest there are.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
VERSION := $(shell $(PYTHON) -c "import sys; print('%d.%d' % sys.version_info[:2])" 2>/dev/null)
VERSIONS := 3.10 3.11 3.12 3.13 3.14
CONSTRAINTS ?= constraints/python$(VERSION).txt
EXTRAS ?= all,dev
PIP = $(BIN)/python -m pip --quiet --disable-pip-version-check
INSTALL = $(PIP) install $(UPGRADE) $(CONSTRAINTS:%=-c %)
MODEL := demo/SmolLM2-135M-Instruct
# These targets run on the CPU, and the CUDA code takes minutes to compile: `make gpu` is for machines that need it.
export LORA_KERNELS_BUILD ?= cpu
# Those that compute in the CPU kernels, for test-levels; TESTS=tests takes all.
TESTS ?= tests/ops tests/layers tests/backends/test_native.py tests/hf/test_bitsandbytes.py
SOURCES := setup.py pyproject.toml $(shell find csrc -type f)
# A wheel holds a compiled module for each of these versions of torch; 2.15 is there from Python 3.11 on.
WHEEL_TORCH ?= 2.11.0 2.12.0 2.13.0 2.14.1 $(if $(filter 3.10,$(VERSION)),,2.15.0)

.PHONY: demo test test-levels test-oldest test-latest lint format bench gpu lock torches wheel sdist clean python

demo: $(VENV)/.installed
	$(BIN)/lora-kernels demo

test: $(VENV)/.installed
	$(BIN)/python -m pytest

# On each instruction set that this CPU has; `test` runs on the best.
test-levels: $(VENV)/.installed
	levels=$$($(BIN)/python -c "from lora_kernels.backends.native import extension; print(*extension().cpu_levels())") || exit 1; \
	for level in $$levels; do LORA_KERNELS_CPU_ISA=$$level $(BIN)/python -m pytest $(TESTS) || exit 1; done

# numpy 2.0 and others of that age are not there for later Pythons.
test-oldest:
	@case "$(VERSION)" in 3.10|3.11|3.12) ;; *) echo "*** $(PYTHON) is Python $(VERSION); the oldest versions are there for 3.10 to \
	3.12: make test-oldest PYTHON=python3.12" >&2; exit 1;; esac
	$(MAKE) test VENV=.venv-oldest CONSTRAINTS=constraints/oldest.txt EXTRAS=all

# What is newer than the lock comes last: it is where to look if a test failed.
test-latest:
	rm -f .venv-latest/.installed
	status=0; $(MAKE) test VENV=.venv-latest CONSTRAINTS= UPGRADE="--upgrade --upgrade-strategy eager" EXTRAS=all || status=$$?; \
	sed -n 's/^\([^# ;]*==[^ ;]*\).*/\1/p' constraints/python$(VERSION).txt | tr A-Z_ a-z- > .venv-latest/lock.txt; \
	echo "Versions that are not those of constraints/python$(VERSION).txt:"; \
	.venv-latest/bin/python -m pip freeze --exclude-editable | sed 's/+.*//' | tr A-Z_ a-z- | grep -vxFf .venv-latest/lock.txt; \
	exit $$status

# Against every rival that is importable; SmolLM2-135M itself where `make demo` left it, else random weights of its shape.
bench: $(VENV)/.installed
	$(BIN)/python -m bench run all --device cpu $(if $(wildcard $(MODEL)),--model $(MODEL)) --minutes 9 --save
	$(BIN)/python -m bench report

# On a GPU machine, in the Python that has its torch and Triton.  A failed test does not keep the suites from running: they
# refuse what is wrong on their own.  Results are files under bench/results/, the table of all suites and targets comes last.
gpu:
	status=0; $(PYTHON) -m pytest -q tests/backends/test_gpu.py tests/backends/test_triton*.py || status=$$?; \
	$(PYTHON) -m bench run all --device cuda --minutes 5.5 --save || status=$$?; exit $$status

lint: $(VENV)/.installed
	PATH="$(CURDIR)/$(BIN):$$PATH" pre-commit run --all-files

format: $(VENV)/.installed
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .
	find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format -i

# Newest versions but for what constraints/lock.in says.  UV="--upgrade-package NAME" moves one package alone.
UV ?= --upgrade
lock:
	test -x build/uv/bin/uv || { $(PYTHON) -m venv build/uv && build/uv/bin/pip install --quiet uv; }
	compile() { build/uv/bin/uv pip compile --quiet --universal --no-emit-index-url --custom-compile-command "make lock" $(UV) "$$@"; }; \
	for v in $(VERSIONS); do \
	    compile --python-version $$v --all-extras -o constraints/python$$v.txt pyproject.toml constraints/lock.in || exit 1; \
	done; \
	compile --python-version 3.10 --resolution lowest-direct --extra all -o constraints/oldest.txt pyproject.toml constraints/oldest.in

# The wheel of this machine, tried in an empty environment, in another folder and with no compiler to be found.
wheel: $(VENV)/.installed torches
	rm -rf dist/*.whl build/lib.* build/bdist.*
	LORA_KERNELS_TORCH="$(subst $() ,:,$(patsubst %,build/torch-%/torch,$(strip $(WHEEL_TORCH))))" $(PIP) wheel --no-deps --no-build-isolation --wheel-dir dist .
	rm -rf build/smoke && $(PYTHON) -m venv build/smoke
	build/smoke/bin/pip install --quiet $(CONSTRAINTS:%=-c %) torch
	build/smoke/bin/pip install --quiet $(CONSTRAINTS:%=-c %) "$$(echo dist/*.whl)[cli]"
	cd build/smoke && PATH="$(CURDIR)/build/smoke/bin" lora-kernels doctor && \
	    PATH="$(CURDIR)/build/smoke/bin" python "$(CURDIR)/tests/smoke.py"

# The files of those versions of torch, to compile against; they are not imported.
torches:
	for v in $(WHEEL_TORCH); do test -f build/torch-$$v/torch/version.py || \
	    $(PYTHON) -m pip install --quiet --no-deps --target build/torch-$$v torch==$$v || exit 1; done

sdist: $(VENV)/.installed
	$(BIN)/python -c "import setuptools.build_meta as b; print(b.build_sdist('dist'))"

$(VENV)/.installed: $(SOURCES) $(wildcard $(CONSTRAINTS)) | python
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV) || \
	    { echo "*** $(PYTHON) can't make $(VENV) (on Debian and Ubuntu: apt install python3-venv)" >&2; exit 1; }
	$(INSTALL) torch setuptools wheel ninja
	$(INSTALL) --no-build-isolation -e ".[$(EXTRAS)]"
	touch $@

# One line if this Python, or the one of an environment that is already here, will not do.
python:
	@test -n "$(VERSION)" || { echo "*** PYTHON=$(PYTHON) is not to be found; Python $(VERSIONS) will do: make PYTHON=/path/to/python3" >&2; exit 1; }
	@case " $(VERSIONS) " in *" $(VERSION) "*) ;; *) echo "*** $(PYTHON) is Python $(VERSION), one of $(VERSIONS) is needed: \
	make PYTHON=/path/to/python3" >&2; exit 1;; esac
	@test -z "$(CONSTRAINTS)" || test -f "$(CONSTRAINTS)" || { echo "*** CONSTRAINTS=$(CONSTRAINTS) is no file" >&2; exit 1; }
	@test ! -x $(BIN)/python || $(BIN)/python -c "import sys; sys.exit('%d.%d' % sys.version_info[:2] != '$(VERSION)')" || { \
	echo "*** $(VENV) holds another Python than $(PYTHON), which is $(VERSION): make clean first, or VENV=.venv$(VERSION) for one beside it" \
	>&2; exit 1; }

clean:
	rm -rf .venv* build demo lora_kernels/*.so *.egg-info
