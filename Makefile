# `make demo` and `make test` are all that a fresh machine with Python 3.11 needs; `make help` lists the rest.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Test processes at once. Each gets one torch thread: the models are tiny, and two pools on one core only wait.
WORKERS ?= 2
PYTEST_ARGS ?=
DEMO_ARGS ?=

comma := ,
HAS_GPU := $(shell nvidia-smi -L >/dev/null 2>&1 && echo yes)
# With no GPU a fixed torch comes first: a CPU build satisfies it where pip is given one, and later installs keep it.
TORCH := $(if $(HAS_GPU),torch>=2.11$(comma)<2.14,torch==2.13.0)
HAS_BROWSER := $(shell command -v chromium)
MARKS := -m "not load$(if $(HAS_GPU),, and not gpu)$(if $(HAS_BROWSER),, and not browser)"

# Whole files to one process, in the order of `tests/conftest.py`: the longest first.
BY_FILE := --dist loadfile --no-loadscope-reorder
PYTEST = OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q

.PHONY: help venv lint format test test-slow test-load test-verl test-clients faults gpu gpu-faults demo clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

venv: $(STAMP) ## make .venv with what tests and demo need (nothing to do the second time)

demo: $(STAMP) ## train a small model with GRPO, pushing weights into a running engine (DEMO_ARGS="--mode async")
	$(BIN)/rollout demo $(DEMO_ARGS)

test: lint ## lint, then every test that this machine can run, but for minutes of load
	@$(if $(HAS_BROWSER),:,echo "no chromium here: the tests marked browser are left out")
	$(PYTEST) -n $(WORKERS) $(BY_FILE) $(MARKS) $(PYTEST_ARGS)

test-slow: $(STAMP) ## only the tests marked slow, which `make test` runs too
	$(PYTEST) -m slow $(PYTEST_ARGS)

test-load: $(STAMP) ## minutes of load on a server whose weights change
	$(PYTEST) -m load $(PYTEST_ARGS)

# verl pins an older transformers than the rest is developed with.
VERL_VENV ?= .venv-verl

test-verl: $(VERL_VENV)/.installed ## verl's own managers, clients and trainer on this engine, in $(VERL_VENV)
	$(subst $(BIN)/,$(VERL_VENV)/bin/,$(PYTEST)) tests/trainers/verl $(PYTEST_ARGS)

$(VERL_VENV)/.installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m venv $(VERL_VENV)
	$(VERL_VENV)/bin/python -m pip install -q "$(TORCH)"
	$(VERL_VENV)/bin/python -m pip install -q -e ".[test,ray,verl]"
	@touch $@

# Their metadata asks for other versions of torch and transformers than the engine's. deepspeed compiles its collectives of
# a CPU, here before any test does; where it is installed, accelerate and peft import it always.
CLIENTS_VENV ?= .venv-clients

test-clients: $(CLIENTS_VENV)/.installed ## clients of AReaL, SkyRL and others against a server, TRL with ZeRO-3, in $(CLIENTS_VENV)
	$(subst $(BIN)/,$(CLIENTS_VENV)/bin/,$(PYTEST)) tests/trainers/clients $(PYTEST_ARGS)

$(CLIENTS_VENV)/.installed: pyproject.toml tests/trainers/clients/requirements.txt | $(BIN)/python
	$(BIN)/python -m venv $(CLIENTS_VENV)
	$(CLIENTS_VENV)/bin/python -m pip install -q "$(TORCH)"
	$(CLIENTS_VENV)/bin/python -m pip install -q -e ".[test,ray,server,trl]" aiohttp
	$(CLIENTS_VENV)/bin/python -m pip install -q --no-deps --ignore-requires-python -r tests/trainers/clients/requirements.txt
	DS_ACCELERATOR=cpu DS_BUILD_SHM_COMM=1 $(CLIENTS_VENV)/bin/python -m pip install -q --no-deps --no-build-isolation deepspeed==0.19.8
	@touch $@

FAULTS := $(addprefix tests/faults/test_,ray_deaths.py engine_*deaths.py pool_deaths.py engine_lies.py)

faults: $(STAMP) ## kill and lie in every phase of an update, and write docs/faults.md from what happened
	rows=$$(mktemp -d); trap 'rm -rf "$$rows"' EXIT; \
	FAULT_ROWS=$$rows $(PYTEST) -n $(WORKERS) $(BY_FILE) $(FAULTS); \
	$(BIN)/python docs/write_faults.py $$rows

GPU_ARGS ?=

gpu: $(STAMP) ## all that needs GPUs: tests, faults, then benchmarks, into runs/gpu (GPU_ARGS="--total-s 560")
	$(BIN)/python tests/gpu_checks.py --out runs/gpu $(GPU_ARGS)

gpu-faults: $(STAMP) ## the same on a GPU, for updates whose bytes are there, and write docs/faults_gpu.md
	$(BIN)/python tests/faults/gpu_faults.py

lint: $(STAMP) ## ruff check, ruff format --check, mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP) ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove caches and build folders, not .venv and not runs/
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(BIN)/python:
	@python=""; \
	for name in $${PYTHON:-python3 python3.13 python3.12 python3.11}; do \
	  if $$name -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then python=$$name; break; fi; \
	done; \
	if [ -z "$$python" ]; then \
	  echo "no Python >= 3.11 found (tried: $${PYTHON:-python3 python3.13 python3.12 python3.11});" \
	    "install one, or name it: make venv PYTHON=/path/to/python3.11" >&2; exit 1; \
	fi; \
	echo "$$python -m venv $(VENV)"; $$python -m venv $(VENV)

$(STAMP): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -q "$(TORCH)"
	$(BIN)/python -m pip install -q -e ".[test,demo,ray,server,trl,lm-eval]"
	@touch $@
