# make demo       the main job on a real teacher (downloads it once, about 90 MB)
# make test       the tests (minutes); make test-slow: kills and other slow proofs
# make test-bits  the tests of which bits are equal, on two instruction sets, with one thread and with two
# make chaos      two minutes of builders that are killed at random over a store that fails
# make check      lint, format and types
# make browser    Chromium (from Debian's packages) and what drives it, for the tests of pages, which are skipped without
# Everything installs itself into .venv: what the demo needs, and for the others also test servers, Beam and linters.
# Every target is safe to run again.

PYTHON ?= python3
BIN := .venv/bin
DEMO_ARGS ?=
# setuptools warns at each editable install that a folder named distillcache may be imported instead; it is the same one.
PIP := PYTHONWARNINGS=ignore $(BIN)/pip
# Two workers that keep neighbouring tests together: fixtures and compiled programs of a file are made once.
PYTEST := $(BIN)/python -m pytest -n 2 --dist worksteal

CHROMIUM := /usr/bin/chromium
APT := $(shell [ "$$(id -u)" = 0 ] || echo sudo) env DEBIAN_FRONTEND=noninteractive apt-get

.PHONY: demo test test-slow test-bits chaos check browser install clean

install: .venv/installed

.venv/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: Python 3.11 or newer is needed; $(PYTHON) is $$($(PYTHON) --version). Try: make PYTHON=python3.12"; exit 2; }
	@echo "installing into .venv, about a minute"
	@$(PYTHON) -m venv .venv
	@$(BIN)/pip install --quiet --disable-pip-version-check --upgrade pip
	@$(PIP) install --quiet --disable-pip-version-check --editable .
	@touch $@

.venv/installed-dev: .venv/installed
	@echo "installing what tests and checks need, about a minute"
	@$(PIP) install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

.venv/installed-browser: .venv/installed-dev
	@$(PIP) install --quiet --disable-pip-version-check --editable '.[browser]'
	@touch $@

browser: .venv/installed-browser
	@test -x $(CHROMIUM) || command -v apt-get > /dev/null || \
	  { echo "error: there is no apt-get to install Chromium with; put one at $(CHROMIUM) yourself"; exit 2; }
	@test -x $(CHROMIUM) || { echo "installing Chromium, about two minutes" && \
	  $(APT) update -qq && $(APT) install -y -qq --no-install-recommends chromium > /dev/null; }

demo: install
	$(BIN)/distillcache demo $(DEMO_ARGS)

test: .venv/installed-dev
	$(PYTEST) -m "not slow"

test-slow: .venv/installed-dev
	$(PYTEST) -m slow

# Without fused multiply-add and on one thread (XLA itself cannot convert from float16 there, hence not fp8); then
# the codecs as the machine has it: optimised as a user's programs are, on all threads.
test-bits: .venv/installed-dev
	XLA_FLAGS="--xla_cpu_max_isa=SSE4_2" $(PYTEST) -m "bits and not slow" -k "not fp8"
	XLA_FLAGS="--xla_backend_optimization_level=3 --xla_cpu_multi_thread_eigen=true" \
	  $(PYTEST) -m "bits and not slow" tests/trainer/feed/test_cache_source.py tests/schemas/codecs/test_delta.py

chaos: .venv/installed-dev
	$(BIN)/python -m tests.chaos --seconds 120

check: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@mkdir -p build/typing && ln -sfn ../.. build/typing/distillcache
	$(BIN)/pyright

clean:
	rm -rf .venv .pytest_cache build *.egg-info
