# Every target that needs the environment makes or completes .venv first (tools/setup_env.sh);
# with a .venv that is there already this costs a fraction of a second.
PY := .venv/bin/python
export PIP_REQUIRE_VIRTUALENV := 1

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-det demo-seg test lint kernels check-gpu bench clean

help:
	@echo 'make demo      train, evaluate and predict: classification on a small built-in set (4 min)'
	@echo 'make demo-det  the same for Mask R-CNN: boxes and masks (8 min)'
	@echo 'make demo-seg  the same for UperNet: semantic segmentation (8 min)'
	@echo 'make test      all tests'
	@echo 'make lint      ruff'
	@echo 'make kernels   compile every CUDA kernel for every GPU, no GPU needed; registers, spills'
	@echo 'make check-gpu every CUDA kernel under compute-sanitizer, on a machine with a GPU'
	@echo 'make bench     speed and memory on this CPU beside Swin-T, correctness first'
	@echo 'make setup     only the environment: .venv in this folder (10 min the first time)'
	@echo 'make clean     remove demo sets, work_dirs and caches; .venv stays'

setup:
	@tools/setup_env.sh

demo: setup
	@$(PY) tools/demo/run.py cls

demo-det: setup
	@$(PY) tools/demo/run.py det

demo-seg: setup
	@$(PY) tools/demo/run.py seg

# ARGS passes options on: make test ARGS='-m "not slow" -x'
test: setup
	@$(PY) -m pytest $(ARGS)

lint: setup
	@$(PY) -m ruff check .

kernels: setup
	@$(PY) tools/check_kernels.py $(ARGS)

check-gpu: setup
	@$(PY) tools/check_gpu.py $(ARGS)

bench: setup
	@$(PY) tools/bench/cpu_vs_swin.py $(ARGS)

clean:
	rm -rf data/demo work_dirs build .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
