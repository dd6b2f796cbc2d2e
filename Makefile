# make quickstart   train, kill, lose the node, resume: bit-identical, in under three minutes
# make test         linters, type checks and the quick tests, as CI runs them
# make test-long    the full campaigns
# make bench        the benchmark table, and bench.json
#
# All in .venv, made with $(PYTHON) when there is none; the versions are those of constraints.txt.

PYTHON ?= python3
PYTEST_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

.PHONY: help
help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

.PHONY: quickstart
quickstart: $(VENV)/.installed
	$(BIN)/python recipes/quickstart.py

# Two workers, for most tests wait for processes or for S3. Tests marked xdist_group("x") share a worker.
.PHONY: test
test: lint
	$(BIN)/python -m pytest -m "not long" -n 2 --dist loadgroup $(PYTEST_ARGS)

# One after the other: campaigns use all cores, and the mutants change the sources in a copy.
.PHONY: test-long
test-long: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m long -o faulthandler_timeout=3600 $(PYTEST_ARGS)
	$(BIN)/python tests/mutants/run.py

.PHONY: bench
bench: $(VENV)/.installed-dev
	$(BIN)/python tests/bench/run.py

.PHONY: lint
lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

.PHONY: clean
clean:
	rm -rf $(VENV) build dist bench.json .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps are older than what they depend on exactly when an install is due.
$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP_INSTALL) -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP_INSTALL) -e '.[test,lint]'
	@touch $(VENV)/.installed $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "Python 3.10 or newer is needed; choose one with: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
