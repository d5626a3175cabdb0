# Targets create .venv at first use, and update the environment when its prerequisites change.
PYTHON ?= python3
ifeq ($(if $(filter default, $(origin CXX)),,$(strip $(CXX))),)
override CXX := c++
endif

TORCH ?= torch>=2.6
VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip -q --disable-pip-version-check
CXX_FILES = $(shell find csrc tests tools -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: help demo test test-all mutants sanitize cuda-compile lint docs dist bench gpu-check setup clean
.DELETE_ON_ERROR:

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 19

demo: setup  ## train a network with the plain and with the fused neuron, compare, draw demo.png
	@$(RUN) -m benchmarks.learning.demo

# Each process has OpenMP threads: waiting threads must not take cores from working threads.
PYTEST := OMP_WAIT_POLICY=passive $(RUN) -m pytest -n auto --dist worksteal

test: setup  ## run the tests, except for those that take minutes or repeat others
	@$(PYTEST)

test-all: setup  ## run all tests, sanitizers and compilations: for a release, and for a change of the kernels
	@$(PYTEST) -m ""
	@$(RUN) -m tools.emulation.sanitize --all
	@$(RUN) -m tools.kernels.cuda_compile

mutants: setup  ## seed mistakes in the code: each must fail a test; build/mutants.md has which
	@$(RUN) -m tools.mutants.check

sanitize: setup  ## run recorded calls of the CUDA and CPU kernels under AddressSanitizer, UBSan and ThreadSanitizer
	@$(RUN) -m tools.emulation.sanitize

cuda-compile: setup  ## compile the CUDA kernels for all architectures, compare with RESOURCES.md, check their PTX
	@$(RUN) -m tools.kernels.cuda_compile $(if $(ARCHITECTURES),--architectures $(ARCHITECTURES)) \
	  $(if $(TYPES),--types $(TYPES))

lint: setup  ## check style, formatting, types and workflows
	@$(RUN) -m ruff check
	@$(RUN) -m ruff format --check
	@$(VENV)/bin/clang-format --dry-run -Werror $(CXX_FILES)
	@$(RUN) -m mypy
	@$(VENV)/bin/check-jsonschema -q --builtin-schema vendor.github-workflows .github/workflows/*.yml
	@$(VENV)/bin/check-jsonschema -q --builtin-schema vendor.dependabot .github/dependabot.yml
	@$(VENV)/bin/zizmor -q --offline .github

docs: $(VENV)/documented  ## build the documentation into build/docs and execute its tutorials; warnings are errors
	@OMP_WAIT_POLICY=passive $(RUN) -m sphinx -q -W --keep-going -d build/docs-parsed docs build/docs
	@echo "Documentation: $(CURDIR)/build/docs/index.html"

dist: setup  ## build source archive and wheels into dist, install and check each in a fresh environment
	@$(RUN) -m tools.dist

bench: setup  ## time the neuron against an element-wise multiply
	@$(RUN) -m benchmarks.speed.microbench

gpu-check:  ## on a machine with a GPU: build with PYTHON as it is, test and time; log and results to OUT
	@$(PYTHON) -m tools.gpu_check.check $(or $(OUT),build/gpu-check)

setup: $(VENV)/built  ## make .venv with everything, once (the targets above do it themselves)

$(VENV)/created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "asgl_cuda needs Python 3.10 or newer: make PYTHON=/path/to/python3 (this is $$($(PYTHON) --version 2>&1))"; exit 1; }
	@command -v $(firstword $(CXX)) > /dev/null || \
	  { echo "asgl_cuda needs a C++ compiler, and there is no $(CXX): install g++, or name another in CXX"; exit 1; }
	@echo "Making a virtual environment in $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv --clear $(VENV)
	@echo "Installing PyTorch: a large download the first time"
	@# Build requirements of asgl_cuda and Norse, a source distribution, both built without isolation.
	@$(PIP) install "setuptools>=77" "setuptools-scm>=8" "$(TORCH)" ninja
	@touch $@

$(VENV)/built: $(VENV)/created setup.py asgl_cuda/backends/extension/compilation.py asgl_cuda/backends/extension/build_notes.py pyproject.toml MANIFEST.in $(shell find csrc -type f -not -name '*.md')
	@echo "Installing what tests and benchmarks need, compiling csrc: five minutes on two cores"
	@$(PIP) install --no-build-isolation --editable ".[test,bench,dev]"
	@# sinabs pins nir <= 1.0.4, too old for SpikingJelly's exchange, but works with newer versions of nir.
	@$(PIP) install pbr && $(PIP) install --no-deps "sinabs>=3.1"
	@# Published models import its clock_driven, which the current version of the same name does not have.
	@$(PIP) install --no-deps --upgrade --target $(VENV)/spikingjelly-0.0.0.0.12 "spikingjelly==0.0.0.0.12"
	@# NVRTC of nvcc's version, to compare what they make. A torch for CUDA requires one of its own: without --no-deps
	@# this would replace torch by a version that csrc was not compiled for, and earlier it would hold torch back.
	@$(PIP) install --no-deps "nvidia-cuda-nvrtc==13.0.*; sys_platform == 'linux'"
	@touch $@

$(VENV)/documented: $(VENV)/built docs/requirements.txt
	@$(RUN) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "make docs needs Python 3.11 or newer, and $(VENV) has $$($(RUN) --version 2>&1): make clean, then with PYTHON=..."; exit 1; }
	@echo "Installing what the documentation is built with"
	@$(PIP) install -r docs/requirements.txt
	@touch $@

clean:  ## remove .venv and all else that the targets made
	rm -rf $(VENV) build dist *.egg-info asgl_cuda/_C.*.so asgl_cuda/_build_info.* demo.png
	rm -rf .pytest_cache .hypothesis .ruff_cache .mypy_cache
	find asgl_cuda benchmarks tests tools -name __pycache__ -exec rm -rf {} +
