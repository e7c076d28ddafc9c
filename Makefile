# Every target makes .venv by itself when there is none; all it needs is python3 (3.11 or newer), pip and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# torch comes first and pinned: pip then takes the build that this platform offers, and nothing pulls another one.
TORCH ?= torch==2.13.0
READY := $(VENV)/.ready
# verl needs an older transformers than TRL, so it has an environment of its own, with exact versions.
VERL_VENV := .venv-verl
VERL_READY := $(VERL_VENV)/.ready
VERL ?= verl==0.9.1 TransferQueue==0.1.11 tensordict==0.10.0 ray==2.60.0 transformers==5.10.4
export HF_HUB_OFFLINE ?= 1
export NO_MKDOCS_2_WARNING := 1

.PHONY: demo test test-verl check bench bench-verl docs format clean

demo: $(READY)
	$(BIN)/bandpo train demo

test: $(READY)
	$(BIN)/python -m pytest

# Trains with verl on a local Ray, 2 workers, no GPU.
test-verl: $(VERL_READY)
	OMP_NUM_THREADS=1 $(VERL_VENV)/bin/python -m pytest tests/verl

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m mkdocs build --strict --quiet --site-dir $(VENV)/site

bench: $(READY)
	$(BIN)/python benchmarks/bench_core.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/bench_trl_step.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/bench_torchrl_step.py

bench-verl: $(VERL_READY)
	OMP_NUM_THREADS=1 $(VERL_VENV)/bin/python benchmarks/bench_verl_step.py

docs: $(READY)
	$(BIN)/python -m mkdocs serve

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(VERL_VENV) runs site .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "bandpo needs Python 3.11 or newer; try: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	@touch $@

$(VERL_READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' || \
	  { echo "verl needs Python 3.11 or 3.12; try: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VERL_VENV)
	$(VERL_VENV)/bin/python -m pip install --quiet --upgrade pip
	$(VERL_VENV)/bin/python -m pip install --quiet "$(TORCH)"
	$(VERL_VENV)/bin/python -m pip install --quiet "$(TORCH)" $(VERL) "pytest>=8.3" -e ".[verl]"
	$(VERL_VENV)/bin/python -m pip check
	@touch $@
