.SHELLFLAGS := -ec
VENV := .venv
BIN := $(VENV)/bin
# The folder is part of the name: a copied or moved .venv still runs the code of the place it was made in.
STAMP := $(VENV)/.ready-$(shell printf %s '$(CURDIR)' | cksum | cut -d' ' -f1)
# The interpreter that makes .venv, the first that is new enough; override with `make setup PYTHON=...`.
ifndef PYTHON
PYTHON := $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python3.10; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && { echo $$p; break; }; done)
endif

.PHONY: help setup demo test bench gpu-report lint clean

help:
	@echo 'make setup        install everything into $(VENV) (about 5.5 GB, once)'
	@echo 'make demo         a robust teacher and three students, start to report; DEMO_ARGS="--help" says more'
	@echo 'make test         all tests'
	@echo 'make bench        the benchmarks'
	@echo 'make gpu-report   kernel tests and benchmarks on the GPU, into bench/results/'
	@echo 'make lint         ruff'
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
	@touch $@

demo: setup
	@$(BIN)/fastrd demo $(DEMO_ARGS)

# Two workers of one thread each fill the two cores that the time limits in the tests are meant for.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -n 2 --dist worksteal --durations=15

bench: setup
	$(BIN)/python -m pytest bench --benchmark-only

GPU_NAME := import re, torch; torch.cuda.is_available() and \
	print(re.sub("[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()))

# Speed is written down only of kernels just found right, and only when all of it was measured.
gpu-report: setup
	@gpu=$$($(BIN)/python -c '$(GPU_NAME)'); \
	if [ -z "$$gpu" ]; then \
	    echo 'no GPU that torch can use ($(BIN)/fastrd doctor says why): nothing measured, nothing written' >&2; \
	    exit 1; \
	fi; \
	mkdir -p bench/results; \
	$(BIN)/python -m pytest tests/kernels; \
	$(BIN)/python -m pytest bench --benchmark-only --benchmark-json="bench/results/.$$gpu.part"; \
	mv "bench/results/.$$gpu.part" "bench/results/$$gpu.json"; \
	echo "written: bench/results/$$gpu.json"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks
	find fastrd kernels tests bench -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
