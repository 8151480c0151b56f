# Each target makes its own virtual environment where there is none, installs, and does its job.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin

.PHONY: demo test lint bench

demo: $(VENV)/.installed
	$(BIN)/python examples/demo.py

test: $(VENV)/.installed
	$(BIN)/python -m pytest

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.installed
	$(BIN)/python benchmarks/merge.py
	$(BIN)/python benchmarks/tensor_methods.py
	$(BIN)/python benchmarks/caem.py
	$(BIN)/python benchmarks/routed_lora.py
	$(BIN)/python benchmarks/routed_lora_model.py
	$(BIN)/python benchmarks/sequence_moe.py
	$(BIN)/python benchmarks/wemoe.py

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test,plots,bench]'
	touch $@
