# make demo   set everything up and run the comparison; ends in a table and a report
# make test   set everything up and pass the tests
# make check  lint, types, tests: what CI runs
# make test-gpu  what only a GPU shows, where there is one
# make test-hf  Transformers' own tests on our models: a table and runs/hf/results.json
# make families  audits every causal-LM family of Transformers: docs/families.md, minutes
# make docs-site  the documentation site in runs/site: guides, and a reference from the docstrings
# make bench  ours and its rivals in turns: a table and runs/bench.json
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# CPU torch by default. For a GPU: make install TORCH=torch (or any pip requirement).
ifeq ($(shell uname),Darwin)
TORCH ?= torch>=2.11
else
TORCH ?= torch==2.13.0+cpu
endif
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
STAMP := $(VENV)/.installed

.PHONY: install demo test test-slow test-gpu test-hf check lint docs docs-site families bench clean
install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "spannorm needs Python 3.11 or newer; try make PYTHON=python3.11"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)" 2>/dev/null \
	  || $(BIN)/python -m pip install --quiet "$(TORCH)" --index-url $(TORCH_INDEX)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]" \
	  || { echo "the pinned versions are not to be had here: taking the newest"; \
	       $(BIN)/python -m pip install --quiet -e ".[dev]"; }
	touch $@

demo: install
	$(BIN)/spannorm compare recipes/demo.yaml --out runs/demo

test: install
	$(BIN)/python -m pytest -n 2

test-slow: install
	$(BIN)/python -m pytest -m slow

test-gpu: install
	$(BIN)/python -m pytest -m "gpu or not slow" tests/test_gpu.py tests/kernels/test_add_norm.py

test-hf: install
	$(BIN)/python tests_hf/run.py --json runs/hf/results.json

lint: install
	$(BIN)/ruff check src tests tests_hf benchmarks examples site tools
	$(BIN)/ruff format --check src tests tests_hf benchmarks examples site tools
	$(BIN)/mypy

docs: install
	$(BIN)/python -c 'from spannorm.catalog import write; write()'
	$(BIN)/python -c 'from spannorm.catalog import markdown; print(markdown(), end="")' > docs/placements.md
	$(BIN)/python -m spannorm.train.packages > docs/corpus.md

docs-site: install
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[docs]"
	$(BIN)/python site/build.py --out runs/site
	@echo "runs/site/index.html is the first page; its search needs a server: $(BIN)/python -m http.server -d runs/site"

families: install
	$(BIN)/python -m spannorm.rewiring.survey > docs/families.md

bench: install
	mkdir -p runs
	$(BIN)/python benchmarks/run.py --json runs/bench.json

check: lint test

clean:
	rm -rf $(VENV) runs
