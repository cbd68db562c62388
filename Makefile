# Every target sets up what it needs: `make demo` and `make test` work on a fresh clone.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
BIN := .venv/bin
# Two test processes, one thread each: on two cores faster than one process with two threads.
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest

.PHONY: help setup demo test slow lint format bench clean

help:
	@echo 'make demo     from nothing to a live reading and runs/latest/report.html'
	@echo 'make test     checks and tests (default tier, no network)'
	@echo 'make slow     the tests with the real model as well'
	@echo 'make lint     format, lint, import contracts, dependencies, types'
	@echo 'make format   ruff format'
	@echo 'make bench    what reading N lenses costs a token'
	@echo 'make setup    .venv with everything for development'
	@echo 'make clean    remove caches and .venv; runs/ and $$FTW_HOME stay'

# Scripts in a virtual environment name its folder: one that was moved is made anew.
ifneq ($(shell cat .venv/.place 2>/dev/null),$(CURDIR))
$(shell rm -f .venv/.installed-*)
endif

# The demo needs less than the tests do; either is installed anew only when a pin or a dependency changed.
.venv/.installed-train: pyproject.toml constraints.txt
	@PYTHON='$(PYTHON)' .ci/install train

.venv/.installed-dev: pyproject.toml constraints.txt
	@PYTHON='$(PYTHON)' .ci/install dev

setup: .venv/.installed-dev

demo: .venv/.installed-train
	@$(BIN)/ftw demo

test: .venv/.installed-dev
	@$(BIN)/ruff check --quiet .
	@$(BIN)/lint-imports --no-cache > .venv/lint-imports.log || { cat .venv/lint-imports.log; exit 1; }
	@$(BIN)/deptry ftw > .venv/deptry.log 2>&1 || { cat .venv/deptry.log; exit 1; }
	@$(PYTEST) -n $(WORKERS)

slow: .venv/.installed-dev
	@$(BIN)/python -m pytest -m 'not gpu'

lint: .venv/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/deptry ftw
	$(BIN)/basedpyright

format: .venv/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/.installed-train
	@$(BIN)/ftw bench bank

clean:
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis .import_linter_cache build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
