# Everything here sets itself up: a virtual environment, pinned requirements, the C++ extension. The second call is fast.

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
SOURCES := setup.py pyproject.toml $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.inl')
CPP := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.inl')

.PHONY: demo test check lint format build bench accuracy density clean
.DEFAULT_GOAL := build

build: $(VENV)/built

# torch first and by itself: whatever depends on it must find it, not fetch another build of it
$(VENV)/requirements: requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=23"
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	touch $@

$(VENV)/built: $(VENV)/requirements $(SOURCES)
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --editable .
	touch $@

demo: build
	$(BIN)/python examples/train_faces.py --head both --out runs/demo

test: build
	$(BIN)/python -m pytest

lint: build
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP)
	$(BIN)/mypy

format: build
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

check: lint test

# The benchmarks want a quiet machine; each writes a file under benchmarks/results/.
bench: build
	$(BIN)/python -m benchmarks.bench_loss --suite --out benchmarks/results/cpu_loss.json

density: build
	$(BIN)/python -m benchmarks.density --out benchmarks/results/cpu_density.json

accuracy: build
	$(BIN)/python -m benchmarks.accuracy --out benchmarks/results/cpu_accuracy.json

clean:
	rm -rf $(VENV) build runs sface_kernels/*.so *.egg-info
