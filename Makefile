# make demo       the main job on a real teacher (downloads it once, about 90 MB)
# make test       the tests (minutes); make test-slow: kills and other slow proofs
# make chaos      two minutes of builders that are killed at random over a store that fails
# make check      lint, format and types
# Everything installs itself into .venv: what the demo needs, and for the others also test servers, Beam and linters.
# Every target is safe to run again.

PYTHON ?= python3
BIN := .venv/bin
DEMO_ARGS ?=
# Two workers that keep neighbouring tests together: fixtures and compiled programs of a file are made once.
PYTEST := $(BIN)/python -m pytest -n 2 --dist worksteal

.PHONY: demo test test-slow chaos check install clean

install: .venv/installed

.venv/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: Python 3.11 or newer is needed; $(PYTHON) is $$($(PYTHON) --version). Try: make PYTHON=python3.12"; exit 2; }
	@echo "installing into .venv, about a minute"
	@$(PYTHON) -m venv .venv
	@$(BIN)/pip install --quiet --disable-pip-version-check --upgrade pip
	@$(BIN)/pip install --quiet --disable-pip-version-check --editable .
	@touch $@

.venv/installed-dev: .venv/installed
	@echo "installing what tests and checks need, about a minute"
	@$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

demo: install
	$(BIN)/distillcache demo $(DEMO_ARGS)

test: .venv/installed-dev
	$(PYTEST) -m "not slow"

test-slow: .venv/installed-dev
	$(PYTEST) -m slow

chaos: .venv/installed-dev
	$(BIN)/python -m tests.chaos --seconds 120

check: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

clean:
	rm -rf .venv .pytest_cache build *.egg-info
