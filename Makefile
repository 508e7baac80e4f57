# make demo | make test do everything on a fresh machine: python3 (3.11 or later, with venv and headers) and a C++ compiler.
PYTHON ?= python3
VENV   ?= .venv
PIP    := $(VENV)/bin/python -m pip --disable-pip-version-check -q
RUN    := $(VENV)/bin/python
# CUDA=1 compiles the CUDA library, too, and fails where there is no nvcc; CUDA=0 leaves it out. Without either it is
# compiled where there are an NVIDIA GPU and an nvcc: on two cores it would take 6 of the 9 minutes of `make demo`, and
# without a GPU nothing could run it. The environment's CUDA, often a toolkit's folder, is not read.
CUDA   :=
# `make build CUDA=1 NVCC=wheels` gets an nvcc from PyPI where there is no CUDA toolkit.
NVCC   ?=
GPU    := $(shell (command -v nvidia-smi || ls /dev/nvidia0) 2> /dev/null)
ifneq ($(filter-out 0 1,$(CUDA)),)
$(error CUDA is 1 (compile the CUDA library) or 0 (leave it out), got '$(CUDA)')
endif
# CMake's JAX_BSK_CUDA. One in $CMAKE_ARGS wins, because it comes later.
OPTION  = $(if $(CUDA),$(if $(filter 1,$(CUDA)),ON,OFF),$(if $(GPU)$(filter wheels,$(NVCC)),AUTO,OFF))
ON      = and the CUDA library: 4 to 9 minutes on two cores the first time. CUDA=0 leaves the CUDA library out.
AUTO    = and, if there is an nvcc, the CUDA library: 4 to 9 minutes on two cores the first time. CUDA=0 leaves it out.
OFF     = only: about 1 minute on two cores the first time. CUDA=1 compiles the CUDA library, too.
# On a machine with an NVIDIA GPU, JAX comes with its CUDA plugin.
comma  := ,
space  := $(comma) $(comma)
space  := $(subst $(comma),,$(space))
# The demo needs no linters and no tools for tests, unless they are installed already; packaging needs its own tools alone.
PACKAGING := wheel sdist check-wheel check-sdist check-aarch64
PACKS  := $(filter $(PACKAGING),$(MAKECMDGOALS))
OTHERS := $(filter-out $(PACKAGING),$(MAKECMDGOALS))
NEEDS  := $(if $(PACKS),$(if $(OTHERS),dev) wheel,$(if $(filter-out demo,$(OTHERS))$(wildcard $(VENV)/.installed-dev*),dev,build demo))
NEEDS  += $(if $(GPU),$(if $(PACKS),,cuda13)) $(if $(filter wheels,$(NVCC)),nvcc)
EXTRAS := $(subst $(space),$(comma),$(strip $(NEEDS)))

.PHONY: help demo test build lint format bench docs docs-serve asan sass wheel sdist check-wheel check-sdist check-aarch64 clean
.DEFAULT_GOAL := help
# There is one stamp per set of extras, so that asking for another set installs it.
STAMP  := $(VENV)/.installed-$(subst $(comma),-,$(EXTRAS))

help:
	@echo "make demo    trains a small Flax model on real text, with dense and with block-sparse attention"
	@echo "make test    runs the tests"
	@echo "make build   compiles the native libraries and installs jax_bsk in $(VENV); only what changed is compiled"
	@echo "make bench   compares with jax.nn.dot_product_attention on this machine"
	@echo "make docs    builds the documentation site in site/          make docs-serve  shows it while you write"
	@echo "make lint    runs ruff, clang-format and pyright        make format   applies the formatters"
	@echo "make asan    checks the CPU kernels under AddressSanitizer and UBSan"
	@echo "make sass    compiles and disassembles the CUDA library: matrix and copy instructions are there, and no spills"
	@echo "make wheel   builds wheels for other machines in dist/: CPU kernels, with CUDA=1 also those for GPUs"
	@echo "make sdist   packs the sources in dist/     make check-wheel check-sdist  tries what dist/ has in empty environments"
	@echo "make check-aarch64  compiles the CPU kernels for 64-bit ARM and checks them under qemu"
	@echo
	@echo "demo, test, build and bench take CUDA=1 (compile the CUDA library, too; an error without an nvcc) or CUDA=0 (leave"
	@echo "it out). By default it is compiled where there are an NVIDIA GPU and an nvcc. NVCC=wheels gets an nvcc from PyPI."

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
	@echo "Compiles the CPU library $($(OPTION))"
	@CMAKE_ARGS="-DJAX_BSK_CUDA=$(OPTION) $$CMAKE_ARGS" $(PIP) install --no-build-isolation --no-deps -e .
	@cd $(VENV) && bin/python -m jax_bsk info --brief

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || (echo "Python 3.11 or later is needed (make PYTHON=...)" && exit 1)
	@$(PYTHON) -m venv $(VENV) || (echo "venv is missing (Debian: apt install python3-venv)" && exit 1)
	@$(RUN) tools/requirements.py $(EXTRAS) > $(VENV)/requirements.txt
	@echo "Installs Python packages in $(VENV)"
	@$(PIP) install --no-compile -r $(VENV)/requirements.txt
	@touch $@

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --quiet

docs-serve: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs serve

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

# Needs an nvcc and no GPU: a CUDA kernel without its matrix instructions, or with spills, is right and slow, which no test sees.
sass: CUDA := 1
sass: build
	$(RUN) tools/check_sass.py $(ARGS)

# PYTHONS names the interpreters to build with, where others are wanted than one 3.11 and one later that are found.
wheel: $(STAMP)
	@$(RUN) tools/build_wheels.py $(if $(filter 1,$(CUDA)),--cuda) $(PYTHONS)

sdist: $(STAMP)
	@$(RUN) -m build --sdist --outdir dist .

check-wheel:
	@$(PYTHON) tools/check_wheel.py $(or $(WHEELS),dist/*.whl)

check-sdist:
	@$(PYTHON) tools/check_wheel.py dist/*.tar.gz

# As asan, but for another processor and without sanitizers. Debian: apt install g++-aarch64-linux-gnu qemu-user
check-aarch64:
	@for tool in aarch64-linux-gnu-g++ qemu-aarch64; do command -v $$tool > /dev/null || \
	  { echo "No $$tool (Debian: apt install g++-aarch64-linux-gnu qemu-user)"; exit 1; }; done
	cmake -S tests/csrc -B build/aarch64 -DCMAKE_TOOLCHAIN_FILE=aarch64-linux-gnu.cmake -DSANITIZE= \
	  -DCMAKE_BUILD_TYPE=Release > /dev/null
	cmake --build build/aarch64 --parallel
	qemu-aarch64 -L /usr/aarch64-linux-gnu build/aarch64/cpu_check $(or $(ARGS),--cases 24)

clean:
	rm -rf build $(VENV) demo_output
