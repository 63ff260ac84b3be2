# Every target sets itself up: Python >= 3.11 and make are all that a machine needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TOOLS := $(VENV)/.tools

.DEFAULT_GOAL := help

.PHONY: help
help: ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-12s %s\n", $$1, $$2}'

PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) -e .
	@touch $@

$(TOOLS): $(STAMP)
	$(PIP) -e '.[test]' hypothesis mypy pandas pytest ruff
	@touch $@

.PHONY: install
install: $(TOOLS) ## Make .venv with the package and its development tools

.PHONY: demo
demo: $(STAMP) ## Go the whole path against the sandbox exchange and show the report's place
	$(BIN)/recur demo

.PHONY: test
test: check ## Lint, type-check, and run the tests (minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not full"

.PHONY: test-full
test-full: check ## All tests, the long proofs on real data too
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.PHONY: check
check: $(TOOLS) ## Lint and type-check only
	$(BIN)/ruff format --check -q .
	$(BIN)/ruff check -q .
	$(BIN)/mypy

.PHONY: bench
bench: $(STAMP) ## Benchmarks beside their peers (installs the peers)
	$(PIP) -e '.[bench]'
	$(BIN)/python benchmarks/run.py

.PHONY: bench-models
bench-models: $(STAMP) ## The sequence models beside public implementations (installs them)
	$(PIP) -e '.[bench]'
	$(BIN)/python benchmarks/models_cells.py
	$(BIN)/python benchmarks/models_mamba.py

.PHONY: real
real: $(STAMP) ## Real Bybit candles: fetch from files, backtest, print the table of the README
	$(BIN)/python benchmarks/real.py
