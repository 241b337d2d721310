# Everything here sets itself up: a virtual environment, pinned requirements, the C++ extension. The second call is fast.

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
OUTER_PATH := $(PATH)
export PATH := $(CURDIR)/$(BIN):$(PATH)
OUT ?= runs/gpu
SOURCES := setup.py pyproject.toml $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.inl')
CPP := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.inl')

.PHONY: demo test test-compiled test-triton test-oldest sanitize wheel sdist compile-matrix gpu check lint format build \
	bench results pictures tables clean FORCE
.DEFAULT_GOAL := build
.NOTPARALLEL: # two measurements at once measure each other

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

KERNELS := tests/triton/test_triton.py tests/triton/test_ways.py tests/triton/test_int8_screen.py tests/triton/test_specialised.py \
	tests/triton/test_head_step.py
# The interpreter runs Triton's kernels on the CPU, and must be asked for before they are imported: a process of its own.
test: build
	$(BIN)/python -m pytest -n 2
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 2 -k triton $(KERNELS) tests/loss/test_compile.py \
		tests/loss/test_parity.py tests/loss/test_filter.py tests/loss/test_layouts.py tests/backends/test_exact.py
	SFACE_PTX=sm_90 $(COMPILED) $(KERNELS)

# A copy of the package with an extension that checks itself, for each instruction set of this CPU: no read or write out of
# bounds, no undefined behaviour, in a thousand random calls, in what only this backend does and in the optimizers' steps.
# Python's own flags would define signed overflow (-fwrapv). Offsets past 32 bits and trainings of 200 steps take too long here.
SANITIZE := build/sanitize
CHECKS := -fsanitize=address,undefined
ISAS := import torch, sface_kernels; print(*torch.ops.sface.native_instruction_sets())

