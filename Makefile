# Everything runs in a virtual environment of its own. To choose the interpreter: make test PYTHON=python3.12
# To choose the torch build, anything pip understands: make test TORCH="torch==2.6.0"
PYTHON ?= python3
VENV ?= .venv
FUZZ ?= 10000
python := $(VENV)/bin/python
ready := $(VENV)/ready
pip := $(python) -m pip --disable-pip-version-check

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test fuzz lint format bench docs clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(ready) ## Run a 1.6 GiB model in every way and compare memory and speed (5 minutes, 4 GiB of disk)
	$(python) -m examples.bert $(ARGS)

test: $(ready) ## Run the tests (ARGS="-k name" to choose)
	$(python) -m pytest $(ARGS)

fuzz: $(ready) ## Open 10,000 damaged files of each format (FUZZ=100000 for more)
	PYLOMIN_FUZZ_EXAMPLES=$(FUZZ) $(python) -m pytest tests/store/test_fuzz.py $(ARGS)

lint: $(ready) ## Check style and types
	$(python) -m ruff check .
	$(python) -m ruff format --check .
	$(python) -m mypy

format: $(ready) ## Rewrite the code in the project's style
	$(python) -m ruff check --fix-only .
	$(python) -m ruff format .

bench: $(ready) ## Run the benchmarks (30 minutes, 8 GiB of disk; ARGS="name ..." to choose, "--publish" for the docs)
	$(python) -m benchmarks.run $(ARGS)

docs: $(ready) ## Build the documentation into site/; dead links and missing references are errors
	$(python) -m mkdocs build --strict $(ARGS)

clean: ## Remove the virtual environment, the checkpoints of demo and benchmarks, and all caches
	rm -rf $(VENV) .demo .bench benchmarks/results build dist site *.egg-info
	rm -rf .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch goes in first, in the build that suits the machine; the constraint keeps the rest from replacing it.
$(ready): setup.cfg scripts/install-torch
	$(PYTHON) -m venv $(VENV)
	scripts/install-torch $(python)
	$(python) -c 'from importlib.metadata import version; print("torch==" + version("torch"))' \
		> $(VENV)/constraints.txt
	$(pip) install --quiet --constraint $(VENV)/constraints.txt --editable '.[all]'
	@touch $@
