# Each target makes its virtual environment where there is none, installs, and does its job.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
NEWEST := .venv-newest/bin
OLDEST := .venv-oldest/bin
TRANSFORMERS_4 := .venv-transformers4/bin
# A plain `torch` may resolve to a build with gigabytes of CUDA packages; this one is for CPUs.
TORCH ?= torch==2.13.0
OLDEST_TORCH ?= torch==2.7.0
# Named after its torch, so that another torch is installed anew.
OLDEST_INSTALLED := .venv-oldest/.installed-$(subst ==,-,$(OLDEST_TORCH))

.PHONY: claims demo test slow hosts newest newest-installed oldest exchange transformers4 architectures lint docs package bench gpu robustness

demo: $(VENV)/.installed
	$(BIN)/python examples/demo.py

test: $(VENV)/.installed
	$(BIN)/python -m pytest

# What takes too long to be run with every change.
slow: $(VENV)/.installed
	$(BIN)/python -m pytest -m slow

# The compact suite: what a new version of a host may break.
hosts: $(VENV)/.installed
	$(BIN)/python -m pytest -m hosts

# The compact suite on what pip installs today, without constraints.
newest: newest-installed
	$(NEWEST)/python -m pytest -m hosts

newest-installed:
	test -x $(NEWEST)/python || $(PYTHON) -m venv .venv-newest
	$(NEWEST)/python -m pip install --quiet --upgrade --upgrade-strategy eager $(TORCH) --editable '.[test]'

# The compact suite on the oldest versions that pyproject.toml allows.
oldest: $(OLDEST_INSTALLED)
	$(OLDEST)/python -m pytest -m hosts

# Each end of the range writes outputs that the other end reads.
exchange: export HF_HUB_OFFLINE = 1
exchange: $(VENV)/.installed $(OLDEST_INSTALLED)
	rm -rf build/exchange build/modules
	HF_MODULES_CACHE=$(CURDIR)/build/modules/new $(BIN)/python -m tests.exchange write build/exchange/new
	TORCH_DEVICE_BACKEND_AUTOLOAD=0 HF_MODULES_CACHE=$(CURDIR)/build/modules/old $(OLDEST)/python -m tests.exchange read build/exchange/new
	HF_MODULES_CACHE=$(CURDIR)/build/modules/old $(OLDEST)/python -m tests.exchange write build/exchange/old
	TORCH_DEVICE_BACKEND_AUTOLOAD=0 HF_MODULES_CACHE=$(CURDIR)/build/modules/new $(BIN)/python -m tests.exchange read build/exchange/old

# Outputs are read by transformers 4 as they are by 5.
transformers4: export TRANSFORMERS_4_PYTHON = $(CURDIR)/$(TRANSFORMERS_4)/python
transformers4: $(VENV)/.installed
	test -x $(TRANSFORMERS_4)/python || $(PYTHON) -m venv .venv-transformers4
	$(TRANSFORMERS_4)/python -m pip install --quiet $(TORCH) 'transformers==4.57.*'
	$(BIN)/python -m pytest tests/mergekit_moe_ext/merging/test_transformers4.py

# What becomes of every architecture of transformers, as a table in the documentation, and tested.
architectures: export HF_HUB_OFFLINE = 1
architectures: $(VENV)/.installed
	$(BIN)/python -m tests.mergekit_moe_ext.upcycling.architectures docs/upcycling.md docs/caem.md
	ARCHITECTURES=all $(BIN)/python -m pytest tests/mergekit_moe_ext/upcycling/test_architectures.py

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The papers' claims, tested: small in hours, full in a night; both write docs/claims.md. ONLY names
# one experiment.
SCALE ?= small
ONLY ?=
claims: $(VENV)/.installed-claims
	cd examples && ../$(BIN)/python -m claims --output ../build/claims/$(SCALE) --scale $(SCALE) \
		$(if $(ONLY),--only $(ONLY)) $(if $(filter quick,$(SCALE)),,--docs ../docs)

# The site, into site/: strictly, so that a warning or a dead link stops it.
docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# What is uploaded to a package index, into dist/, and checked.
package: $(VENV)/.installed-release
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*
	$(BIN)/check-wheel-contents dist/*.whl
	$(BIN)/cffconvert --validate

bench: $(VENV)/.installed
	$(BIN)/python benchmarks/merge.py
	$(BIN)/python benchmarks/tensor_methods.py
	$(BIN)/python benchmarks/caem.py
	$(BIN)/python benchmarks/routed_lora.py
	$(BIN)/python benchmarks/routed_lora_model.py
	$(BIN)/python benchmarks/routed_lora_dtypes.py
	$(BIN)/python benchmarks/library.py
	$(BIN)/python benchmarks/sequence_moe.py
	$(BIN)/python benchmarks/wemoe.py

# Everything that computes on a GPU against a CPU, and a table of what it costs there. Here it is an
# error if Triton's kernels do not compute what they should; elsewhere it is a warning. On a machine
# with a GPU, give an environment that has its torch, pytest, pytest-xdist and this package:
# python3 -m pip install --editable '.[test]'; make gpu GPU_PYTHON=python3
GPU_PYTHON ?= $(BIN)/python
GPU ?= cuda
gpu:
	$(GPU_PYTHON) -m pytest -W 'error:Triton:UserWarning' tests/gpu $(wildcard tests/mergekit_moe_ext/tensor/test_fused*.py) $(wildcard tests/mergekit_moe_ext/modeling/test_wemoe_kernel*.py) $(wildcard tests/peft_routing/test_kernel*.py) --device $(GPU) -n 8 -q
	$(GPU_PYTHON) -W error:Triton:UserWarning benchmarks/gpu.py --device $(GPU) $(if $(filter cpu,$(GPU)),--small)

# Damaged inputs and killed commands, for an hour or two.
robustness: $(VENV)/.installed
	$(BIN)/python benchmarks/robustness.py --mutations 10000 --kills 1000

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test,plots,bench]'
	touch $@

# The tools of one extra beside the rest: `docs`, `release`.
$(VENV)/.installed-%: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[$*]'
	touch $@

$(OLDEST_INSTALLED): pyproject.toml constraints-oldest.txt
	test -x $(OLDEST)/python || $(PYTHON) -m venv .venv-oldest
	rm -f .venv-oldest/.installed-*
	$(OLDEST)/python -m pip install --quiet --constraint constraints-oldest.txt $(OLDEST_TORCH) --editable '.[test]'
	touch $@
