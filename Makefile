# `make quickstart` is the whole product on generated data. Everything here works in a fresh clone that has
# nothing but a Python 3.11, 3.12 or 3.13 on PATH; the environment is made in .venv on first use.

# The first of these that is really there, of a supported version, and able to make environments.
PYTHON ?= $(shell for python in python3.12 python3.13 python3.11 python3 python; do \
	$$python -c 'import sys, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
	>/dev/null 2>&1 && echo $$python && break; done)
BIN := .venv/bin
TEST ?= tests

.DEFAULT_GOAL := help
.PHONY: help quickstart test lint format bench clean

help:  ## show this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## */\1\t/' | expand -t 12

quickstart: .venv/.train  ## teacher, baseline, distilled student, ONNX file and report on generated data
	$(BIN)/compress quickstart

test: .venv/.dev  ## all tests (TEST=tests/test_recipe.py for one file)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 $(TEST)

lint: .venv/.dev  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/.dev  ## let ruff fix and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/.dev  ## speed against PyTorch and, with MMDET_PYTHON=/path/to/python, against mmdet
	$(BIN)/python -m benchmarks

clean:  ## remove the environment and caches, never runs/
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist *.egg-info

.venv/bin/python:
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11, 3.12 or 3.13 on PATH; make PYTHON=/path/to/python" >&2; exit 2; }
	$(PYTHON) -m venv .venv

# The stamps are redone when pyproject.toml changes; pip then only installs what is new.
.venv/.train: .venv/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[train]'
	@touch $@

.venv/.dev: .venv/bin/python pyproject.toml $(wildcard tests/trt_rig/*.* tests/trt_rig/*/*.py)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[train,dev]'
	$(BIN)/python tests/trt_rig/install.py
	@touch $@ .venv/.train
