# make demo: install, generate, train, evaluate, show.   make test: a sample of what runs without a GPU.   make test-all: all of it.
# TORCH="torch==2.13.0" overrides which torch is installed where none is there yet.
TORCH ?= torch>=2.6
ifdef VIRTUAL_ENV
ENV := $(VIRTUAL_ENV)
else
ENV := .venv
endif
PYTHON := $(ENV)/bin/python
# Python compiles what it imports, a tenth of what is installed: torch's 15 s become 5.
PIP := $(PYTHON) -m pip install -q --no-compile
# What is installed where: a stamp per environment, kept in this tree, so that two clones can share an environment.
STAMP := build/stamp$(subst /,-,$(abspath $(ENV)))
DEV := video,train,serve,usearch,bench,dev
SOURCES := setup.py pyproject.toml $(wildcard csrc/*.cpp csrc/*/*)

.PHONY: demo test test-all test-triton lint clean
demo: $(STAMP)-user
	$(PYTHON) -m evaat_fast demo

test: $(STAMP)-dev
	$(PYTHON) tests/tiers.py

test-all: $(STAMP)-dev
	$(PYTHON) tests/tiers.py --all

# The kernels compiled ahead of time by another Triton than the environment's: the oldest that is supported refuses what later ones
# take, and GPU machines have it for long.
TRITON ?= 3.6.0
test-triton: $(STAMP)-dev
	$(PIP) --no-deps --upgrade --target build/triton-$(TRITON) triton==$(TRITON)
	PYTHONPATH=$(CURDIR)/build/triton-$(TRITON) $(PYTHON) tests/tiers.py tests/test_aot.py

lint: $(STAMP)-dev
	$(ENV)/bin/ruff check . && $(ENV)/bin/ruff format --check . && $(PYTHON) -m mypy

# A torch that the base Python already has is kept: the environment then sees the system's packages.
.venv/bin/python:
	@base=$$(command -v python3); \
	if $$base -c 'import torch' 2>/dev/null; then site=--system-site-packages; fi; \
	$$base -m venv $$site .venv

$(STAMP)-torch: | $(PYTHON)
	@$(PYTHON) -c 'import torch' 2>/dev/null || $(PIP) "$(TORCH)"
	@mkdir -p build && touch $@

$(STAMP)-user: $(SOURCES) $(STAMP)-torch
	$(PIP) -e ".[video,train,serve]"
	@touch $@

# timm wants a torchvision, and each torchvision one torch: pip is told to keep the torch that is there. Where there is no
# torchvision for it, the tests that compare with timm, open_clip and transformers are skipped.
$(STAMP)-dev: $(SOURCES) $(STAMP)-torch
	@torch=$$($(PYTHON) -c 'import torch; print(torch.__version__)'); \
	$(PIP) -e ".[$(DEV),peers]" "torch==$$torch" || $(PIP) -e ".[$(DEV)]"
	@touch $@ $(STAMP)-user

clean:
	rm -rf build dist *.egg-info evaat_fast/*.so
