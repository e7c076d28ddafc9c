# Every target makes .venv by itself when there is none; all it needs is python3 (3.11 or newer), pip and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# torch comes first and pinned: pip then takes the build that this platform offers, and nothing pulls another one.
TORCH ?= torch==2.13.0
READY := $(VENV)/.ready
export HF_HUB_OFFLINE ?= 1
export NO_MKDOCS_2_WARNING := 1

.PHONY: demo test check bench docs format clean

demo: $(READY)
	$(BIN)/bandpo train demo

test: $(READY)
	$(BIN)/python -m pytest

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m mkdocs build --strict --quiet --site-dir $(VENV)/site

bench: $(READY)
	$(BIN)/python benchmarks/bench_core.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/bench_trl_step.py

docs: $(READY)
	$(BIN)/python -m mkdocs serve

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) runs site .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "bandpo needs Python 3.11 or newer; try: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	@touch $@
