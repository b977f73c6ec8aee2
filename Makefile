# `make demo` and `make test` do all set-up: virtual environment, pinned installs, data, model.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# The GPU targets install nothing: a GPU machine often has its own torch, and no network.
GPU_PYTHON ?= python3

.PHONY: demo test test-slow test-wheel lint test-gpu bench-gpu gpu-sheet clean

demo: $(STAMP)
	$(BIN)/python -m rlhf.pipeline --config configs/demo $(ARGS)
	@echo "The rlhf command is found after: source $(BIN)/activate"

test: $(STAMP) lint
	$(BIN)/python -m pytest -m "not gpu and not slow" $(ARGS)

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m "slow and not gpu" $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The built file, installed with its dependencies in a new environment, trains in a folder that is not this one.
test-wheel:
	rm -rf .whl && mkdir -p .whl/place && $(PYTHON) -m venv .whl/venv
	.whl/venv/bin/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	.whl/venv/bin/python -m pip wheel --quiet --disable-pip-version-check --no-deps -w .whl .
	.whl/venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt "$$(echo .whl/*.whl)[demo]"
	cd .whl/place && ../venv/bin/rlhf data --config demo/data.yaml
	cd .whl/place && ../venv/bin/rlhf sft --config demo/sft.yaml --max_steps 2 --per_device_train_batch_size 4 --max_eval_samples 8
	cd .whl/place && ../venv/bin/rlhf registry export sft/demo model && ../venv/bin/rlhf registry list

test-gpu:
	$(GPU_PYTHON) -m pytest -m gpu tests/test_gpu.py $(ARGS)

bench-gpu:
	$(GPU_PYTHON) benchmarks/rollout.py --device cuda --variants default sampler=compiled $(ARGS)
	$(GPU_PYTHON) benchmarks/floor.py --device cuda $(ARGS)
	$(GPU_PYTHON) benchmarks/memory.py --device cuda $(ARGS)
	$(GPU_PYTHON) benchmarks/scaling.py --device cuda $(ARGS)

# Eight minutes at most; ARGS="--only 135M 1B" takes some of the sections.
gpu-sheet:
	$(GPU_PYTHON) benchmarks/gpu_sheet.py $(ARGS)

# torch first and alone: pip then sees the pinned version and does not go looking for another build.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[demo,dev]"
	touch $@

clean:
	rm -rf $(VENV) outputs registry
