# `make help` lists the targets. The only needs are Python 3.11 or newer, g++ and make.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
PIP_INSTALL := $(PY) -m pip install --disable-pip-version-check --quiet -c constraints.txt
# The extras of pyproject.toml that development needs, as requirements.
EXTRAS := import tomllib; project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
	wanted = [r for e in ("transformers", "bench", "dev") for r in project["optional-dependencies"][e]]; \
	print("\n".join(wanted + [r for r in project["dependencies"] if not r.startswith("torch")]))
CPP_FILES = $(shell git ls-files --cached --others --exclude-standard '*.cpp' '*.h' '*.hpp' '*.cc' '*.cu' '*.cuh')

.DEFAULT_GOAL := help
.PHONY: help demo test test-all lint bench kernels hooks clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: kernels  ## run a trained MLA model through FlashMLA and show what it gained
	$(PY) -m flashmla_ops.demo

test: kernels  ## run the tests, without the slow ones
	$(PY) -m pytest -m "not slow"

test-all: kernels  ## run every test
	$(PY) -m pytest

lint: $(INSTALLED)  ## ruff, mypy --strict and clang-format; changes nothing
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(if $(CPP_FILES),$(VENV)/bin/clang-format --dry-run -Werror $(CPP_FILES))

bench: kernels  ## time the operators against their peers (minutes, on a quiet machine) and update the README
	$(PY) -m bench decode
	$(PY) -m bench table

kernels: $(INSTALLED)
	@$(PY) -m flashmla_ops build

hooks: $(INSTALLED)  ## install pre-commit and its git hook
	$(PIP_INSTALL) pre-commit
	$(VENV)/bin/pre-commit install

clean:  ## remove everything that make created, .venv included
	rm -rf $(VENV) build dist demo_output *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch comes first and alone: whatever is installed after it finds the pinned torch present and leaves it.
$(INSTALLED): pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@echo "installing torch into $(VENV) (once; a few hundred megabytes)"
	@$(PIP_INSTALL) torch
	@echo "installing the other dependencies"
	@$(PY) -c '$(EXTRAS)' > $(VENV)/requirements.txt
	@$(PIP_INSTALL) setuptools -r $(VENV)/requirements.txt
	@FLASHMLA_BUILD_AT_INSTALL=0 $(PIP_INSTALL) --no-build-isolation --no-deps -e .
	@touch $@
