# `make quickstart` is the whole product on generated data. Everything here works in a fresh clone that has
# nothing but a Python 3.11, 3.12 or 3.13 on PATH; the environment is made in .venv on first use.

# The first of these that is really there, of a supported version, and able to make environments.
PYTHON ?= $(shell for python in python3.12 python3.13 python3.11 python3 python; do \
	$$python -c 'import sys, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
	>/dev/null 2>&1 && echo $$python && break; done)
BIN := .venv/bin
TEST ?= tests

# mmdet wants older things than we do, so it has an environment of its own. One that has mmdet already is used as it is.
MMDET_VENV ?= .venv-mmdet
MMDET_TORCH ?= torch==2.13.0 torchvision==0.28.0
MMDET_BASE ?= $(shell for python in python3.11 python3.12; do \
	$$python -c 'import ensurepip' >/dev/null 2>&1 && echo $$python && break; done)

.DEFAULT_GOAL := help
.PHONY: help quickstart test test-exhaustive test-mmdet test-runtimes test-cluster lint format docs bench release-check clean

help:  ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */\1\t/' | expand -t 12

quickstart: .venv/.train  ## teacher, baseline, distilled student, ONNX file and report on generated data
	$(BIN)/compress quickstart

test: .venv/.dev  ## all tests (TEST=tests/test_docs.py for one file)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile $(TEST)

test-exhaustive: .venv/.dev  ## what `make test` leaves out: every GPU target, every pair of detector families, ...
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile -m exhaustive $(TEST)

test-mmdet: $(MMDET_VENV)/.mmdet  ## our GFL and mmdet teachers against mmdet itself (see docs/mmdet.md)
	$(MMDET_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[train]' 'pytest>=8.3'
	OMP_NUM_THREADS=1 $(MMDET_VENV)/bin/python -m pytest --disable-warnings tests/parity_mmdet

test-runtimes: .venv-runtimes/.runtimes  ## the quickstart's student in LiteRT, MNN, ncnn, OpenVINO, tract, TVM and a browser, with its mAP in each
	PATH="$(CURDIR)/.venv-onnx2tf/bin:$$PATH" OMP_NUM_THREADS=2 .venv-runtimes/bin/python -m pytest -s tests/runtimes

test-cluster: .venv/.dev  ## Ray clusters whose actors and nodes are killed, two hosts that train together
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/cluster -m "exhaustive or not exhaustive"

lint: .venv/.dev docs  ## ruff, mypy, and the documents as a site
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/.dev  ## let ruff fix and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: .venv/.dev  ## the documents as a site in build/site/index.html; a link or anchor that leads nowhere is an error
	$(BIN)/python docs/site.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

bench: .venv/.dev  ## speed against PyTorch and, with MMDET_PYTHON=/path/to/python, against mmdet
	@for suite in vs_mmdet data_path latency; do \
	$(BIN)/python -m benchmarks $$suite || failed="$$failed $$suite"; done; \
	test -z "$$failed" || { echo "error: failed:$$failed" >&2; exit 1; }

release-check: .venv/.dev  ## build the wheel and run its quickstart in an empty environment elsewhere (TAG=v0.1.0 before a release)
	.ci/release-check $(TAG)

clean:  ## remove the environments and caches, never runs/
	rm -rf .venv .venv-mmdet .venv-runtimes .venv-onnx2tf .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist *.egg-info

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

# onnx2tf fixes the versions of all that it needs, so it is apart.
.venv-runtimes/.runtimes: pyproject.toml
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11, 3.12 or 3.13 on PATH; make PYTHON=/path/to/python" >&2; exit 2; }
	test -x .venv-runtimes/bin/python || $(PYTHON) -m venv .venv-runtimes
	.venv-runtimes/bin/python -m pip install --quiet --disable-pip-version-check \
	--editable '.[train,serve,openvino,litert,mnn,ncnn,tract,tvm]' 'pytest>=8.3' 'hypothesis>=6.115' 'websockets>=13' coremltools
	test -x .venv-onnx2tf/bin/python || $(PYTHON) -m venv .venv-onnx2tf
	.venv-onnx2tf/bin/python -m pip install --quiet --disable-pip-version-check onnx2tf
	@touch $@

# mmcv's operators are compiled against the torch that is there: about eight minutes, and no wheel of another build.
$(MMDET_VENV)/.mmdet:
	@$(MMDET_VENV)/bin/python -c 'import mmcv.ops, mmdet' 2>/dev/null || { set -e; \
	test -n "$(MMDET_BASE)" || { echo "error: no Python 3.11 or 3.12 on PATH; make MMDET_BASE=/path/to/python" >&2; exit 2; }; \
	set -x; $(MMDET_BASE) -m venv $(MMDET_VENV); pip="$(MMDET_VENV)/bin/python -m pip install --quiet"; \
	$$pip 'setuptools<81' wheel ninja $(MMDET_TORCH); \
	MMCV_WITH_OPS=1 FORCE_CUDA=0 CUDA_VISIBLE_DEVICES= $$pip --no-build-isolation --no-cache-dir mmcv==2.1.0; \
	$$pip mmdet==3.3.0 mmengine==0.10.7; }
	@touch $@
