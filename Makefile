# Every target sets itself up: Python >= 3.11 and make are all that a machine needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help

.PHONY: help
help: ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-12s %s\n", $$1, $$2}'

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e . \
		hypothesis mypy pandas pytest ruff
	@touch $@

.PHONY: install
install: $(STAMP) ## Make .venv with the package and its development tools

.PHONY: demo
demo: $(STAMP) ## Go the whole path against the sandbox exchange and show the report's place
	$(BIN)/recur demo

.PHONY: test
test: check ## Lint, type-check, and run the tests (minutes)
	$(BIN)/python -m pytest -m "not full"

.PHONY: test-full
test-full: check ## All tests, the long proofs on real data too
	$(BIN)/python -m pytest

.PHONY: check
check: $(STAMP) ## Lint and type-check only
	$(BIN)/ruff format --check -q .
	$(BIN)/ruff check -q .
	$(BIN)/mypy

.PHONY: bench
bench: $(STAMP) ## Benchmarks beside their peers (installs the peers)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	$(BIN)/python benchmarks/run.py

.PHONY: real
real: $(STAMP) ## Real Bybit candles: fetch from files, backtest, print the table of the README
	$(BIN)/python benchmarks/real.py
