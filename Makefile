# Every target sets up what it needs: a virtual environment with the pinned versions, once.

VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
OUT ?= demo_output
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help install demo test test-long test-gpu lint format docs-check bench clean

help:  ## show this list
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

install: $(INSTALLED)  ## create the environment in .venv

# The first Python of at least 3.11; choose another with `make PYTHON=python3.12 ...`.
$(BIN)/python:
	@for python in $(PYTHON) python3 python3.13 python3.12 python3.11; do \
		if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
			echo "creating $(VENV) with $$($$python --version)"; exec $$python -m venv $(VENV); \
		fi; \
	done; echo "Python 3.11 or newer was not found; name one with: make PYTHON=/path/to/python ..." >&2; exit 1

$(INSTALLED): pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing the pinned packages into $(VENV)"
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $@

demo: $(INSTALLED)  ## train SCVI on real data, write results and pictures to demo_output/
	$(BIN)/scvi-lite demo --out $(OUT) $(ARGS)

# A test a core: one thread each is faster than all threads for one test after the other. Whole stretches of tests go to
# a core, which so makes the models that tests share once, and takes over what another has left at the end.
test: $(INSTALLED)  ## run every test, doctest, lint and type check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses logical --dist worksteal --durations 25 $(ARGS)

test-long: $(INSTALLED)  ## run the tests that take minutes
	$(BIN)/python -m pytest -m "long and not gpu" --timeout 3600 $(ARGS)

test-gpu: $(INSTALLED)  ## run the tests that need a GPU
	$(BIN)/python -m pytest -m gpu $(ARGS)

lint: $(INSTALLED)  ## check style and types
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

format: $(INSTALLED)  ## lay out the code and mend what can be mended by a machine
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

docs-check: $(INSTALLED)  ## run the examples of README and docstrings, check the links of the documents
	$(BIN)/python -m pytest scvi_lite tests/test_house.py $(ARGS)

bench: $(INSTALLED)  ## time training and inference
	$(BIN)/python benchmarks/compare_scvi_tools.py $(ARGS)

clean:  ## remove the environment and caches
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .hypothesis
