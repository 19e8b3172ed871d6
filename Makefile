# Needs python3 (>= 3.11), pip and make. Everything is installed into .venv, nothing outside it.
# PYTHON=python3.12 chooses the interpreter of a new .venv; `make clean` first to change it.
PYTHON ?= python3
GOLDEN ?= $(wildcard tests/golden/meta/*.npz)
PYTEST_ARGS ?=
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
# EXTRAS=cuda12 (or cuda13, tpu) holds for later targets too, until EXTRAS= or `make clean`.
EXTRAS ?= $(shell cat $(VENV)/extras 2>/dev/null)
COMMA := ,
# Another pyproject.toml, other constraints or extras: another stamp, so a new install.
STAMP := $(VENV)/installed-$(shell cat pyproject.toml constraints.txt | cksum | cut -d' ' -f1)$(addprefix -,$(EXTRAS))

.DEFAULT_GOAL := help
.PHONY: help venv speedrun leaderboard test lint format types golden rehearse-device clean

help:  ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: $(STAMP)  ## Create .venv with everything installed (EXTRAS=cuda12 adds JAX for NVIDIA GPUs)

# The interpreter behind an activated .venv does the work, since .venv is replaced; its pip installs
# into .venv from outside, so that neither ensurepip nor activation is needed.
$(STAMP):
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python " + sys.version.split()[0] + " is too old: 3.11 or newer is needed, as in make PYTHON=python3.12")'
	@echo "Installing into $(VENV), about a minute"
	@set -e; base=$$($(PYTHON) -c 'import os, sys; print(os.path.realpath(sys.executable))'); \
	install() { "$$base" -m pip --python $(BIN)/python install --quiet --constraint constraints.txt "$$@"; }; \
	"$$base" -m venv --clear --without-pip $(VENV); \
	install pip setuptools; \
	install --no-build-isolation --editable '.[test,dev$(addprefix $(COMMA),$(EXTRAS))]'
	@echo '$(EXTRAS)' > $(VENV)/extras
	@touch $@

speedrun: venv  ## Train a small GPT with AdamW, Muon and Shampoo, draw the comparison (ARGS=--resume goes on)
	@$(BIN)/nanogpt demo $(ARGS)

leaderboard: venv  ## Tune and train every optimizer at one small size, write the board (ARGS=--quick: minutes)
	@$(BIN)/nanogpt board $(ARGS)

test: venv  ## Run the test suite (PYTEST_ARGS="-k blocks" chooses tests)
	@$(BIN)/python -m pytest -q -n 2 --dist worksteal $(PYTEST_ARGS)

lint: venv  ## Check style
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

format: venv  ## Format the code, sort the imports
	@$(BIN)/ruff check --select I --fix .
	@$(BIN)/ruff format .

types: venv  ## Check types
	@$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python

golden: venv  ## Replay the recorded trajectories of the reference (GOLDEN="files" chooses others)
	@$(BIN)/python -m scripts.maintenance.replay_golden $(GOLDEN)

# The machine it stands for: Python 3.12, jax 0.11, nothing else, no network where it can be cut off.
TEXT ?= data/sotu
DEVICE_PYTHON ?= python3.12
rehearse-device: venv  ## Rehearse the report of a GPU as it runs there (TEXT=data/sotu: folder of shards)
	@$(BIN)/python -m scripts.maintenance.device.prepare --text $(TEXT)
	@$(DEVICE_PYTHON) -m venv --clear build/device-venv
	@build/device-venv/bin/python -m pip install --quiet 'jax==0.11.*'
	@$$(unshare -rn true 2>/dev/null && echo unshare -rn) \
	  build/device-venv/bin/python -m scripts.maintenance.device_report --rehearse --minutes 9

clean:  ## Remove .venv and caches; runs/ and data/ stay
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