sanitize: build
	rm -rf $(SANITIZE)
	mkdir -p $(SANITIZE)
	cp -r csrc sface_kernels benchmarks tests setup.py pyproject.toml README.md LICENSE $(SANITIZE)
	rm -f $(SANITIZE)/sface_kernels/*.so
	cd $(SANITIZE) && CFLAGS="-g -fno-wrapv -fno-omit-frame-pointer $(CHECKS) -fno-sanitize-recover=all" \
		LDFLAGS="$(CHECKS)" python setup.py build_ext --inplace
	for isa in $$(python -c "$(ISAS)" || echo none); do (cd $(SANITIZE) && \
		LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libstdc++.so)" \
		ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
		SFACE_CPU_ISA=$$isa SFACE_FUZZ=1000 python -m pytest -p no:cacheprovider \
		-k "not Past32Bits and not parity_with and not two_hundred and not chunked and not triton and not reference" \
		tests/backends/test_native.py tests/backends/test_native_rows.py tests/backends/test_native_far.py tests/backends/test_exact.py \
		tests/backends/test_native_memory.py tests/backends/test_native_fuzz.py \
		tests/optim/test_operators.py tests/optim/test_trajectory.py) || exit 1; \
	done

# The Triton kernels compiled for GPUs, executed on the CPU by an emulator of PTX; skipped where there is none
# (tests/triton/compiled.py). The last lines: without fusing products and sums, and with divisions off by an ulp.
COMPILED := $(BIN)/python -m pytest -n 2 -p tests.triton.compiled -k triton
CALLS := $(KERNELS) tests/triton/test_compiled_cases.py
test-compiled: build
	SFACE_PTX=sm_80 $(COMPILED) $(CALLS)
	SFACE_PTX=sm_90 $(COMPILED) $(CALLS) tests/loss/test_parity.py tests/loss/test_filter.py tests/loss/test_layouts.py
	SFACE_PTX=sm_90 SFACE_PTX_SPECIALISED=1 $(COMPILED) $(CALLS)
	SFACE_PTX=sm_120 $(COMPILED) $(CALLS)
	SFACE_PTX=sm_90 SFACE_PTX_FUSION=0 $(COMPILED) $(KERNELS)
	SFACE_PTX=sm_90 PTXEMU_NOISE=1 $(COMPILED) $(KERNELS)

# Another Triton beside the environment's own: that of torch 2.11, or with OTHER_TRITON=3.4.0 or 3.9.0 the oldest and the
# newest supported. Interpreters before 3.7 need the older numpy. 200 MB.
OTHER_TRITON := 3.6.0
OTHER := $(VENV)/triton-$(OTHER_TRITON)
$(OTHER)/installed: $(VENV)/requirements
	rm -rf $(OTHER)
	$(BIN)/python -m pip install --quiet --no-deps --target $(OTHER) "triton==$(OTHER_TRITON)" "numpy<2.4"
	touch $@

test-triton: build $(OTHER)/installed
	PYTHONPATH=$(CURDIR)/$(OTHER) $(BIN)/python -m pytest tests/triton/test_triton_compile.py tests/triton/test_launch.py \
		tests/triton/test_gpu_choice.py
	PYTHONPATH=$(CURDIR)/$(OTHER) TRITON_INTERPRET=1 $(BIN)/python -m pytest \
		$(KERNELS) tests/triton/test_triton_memory.py

# The oldest versions that pyproject.toml allows, of everything but torch (requirements-oldest.txt), and the oldest Triton.
OLDEST := $(VENV)/oldest
$(OLDEST)/built: $(VENV)/built requirements-oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet "$(TORCH)"
	$(OLDEST)/bin/python -m pip install --quiet -r requirements-oldest.txt
	touch $@

test-oldest: $(OLDEST)/built
	PYTHONPATH=$(CURDIR) $(OLDEST)/bin/python -m pytest tests/tools tests/examples tests/compat tests/loss/test_torch_features.py
	$(MAKE) test-triton OTHER_TRITON=3.4.0

# dist/: one wheel for every Python and every PyTorch from 2.11 on, and the sources that it is built from. On Linux its tag
# says which C library it needs; PyTorch's libraries stay out of it.
wheel: build
	rm -rf build/wheel
	$(BIN)/python -m build --wheel --no-isolation --outdir build/wheel
	mkdir -p dist
	if [ "$$(uname)" = Linux ]; then $(BIN)/auditwheel repair build/wheel/*.whl --wheel-dir dist \
		--exclude 'libtorch*' --exclude 'libc10*' --exclude 'libgomp*'; else cp build/wheel/*.whl dist; fi

sdist: build
	$(BIN)/python -m build --sdist --no-isolation --outdir dist

# docs/compile-tables.md. Needs no GPU; some minutes. SFACE_COMPILE_EVERY=1 makes the tests take every case.
compile-matrix: build
	$(BIN)/python -m sface_kernels.backends.triton.tools.compile_report --targets sm_80,sm_89,sm_90,sm_100,sm_120,gfx942 --jobs 2 \
		--write docs/compile-tables.md

# On a machine with a GPU: uses the interpreter PYTHON as it is, installs nothing, ends inside ten minutes.
gpu:
	PATH="$(OUTER_PATH)" OUT="$(OUT)" $(PYTHON) -m benchmarks.gpu

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

# Microbenchmarks, within three minutes on two cores. BENCH=--benchmark-autosave keeps them, BENCH=--benchmark-compare
# compares with the last that were kept.
bench: build
	$(BIN)/python -m pytest benchmarks/micro -q --benchmark-group-by=group --benchmark-sort=name \
		--benchmark-columns=median,iqr,min,max,rounds $(BENCH)

# The results of bench and benchmarks.accuracy, their pictures and the tables, on a quiet machine. DEVICE=cuda measures
# a GPU. A single file is made again by its name, as in `make benchmarks/results/cpu-random.json pictures tables`.
DEVICE := cpu
RESULTS := benchmarks/results/$(DEVICE)
PLOT = $(BIN)/python -m sface_kernels plot --out $(dir $(RESULTS)) --prefix $(DEVICE)- --formats png
ifeq ($(DEVICE),cpu)
SHAPE := ms1mv2
OURS := native
CASES := random trained dense casia all thp thp-bf16 modes steps classes samples density
else
SHAPE := --n 1024 --c 1000000 --dtype bfloat16
OURS := triton
CASES := random trained dense casia all modes classes samples density
endif
random := $(SHAPE)
trained := $(SHAPE) --geometry trained
dense := $(SHAPE) --geometry dense
casia := casia --n 512
all := $(SHAPE) --providers all
thp := $(SHAPE) --thp
thp-bf16 := $(SHAPE) --thp --bf16-opponents
modes := $(SHAPE) --mode all --no-memory
steps := $(SHAPE) --mode step --providers steps --no-memory
classes := --c 1000,10575,85742,360232
samples := ms1mv2 --n 16,64,256,1024
density := ms1mv2 --geometry dense --density 1e-6,1e-5,1e-4,3e-4,1e-3,3e-3,1e-2,3e-2,0.1,0.3,1 --repeats 9 --no-memory \
	--providers $(OURS)@2^-16,$(OURS)@0,reference

results: $(CASES:%=$(RESULTS)-%.json) $(RESULTS)-accuracy.json $(RESULTS)-accuracy-dense.json
	$(MAKE) pictures tables

$(RESULTS)-accuracy.json: build FORCE
	$(BIN)/python -m benchmarks.accuracy --device $(DEVICE) --out $@

$(RESULTS)-accuracy-dense.json: build FORCE
	$(BIN)/python -m benchmarks.accuracy --device $(DEVICE) --c 85742 --d 512 --geometries dense --out $@

$(RESULTS)-%.json: build FORCE
	$(BIN)/python -m sface_kernels bench $($*) --device $(DEVICE) --budget-seconds 30 --out $@

pictures: build
	$(PLOT) $(RESULTS)-random.json $(RESULTS)-trained.json $(RESULTS)-dense.json $(RESULTS)-casia.json --only ratio
	$(PLOT) $(RESULTS)-classes.json --only time_vs_classes,memory_vs_classes
	$(PLOT) $(RESULTS)-samples.json --only time_vs_samples,memory_vs_samples
	$(PLOT) $(RESULTS)-density.json
	$(PLOT) $(RESULTS)-accuracy.json --only error_vs_filter

tables: build
	$(BIN)/python -m benchmarks.tables README.md docs/performance.md docs/accuracy.md docs/training.md docs/distributed.md docs/kernels.md

FORCE:

clean:
	rm -rf $(VENV) build runs sface_kernels/*.so *.egg-info
