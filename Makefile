# make demo | test | lint | bench, each in a virtual environment that make itself creates.
PYTHON ?= python3
VENV ?= .venv
# Installed first, so that no later requirement chooses another build of PyTorch; any release from 2.6 on will do.
TORCH ?= torch==2.13.0
export GRADTRACE_DATA ?= $(abspath ../shared/data)
# digits, or with GRADTRACE_DATA: mnist, cifar10, california, dbpedia, sst2
DATASET ?= digits
ONCE ?=

.PHONY: demo test lint bench install clean
install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml client/pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet "$(TORCH)"
	$(VENV)/bin/python -m pip install --quiet -e ./client -e ".[dev]"
	@touch $@

demo: install
	$(VENV)/bin/gradtrace demo --dataset $(DATASET) $(if $(ONCE),--once)

test: install
	$(VENV)/bin/python -m pytest

lint: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

bench: install
	$(VENV)/bin/python -m benchmarks

clean:
	rm -rf $(VENV) runs
