# Everything runs in a virtual environment of its own: made by the first target that needs it, brought up to date when
# pyproject.toml or constraints.txt changes. `PYTHON=python3.13 make test` picks the interpreter, `ARGS=` goes to the command.

VENV ?= .venv
FLOOR_VENV ?= .venv-floor
# Test processes; two cores run the whole suite in minutes.
JOBS ?= 2

# The interpreter: the one that made the environment, else the first of these that is new enough and can make one.
ifeq ($(origin PYTHON),undefined)
PYTHON := $(shell for python in $(VENV)/bin/python python3.11 python3.13 python3.12 python3; do \
	$$python -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
endif
VERSION := $(shell $(or $(PYTHON),false) -c 'import platform; print(platform.python_version())' 2>/dev/null)
STAMP := $(VENV)/.installed-with-python-$(VERSION)

# The oldest supported versions. PyTorch comes as the platform's default build (on Linux that is the large one with
# CUDA); `FLOOR_TORCH=` takes a requirement or the path of a wheel instead.
FLOOR_TORCH ?= torch==2.5.1
FLOOR := diffusers==0.38.0 huggingface-hub==1.3.0 transformers==5.0.0 accelerate==1.6.0 'datasets<4' \
	torchmetrics==1.5.0 peft==0.18.0 safetensors==0.8.0 numpy==1.26.4 pyarrow==20.0.0
FLOOR_STAMP := $(FLOOR_VENV)/.installed
FLOOR_TESTS ?= tests

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help install demo demo-unclip test test-fast test-floor test-gpu quality style pictures bench
.DELETE_ON_ERROR:

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 14

install: $(STAMP) ## only make the environment

demo: $(STAMP) ## train PDAE on real digits, publish it, load it again, measure it: demo/
	@$(VENV)/bin/diffusers-ext demo $(ARGS)

demo-unclip: $(STAMP) ## train CLIP, a prior and a decoder on captioned digits, paint texts: demo-unclip/
	@$(VENV)/bin/diffusers-ext demo-unclip $(ARGS)

test: $(STAMP) ## all tests
	@$(VENV)/bin/python -m pytest -n $(JOBS) --dist loadfile $(ARGS)

test-fast: $(STAMP) ## the tests that take seconds
	@$(VENV)/bin/python -m pytest -n $(JOBS) --dist loadfile -m "not slow" $(ARGS)

test-floor: $(FLOOR_STAMP) ## the tests with the oldest supported versions, in an environment of their own
	@$(FLOOR_VENV)/bin/python -m pytest -n $(JOBS) --dist loadfile $(FLOOR_TESTS) $(ARGS)

test-gpu: $(STAMP) ## the tests that need a CUDA device; they skip without one
	@$(VENV)/bin/python -m pytest -m gpu $(ARGS)

quality: $(STAMP) ## check style and formatting
	@$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check .

style: $(STAMP) ## repair what `quality` complains about, as far as that can be done by itself
	@$(VENV)/bin/ruff check --fix . ; $(VENV)/bin/ruff format .

pictures: demo demo-unclip ## make the README's pictures anew, from the demos'
	@mkdir -p docs/pictures && cp demo/*.png demo-unclip/*.png docs/pictures/ && ls docs/pictures

bench: $(STAMP) ## run every benchmark; each writes a CSV beside itself
	@for benchmark in benchmarks/*.py; do echo "$$benchmark" && $(VENV)/bin/python "$$benchmark" $(ARGS) || exit; done

# PyTorch goes first, by its exact pin: a range would let pip take another build than the tested one.
$(STAMP): pyproject.toml constraints.txt
	@test -n "$(VERSION)" || { echo "No Python 3.11 or newer found: install one, or name it: PYTHON=/path/to/python make ..." >&2; exit 1; }
	@test "$$($(VENV)/bin/python -c 'import platform; print(platform.python_version())' 2>/dev/null)" = "$(VERSION)" \
		|| { echo "Making $(VENV) with Python $(VERSION)"; $(PYTHON) -m venv $(if $(wildcard $(VENV)/pyvenv.cfg),--clear) $(VENV); }
	@echo "Installing PyTorch (minutes, the first time)"
	@$(VENV)/bin/python -m pip install -qq -c constraints.txt "$$(grep '^torch==' constraints.txt)"
	@echo "Installing diffusers-ext and what it needs"
	@$(VENV)/bin/python -m pip install -qq -c constraints.txt -e '.[training,dev]'
	@rm -f $(VENV)/.installed-with-python-* && touch $@

$(FLOOR_STAMP): pyproject.toml Makefile
	@test -n "$(VERSION)" || { echo "No Python found: PYTHON=/path/to/python3.11 make test-floor" >&2; exit 1; }
	@test -x $(FLOOR_VENV)/bin/python || { echo "Making $(FLOOR_VENV) with Python $(VERSION)"; $(PYTHON) -m venv $(FLOOR_VENV); }
	@echo "Installing $(FLOOR_TORCH) (minutes, the first time)"
	@$(FLOOR_VENV)/bin/python -m pip install -qq '$(FLOOR_TORCH)'
	@echo "Installing diffusers-ext and the oldest versions of what it needs"
	@$(FLOOR_VENV)/bin/python -m pip install -qq '$(FLOOR_TORCH)' $(FLOOR) -e '.[training,dev]'
	@touch $@
