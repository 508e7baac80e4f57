# make demo | make test do everything on a fresh machine: python3 (3.11 or later, with venv and headers) and a C++ compiler.
PYTHON ?= python3
VENV   ?= .venv
PIP    := $(VENV)/bin/python -m pip --disable-pip-version-check -q
RUN    := $(VENV)/bin/python
# A CUDA toolkit's nvcc is found by itself; `make build NVCC=wheels` gets one from PyPI instead.
NVCC   ?=
# On a machine with an NVIDIA GPU, JAX comes with its CUDA plugin.
comma  := ,
EXTRAS := dev$(shell command -v nvidia-smi > /dev/null 2>&1 && echo ,cuda)$(if $(filter wheels,$(NVCC)),$(comma)nvcc)

.PHONY: help demo test build lint format bench asan sass clean
.DEFAULT_GOAL := help
# One stamp a set of extras, so that asking for another installs it.
STAMP  := $(VENV)/.installed-$(subst $(comma),-,$(EXTRAS))

help:
	@echo "make demo    trains a small Flax model on real text with dense and with block-sparse attention"
	@echo "make test    runs the tests"
	@echo "make build   builds the native libraries into $(VENV); only what changed is compiled"
	@echo "make bench   compares with jax.nn.dot_product_attention on this machine"
	@echo "make lint    ruff, clang-format, pyright        make format   applies the formatters"
	@echo "make asan    checks the CPU kernels under AddressSanitizer and UBSan"
	@echo "make sass    disassembles the CUDA library: matrix and copy instructions there, no local memory"

demo: build
	$(RUN) examples/train_bytes.py --output demo_output

# Two files of tests at a time: most of their time is XLA compiling on one thread.
test: build
	$(RUN) -m pytest -n 2 --dist loadfile $(ARGS)

bench: build
	$(RUN) -m jax_bsk bench $(ARGS)

# The extension is compiled in build/ and installed in editable mode: Python files are used from here, and ninja compiles
# only what changed.
build: $(STAMP)
	@$(PIP) install --no-build-isolation --no-deps -e . || (echo "The build failed; python3 needs its headers (Debian: apt install python3-dev) and there must be a C++ compiler (g++)." && exit 1)
	@cd $(VENV) && bin/python -m jax_bsk info --brief

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || (echo "Python 3.11 or later is needed (make PYTHON=...)" && exit 1)
	@$(PYTHON) -m venv $(VENV) || (echo "venv is missing (Debian: apt install python3-venv)" && exit 1)
	@$(PIP) install "scikit-build-core>=0.11" "nanobind>=2.9"
	@$(RUN) tools/requirements.py $(EXTRAS) > $(VENV)/requirements.txt
	@$(PIP) install -r $(VENV)/requirements.txt
	@touch $@

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror $(shell git ls-files '*.h' '*.cc' '*.cu' '*.cuh')
	$(VENV)/bin/pyright --pythonpath $(RUN)

format: $(STAMP)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(shell git ls-files '*.h' '*.cc' '*.cu' '*.cuh')

# The kernels alone, without Python or XLA, against a plain float64 loop: random shapes, poisoned lists, exact allocations.
asan:
	cmake -S tests/csrc -B build/asan -DCMAKE_BUILD_TYPE=Release > /dev/null
	cmake --build build/asan --parallel
	build/asan/cpu_check $(ARGS)

# Needs no GPU: a CUDA kernel without its matrix instructions, or with spills, is right and slow, which no test sees.
sass: build
	$(RUN) tools/check_sass.py $(ARGS)

clean:
	rm -rf build $(VENV) demo_output
