# make demo   reads a book through a small window and shows what the memory is worth
# make test   runs the tests
# make quick  runs every benchmark with every method at tiny sizes, and makes a report of it
# make check  runs linter, formatter, types, import contract, and builds and installs the wheel

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test quick check clean

demo: $(VENV)/.installed
	$(BIN)/absorber demo --output demo

test: $(VENV)/.installed
	$(BIN)/python -m pytest

quick: $(VENV)/.installed
	mkdir -p build && rm -f build/quick.jsonl
	$(BIN)/absorber bench all --quick --model tiny --device cpu --output build/quick.jsonl
	$(BIN)/absorber report build/quick.jsonl --output build/quick.html

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	rm -rf build
	$(BIN)/python -m build --wheel --no-isolation --outdir build
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target build/site build/*.whl
	PYTHONPATH=build/site $(BIN)/python -m absorber --help

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer with venv is needed (Debian: apt install python3 python3-venv)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/pip install --quiet --disable-pip-version-check --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist
