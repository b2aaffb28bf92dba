# `make demo` and `make test` do everything on a machine that has Python 3.11-3.13 and pip:
# they make the environment when it is missing or stale, then run.

SHELL := /bin/sh
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.made-from

.PHONY: demo test check notebooks bench clean

demo: $(STAMP)
	$(BIN)/tfgrad demo

test: $(STAMP)
	$(BIN)/python -m pytest --numprocesses=auto --dist=loadfile

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Runs each notebook from clean, from the .py that it is paired with, and keeps what it shows.
notebooks: $(STAMP)
	$(BIN)/jupytext --quiet --to ipynb notebooks/*.py
	$(BIN)/python -m pytest --nbmake --nbmake-timeout=300 --overwrite notebooks/*.ipynb

bench: $(STAMP)
	$(BIN)/python -m pytest benchmarks

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache

$(STAMP): pyproject.toml constraints.txt scripts/setup
	sh scripts/setup $(VENV)
	touch $@
