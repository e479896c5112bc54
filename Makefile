# Everything a newcomer needs: make demo, make test.
PYTHON ?= python3
# Another package index for torch only, e.g. PyTorch's public CPU builds:
#   make TORCH_INDEX=https://download.pytorch.org/whl/cpu demo
TORCH_INDEX ?=
NODES ?= 20
# Processes that run tests.
JOBS ?= 2
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help demo deploy-demo test drills compare bench check format clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F':[^#]*## ' '{printf "%-12s%s\n", $$1, $$2}'

.venv/installed: pyproject.toml
	@echo "installing into .venv (once; PyTorch and Ray are large, this takes minutes)"
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' || \
		{ echo "error: $(PYTHON) is not 3.11 to 3.14; use make PYTHON=python3.11"; exit 1; }
	@$(PYTHON) -m venv .venv
	@if [ -n "$(TORCH_INDEX)" ]; then \
		$(BIN)/pip install --progress-bar off --index-url "$(TORCH_INDEX)" 'torch>=2.6,<2.14'; fi
	@# What builds packages lies in .venv too: a second installation needs no network.
	@$(BIN)/pip install --progress-bar off 'hatchling>=1.25' 'editables>=0.5'
	@$(BIN)/pip install --progress-bar off --no-build-isolation --editable '.[offline,dev]'
	@touch $@
	@echo "installed"

demo: .venv/installed ## install, then run the embedded example end to end
	@$(BIN)/fedpft-run conf/demo.toml --nodes $(NODES) $(SET)

test: .venv/installed ## tests, offline, on JOBS cores, but slow ones (make drills) and those for a GPU
	@$(BIN)/python -m pytest -n $(JOBS) --dist worksteal

deploy-demo: .venv/installed ## a deployment of real processes on this machine: TLS, keys, three sites
	@$(BIN)/python -m deploy.demo $(SET)

drills: .venv/installed ## what a deployment meets: kills, cut networks, full disks, with real processes; an hour
	@$(BIN)/python -m pytest -v -m 'slow or not slow' tests/test_drills.py tests/test_deploy.py

compare: .venv/installed ## every method on the embedded task, 3 seeds: table and plots
	@$(BIN)/fedpft-compare conf/compare/quick.toml $(SET)

bench: .venv/installed ## rounds, a client's step and the server's work against bare loops; idle cores, 10 minutes
	@$(BIN)/python -m benchmarks.overhead --rounds 3 --repeats 2 --nodes $(NODES) \
		align.steps=5 data.max-test-rows=50 $(SET)
	@$(BIN)/python -m benchmarks.step --lengths 64 --repeats 5
	@$(BIN)/python -m benchmarks.throughput --layers 6 --hidden 384 --rows 16 --length 64 \
		--batches 5 --repeats 3

check: .venv/installed ## lint, format check, types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: .venv/installed ## format and fix what can be fixed
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean: ## remove the virtual environment and caches
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache
