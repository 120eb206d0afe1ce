# Everything there is to run. Needs Python 3.11 or newer, make and a package registry.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
# One thread a worker: the tests' tensors are too small to share out.
TESTS := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q

.DEFAULT_GOAL := help
.PHONY: help venv demo test oldest newest lint format bench sweep docs clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: $(READY) ## make the environment (.venv) with the exact versions of constraints.txt

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "make needs Python 3.11 or newer; set PYTHON=")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(READY) ## convert a small real model, let it answer, show what is in the pack
	PATH="$(CURDIR)/$(BIN):$$PATH" demo/demo.sh

oldest: ## the test suite with the oldest versions that pyproject.toml declares
	PYTHON=$(PYTHON) .ci/suite_with oldest

newest: ## the test suite with the newest versions there are, beyond what is declared, too
	PYTHON=$(PYTHON) .ci/suite_with newest

test: lint ## lint, then the whole test suite
	$(TESTS) -n 2 --dist worksteal

lint: $(READY) ## style, types and the layers of the code
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python .ci/rooms.py

format: $(READY) ## rewrite the code in the style that lint asks for
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY) ## time the quantiser here (what needs a GPU and large packs: docs/performance.md)
	$(BIN)/python benchmarks/quantise.py

sweep: $(READY) ## try every model type that transformers knows; writes docs/architectures.md
	$(BIN)/python docs/architectures.py

docs: $(READY) ## write docs/commands.md from the commands' own help, and check the documents
	$(BIN)/python docs/commands.py
	$(TESTS) tests/test_docs.py

clean: ## remove what the other targets made, downloads too
	rm -rf .venv .venv-oldest .venv-newest .cache build dist demo-out *.egg-info .pytest_cache .mypy_cache .ruff_cache \
		.import_linter_cache .hypothesis
