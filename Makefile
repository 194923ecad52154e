# make demo        train two tiny models, without and with PRe, diagnose both, write the report (minutes on a CPU)
# make test        the tests but those that need downloaded weights and the rest of the largest grid
# make test-thorough  that rest: every pair of settings of PRe in every way to train
# make check       ruff, mypy and the fast tests, in under two minutes
# make bench       the benchmarks, each prints a ratio
# make test-oldest   the fast tests with the oldest supported transformers, in an environment of their own
# make test-harness  lmms-eval installed without torchvision, then the tests that need it
# make test-real   fetch the pretrained parts, then the tests that need them
#
# Each sets up what it needs in .venv; a second time that costs nothing. ARGS goes on to the command:
#   make demo ARGS="--out runs/mine"        make test ARGS="-k report"

PYTHON  ?= $(shell command -v python3.11 || command -v python3)
VENV    ?= .venv
WORKERS ?= 2
ARGS    ?=

BIN     := $(VENV)/bin
STAMP   := $(VENV)/.ready
PIP     := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# One thread a worker: small models run faster so, and two workers do not fight over two cores.
PYTEST  := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile
BENCHES := $(filter-out benchmarks/_%,$(sort $(wildcard benchmarks/*.py)))

.PHONY: help setup demo test test-thorough test-oldest check bench test-harness test-real
help:
	@sed -n '/^# /s/^# //p' Makefile | head -8

setup: $(STAMP)

# The stamp follows what decides the environment. torch comes first and pinned, so that nothing else picks another.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if (3, 11) <= v[:2] < (3, 14) else \
	    f"keepsight needs Python 3.11 to 3.13, this is {v[0]}.{v[1]}: make PYTHON=/path/to/python3.11 ...")'
	@echo "Setting up $(VENV): a few minutes the first time"
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) -e '.[train,figures,dev]'
	@touch $@

demo: setup
	$(BIN)/keepsight demo $(ARGS)

test: setup
	$(PYTEST) -m "not real and not thorough" --durations=15 $(ARGS)

test-thorough: setup
	$(PYTEST) -m thorough $(ARGS)

# pyproject.toml says which release that is; what it needs itself is not pinned, as constraints.txt has newer ones.
OLDEST := $(shell sed -n 's/.*"transformers>=\([0-9.]*\),.*/\1/p' pyproject.toml)
test-oldest:
	$(PYTHON) -m venv .venv-oldest
	grep -vE '^(transformers|huggingface_hub|tokenizers|trl|peft|accelerate|datasets)=' constraints.txt > .venv-oldest/constraints.txt
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check -c .venv-oldest/constraints.txt \
	    -e '.[train,figures,dev]' 'transformers~=$(OLDEST).0'
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest -n $(WORKERS) --dist loadfile -m "not slow and not real" $(ARGS)

check: setup
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(PYTEST) -q -m "not slow and not real" $(ARGS)

bench: setup
	@set -e; for file in $(BENCHES); do echo "== $$file"; $(BIN)/python $$file $(ARGS); done

# lmms-eval asks for torchvision, sentence-transformers, wandb and thirty more, some of which bring another torch. What
# tasks about pictures import is below; --no-deps keeps the rest out.
HARNESS := loguru pytablewriter tenacity python-dotenv openai sacrebleu nltk evaluate

test-harness: setup
	$(PIP) --no-deps lmms-eval
	$(PIP) $(HARNESS)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/evaluation/harness $(ARGS)

test-real: setup
	$(PIP) -e '.[train,figures,dev,real]'
	$(BIN)/python -m tests.real.fetch
	$(BIN)/python -m pytest -m real -s $(ARGS)
