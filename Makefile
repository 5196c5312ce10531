# Two commands matter: `make demo` and `make test`. Both set everything up on a machine with Python 3.11 and make.

PYTHON ?= python3.11
VENV := .venv
FREE := .torch-free
LOWEST := .lowest
EXTRAS := serve remote milvus map watch
QUICK := beartype hypothesis jaxtyping pytest pytest-xdist httpx milvus-lite scikit-image scikit-learn scipy
# what an old package does at its import is no fault of ours; test_pins.py is about constraints.txt, which is not used here
OLD_HINTS := -W ignore::beartype.roar.BeartypeDecorHintPep585DeprecationWarning -W ignore:numpy.core._multiarray_umath:DeprecationWarning
COMMA := ,
SPACE := $(subst ,, )
BIN := $(VENV)/bin
# every package, direct or not, at the version that was tested
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: help demo test test-quick test-slow test-torch-free test-lowest test-pythons lint types docs docs-site check clean

help:  ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

demo: $(VENV)/.demo  ## install, then run the whole line on real pictures (minutes)
	$(BIN)/samething demo

test: $(VENV)/.dev  ## install, then run the tests
	$(BIN)/python -m pytest -n 2

test-quick: $(VENV)/.dev  ## the tests that need neither torch nor the whole line (under a minute)
	$(BIN)/python -m pytest -n 2 --quick

test-slow: $(VENV)/.dev  ## the tests that take minutes
	$(BIN)/python -m pytest -m slow

test-torch-free: $(VENV)/.dev  ## an environment without torch is built and searches pictures
	rm -rf $(FREE) && mkdir -p $(FREE)/line && $(PYTHON) -m venv $(FREE)/venv
	$(FREE)/venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt .
	PYTHONPATH=src:tests $(BIN)/python tests/torch_free.py make $(FREE)/line
	$(FREE)/venv/bin/python tests/torch_free.py check $(FREE)/line

test-lowest:  ## an environment at the lowest versions that pyproject.toml allows passes the quick tests
	rm -rf $(LOWEST) && $(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python tests/lowest.py $(EXTRAS) > $(LOWEST)/lowest.txt
	$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check -c $(LOWEST)/lowest.txt ".[$(subst $(SPACE),$(COMMA),$(EXTRAS))]" $(QUICK)
	$(LOWEST)/bin/python -m pytest -n 2 --quick --ignore tests/test_pins.py --doctest-ignore-import-errors $(OLD_HINTS)

test-pythons: $(VENV)/.dev  ## test-torch-free with every Python from 3.11 that is here
	@for python in python3.11 python3.12 python3.13 python3.14; do \
	  if $$python --version 2>/dev/null; then $(MAKE) test-torch-free PYTHON=$$python || exit 1; \
	  else echo "$$python is not here"; fi; \
	done

lint: $(VENV)/.dev  ## style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev  ## static types
	$(BIN)/mypy

docs-site: $(VENV)/.dev  ## build the documentation site into site/, with every link checked
	$(INSTALL) '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

docs: $(VENV)/.dev  ## write the generated pages of docs/
	$(BIN)/python docs/generate.py

check: lint types test  ## all that CI runs

clean:  ## remove what the demo and the checks made; the installation stays
	rm -rf demo .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { echo "Python 3.11 is needed; if it has another name: make PYTHON=python3 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml demo_images/pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing (torch is large: some minutes the first time) ..."
	$(INSTALL) -e ./demo_images -e '.[demo]'
	@touch $@

$(VENV)/.dev: pyproject.toml demo_images/pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing (torch is large: some minutes the first time) ..."
	$(INSTALL) -e ./demo_images -e '.[dev]'
	@touch $@ $(VENV)/.demo
