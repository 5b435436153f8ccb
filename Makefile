# Two commands on a machine that has Python 3.11 or newer: make train, make test.
# BACKEND=jax|mlx chooses; the default is mlx on Apple silicon, else jax.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BACKEND ?= $(if $(filter Darwin-arm64,$(shell uname -s)-$(shell uname -m)),mlx,jax)
FABLES := runs/fables-$(BACKEND)

# Where it is set, each process that a test starts compiles Python anew: to import JAX's backend takes 4 s in place of 1.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: train fast test test-all torture parity check dist docs links setup clean

train: setup
	$(BIN)/moezoo train configs/fables.yaml --backend $(BACKEND) --out $(FABLES) $(if $(wildcard $(FABLES)/config.yaml),--resume)
	$(BIN)/moezoo generate $(FABLES) --backend $(BACKEND) --prompt "At noon, " --max-new-tokens 400

# After every edit, in two minutes: what neither compiles on JAX nor starts whole runs.
fast: setup
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not release and not slow" -k "not jax"

# What every change must pass.
test: setup
	$(BIN)/python -m pytest -n 2 --dist worksteal

# What a release must pass: also every tiny config on JAX and the other sweeps that are marked `release`.
test-all: setup
	$(BIN)/python -m pytest -n 2 --dist worksteal -m ""

# Kills, flipped bits, mutated files, full disks, closed terminals, two processes, for HOURS; a second call goes on.
torture: setup
	$(BIN)/python -m tests.torture --hours $(or $(HOURS),2)

# With the compiler's optimizations, as users have it and the tests do not.
parity: setup
	$(BIN)/moezoo parity configs/tiny/top_k.yaml
	$(BIN)/moezoo parity configs/tiny/latent_attention.yaml
	$(BIN)/moezoo parity configs/tiny/bfloat16.yaml

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Source distribution and wheel in dist/, with their metadata and README checked as PyPI does.
dist: setup
	$(BIN)/python -m pip install --quiet --constraint constraints.txt build twine || uv pip install --quiet --python $(BIN)/python --constraint constraints.txt build twine
	rm -rf dist build
	$(BIN)/python -m build --no-isolation
	$(BIN)/python -m twine check --strict dist/*

# The site in build/site; a link that leads nowhere is an error. To read it: python -m http.server -d build/site
docs: setup
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]' || uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

# Numbers of the links to lines of code, in the writings.
links: setup
	$(BIN)/python tests/contracts/line_links.py

setup: $(VENV)/installed

# uv where it is on the PATH, else venv and pip; the same pinned versions either way. The pip that came with Python may
# take twice as long as the pinned one. Python compiles what it imports when it imports it: to do so for everything that
# is installed takes as long as the rest.
$(VENV)/installed: pyproject.toml constraints.txt
	@if command -v uv >/dev/null 2>&1; then \
		uv venv --quiet --allow-existing --python $(PYTHON) $(VENV) && \
		uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable '.[dev]'; \
	else \
		$(PYTHON) -m venv $(VENV) && \
		$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check --constraint constraints.txt --upgrade pip && \
		$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'; \
	fi
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .mypy_cache
