# Every command of the project. None asks a question; the first one that needs it makes .venv.
VENV ?= .venv
PY := $(VENV)/bin/python
NOTEBOOK ?= notebooks/01_first_light.ipynb
LAB_ARGS ?=
TEST_ARGS ?=
GPU_ARGS ?=
NBVAL := --nbval --nbval-current-env --nbval-cell-timeout=120 --nbval-sanitize-with=tests/notebooks/sanitize.cfg

MAKEFLAGS += --no-print-directory
export PIP_DISABLE_PIP_VERSION_CHECK = 1
export PIP_ROOT_USER_ACTION = ignore
PIP_INSTALL := $(PY) -m pip install -qq --progress-bar off -c constraints.txt

.PHONY: help lab test test-long parity fuzz truth bench bench-20b gpu lint notebooks wheel

help:
	@echo "make lab        open JupyterLab on $(NOTEBOOK)   (LAB_ARGS=... is passed on)"
	@echo "make test       everything: unit, notebook and browser tests   (TEST_ARGS=... is passed to pytest)"
	@echo "make test-long  sessions of edits, interrupts and failures, 500 of 30 steps (a quarter of an hour)"
	@echo "make parity     compare every site and layer with transformers, and write the table"
	@echo "make fuzz       load 10,000 damaged checkpoints, and count what becomes of them"
	@echo "make truth      ask every method about models whose circuits are known, and about models with none"
	@echo "make bench      every benchmark, beside peers that it installs or builds (half an hour, 15 GB of disk)"
	@echo "make bench-20b  those of gpt-oss-20b's shape alone"
	@echo "make gpu        tests, timings and memory on the NVIDIA GPU here, at the full shapes   (GPU_ARGS=... is passed on)"
	@echo "make lint       ruff and pyright"
	@echo "make notebooks  run the notebooks anew and clean them"
	@echo "make wheel      build dist/*.whl"

# An interpreter may be on PATH and still not run (pyenv shims), so each is tried.
$(PY):
	@for candidate in $(PYTHON) python3 python3.14 python3.13 python3.12 python3.11; do \
		if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
			echo "Making $(VENV) with $$("$$candidate" --version)"; \
			"$$candidate" -m venv $(VENV) && exit 0; \
			rm -rf $(VENV); \
			echo "The venv module of $$candidate does not work (on Debian and Ubuntu: apt install python3-venv)." >&2; \
			exit 1; \
		fi; \
	done; \
	echo "No Python 3.11 or newer found on PATH. Install one, or name one: make $(MAKECMDGOALS) PYTHON=/path/to/python" >&2; \
	exit 1

# JupyterLab asks every new user about news; in our own environment the answer is no.
$(VENV)/.lab: pyproject.toml constraints.txt | $(PY)
	@echo "Installing what the lab needs (a few minutes the first time)"
	@$(PIP_INSTALL) -e '.[lab]'
	@mkdir -p $(VENV)/share/jupyter/lab/settings
	@echo '{"@jupyterlab/apputils-extension:notification": {"fetchNews": "false"}}' \
		> $(VENV)/share/jupyter/lab/settings/overrides.json
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(PY)
	@echo "Installing what the tests need (a few minutes the first time)"
	@$(PIP_INSTALL) -e '.[dev]'
	@touch $@

lab: $(VENV)/.lab
	@root=; [ "$$(id -u)" != 0 ] || root=--allow-root; \
	exec $(PY) -m jupyterlab $$root --LabApp.default_url=/lab/tree/$(notdir $(NOTEBOOK)) $(LAB_ARGS) $(NOTEBOOK)

# Waiting OpenMP threads spin by default and starve the kernels and browsers that tests start.
test: export OMP_WAIT_POLICY = PASSIVE
test: $(VENV)/.dev
	@$(PY) -m pytest tests $(wildcard notebooks) $(NBVAL) --ignore=tests/benchmarks $(TEST_ARGS)

test-long: export OMP_WAIT_POLICY = PASSIVE
test-long: export GPTOSS_TEST_LONG = 1
test-long: $(VENV)/.dev
	@$(PY) -m pytest tests/hooks/test_states.py $(TEST_ARGS)

parity: export OMP_WAIT_POLICY = PASSIVE
parity: $(VENV)/.dev
	@$(PY) -m tests.parity.report

fuzz: $(VENV)/.dev
	@$(PY) -m tests.fuzz.run

truth: export OMP_WAIT_POLICY = PASSIVE
truth: $(VENV)/.dev
	@$(PY) -m tests.truth.report

# llama.cpp, built from the source of its Python package for this processor, in an environment of its own. Where it can't
# be built the benchmarks go on without it.
$(VENV)/.llama: | $(PY)
	@echo "Building llama.cpp to measure beside it (a quarter of an hour)"
	@$(PY) -m venv $(VENV)/llama && CMAKE_ARGS=-DGGML_NATIVE=ON $(VENV)/llama/bin/python -m pip install -qq --progress-bar off \
		--no-binary llama-cpp-python llama-cpp-python==0.3.36 gguf==0.19.0 && touch $@ \
		|| echo "llama.cpp could not be built; measuring without it" >&2

# The other peers are Python packages that live with the versions of constraints.txt.
$(VENV)/.peers: | $(VENV)/.dev
	@echo "Installing TransformerLens and nnsight to measure beside them"
	@$(PIP_INSTALL) transformer-lens==4.3.0 nnsight==0.8.1 && touch $@ \
		|| echo "TransformerLens and nnsight could not be installed; measuring without them" >&2

bench bench-20b: export OMP_WAIT_POLICY = PASSIVE
bench: WHICH = tests/benchmarks
bench: $(VENV)/.peers
bench-20b: WHICH = tests/benchmarks/bench_full_shape.py tests/benchmarks/bench_20b.py
bench bench-20b: $(VENV)/.dev $(VENV)/.llama
	@[ ! -e $(VENV)/.llama ] || export GPTOSS_BENCH_LLAMA=$(VENV)/llama/bin/python; \
	$(PY) -m pytest $(WHICH) -s $(TEST_ARGS)

gpu: $(VENV)/.dev
	@$(PY) -m tests.gpu.run $(GPU_ARGS)

lint: $(VENV)/.dev
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/pyright --pythonpath $(PY)

notebooks: $(VENV)/.dev
	@$(PY) tests/notebooks/execute.py notebooks

wheel: $(VENV)/.dev
	@$(PY) -m hatchling build -t wheel
