# One-word tasks. `make demo` and `make test` are all a new checkout needs; both install what is missing first.
#
# TORCH chooses the torch requirement, with any pip options: make test TORCH=torch==2.13.0
# CUDA=1 allows an install that brings the CUDA packages to a machine without a GPU.
PYTHON ?= python3
TORCH ?= torch==2.13.0
ROOM ?= gemm_fp8_block
VENV ?= .venv
PINS ?=
TESTS ?= tests
OLDER = transformers==5.17.0
RUN = $(VENV)/bin/python

.PHONY: setup check test test-older gpu gpus sanitize bench tune demo

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml Makefile
	$(PYTHON) -m venv $(VENV)
	@$(PYTHON) tools/guard_torch.py "$(VENV)/bin/python" "$(CUDA)" $(TORCH)
	$(RUN) -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(RUN) -m pip install --quiet --disable-pip-version-check --editable '.[dev]' $(PINS)
	@touch $@

check: setup
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

test: setup
	$(RUN) -m pytest $(TESTS)

# What touches transformers, with the older of the two versions that are tested, in an environment of its own.
test-older:
	$(MAKE) test VENV=.venv-older PINS=$(OLDER) TESTS=tests/toolkit

# On a machine with a GPU, with the python that has torch there: a test that skips fails.
gpu:
	PYTHONPATH=.:kernels:calib $(PYTHON) -m pytest -m gpu --require-gpu

# The same on a machine with two.
gpus:
	PYTHONPATH=.:kernels:calib $(PYTHON) -m pytest -m gpus --require-gpu

# Out-of-bounds accesses and races of the CUDA kernels; compute-sanitizer comes with the CUDA toolkit.
sanitize:
	PYTHONPATH=kernels $(PYTHON) tools/sanitize.py

bench:
	PYTHONPATH=.:kernels:calib $(PYTHON) -m quantlab.cli bench $(ROOM)

tune:
	PYTHONPATH=.:kernels:calib $(PYTHON) -m quantlab.cli tune $(ROOM)

demo: setup
	$(VENV)/bin/quantlab demo
