# Everything here sets itself up: a virtual environment, pinned requirements, the C++ extension. The second call is fast.

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
OUTER_PATH := $(PATH)
export PATH := $(CURDIR)/$(BIN):$(PATH)
OUT ?= runs/gpu
TRITON36 := $(VENV)/triton36
SOURCES := setup.py pyproject.toml $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.inl')
CPP := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.inl')

.PHONY: demo test test-triton36 compile-matrix gpu check lint format build bench accuracy density clean
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

# The Triton that torch 2.11 comes with, beside the environment's own; its interpreter needs the older numpy. 200 MB.
$(TRITON36)/installed: $(VENV)/requirements
	rm -rf $(TRITON36)
	$(BIN)/python -m pip install --quiet --no-deps --target $(TRITON36) "triton==3.6.0" "numpy<2.4"
	touch $@

test-triton36: build $(TRITON36)/installed
	PYTHONPATH=$(CURDIR)/$(TRITON36) $(BIN)/python -m pytest tests/test_triton_compile.py
	PYTHONPATH=$(CURDIR)/$(TRITON36) TRITON_INTERPRET=1 $(BIN)/python -m pytest \
		$(filter-out tests/test_triton_compile.py tests/test_triton_gpu.py,$(wildcard tests/test_triton*.py))

# The compile tables of docs/kernels.md. Needs no GPU; some minutes. SFACE_COMPILE_EVERY=1 make test checks more cases.
compile-matrix: build
	$(BIN)/python -m sface_kernels.backends.triton.targets --targets sm_80,sm_90,sm_100,sm_120,gfx942 --jobs 2 \
		--write docs/kernels.md

# On a machine with a GPU: uses the interpreter PYTHON as it is, installs nothing, ends inside ten minutes.
gpu:
	PATH="$(OUTER_PATH)" $(PYTHON) -m benchmarks.gpu --out "$(OUT)"

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
