.SHELLFLAGS := -ec
VENV := .venv
BIN := $(VENV)/bin
# The folder is part of the name: a copied or moved .venv still runs the code of the place it was made in.
STAMP := $(VENV)/.ready-$(shell pwd | tr -d '\n' | cksum | cut -d' ' -f1)
# The interpreter that makes .venv, the first that is new enough; override with `make setup PYTHON=...`.
ifndef PYTHON
PYTHON := $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python3.10; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && { echo $$p; break; }; done)
endif

.PHONY: help setup ffcv ffcv-wheel demo test test-matrix bench gpu-report lint fuzz docs clean

help:
	@echo 'make setup        install everything into $(VENV) (about 5.5 GB, once)'
	@echo 'make demo         a robust teacher, four methods over five seeds, start to report; DEMO_ARGS="--help" says more'
	@echo 'make test         all tests'
	@echo 'make test-matrix  the numerical tests on processors, compilers, releases of torch; CELLS="..." names some'
	@echo 'make ffcv         FFCV again, where setup could not install it; ffcv-wheel builds one for PYTHON into dist/'
	@echo 'make bench        the benchmarks'
	@echo 'make gpu-report   tests and benchmarks on the GPU, into bench/results/, for 9 minutes; again goes on'
	@echo 'make fuzz         damage every kind of file that is read, for FUZZ_SECONDS (600)'
	@echo 'make lint         ruff and mypy'
	@echo 'make docs         the documentation as a site, into build/site; a broken link is an error'
	@echo 'make clean        remove what was built, not $(VENV), data or runs'

setup: $(STAMP)

# The stamp comes last: an interrupted set-up leaves none. $(VENV) is emptied only when its Python does not run.
$(STAMP): setup.py pyproject.toml
	@if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
	    if [ -z '$(PYTHON)' ]; then \
	        echo 'no Python 3.10 or newer on PATH: install one (Debian: apt-get install python3 python3-venv)' \
	            'or name it: make setup PYTHON=/path/to/python3' >&2; \
	        exit 1; \
	    fi; \
	    if ! '$(PYTHON)' -c 'import ensurepip' 2>/dev/null; then \
	        package=$$('$(PYTHON)' -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])'); \
	        if [ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then \
	            echo "$(PYTHON) cannot make virtual environments; Debian, Ubuntu: sudo apt-get install $$package" >&2; \
	            exit 1; \
	        fi; \
	        echo "installing $$package, without which $(PYTHON) cannot make virtual environments"; \
	        apt-get update -qq; \
	        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$$package"; \
	    fi; \
	    clear=; $(BIN)/python -c '' 2>/dev/null || clear=--clear; \
	    '$(PYTHON)' -m venv $$clear $(VENV); \
	fi
	@echo 'installing torch and the rest into $(VENV): about 5.5 GB, a few minutes, once'
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -e '.[test]'
	@$(BIN)/python -c 'import torch, torchvision, fastrd.kernels'
	@sh tools/ffcv/install.sh $(BIN)/python || \
	    echo 'FFCV was not installed; all else works. "make ffcv" tries again, "$(BIN)/fastrd doctor" says more' >&2
	@touch $@

ffcv: setup
	@sh tools/ffcv/install.sh $(BIN)/python

# For a machine without a network or a compiler; PYTHON is of the version that machine has.
ffcv-wheel:
	@sh tools/ffcv/install.sh '$(PYTHON)' dist

demo: setup
	@$(BIN)/fastrd demo $(DEMO_ARGS)

# Two workers of one thread each fill the two cores that the time limits in the tests are meant for.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -n 2 --dist worksteal --durations=15

# Goes on where it was stopped; `.venv/bin/python tools/test_matrix.py --help` names the cells.
test-matrix: setup
	@$(BIN)/python tools/test_matrix.py $(CELLS)

# Beside a numpy whose arrays its interpreter knows. A test for all kernels in every `.triton*` folder there is.
.triton36: | setup
	@echo 'installing Triton 3.6, the oldest one supported, into $@'
	@rm -rf build/$@
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps --target build/$@ 'triton==3.6.*' 'numpy<2.4'
	@mv build/$@ $@

bench: setup
	$(BIN)/python -m pytest bench --benchmark-only

# In calls of a few minutes; each goes on where the last one stopped.
gpu-report: setup
	@$(BIN)/python -m bench.gpu_report

# Seconds for all targets together; FUZZ_ARGS="recipe facts --first 1000" chooses targets and mutations.
FUZZ_SECONDS ?= 600
fuzz: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz --seconds $(FUZZ_SECONDS) $(FUZZ_ARGS)

# mypy sees the package as a wheel has it, with `kernels` in its place.
lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@rm -rf build/types
	@$(BIN)/python setup.py -q build_py --build-lib build/types 2>/dev/null
	bin=$$(cd '$(BIN)' && pwd) && cd build/types && "$$bin/python" -m mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache -p fastrd

docs: setup
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks
	find fastrd kernels tests bench -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
