# `make demo` and `make test` do everything on a machine that has Python 3.11-3.13 and pip:
# they make the environment when it is missing or stale, then run.

SHELL := /bin/sh
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.made-from
MEASURED := .benchmarks/latest.json
ifndef PEERS
PEERS := .venv-peers/bin/python
PEERS_STAMP := .venv-peers/.made-from
endif

.PHONY: demo test check notebooks bench bench-quick docs clean

demo: $(STAMP)
	$(BIN)/tfgrad demo

TESTS := # all of them
COVERAGE := # --cov=tfgrad measures it, for a third of the time more

# In the order of the files, which begins with those of many processes and ends with small
# ones: sorted by their numbers of tests, the longest would come last, beside an idle core.
test: $(STAMP)
	$(BIN)/python -m pytest --numprocesses=auto --dist=loadfile --no-loadscope-reorder \
		$(COVERAGE) $(TESTS)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Runs each notebook from clean, from the .py that it is paired with, and keeps what it shows.
notebooks: $(STAMP)
	$(BIN)/jupytext --quiet --to ipynb notebooks/*.py
	$(BIN)/python -m pytest --nbmake --nbmake-timeout=300 --overwrite notebooks/*.ipynb

# PEERS=/path/to/python uses an environment that is there already.
bench bench-quick: $(STAMP) $(PEERS_STAMP)
	TFGRAD_PEERS=$(PEERS) JAX_PYTHON=$(PEERS) TORCH_PYTHON=$(PEERS) \
		$(BIN)/python -m pytest benchmarks --save $(MEASURED) \
		$(if $(filter bench-quick,$@),--quick) || true
	test $@ = bench-quick || \
		$(BIN)/python benchmarks/report.py $(MEASURED) > benchmarks/README.md

# The reference of every public name, from the docstrings, in site/. A field that a result
# inherits has the names of its own module in its type, which pdoc then shows as text.
docs: $(STAMP)
	$(BIN)/python -W error -W 'ignore:Error parsing type annotation' -m pdoc --docformat google --output-directory site \
		tfgrad '!tfgrad[.]' tfgrad.errors tfgrad.problems

clean:
	rm -rf $(VENV) .venv-peers site .benchmarks .coverage .pytest_cache .mypy_cache .ruff_cache

$(STAMP): pyproject.toml constraints.txt scripts/setup
	sh scripts/setup $(VENV)
	touch $@

.venv-peers/.made-from: benchmarks/peers.txt scripts/setup-peers | $(STAMP)
	sh scripts/setup-peers .venv-peers
	touch $@
