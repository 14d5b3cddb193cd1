# install: the environment in .venv    demo: train, sample and measure    test: the fast tests    test-all: also the slow ones
.PHONY: install demo test test-all lint clean

PYTHON ?= python3
BIN := .venv/bin
WORKERS ?= 2

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "ditkit needs Python 3.11 or newer; set PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: install
	$(BIN)/ditkit train demo --out runs/demo
	$(BIN)/ditkit evaluate runs/demo
	@echo "Look at runs/demo/samples.png, and open runs/demo/report.html for the numbers and what they mean."

# one thread for each worker: two teams of threads on the same cores wait for each other
test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) -m 'not slow'

test-all: install
	$(BIN)/python -m pytest

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports

clean:
	rm -rf .venv runs dist build
