# make demo | make test | make peers | make torture | make setup | make lint. Each sets up what it needs; a second call sets up nothing.
PY := .venv/bin/python
PIP := $(PY) -m pip -qq --disable-pip-version-check --no-input

# The first interpreter that is 3.11 to 3.13 and can make environments; `make PYTHON=/path/to/python` decides otherwise.
PYTHON_IS_FIT := import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))
PYTHON ?= $(firstword $(foreach p,python3.11 python3.12 python3.13 python3,\
	$(shell $(p) -c '$(PYTHON_IS_FIT)' >/dev/null 2>&1 && echo $(p))))

.PHONY: setup demo up down test peers torture lint format clean

setup: .venv/installed

demo: setup
	@.venv/bin/magellano train demo

# Prefect's server, its UI at http://127.0.0.1:4200, all deployments and a worker; `make down` saves what runs and ends them.
up: setup
	@.venv/bin/magellano up

down: setup
	@.venv/bin/magellano down

# A process a core, four at most; the files go out in their order, so that the longest, with the servers, begins first.
test: lint
	@$(PY) -m pytest -n auto --maxprocesses 4 --dist loadscope --no-loadscope-reorder

# Against the real packages that models are exchanged with, which are no dependency (the extra `exchange`).
peers: .venv/peers
	@$(PY) -m pytest tests/peers tests/test_examples.py::test_import_a_mamba

# Some packages come as sources alone: they are built with the setuptools that the lock above pins, not with one that pip fetches.
.venv/peers: .venv/installed requirements-peers.lock
	@echo "installing what models are exchanged with into .venv (a minute or two)"
	@$(PIP) install --no-deps --require-hashes --no-build-isolation -r requirements-peers.lock || { \
		echo "make: of torch on Linux the lock takes a CPU build alone: tell pip where one is," \
		"as PIP_FIND_LINKS=FOLDER or PIP_EXTRA_INDEX_URL=URL, and call make peers again" >&2; exit 1; }
	@touch $@

# Half an hour or more: kills, injected faults, damage, no network. A share of it is among the tests.
torture: setup
	@$(PY) -m tests.torture

lint: setup
	@.venv/bin/ruff check --quiet .
	@.venv/bin/ruff format --check --quiet . || { echo "not formatted: run make format"; exit 1; }
	@.venv/bin/mypy

format: setup
	@.venv/bin/ruff check --quiet --fix .
	@.venv/bin/ruff format --quiet .

# Artifacts in .magellano/ stay: they are work, not build products.
clean:
	@rm -rf .venv .pytest_cache .ruff_cache .mypy_cache .hypothesis *.egg-info

# The lock is complete, so pip resolves nothing (--no-deps) and checks every file against its hash.
.venv/locked: requirements.lock
	@test -n "$(PYTHON)" || { echo "make: no Python 3.11, 3.12 or 3.13 with venv found;" \
		"install one (Debian: python3-venv) or name it: make PYTHON=/path/to/python" >&2; exit 1; }
	@echo "installing the pinned packages into .venv (about a minute)"
	@test -x $(PY) || $(PYTHON) -m venv .venv
	@$(PIP) install --no-deps --require-hashes -r requirements.lock
	@touch $@

.venv/installed: .venv/locked pyproject.toml
	@$(PIP) install --no-deps --no-build-isolation -e .
	@touch $@
