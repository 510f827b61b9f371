# `make demo` runs the main job, `make test` every check that CI runs. Both need Python >= 3.11.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DOCS := .venv-docs
RECORDS := benchmarks/results

.PHONY: demo test docs docs-version package fuzz mutants lint bench clean help

help:
	@echo "make demo   install, then certify handwritten digits with and without a denoiser"
	@echo "make test   install the test extras, then run every check that CI runs"
	@echo "make docs   build the documentation site into site/ and check it (needs no torch)"
	@echo "make docs-version  add this version of the site to the branch gh-pages, with a selector of versions"
	@echo "make package  build wheel and sdist, and install the wheel into an empty environment"
	@echo "make fuzz   thousands of damaged logs, images, weights and command lines (an hour)"
	@echo "make mutants  plant errors in the mathematics, and count those that the tests see (an hour)"
	@echo "make lint   formatting, style, types and the import contract alone"
	@echo "make bench  time everything beside its peers, and write the tables of the documentation (an hour)"

demo: $(VENV)/installed
	@out=demo-output; if [ -e $$out ]; then out=demo-output-$$(date +%Y%m%d-%H%M%S); fi; \
	$(BIN)/art-denoised demo --out $$out

# Plugins that no test uses are not loaded, and each process finds the bytecode of those before it.
test:
	$(MAKE) --jobs 2 --output-sync=target lint docs package
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest --numprocesses 2 --dist worksteal \
		--disable-plugin-autoload -p xdist.plugin -p _hypothesis_pytestplugin

docs: $(DOCS)/installed
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build
	$(DOCS)/bin/python tools/check_site.py site

# The branch gh-pages of this clone gets a folder for this version; nothing is pushed.
docs-version: $(DOCS)/installed
	VERSIONS=mike NO_MKDOCS_2_WARNING=1 PATH="$(DOCS)/bin:$$PATH" mike deploy --update-aliases \
		"$$(sed -n 's/^__version__ = "\(.*\)"/\1/p' art_denoised/__init__.py)" latest
	PATH="$(DOCS)/bin:$$PATH" mike set-default latest

package: $(VENV)/installed-test
	$(BIN)/python tools/check_package.py

fuzz: $(VENV)/installed-test
	FUZZ_EXAMPLES=1000 $(BIN)/python -m pytest --numprocesses 2 tests/fuzz

mutants: $(VENV)/installed-test
	OMP_NUM_THREADS=1 $(BIN)/python tools/mutants.py

lint: $(VENV)/installed-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/installed-test
	$(BIN)/python benchmarks/certify.py --json $(RECORDS)/certify.json
	$(BIN)/python benchmarks/replay.py --seeds 6 --json $(RECORDS)/replay.json
	$(BIN)/python benchmarks/scale.py --json $(RECORDS)/scale.json
	$(BIN)/python benchmarks/workers.py --json $(RECORDS)/workers.json
	$(BIN)/python benchmarks/rdc.py --json $(RECORDS)/rdc.json
	$(BIN)/python benchmarks/purification.py --json $(RECORDS)/purification.json
	$(BIN)/python benchmarks/networks.py --json $(RECORDS)/networks.json
	$(BIN)/python benchmarks/adversarial.py --json $(RECORDS)/adversarial.json
	$(BIN)/python benchmarks/gpu.py --json $(RECORDS)/gpu.json
	$(BIN)/python benchmarks/record.py --page

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: pyproject.toml | $(VENV)/bin/python
	$(BIN)/pip install --disable-pip-version-check --quiet --editable .
	@touch $@

$(VENV)/installed-test: pyproject.toml | $(VENV)/bin/python
	$(BIN)/pip install --disable-pip-version-check --quiet --editable '.[test]'
	@touch $@ $(VENV)/installed

$(DOCS)/installed: docs/requirements.txt
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/pip install --disable-pip-version-check --quiet --requirement docs/requirements.txt
	@touch $@

clean:
	rm -rf $(VENV) $(DOCS) site dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
