# Everything sets itself up in .venv: `make demo` and `make test` work in a fresh clone.
PYTHON ?= python3
TORCH  ?= torch# or a pinned one: make test TORCH=torch==2.11.0
VENV   := .venv
BIN    := $(VENV)/bin
EXTENSION_SOURCES := $(shell find csrc -type f) setup.py pyproject.toml

.PHONY: install demo test lint bench clean

install: $(VENV)/.installed

# torch comes first and the build is not isolated: the extension compiles against the torch that will load it.
$(VENV)/.installed: $(EXTENSION_SOURCES)
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if v >= (3, 11) else \
	  f"Python 3.11 or newer is needed, {sys.executable} is {v.major}.{v.minor}; set PYTHON=/path/to/python3")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)" "setuptools>=77" wheel ninja numpy
	$(BIN)/python -m pip install --quiet --no-build-isolation -e ".[train,dev]"
	@touch $@

demo: install
	$(BIN)/mft demo

test: install
	$(BIN)/python -m pytest

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: install
	$(BIN)/python -m benchmarks

clean:
	rm -rf build *.egg-info mft_kernels/*.so mft_kernels/_build.json .pytest_cache .mypy_cache .ruff_cache $(VENV)/.installed
