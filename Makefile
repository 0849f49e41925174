SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

PY := .venv/bin/python
MODEL := runs/models/demo
REAL_MODEL := runs/models/smollm2
SCRIPTS := $(wildcard deploy/*.sh deploy/*/*.sh)
ARGS ?=

export TARGET PYTHON

.PHONY: help setup demo demo-model serve test test-unit real-model test-real bench chaos lint format typecheck lock docs clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{ printf "  make %-11s %s\n", $$1, $$2 }'
	@echo "  ARGS=\"...\" is handed to demo, demo-model, serve, test, test-unit, test-real, bench and chaos."

setup: ## Make or complete .venv (TARGET=cpu|gpu, PYTHON=python3.12; no-op if up to date)
	@bash deploy/setup.sh

demo: setup ## Train a tiny model with E3RL on the CPU and evaluate it
	@$(PY) -m learner.train --config deploy/configs/demo.yaml $(ARGS)

demo-model: setup ## Write the demo's warm-started model to runs/models/demo
	@$(PY) -m learner.warm_start --output $(MODEL) $(ARGS)

$(MODEL)/config.json: | setup
	@$(PY) -m learner.warm_start --output $(MODEL)

serve: setup $(MODEL)/config.json ## Serve the demo's model over HTTP (makes it first if needed)
	@$(PY) -m rollout_server --model $(MODEL) $(ARGS)

test: setup lint typecheck ## Everything: lint, types, unit and integration tests
	@$(PY) -m pytest --durations=15 $(ARGS)

test-unit: setup ## The fast tests only (no vLLM)
	@$(PY) -m pytest tests/unit $(ARGS)

real-model: setup ## Fetch SmolLM2-135M-Instruct and write it to runs/models/smollm2
	@$(PY) deploy/real_model.py --output $(REAL_MODEL)

test-real: real-model ## The tests that need a pretrained model (not part of make test)
	@$(PY) -m pytest tests/real --durations=15 $(ARGS)

bench: setup ## Measure the performance targets; the table is also in runs/bench/latest.json
	@$(PY) -m tests.benchmarks.run $(ARGS)

chaos: setup ## One training run under 50 faults of nine kinds on a local cluster (up to 40 minutes)
	@$(PY) -m tests.chaos.run $(ARGS)

lint: setup ## ruff (rules, formatting), shellcheck (scripts), hadolint (deploy/Dockerfile)
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@.venv/bin/shellcheck .ci/run $(SCRIPTS)
	@.venv/bin/hadolint deploy/Dockerfile

format: setup ## Apply ruff's formatting and safe fixes
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

typecheck: setup ## mypy in strict mode
	@$(PY) -m mypy

lock: setup ## Resolve deploy/locks/*.txt anew from pyproject.toml (UPGRADE=1: newest versions)
	@$(PY) deploy/lock.py $(if $(UPGRADE),--upgrade)

docs: ## Write the list of modules in docs/architecture.md anew
	@python3 deploy/module_list.py

clean: ## Remove caches and build leftovers; runs/ and .venv are never touched
	@rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist *.egg-info
	@find . \( -path ./runs -o -path ./.venv -o -path ./.git \) -prune -o -name __pycache__ -type d -exec rm -rf {} +
	@echo "Caches removed. runs/ and .venv are left as they are."
