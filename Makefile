# `make demo` and `make test` do everything on a fresh clone; the second run starts at once.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
MAKEFLAGS += --no-print-directory
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help demo test lint zoo mnist gpu clean

PYTHON := .venv/bin/python
CHECK := import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))
# pip's own bar needs a terminal and -q hides it: one line a big download says as much. Python compiles what it imports.
PIP := $(PYTHON) -m pip install --disable-pip-version-check --no-compile
SHOW := | sed -un -e 's/^ *Downloading \(.*[0-9][0-9]\.[0-9] MB)\).*/  \1/p' -e 's/^Installing collected packages.*/  installing .../p'

help:
	@echo "make demo   train a network dense and at 5% density on real digits, side by side"
	@echo "make test   the tests"
	@echo "make lint   ruff and pyright"
	@echo "make zoo    every model of torchvision through the compiler (minutes)"
	@echo "make gpu    on a CUDA device: the tests that need it and the benchmark (ten minutes)"
	@echo "make mnist  the paper's MNIST table (hours; goes on where it stopped)"
	@echo "make clean  remove .venv and everything built"

demo: .venv/.examples
	@$(PYTHON) examples/demo.py

test: .venv/.dev
	@$(PYTHON) -m pytest -q

lint: .venv/.dev
	@$(PYTHON) -m ruff check
	@$(PYTHON) -m ruff format --check
	@$(PYTHON) -m pyright

zoo: .venv/.dev
	@$(PYTHON) -m pytest -q -m zoo

gpu: .venv/.dev
	@$(PYTHON) -m pytest -q -m gpu
	@$(PYTHON) -m sparsefx bench --device cuda --json results/bench_gpu.json --plot results/bench_gpu.svg

mnist: .venv/.examples
	@for density in 1 0.2 0.05; do $(PYTHON) examples/mnist.py --model lenet300 --density $$density; done
	@for density in 1 0.05; do $(PYTHON) examples/mnist.py --model lenet5 --density $$density; done
	@$(PYTHON) examples/mnist.py --model lenet5 --density 0.05 --clip 1

$(PYTHON):
	@for python in python3 python3.14 python3.13 python3.12 python3.11; do \
	    if $$python -c '$(CHECK)' 2>/dev/null; then \
	        echo "Creating .venv with $$($$python --version)"; \
	        exec $$python -m venv .venv; \
	    fi; \
	done; \
	echo "expected Python 3.11 or newer with venv, found none; install it and run make again" >&2; exit 1

.venv/.examples: pyproject.toml | $(PYTHON)
	@echo "Installing sparsefx and PyTorch (a few minutes the first time)"
	@$(PIP) -e ".[examples]" $(SHOW)
	@touch $@

.venv/.dev: pyproject.toml | $(PYTHON)
	@echo "Installing sparsefx, PyTorch and the tools of development (a few minutes the first time)"
	@$(PIP) -e ".[dev]" $(SHOW)
	@touch $@ .venv/.examples

clean:
	@rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
