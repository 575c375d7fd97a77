# make setup | demo | test | test-slow | test-long | lint | bench; `make demo` and `make test` set up what they need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CLAIMS := tests/test_overopt_online.py

.PHONY: setup demo test test-slow test-long lint bench clean

setup: $(VENV)/installed

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -e .
	touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(BIN)/pip install --quiet -e '.[test]'
	touch $@

demo: setup
	$(BIN)/alignax train --config experiments/demo.py

test: $(VENV)/installed-test
	$(BIN)/pytest -m "not slow" -n auto --maxprocesses 4 --dist loadfile

test-slow: $(VENV)/installed-test
	$(BIN)/pip install --quiet -e '.[tpu]'
	$(BIN)/pytest -m "slow and not long" --ignore=$(CLAIMS) -n auto --maxprocesses 4 --dist loadfile
	OPTIMISED=1 $(BIN)/pytest -m "slow and not long" $(CLAIMS) -n auto --maxprocesses 4 --dist worksteal

test-long: $(VENV)/installed-test
	$(BIN)/pip install --quiet -e '.[tpu]'
	OPTIMISED=1 $(BIN)/pytest -m long -n auto --maxprocesses 4 --dist worksteal

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: setup
	$(BIN)/alignax bench
	$(BIN)/alignax bench growth

clean:
	rm -rf $(VENV) runs
