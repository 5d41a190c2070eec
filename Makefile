# One command per verb, the same for people and for CI. `make help` lists them.
#   VENV=path    virtual environment to use or make (default .venv)
#   ENVIRONMENTS="oldest-python3.10 newest-python3.13"  what `make compat` runs on: packages and interpreter, as
#                docs/compatibility.md says; COMPAT=path is the folder they are kept in (default .venv-compat),
#                COMPAT_TESTS=tests/engines runs a part
#   VLLM=path    environment of `make vllm` (default .venv-vllm); VLLM_TESTS=tests/vllm/test_caches.py runs a part
#   WORKERS=n    processes that tests are shared by (default: one a core; 0: none but pytest's own)
#   BENCH=args   further arguments of `make bench`, e.g. BENCH="-k load"
#   TORCH=spec   what to install where torch is missing, e.g. TORCH="torch --index-url https://download.pytorch.org/whl/cpu"
VENV ?= .venv
PYTHON ?= python3
TORCH ?= torch==2.13.0
COMPAT ?= .venv-compat
COMPAT_TESTS ?=
ENVIRONMENTS ?= oldest-python3.10 pinned-python3.11 pinned-python3.12 newest-python3.13
PINS_oldest := -c constraints-oldest.txt
PINS_pinned := -c constraints.txt
PINS_newest := --upgrade --upgrade-strategy eager
SCREENSHOTS ?= runs/screenshots
VLLM ?= .venv-vllm
VLLM_TESTS ?= tests/vllm
WORKERS ?= logical
PARALLEL := -n $(WORKERS) --dist worksteal
PIP := -m pip install --disable-pip-version-check
BIN := $(VENV)/bin
# tests start some 150 processes: their sources are compiled once, wherever bytecode is kept
PYTEST := PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest
READY := $(VENV)/.pa_fast-ready
DOCS := $(VENV)/.pa_fast-docs
SOURCES := PYTHONPATH=.:kernels

.PHONY: help demo test test-slow test-browser vllm coverage compat check docs bench gpu train-demo clean
help:  ## list the verbs
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(READY): pyproject.toml constraints.txt
	@echo "Setting up $(VENV). Downloads PyTorch where it is missing (200 MB for a CPU build; on Linux PyPI's default is the CUDA" >&2
	@echo "build, about 3 GB: set TORCH= to choose) and about 500 MB of other packages (triton is 190 of them, ray 70)." >&2
	@test -x $(BIN)/python || $(PYTHON) -m venv $$($(PYTHON) -c 'import torch' 2>/dev/null && echo --system-site-packages) $(VENV)
	@$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/python -m pip install --disable-pip-version-check --progress-bar on $(TORCH)
	@$(BIN)/python -m pip install --disable-pip-version-check --progress-bar on -q -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(READY)  ## sweep the shipped pair: answer, table, figure and page in runs/demo
	GOMP_SPINCOUNT=10000 $(BIN)/pa-fast sweep examples/demo/pair/base examples/demo/pair/instruct --lambdas 0:1:0.05 \
	  --eval 'icl:examples/demo/fewshot.jsonl,shots=5,sep=\n' --eval python:examples.demo.follow:follow \
	  --keep 'python>=80%' --batch-size 64 --out runs/demo

test: $(READY)  ## the whole test suite, no GPU needed
	$(PYTEST) $(PARALLEL)

test-slow: $(READY)  ## the tests that `test` leaves out: more architectures, ranks, kills and longer walks
	PA_FAST_TEST_WALK=1000 PA_FAST_KILLS=30 $(PYTEST) $(PARALLEL) -m slow

test-browser: $(READY)  ## the report page in headless Chromium (Debian: chromium, chromium-driver); SCREENSHOTS=folder keeps them
	@$(BIN)/python -c 'import selenium' 2>/dev/null || $(BIN)/python $(PIP) -q -c constraints.txt selenium
	PA_FAST_SCREENSHOTS=$(SCREENSHOTS) $(BIN)/python -m pytest -m browser tests/browser

vllm: $(VLLM)/.pa_fast-ready  ## the vLLM engine beside unmodified vLLM, on its CPU build: an environment of its own, 3 GB
	$(SOURCES) $(VLLM)/bin/python -m pytest -p no:cacheprovider -n $(WORKERS) --dist loadfile $(VLLM_TESTS)

$(VLLM)/.pa_fast-ready: tests/vllm/requirements.txt
	@test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	@$(VLLM)/bin/python -c 'import torch' 2>/dev/null || $(VLLM)/bin/python $(PIP) -q --no-deps $(TORCH)
	@$(VLLM)/bin/python $(PIP) -q --no-deps -r tests/vllm/requirements.txt
	@touch $@

coverage: $(READY)  ## branch coverage of pa_fast and pa_kernels by `test`, without what tests run in other processes
	$(BIN)/python -m pytest $(PARALLEL) --cov --cov-report=term:skip-covered

compat:  ## the suite on the oldest, pinned and newest packages and on each Python: results in docs/compatibility.md
	@$(MAKE) --no-print-directory --keep-going $(addprefix compat-,$(ENVIRONMENTS))

# torch first, from the index that TORCH names; it then stays what it is
compat-%: PINS = $(or $(PINS_$(firstword $(subst -, ,$*))),$(error $*: write pinned, oldest or newest, as in newest-python3.12))
compat-%: INTERPRETER = $(or $(word 2,$(subst -, ,$*)),$(PYTHON))
compat-%:
	@$(INTERPRETER) -c '' 2>/dev/null || { echo "$*: skipped, there is no $(INTERPRETER) here" >&2; exit 0; }; \
	  set -ex; at=$(COMPAT)/$*; test -x $$at/bin/python || $(INTERPRETER) -m venv $$at; \
	  $$at/bin/python $(PIP) -q $(PINS) $(if $(filter pinned%,$*),$(TORCH),$(patsubst torch%,torch,$(TORCH))); \
	  $$at/bin/python -c 'import torch; print("torch==" + torch.__version__.partition("+")[0])' > $$at/held.txt; \
	  $$at/bin/python $(PIP) -q $(PINS) -c $$at/held.txt -e '.[dev]'; \
	  $$at/bin/python -m tests.compatibility $* $(PARALLEL) $(COMPAT_TESTS)

check: $(READY)  ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

$(DOCS): $(READY)
	@echo "Adding the packages that build the documentation (about 40 MB)." >&2
	@$(BIN)/python $(PIP) -q -c constraints.txt -e '.[docs]'
	@touch $@

docs: $(DOCS)  ## the documentation as a site in site/; a warning is an error
	PATH=$(BIN):$$PATH NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(READY)  ## what this machine can measure, as ratios in one run, correctness first: tables in bench/results
	$(SOURCES) $(BIN)/python -m bench $(BENCH)

gpu:  ## everything that needs a GPU, correctness first; installs nothing: $(PYTHON), or where that has no torch $(VENV)
	@python=$(PYTHON); $$python -c 'import torch' 2>/dev/null || python=$(BIN)/python; \
	  set -x; $(SOURCES) $$python -m bench.gpu $(GPU)

train-demo: $(READY)  ## retrain the demo pair from scratch (under 10 minutes on 2 cores)
	GOMP_SPINCOUNT=10000 $(BIN)/python -m examples.demo.train

clean:  ## remove what the other verbs made
	rm -rf runs site .cache build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks .coverage
