# Every target does its own set-up: `make demo` and `make test` work on a fresh clone.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help setup demo peer-vllm test test-fast check format clean
help: ## List the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(STAMP) ## Make .venv with everything pinned in constraints.txt
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: setup ## The main job: basic, dualpath and oracle side by side on real clusters
	$(BIN)/dualpath demo

peer-vllm: setup ## Replay against vLLM on the CPU, in an environment of its own (2 GB, not part of setup)
	$(BIN)/python benchmarks/peers/vllm.py

check: setup ## Lint, format, types, import contracts
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/mypy
	$(BIN)/lint-imports

test: check ## All checks and all tests
	$(BIN)/python -m pytest --cov --cov-report=term-missing:skip-covered --cov-fail-under=100

test-fast: setup ## The tests that take seconds
	$(BIN)/python -m pytest -m 'not slow'

format: setup ## Rewrite the code in the house format
	$(BIN)/ruff format src tests benchmarks
	$(BIN)/ruff check --fix src tests benchmarks

clean: ## Remove what the targets made
	rm -rf $(VENV) results .models .store .peers .pytest_cache .mypy_cache .ruff_cache
