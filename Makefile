# Every target that needs the environment makes or completes .venv first (tools/setup_env.sh);
# with a .venv that is there already this costs a fraction of a second. With another Python
# (make test-gpu PY=python3) nothing is installed: its packages are its owner's.
PY := .venv/bin/python
export PIP_REQUIRE_VIRTUALENV := 1
OWN := $(filter .venv/%,$(PY))
ENV := $(if $(OWN),env)
SETUP := $(if $(OWN),setup)

.DEFAULT_GOAL := help
.PHONY: help env setup setup-nnunet demo demo-det demo-seg demo-video demo-medical demo-change \
        demo-diffusion demo-points demo-sr demo-vlm setup-transformers test test-gpu lint tables kernels check-gpu bench docs \
        clean

help:
	@echo 'make demo      train, evaluate and predict: classification on a small built-in set (3 min)'
	@echo 'make demo-det  the same for Mask R-CNN: boxes and masks (6 min)'
	@echo 'make demo-seg  the same for UperNet: semantic segmentation (5 min)'
	@echo 'make demo-video  the same for VideoMamba: digits that move, in video files (5 min)'
	@echo 'make demo-medical  VM-UNet on slices and SegMamba on volumes of made-up heads (8 min)'
	@echo 'make demo-change  RSM-CD: what changed between two photographs (4 min)'
	@echo 'make demo-diffusion  DiS: digits made of noise, of the class that is asked for (5 min)'
	@echo 'make demo-points  PointMamba: solids as clouds of points (4 min)'
	@echo 'make demo-vlm  Cobra: captions of digits on photographs (6 min)'
	@echo 'make demo-sr   MambaIR: photographs twice as large, beside bicubic (4 min)'
	@echo 'make test      all tests'
	@echo 'make test-gpu  the tests that need a GPU, in several processes'
	@echo 'make lint      ruff, and whether the tables are those of the metafiles'
	@echo 'make tables    write the tables of published models into README, docs and configs'
	@echo 'make kernels   compile every CUDA kernel for every GPU, no GPU needed; registers, spills'
	@echo 'make check-gpu every CUDA kernel under compute-sanitizer, on a machine with a GPU'
	@echo 'make docs      the documentation as a site in site/, every warning an error (15 s)'
	@echo 'make bench     speed and memory on this CPU beside Swin-T, correctness first'
	@echo 'make env       only the environment: .venv in this folder (3 min the first time)'
	@echo "make setup     the same and mmcv's operators, which detection needs (5 min more)"
	@echo 'make setup-transformers  .venv-transformers beside it, for tests with transformers (1 min)'
	@echo 'make setup-nnunet  .venv-nnunet beside it, with nnU-Net for its trainers (1 min)'
	@echo 'make clean     remove demo sets, work_dirs and caches; .venv stays'
	@echo 'PY=python3     another Python that has the packages, in place of .venv'

env:
	@tools/setup_env.sh

setup:
	@tools/setup_env.sh ops

# nnU-Net needs an older timm than the tests: a second environment that sees the first's packages.
setup-nnunet: $(ENV) .venv-nnunet/stamp

.venv-nnunet/stamp: pyproject.toml
	@$(PY) -m venv --clear .venv-nnunet
	@$(PY) -c 'import sysconfig; print("import site; site.addsitedir(%r)" % \
	    sysconfig.get_path("purelib"))' >"$$(.venv-nnunet/bin/python -c \
	    'import sysconfig; print(sysconfig.get_path("purelib"))')/venv.pth"
	@.venv-nnunet/bin/python -m pip install -qq -e '.[nnunet]'
	@touch $@

# mmpretrain cannot be imported beside the newest transformers, with which tests compare.
setup-transformers: $(ENV) .venv-transformers/stamp

.venv-transformers/stamp: pyproject.toml
	@$(PY) -m venv --clear .venv-transformers
	@$(PY) -c 'import sysconfig; print("import site; site.addsitedir(%r)" % \
	    sysconfig.get_path("purelib"))' >"$$(.venv-transformers/bin/python -c \
	    'import sysconfig; print(sysconfig.get_path("purelib"))')/venv.pth"
	@.venv-transformers/bin/python -m pip install -qq 'transformers==5.24.0'
	@touch $@

demo: $(ENV)
	@$(PY) tools/demo/run.py cls

demo-det: $(SETUP)
	@$(PY) tools/demo/run.py det

demo-seg: $(ENV)
	@$(PY) tools/demo/run.py seg

demo-video: $(ENV)
	@$(PY) tools/demo/run.py video

demo-medical: $(ENV)
	@$(PY) tools/demo/medical.py

demo-change: $(ENV)
	@$(PY) tools/demo/change.py

demo-diffusion: $(ENV)
	@$(PY) tools/demo/diffusion.py

demo-points: $(ENV)
	@$(PY) tools/demo/points.py

demo-sr: $(ENV)
	@$(PY) tools/demo/super_resolution.py

demo-vlm: $(ENV)
	@$(PY) tools/demo/vlm.py

# ARGS passes options on: make test ARGS='-m "not slow" -x'; with -n 0 all run in one process
test: $(SETUP)
	@OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --dist worksteal $(ARGS)  # a core for each process

test-gpu: $(ENV)
	@$(PY) -c 'import sys, torch; torch.cuda.is_available() or sys.exit("PyTorch finds no GPU here")'
	@PYTHONPATH=$(CURDIR):$$PYTHONPATH $(PY) -m pytest -m gpu -n auto --dist worksteal $(ARGS)

lint: $(ENV)
	@$(PY) -m ruff check .
	@PYTHONPATH=$(CURDIR) $(PY) tools/tables.py --check

tables: $(ENV)
	@PYTHONPATH=$(CURDIR) $(PY) tools/tables.py

kernels: $(ENV)
	@$(PY) tools/check_kernels.py $(ARGS)

check-gpu: $(ENV)
	@$(PY) tools/check_gpu.py $(ARGS)

bench: $(ENV)
	@$(PY) tools/bench/cpu_vs_swin.py $(ARGS)

# An environment of its own, without torch: 130 MB in place of 6 GB. It needs Python 3.11 or newer.
DOCS := .venv-docs/bin/python
docs: .venv-docs/stamp
	@$(DOCS) -m sphinx -W --keep-going -q -E -j auto -d build/doctrees docs site
	@echo 'the documentation is in site/index.html'

.venv-docs/stamp: pyproject.toml
	@$(or $(PYTHON),python3) -m venv .venv-docs
	@$(DOCS) -m pip install -qq 'pip>=25.1'
	@$(DOCS) -m pip install -qq --group docs
	@touch $@

clean:
	rm -rf data/demo work_dirs build site .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv*/*' -prune -exec rm -rf {} +
