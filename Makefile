# `make` prints the targets. PYTHON is the interpreter that makes .venv: make install PYTHON=python3.12

PYTHON ?= python3

VENV := .venv
# Lies inside the environment, so that deleting the environment deletes it too.
STAMP := $(VENV)/.installed

.PHONY: help install train test lint docs release clean

help:
	@echo "make install   create $(VENV) and install rhc with its development tools"
	@echo "make train     a first run: digits, windows of 50 steps, no download"
	@echo "make test      the quick tests"
	@echo "make lint      ruff and mypy"
	@echo "make docs      the documentation as a site, in site/"
	@echo "make release   the wheel, in dist/, tried in a fresh environment"
	@echo "make clean     remove caches and build products; keeps $(VENV) and runs/"

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -c constraints.txt -e '.[dev,report,runners]'
	touch $@

train: install
	$(VENV)/bin/rhc train --window 50

test: install
	$(VENV)/bin/python -m pytest -q -n auto

lint: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy rhc runners

docs: install
	test -x $(VENV)/bin/mkdocs || $(VENV)/bin/python -m pip install -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict

release:
	PYTHON=$(PYTHON) .ci/release

clean:
	rm -rf site build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
