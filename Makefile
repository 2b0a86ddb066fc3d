# Everything runs from .venv, which pyproject.toml alone defines.
PYTHON ?= python3
BIN := .venv/bin
# One process per core, four at most: some tests start a Ray cluster of their own.
PYTEST := $(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist loadgroup --no-loadscope-reorder

# Each process of the tests compiles what it imports otherwise: half of what collecting them takes.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup demo cluster-demo bench test test-long check format clean

setup: .venv/.done

# One pip command, so that torch and torchvision are resolved together.
.venv/.done: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade 'pip>=25'
	$(BIN)/pip install --quiet --editable '.[pipeline,export,deep,heic,medical,tables,search,wandb,tensorboard,dev,postgres]'
	touch $@

# The complete pipeline on the bundled sample: shards, pretraining, registry, fine-tuning, sweep, pictures.
demo: setup
	$(BIN)/mae demo

# Postgres, S3, MLflow and two Ray nodes on loopback: from a bucket to a champion and back, with servers killed meanwhile.
cluster-demo: setup
	$(BIN)/python infra/cluster_demo

# Training steps/s at the CPU targets: ViT-S/8 at 64 px with eight decoder blocks, and with one.
bench: setup
	$(BIN)/mae bench step
	$(BIN)/mae bench step --decoder-depth 1

# Every test that can run on this machine; each skipped test says what is missing.
test: setup
	$(PYTEST) --durations=30

# Tests of kills and restarts that take many minutes.
test-long: setup
	$(BIN)/python -m pytest -m long

# Files, lint, types, import contracts and fast tests.
check: setup
	$(BIN)/python infra/check_files.py
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright
	$(BIN)/lint-imports
	$(PYTEST) -q -m "not long and not slow and not ray and not s3 and not gpu and not browser"

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv mae-demo
