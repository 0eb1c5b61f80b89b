# make pretrain   train on the embedded demo set, two processes        make test    the tests
# make lint       style                                                make types   static types
# make bench-check   counts of a training step against the stored ones, exactly; times with a margin: two minutes
# make faults     trainings that are killed, damaged and starved, and must go on: 16 minutes on two cores
#
# Variables: PYTHON (the interpreter that makes .venv), TORCH_INDEX (index of torch builds: the default one brings
# CUDA libraries of several gigabytes; https://download.pytorch.org/whl/cpu has none), PYTEST_ARGS, FAULTS_ARGS,
# BENCH_CHECK_ARGS (--update makes this machine's numbers the stored ones).

PYTHON ?= python3
TORCH_INDEX ?=
PYTEST_ARGS ?= -q -n 2 --dist worksteal
FAULTS_ARGS ?= --jobs 2
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: install pretrain test faults bench-check lint types clean

pretrain: $(INSTALLED)
	PATH="$(CURDIR)/$(BIN):$$PATH" bash examples/pretrain_matris.sh

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS)

faults: $(INSTALLED)
	$(BIN)/python -m tools.faults $(FAULTS_ARGS)

bench-check: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m tools.bench.check $(BENCH_CHECK_ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/mypy

install: $(INSTALLED)

# torch first and alone: its index, if one is given, must not serve anything else.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache *.egg-info
