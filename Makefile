# Every target makes .venv by itself on first use.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: demo study docs test test-fast test-install test-newest real lint bench gpu chaos format catalogue clean

demo: $(STAMP)  ## the same training twice, without and with a divergence: runs/demo/
	rm -rf runs/demo
	$(BIN)/mirrorpo study recipes/studies/demo.yaml --out runs/demo --export png
	@echo "one seed: run 'make study' for more"

study: $(STAMP)  ## ten more seeds of the demo, in its folder
	test -d runs/demo || $(MAKE) demo
	$(BIN)/mirrorpo study recipes/studies/demo.yaml 'seeds={first: 50, count: 10}' --out runs/demo --resume --export png

docs: $(STAMP)  ## the site: build/site/index.html; a warning is an error
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs build/site

# Fewer steps and problems than the recipe's: a step takes 9 s on two cores that multiply bfloat16, 20 s on two that do not.
real: $(STAMP)  ## train a pretrained model of 135 M parameters on word problems: runs/real/ (fetches 98 MB once)
	$(BIN)/python scripts/get_smollm2.py
	rm -rf runs/real
	$(BIN)/mirrorpo train smollm2/words_dr_grpo train.steps=20 eval.problems=64 --out runs/real \
		model.dtype=$(if $(shell grep -m1 -ow -e avx512_bf16 -e amx_bf16 /proc/cpuinfo 2>/dev/null),bfloat16,float32)

test: $(STAMP)  ## the whole test suite, warnings as errors, on up to four cores
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

FAST := $(addprefix tests/divergences/test_,custom.py enumeration.py neural.py neural_file.py reductions.py validation.py) \
  $(addprefix tests/losses/test_,advantages.py aggregation.py anchors.py coefficient.py combinations.py metrics.py \
  objective.py presets.py regions.py solver.py surrogates.py) tests/kernels/test_packing.py \
  $(addprefix tests/config/test_,merge.py objective_file.py train_recipe.py) tests/runs/test_folder.py tests/tasks/test_plugins.py \
  tests/training/test_trl_seam.py tests/test_moved.py tests/test_user_code.py

test-fast: $(STAMP)  ## the pure core and the contracts: under 90 seconds
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile $(FAST)

test-install: $(STAMP)  ## the wheel in fresh environments: the core alone, beside verl, with the trainer
	$(BIN)/python scripts/test_install.py

# Not part of CI's verdict: a seam that moved in a newer TRL is seen here before its users meet it.
test-newest: $(STAMP)  ## the trainer's tests with the newest TRL and transformers, in an environment of their own
	$(BIN)/python scripts/test_newest.py

test-real: $(STAMP)  ## inside other projects' code: verl, DeepSpeed in their own environments; PRIME_RL, SLIME, SKYRL name checkouts
	$(BIN)/python scripts/test_install.py train verl
	$(BIN)/python -m pytest -rs tests/real

catalogue: $(STAMP)  ## write the generated docs again: tables of names, of bias and of fixed points, the page with sliders
	$(BIN)/python -m mirrorpo.cli.listing
	$(BIN)/python scripts/names_table.py
	$(BIN)/python scripts/make_bias_table.py
	$(BIN)/python scripts/fixed_points.py
	$(BIN)/python scripts/make_explorer.py
	$(BIN)/python scripts/rewards_tables.py

lint: $(STAMP)  ## style, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)  ## ratios, not absolute times
	$(BIN)/python benchmarks/run.py

gpu:  ## the library on a GPU, in under nine minutes: docs/results/gpu/ (QUICK=1, DEVICE=cpu: build/gpu/, WHEELS=FOLDER; no .venv)
	$(PYTHON) scripts/gpu.py $(if $(QUICK),--quick) $(if $(DEVICE),--device $(DEVICE)) $(if $(WHEELS),--wheels $(WHEELS))

chaos: $(STAMP)  ## 50 kills and other faults; every run must end equal to the unbroken one
	HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1 $(BIN)/python tests/chaos/long.py

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "mirrorpo needs Python >= 3.11, this is " + sys.version.split()[0] + ": make PYTHON=python3.11 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
# verl asks for transformers below 5.11 and TRL for a newer one; its losses, which the tests call, need neither bound.
	if $(BIN)/python -c 'import sys; sys.exit(sys.version_info >= (3, 13))'; then \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps verl; fi
	touch $@

clean:
	rm -rf .venv runs .pytest_cache .ruff_cache
