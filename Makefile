# make demo | test | bench | report | lint | sanitize. Each makes the environment it needs (.venv) on its first run.
# make gpu: all that wants an NVIDIA GPU, offline, with the environment that `python3` (or PYTHON) already is.
#
#   make test ARGS="-k topology"                 arguments for the command behind a target
#   make test PYTHON=python3.12                  the Python that .venv is made with
#   make test VENV=/path/to/environment          an existing environment, used and filled instead of .venv
#   make demo PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"    a CPU-only torch (200 MB, not 3 GB)

PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
ARGS ?=
BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml constraints.txt $(shell find csrc -name '*.h' -o -name '*.c*')

# Also for the isolated build: pip reads the first before version 25.3 and the second since.
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_BUILD_CONSTRAINT := $(CURDIR)/constraints.txt

.PHONY: demo test bench report lint sanitize gpu

demo: $(VENV)/.stamp-base
	$(BIN)/sparsediff demo $(ARGS)

test: $(VENV)/.stamp-test
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --maxprocesses=8 $(ARGS)

bench: $(VENV)/.stamp-bench
	$(BIN)/python -m bench run $(ARGS)

report: $(VENV)/.stamp-base
	$(BIN)/python -m bench report $(ARGS)

gpu:
	$(PYTHON) -m bench gpu $(ARGS)

lint: $(VENV)/.stamp-dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && git ls-files 'csrc/*' | xargs $(BIN)/clang-format --dry-run -Werror

sanitize: $(VENV)/.stamp-test
	$(BIN)/python tests/sanitize.py $(ARGS)

# An environment with the extra of the stamp's name (base: none); torch first, so that a failing download fails before the build.
$(VENV)/.stamp-%: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(PIP_ARGS) torch
	$(BIN)/python -m pip install $(PIP_ARGS) -e '.$(if $(filter base,$*),,[$*])'
	touch $@
