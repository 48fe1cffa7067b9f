# make run    set up .venv and run the main job on 8 ranks
# make test   set up .venv, then lint, types and the whole test suite
# make chaos  1,000 jobs struck at random moments until each is complete (about an hour on 2 cores)
# Other targets: lint, format, bench, clean. PYTHON=python3.12 make … chooses the interpreter.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RANKS ?= 8
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help run test lint format bench chaos clean

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

# torch is installed by itself first, so that a CPU build that lies on the machine satisfies everything after it.
$(VENV)/run-ready: setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if v >= (3, 10) else f"distsurf needs Python 3.10 or newer; {sys.executable} is {v[0]}.{v[1]}. Try: make run PYTHON=python3.12")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing distsurf into $(VENV) (torch is large: this takes a few minutes the first time)"
	@$(INSTALL) torch
	@$(INSTALL) -e '.[mpich]'
	@touch $@

$(VENV)/test-ready: $(VENV)/run-ready
	@$(INSTALL) -e '.[mpich,dev]'
	@touch $@

run: $(VENV)/run-ready
	$(BIN)/mpirun -n $(RANKS) $(BIN)/python -m distsurf.run

lint: $(VENV)/test-ready
	$(BIN)/ruff check distsurf tests
	$(BIN)/ruff format --check distsurf tests
	$(BIN)/mypy

format: $(VENV)/test-ready
	$(BIN)/ruff check --fix distsurf tests
	$(BIN)/ruff format distsurf tests

test: lint
	$(BIN)/python -m pytest

bench: $(VENV)/test-ready
	$(BIN)/python tests/bench_run.py

chaos: $(VENV)/test-ready
	$(BIN)/python -m tests.faults.chaos

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
