# make demo       the main job on a real teacher (downloads it once, about 90 MB)
# make test       the tests (minutes); make test-slow: kills and other slow proofs
# make test-bits  the tests of which bits are equal, with SSE4.2 on one thread; those of the codecs also with the
#                 machine's own instructions, on all threads
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
# Workers keep neighbouring tests together: fixtures and compiled programs of a file are made once. Slow tests wait, for
# servers, for claims that expire and for the disk, as long as they compute: there are twice as many of them at once.
# Python's own compiled files are kept, also where the environment says not to: half of the time to collect the tests.
# What tests write is made durable, file by file, and a disk takes milliseconds for each: it lies in memory if there is room.
ROOMY := $(shell awk '/MemAvailable/ {exit $$2 < 16e6}' /proc/meminfo 2> /dev/null && \
  [ "$$(df --output=avail -k /dev/shm 2> /dev/null | tail -n 1)" -gt 8000000 ] 2> /dev/null && echo /dev/shm)
PYTEST := $(if $(TMPDIR),,$(if $(ROOMY),TMPDIR=$(ROOMY))) PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest --dist worksteal
# The files that hold tests of a mark: to import all the others would take every worker three seconds.
FILES = $$(grep -rlw $(1) tests --include='test_*.py' | sort)

CHROMIUM := /usr/bin/chromium
APT := $(shell [ "$$(id -u)" = 0 ] || echo sudo) env DEBIAN_FRONTEND=noninteractive apt-get

.PHONY: demo test test-slow test-bits test-bits-plain test-bits-optimised chaos check browser chromium install clean

install: .venv/installed

.venv/made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: Python 3.11 or newer is needed; $(PYTHON) is $$($(PYTHON) --version). Try: make PYTHON=python3.12"; exit 2; }
	@$(PYTHON) -m venv .venv
	@$(BIN)/pip install --quiet --disable-pip-version-check --upgrade pip
	@touch $@

.venv/installed: .venv/made pyproject.toml
	@echo "installing into .venv, about a minute"
	@$(PIP) install --quiet --disable-pip-version-check --editable .
	@touch $@

# Each of the next two holds what the ones above it do: whoever asks for it first waits for one installation.
.venv/installed-dev: .venv/made pyproject.toml
	@echo "installing what tests and checks need, about a minute"
	@$(PIP) install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch .venv/installed $@

.venv/installed-browser: .venv/made pyproject.toml
	@echo "installing what tests and checks need, browser tests too, about a minute"
	@$(PIP) install --quiet --disable-pip-version-check --editable '.[dev,browser]'
	@touch .venv/installed .venv/installed-dev $@

browser: .venv/installed-browser chromium

chromium:
	@test -x $(CHROMIUM) || command -v apt-get > /dev/null || \
	  { echo "error: there is no apt-get to install Chromium with; put one at $(CHROMIUM) yourself"; exit 2; }
	@test -x $(CHROMIUM) || { echo "installing Chromium, about two minutes" && \
	  $(APT) update -qq && $(APT) install -y -qq --no-install-recommends chromium > /dev/null; }

demo: install
	$(BIN)/distillcache demo $(DEMO_ARGS)

test: .venv/installed-dev
	$(PYTEST) -n 2 -m "not slow" --durations=15 --durations-min=3

test-slow: .venv/installed-dev
	$(PYTEST) -n 4 -m slow --durations=30 --durations-min=5 $(call FILES,slow)

test-bits: test-bits-plain test-bits-optimised

# Without fused multiply-add and on one thread (XLA itself cannot convert from float16 there, hence not fp8).
test-bits-plain: .venv/installed-dev
	XLA_FLAGS="--xla_cpu_max_isa=SSE4_2" $(PYTEST) -n 2 -m "bits and not slow" -k "not fp8" $(call FILES,bits)

# The codecs as the machine has it: optimised as a user's programs are, on all threads.
CODECS := tests/schemas/codecs/test_codecs.py::test_same_bits_every_time_and_decoding_in_every_program
ONLINE := tests/trainer/feed/test_online.py::test_the_bits_are_the_cache_s
test-bits-optimised: .venv/installed-dev
	XLA_FLAGS="--xla_backend_optimization_level=3 --xla_cpu_multi_thread_eigen=true" \
	  $(PYTEST) -n 1 -m bits tests/trainer/feed/test_cache_source.py tests/schemas/codecs/test_delta.py \
	  "$(CODECS)[fp8-None]" "$(CODECS)[int4-None-rotated]" "$(ONLINE)[delta_cache-False]"

chaos: .venv/installed-dev
	$(BIN)/python -m tests.chaos --seconds 120

check: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@mkdir -p build/typing && ln -sfn ../.. build/typing/distillcache
	$(BIN)/pyright

clean:
	rm -rf .venv .pytest_cache build *.egg-info
