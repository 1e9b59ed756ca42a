# Every target sets itself up on a fresh machine: a virtual environment, the pinned packages, then the work. Needs Python
# 3.11 or newer with `venv`; nothing else. Once packages are there, nothing is fetched any more.
SHELL := /bin/bash
PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
BENCHES ?= $(wildcard bench/*.py)

export HF_HUB_OFFLINE := 1

.PHONY: demo tiny-lm test test-slow sweep mutants lint bench install clean

install: $(STAMP)

# torch goes first and alone: the other packages then find the pinned build and do not choose one of their own.
$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "trimtab needs Python 3.11 or newer with venv; none of python3.11, python3, python3.12, python3.13 is one" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test,demo]'
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/python -m trimtab.demo

# a small LLaMA with its own tokenizer, in examples/.cache/tiny_lm: the base of decoder examples and benchmarks
tiny-lm: $(STAMP)
	$(BIN)/python -m examples.tiny_lm

# one thread a worker: two workers with two threads each are slower on two cores
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -q

test-slow: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -q -m slow

# every architecture of transformers, tiny, with four methods; the table is docs/sweep.md
sweep: $(STAMP)
	rm -rf .sweep
	-OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -q -m slow tests/sweep/test_sweep.py
	cd tests && ../$(BIN)/python -m sweep.table

# how many faults the tests notice: SEED and COUNT choose the sample, results are kept and continued
SEED ?= 0
COUNT ?= 200
mutants: $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[mutation]'
	$(BIN)/python scripts/mutants.py record
	$(BIN)/python scripts/mutants.py run --seed $(SEED) --count $(COUNT) --part 0 --parts 2 & \
	$(BIN)/python scripts/mutants.py run --seed $(SEED) --count $(COUNT) --part 1 --parts 2; wait
	$(BIN)/python scripts/mutants.py report --seed $(SEED)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/python scripts/check_style.py

# bench/supersense.py and its neighbours: each prints a table and writes JSON to bench/results/
bench: $(STAMP)
	set -e; for file in $(BENCHES); do echo "== $$file"; $(BIN)/python $$file; done

clean:
	rm -rf $(VENV)
