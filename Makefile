# One command each. `make` alone prints this list.
SHELL := /bin/bash
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup fmt lint types arch test test-serve test-rest test-fast test-slow test-ray sim scale bench bench-gpu bench-cpu-proxy demo parity train chaos check clean

help: ## print this list
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(STAMP): pyproject.toml constraints.txt
	@echo "installing into $(VENV), a few minutes the first time ..."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -qq --constraint constraints.txt --editable ".[dev]"
	@touch $@

setup: $(STAMP) ## create .venv and install everything, pinned, CPU only

fmt: $(STAMP) ## format and fix
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: $(STAMP) ## ruff, formatting and rules
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(STAMP) ## mypy, strict
	$(BIN)/mypy

arch: $(STAMP) ## the layer rules
	$(BIN)/lint-imports --no-cache

test: lint types arch ## everything CI runs: style, types, layers, tests, faults
	@$(MAKE) --no-print-directory -j 2 -k test-serve test-rest

test-serve: $(STAMP) ## the tests of the service, faults on real processes among them: mostly waiting
	$(BIN)/pytest -m "not bench and not gpu" tests/serve tests/chaos

test-rest: $(STAMP) ## all other tests: mostly computing
	$(BIN)/pytest -m "not bench and not gpu" --ignore tests/serve --ignore tests/chaos

test-fast: $(STAMP) ## the tests but the long ones, faults on real processes among them
	$(BIN)/pytest -m "not slow and not bench and not gpu"

test-slow: $(STAMP) ## the long tests: random faults, old age, restarts, the page in a browser
	$(BIN)/pytest -m "slow and not bench and not gpu"

test-ray: $(STAMP) ## only the tests on a real Ray cluster
	$(BIN)/pytest -m "ray and not bench"

SEED ?= 0
STEPS ?= 100000
JOBS ?= $(shell nproc)

sim: $(STAMP) ## the simulation: STEPS= seeds from SEED= on in JOBS= processes; STEPS=1 prints its log
	cd tests && ../$(BIN)/python -m sim --seed $(SEED) --steps $(STEPS) --jobs $(JOBS)

scale: $(STAMP) ## what 10,000 sessions cost the stores, and losing 5 % of 2,000 replicas (20 minutes)
	$(BIN)/python tests/bench/scale_costs.py
	cd tests && ../$(BIN)/python -m sim.scale

bench: $(STAMP) ## chunk time by stage, snapshot and restore, router overhead
	$(BIN)/pytest -m bench --benchmark-only --benchmark-columns=median,iqr,min,max,rounds --benchmark-sort=name

bench-gpu: $(STAMP) ## the engine on a GPU against the published loop, gate first (ARGS="--minutes 10")
	$(BIN)/echo-ray bench gpu $(ARGS)

bench-cpu-proxy: $(STAMP) ## the engine against the published loop at a small size, and its budgets (UPDATE=1)
	UPDATE=$(UPDATE) $(BIN)/pytest tests/benchmark/test_cpu_proxy.py

demo: $(STAMP) ## two live streams, a prompt switch, a kill -9, and the proof that nothing was lost
	$(BIN)/echo-ray demo

parity: $(STAMP) ## compare the engine with the numbers of the reference (DIR=folder)
	$(BIN)/echo-ray parity $(DIR)

train: $(STAMP) ## train echo-tiny from nothing, or on from where it was (CPU, hours)
	$(BIN)/echo-ray train --config codec pretrain fewstep streaming --out runs/echo-tiny --resume

chaos: $(STAMP) ## random faults against a real cluster, nothing lost (SEED= FAULTS= ENGINE=tiny OUT=folder)
	PYTHONPATH=tests $(BIN)/python -m chaos $(if $(SEED),--seed $(SEED)) $(if $(FAULTS),--faults $(FAULTS)) $(if $(ENGINE),--engine $(ENGINE)) $(if $(OUT),--out $(OUT))

check: test ## the same as test

clean: ## remove the environment and every cache
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache build *.egg-info
