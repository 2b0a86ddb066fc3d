# Everything runs from .venv, which pyproject.toml alone defines.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo test check bench format clean

setup: .venv/.done

# One pip command, so that torch and torchvision are resolved together.
.venv/.done: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade 'pip>=25'
	$(BIN)/pip install --quiet --editable '.[dev,postgres]'
	touch $@
