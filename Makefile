# Two commands do everything: `make demo` and `make test`.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN = $(VENV)/bin
INSTALLED = $(VENV)/.installed

.PHONY: demo test lint types faults benchmark lightning-tests clean

demo: $(INSTALLED)
	$(BIN)/enstack demo

test: $(INSTALLED)
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadscope

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/mypy

faults: $(INSTALLED)
	$(BIN)/python -m pytest -s -m faults_long tests

benchmark: $(INSTALLED)
	$(BIN)/python tests/benchmarks/bench_verify.py
	$(BIN)/python tests/benchmarks/bench_guard.py

# LIGHTNING is a checkout of Lightning at the installed version; with KEPT=folder a run goes on where it was stopped.
lightning-tests: $(INSTALLED)
	$(BIN)/python tests/benchmarks/lightning_tests.py $(LIGHTNING) $(if $(KEPT),--kept $(KEPT))

# torch first and with its exact version: a bare `torch` would bring gigabytes of CUDA packages.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test,dev]'
	touch $(INSTALLED)

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache runs
