# Everything works on a fresh clone: each target first makes .venv with the pinned packages, once.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.dcomp-installed
PYTEST_FLAGS ?= -n auto --maxprocesses 4 --dist worksteal --durations 12

.DEFAULT_GOAL := help
.PHONY: help setup lint format types layers test test-slow test-all bench demo ci clean

help:  ## Show the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP)  ## Create .venv with pinned packages

$(STAMP): pyproject.toml .ci/constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) was not found. Install Python 3.11 or newer, or name one: make setup PYTHON=/path/to/python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and "dcomp needs Python 3.11 or newer, and $(PYTHON) is %d.%d. Name another: make setup PYTHON=/path/to/python3.12" % v[:2])'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --no-compile --disable-pip-version-check -c .ci/constraints.txt --editable '.[dev]'
	@mkdir -p .dev && ln -sfn .. .dev/dcomp
	@touch $@

lint: setup  ## ruff: rules and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup  ## Let ruff rewrite the files
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: setup  ## mypy, strict
	$(BIN)/mypy

layers: setup  ## import-linter: nothing imports upwards
	$(BIN)/lint-imports

test: setup  ## The default tests
	$(BIN)/pytest $(PYTEST_FLAGS)

test-slow: setup  ## The tests marked slow
	$(BIN)/pytest -m slow $(PYTEST_FLAGS)

test-all: setup  ## Both in one run, which is faster than one after the other
	$(BIN)/pytest -m "slow or not slow" $(PYTEST_FLAGS)

bench: setup  ## The benchmarks and how to run them
	@echo "Benchmarks, each a script with --help:"
	@for file in benchmarks/*.py; do [ -e "$$file" ] && echo "  $(BIN)/python -P $$file" || true; done

demo: setup  ## Quantize the embedded pipeline and validate it
	$(BIN)/dcomp demo

ci:  ## Everything that has to pass before a merge
	.ci/run

clean:  ## Remove what tools left behind; .venv stays
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache .coverage demo-out
