# Every target sets itself up; a first run downloads torch and takes minutes, later runs start at once.
#
#   make demo    train a small network that compresses itself; results in out/demo
#   make test    lint, types, package check, tests: everything that CI runs
#   make lint    the first two of those
#   make device  the tests on a device that is not the CPU, pretended where there is none
#   make fuzz    the property tests on far more examples, seeded at random
#   make bench   the benchmarks; results in out/bench
#   make clean   remove all that the others made
#
# Another interpreter: make test PYTHON=python3.12

PYTHON ?= python3
VENV   ?= .venv

BIN    := $(VENV)/bin
# One thread for each worker: torch's own threads on top of them would compete for the same cores.
PYTEST := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal

.PHONY: help demo test lint device fuzz bench clean
.DELETE_ON_ERROR:

help:
	@sed -n 's/^#   //p' Makefile

demo: $(VENV)/.demo
	$(BIN)/fxcompress demo --out out/demo

# pytest last, so that the output ends with its summary.
test: lint
	$(BIN)/python tests/package_check.py
	$(PYTEST)

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

device: $(VENV)/.test
	$(PYTEST) -p tests.pretend_device

fuzz: $(VENV)/.test
	FXCOMPRESS_FUZZ=1 $(PYTEST) -m hypothesis

bench: $(VENV)/.bench
	$(BIN)/python -m benchmarks --out out/bench

clean:
	rm -rf $(VENV) build dist out *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find fxcompress tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# Stamps: an environment is installed once, and again when pyproject.toml changes.
$(VENV)/.bench $(VENV)/.demo $(VENV)/.test: $(VENV)/.%: pyproject.toml | $(VENV)/.created
	@echo "installing fxcompress[$*] into $(VENV); the first time, this downloads torch"
	@$(BIN)/python -m pip install --quiet --editable ".[$*]"
	@touch $@

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
	    echo "fxcompress needs Python 3.10 or later; '$(PYTHON)' is $$($(PYTHON) --version 2>/dev/null || echo missing)." >&2; \
	    echo "Name another one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@
