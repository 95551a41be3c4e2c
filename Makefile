# The project's commands. `make` lists them.
#
# Commands use .venv, which they create, or another environment: PYTHON=/path/to/python or an activated VIRTUAL_ENV.
# TORCH is the torch to install if there is none. The pinned version is a CPU build if the package index offers one.
# It must be installed before packages that require torch by a range, because they would pull in the newest release
# with several gigabytes of CUDA.

TORCH ?= torch==2.13.0
# Number of test processes: one more than two cores, because some tests wait for time limits.
JOBS ?= 3
# Minutes for the speed benchmarks on a GPU.
GPU_MINUTES ?= 6
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

ifneq ($(PYTHON),)
  STAMP := env-given
else ifneq ($(VIRTUAL_ENV),)
  PYTHON := $(VIRTUAL_ENV)/bin/python
  STAMP := env-given
else
  PYTHON := .venv/bin/python
  STAMP := .venv/installed
endif

NATIVE := $(shell find csrc -type f 2>/dev/null)
CLANG_FORMAT = "$$($(PYTHON) -c 'import clang_format; print(clang_format.get_executable("clang-format"))')"
PIP := $(PYTHON) -m pip install --disable-pip-version-check --quiet

help: ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

env: $(STAMP) ## create the environment and build the compiled part

demo: env ## scan and repair the shipped models; writes an HTML report
	$(PYTHON) -m bdprune demo

test: env ## run all checks: lint, types, tests with coverage
	$(MAKE) -j$(JOBS) --output-sync STAMP= lint types cuda-check-if-nvcc
	$(PYTHON) -m pytest --cov --cov-report=term -n $(JOBS) --dist loadfile --no-loadscope-reorder

lint: env ## ruff, clang-format, and the layers of imports
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(if $(NATIVE),$(CLANG_FORMAT) --dry-run -Werror $(NATIVE))
	$(PYTHON) -c 'import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports())'

types: env ## mypy --strict
	$(PYTHON) -m mypy

format: env ## format Python and C++
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .
	$(if $(NATIVE),$(CLANG_FORMAT) -i $(NATIVE))

.PHONY: docs docs-serve
docs: export NO_MKDOCS_2_WARNING = 1
docs: env ## write the reference pages and build the site into site/; a warning is an error
	$(PYTHON) tools/generate_docs.py
	$(PYTHON) -m mkdocs build --strict

docs-serve: export NO_MKDOCS_2_WARNING = 1
docs-serve: env ## serve the site on a local port; it follows every change
	$(PYTHON) -m mkdocs serve

cuda-check: env ## compile the CUDA sources for sm_80 and sm_90 and check for register spills (needs nvcc, no GPU)
	$(PYTHON) tools/cuda_check.py

bench: env ## run the speed benchmarks on this CPU and write docs/evaluation/speed.md
	$(PYTHON) -m bench.speed --device cpu --threads 1 2 --minutes 14 --out bench/results/speed-cpu.json
	$(PYTHON) -m bench.speed.report

bench-gpu: env ## run the speed benchmarks on a CUDA device and write docs/evaluation/speed.md
	$(PYTHON) -m bench.speed --device cuda --threads 1 --minutes $(GPU_MINUTES) --out bench/results/speed-cuda.json
	$(PYTHON) -m bench.speed.report

calibration: env ## scan the reference zoo and fit the tables of the package; DATA=DIR names the data sets
	$(PYTHON) -m bdprune calibrate zoo/reference.toml --data $(DATA) --rows bench/results/reference-default.jsonl \
		-o bdprune/verdict/tables/default.json --report docs/evaluation/calibration.md
	$(PYTHON) -m bdprune calibrate zoo/reference.toml --data $(DATA) --rows bench/results/reference-fast.jsonl \
		--budget fast -o bdprune/verdict/tables/fast.json --report docs/evaluation/calibration.md
	$(PYTHON) -m bdprune calibrate zoo/reference.toml --data $(DATA) --rows bench/results/reference-full.jsonl \
		--budget full -o bdprune/verdict/tables/full.json --report docs/evaluation/calibration.md

wheel: env ## one wheel for Linux x86-64, Python >= 3.11 and torch >= 2.11, without CUDA ops; into dist/
	rm -rf build/lib* build/bdist* build/wheel dist/bdprune-*.whl
	FORCE_CUDA=0 $(PYTHON) -m pip wheel . --no-build-isolation --no-deps --wheel-dir build/wheel
	PATH="$(dir $(PYTHON)):$$PATH" $(PYTHON) -m auditwheel repair --plat manylinux_2_28_x86_64 --strip \
	  --exclude 'libtorch*.so' --exclude 'libc10*.so' --wheel-dir dist build/wheel/*.whl
	$(PYTHON) -m abi3audit --strict --summary dist/*.whl
	BDPRUNE_WHEEL="$$(realpath dist/*.whl)" $(PYTHON) -m pytest -q tests/test_wheel.py

test-wheel: wheel ## install the wheel into a new environment and run the tests there, the source tree out of reach
	tools/test_wheel.sh $(PYTHON) dist/*.whl '$(TORCH)' -n $(JOBS) --dist loadfile --no-loadscope-reorder

clean: ## remove build outputs; keeps .venv
	rm -rf build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .coverage*
	find bdprune -name '*.so' -delete -o -name __pycache__ -type d -prune -exec rm -rf {} +

# Compiles only what changed since the last check that passed.
cuda-check-if-nvcc: $(if $(shell command -v nvcc),build/cuda-checked)
	@command -v nvcc >/dev/null || echo "nvcc not found: the CUDA sources are not compiled"

build/cuda-checked: $(NATIVE) tools/cuda_check.py | $(STAMP)
	$(PYTHON) tools/cuda_check.py
	@mkdir -p build && touch $@

.venv/bin/python:
	@for python in python3 python3.13 python3.12 python3.11; do \
	  if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    exec $$python -m venv .venv; fi; done; \
	echo "bdprune needs Python 3.11 or newer; none was found. Install it, or set PYTHON=..." >&2; exit 1

.venv/installed: pyproject.toml setup.py $(NATIVE) | .venv/bin/python
	@$(install)
	@touch $@

env-given:
	@$(install)

define install
	$(PYTHON) -c 'import torch' 2>/dev/null || $(PIP) '$(TORCH)'
	$(PIP) 'setuptools>=77' wheel ninja
	rm -f bdprune/_core.cpython-*.so # from before the limited API: Python would prefer it
	$(PIP) --editable '.[dev]' --no-build-isolation --config-settings editable_mode=compat
endef

.PHONY: help env demo test lint types format cuda-check bench bench-gpu wheel test-wheel clean cuda-check-if-nvcc env-given
