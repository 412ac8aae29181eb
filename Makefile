PYTHON ?= python3
# More options for `make demo` and `make benchmark`: make demo ARGS="--seed 1 --iterations 20"
ARGS ?=

BIN := .venv/bin
INSTALLED := .venv/.installed
DATA := data/toybox
SPLITS := train validation test
MANIFESTS := $(SPLITS:%=$(DATA)/%/metadata.jsonl)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo compare compare-leak compare-guard figures test test-all test-device test-quantization test-trackers test-oldest lint benchmark clean

help: ## List the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' Makefile | \
		while IFS='|' read -r name text; do printf '%-18s %s\n' "$$name" "$$text"; done

setup: $(INSTALLED) ## Create .venv and install the package and its tools in tested versions

demo: $(INSTALLED) $(MANIFESTS) ## Train on ToyBox from nothing to a report; a few minutes
	$(BIN)/customized-grpo train --config toybox --overwrite \
		--data.validation $(DATA)/validation --data.test $(DATA)/test $(ARGS)

compare: $(INSTALLED) $(MANIFESTS) ## The paper's experiment, 40 runs; most of a day, and goes on where it stopped
	$(BIN)/customized-grpo compare --config compare $(ARGS)

compare-leak: $(INSTALLED) $(MANIFESTS) ## When does it help? 18 runs; goes on where it stopped
	$(BIN)/customized-grpo compare --config compare-leak $(ARGS)

compare-guard: $(INSTALLED) $(MANIFESTS) ## Is the kept best worth it? 12 runs; goes on where it stopped
	$(BIN)/customized-grpo compare --config compare-guard $(ARGS)

figures: $(INSTALLED) ## Draw the figures of README and docs from the tables in docs/results
	$(BIN)/customized-grpo figures --csv docs/results/comparison.csv --output docs/images/comparison
	$(BIN)/customized-grpo figures --csv docs/results/leak.csv --output docs/images/leak
	$(BIN)/customized-grpo figures --diagnosis docs/results/diagnosis.json --output docs/images/diagnosis

# A process for each core, with one thread each: several with several threads each would be far slower.
test: $(INSTALLED) ## Run the fast tests; a few minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal
	@$(MAKE) --no-print-directory test-device

test-all: $(INSTALLED) ## Run every test, the slow ones too
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal -m ""
	SECOND_DEVICE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal -m "" tests/second_device

# By themselves: torch looks for devices once in a process.
test-device: $(INSTALLED) ## Run the tests on a second device, which a C++ compiler makes of the CPU
	SECOND_DEVICE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal tests/second_device

# Apart from the others: where these two libraries are installed, every process that knows LoRA loads them.
test-quantization: $(INSTALLED) ## Install torchao and bitsandbytes apart, and run the tests that need them
	$(BIN)/pip install --quiet --no-deps --upgrade --target .venv/quantization -c constraints.txt torchao bitsandbytes
	OMP_NUM_THREADS=1 PYTHONPATH=.venv/quantization $(BIN)/python -m pytest -n auto --dist worksteal -m quantization \
		tests/policies/test_quantization.py tests/policies/test_recipes.py tests/training/test_optimizer.py
	SECOND_DEVICE=1 OMP_NUM_THREADS=1 PYTHONPATH=.venv/quantization $(BIN)/python -m pytest -n auto -m "quantization and not slow" \
		tests/second_device

# Apart from the others: trackio takes an older Pillow than the tested one.
test-trackers: $(INSTALLED) ## Install wandb and trackio apart, and run the tests that need them
	$(BIN)/pip install --quiet --upgrade --target .venv/trackers wandb==0.31.0 trackio==0.43.0
	OMP_NUM_THREADS=1 PYTHONPATH=.venv/trackers $(BIN)/python -m pytest -n auto -m trackers tests/tracking/test_services.py

test-oldest: $(INSTALLED) ## Run the fast tests with the oldest versions of libraries that pyproject.toml allows
	$(BIN)/pip install --quiet --upgrade --no-deps --target .venv/oldest -r oldest.txt \
		annotated-types typing-extensions pydantic-core==2.33.0 typing-inspection pyparsing python-dateutil six contourpy cycler fonttools kiwisolver
	OMP_NUM_THREADS=1 PYTHONPATH=.venv/oldest $(BIN)/python -m pytest -n auto --dist worksteal

lint: $(INSTALLED) ## Check style, formatting, types, imports between rooms, and plain English
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/python tools/check_language.py

benchmark: $(INSTALLED) ## Measure what a training iteration costs
	$(BIN)/python benchmarks/toybox_step.py $(ARGS)

clean: ## Remove .venv, caches and builds; data and runs stay
	rm -rf .venv build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "Python 3.11 or newer is needed, and '$(PYTHON)' is not that: $$($(PYTHON) --version 2>&1 || true)" >&2; \
		echo "Name another: make setup PYTHON=python3.11" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

$(DATA)/train/metadata.jsonl: COUNT = 256
$(DATA)/validation/metadata.jsonl: COUNT = 96
$(DATA)/test/metadata.jsonl: COUNT = 384

# Written beside its place and renamed, so that an interrupted export leaves nothing half done there.
$(MANIFESTS): | $(INSTALLED)
	@test ! -e $(@D) || { echo "$(@D) has no metadata.jsonl; delete that folder first" >&2; exit 1; }
	@rm -rf $(@D).partial
	$(BIN)/customized-grpo toybox export $(@D).partial --split $(notdir $(@D)) --count $(COUNT)
	@mv $(@D).partial $(@D)
