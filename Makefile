# make demo   dmd2.py, then dfd.py on the tiny teacher; a table and their clips beside data and teacher
# make test   format and lint checks, then the tests that take minutes; make test-all runs all of them
# make site   the docs as a static site in site/, to be opened without a network
# make vbench-env   .venv-vbench with VBench 0.1.5 and its own pins, for eval_vbench.py
# The first two make .venv first, with the pinned packages of requirements.txt. PYTHON names another Python 3.11 or newer.
PYTHON ?= $(firstword $(shell for p in python3.11 python3.12 python3.13; do $$p -c "" 2> /dev/null && echo $$p; done; true))
BIN = .venv/bin
export OMP_WAIT_POLICY = passive

.PHONY: demo test test-all format site vbench-env

.venv/installed: requirements.txt pyproject.toml
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11, 3.12 or 3.13 is here; make PYTHON=... names one"; exit 1; }
	$(PYTHON) -m venv .venv
	@echo "installing PyTorch, diffusers and what they need into .venv, once: minutes, 1.8 GB, with CUDA 5.2 GB"
	$(BIN)/pip install --disable-pip-version-check --quiet --no-compile --requirement requirements.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --editable .
	@echo "compiling them, a minute"
	@# byte-compile on all cores, where pip would use one; a few packages ship files that are no valid Python
	-@$(BIN)/python -m compileall -q -j 0 .venv/lib > /dev/null || true
	touch $@

demo: .venv/installed
	@echo "1/3 DMD2, 200 steps, 3 minutes; the first picture, in one: runs/demo/dmd2__tiny__*/previews/teacher.png"
	$(BIN)/python dmd2.py --steps 200 --gan-weight 0 --ema-decay 0 --runs-dir runs/demo \
		--preview-every 200 --preview-prompts 2 --teacher-steps 25
	@echo "2/3 DFD, 50 steps, a minute"
	$(BIN)/python dfd.py --runs-dir runs/demo --preview-every 0
	@echo "3/3 clips of all, a minute"
	$(BIN)/python experiments/evidence.py "$$(ls -td runs/demo/dmd2__tiny__* | head -1)" \
		"$$(ls -td runs/demo/dfd__tiny__* | head -1)" --names DMD2 "+ DFD" \
		--seeds 12 --repeats 1 --teacher-steps 25 --card --out runs/demo
	@echo "next: source .venv/bin/activate; python dmd2.py --help; README.md"

test: .venv/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -q -n auto --dist worksteal -m "not slow"

test-all: test
	$(BIN)/python -m pytest -q -n auto --dist worksteal -m slow

site: .venv/installed
	$(BIN)/python docs/site.py

format: .venv/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# VBench wants numpy < 2 and transformers 4.33.2, so it lives apart; torch 2.5 is the last to unpickle weights by default.
# Four dimensions need detectron2, which has no wheels: it is compiled from source where that is possible.
DETECTRON2 ?= git+https://github.com/facebookresearch/detectron2.git

vbench-env:
	$(PYTHON) -m venv .venv-vbench
	.venv-vbench/bin/pip install --quiet --disable-pip-version-check --no-compile \
	  vbench==0.1.5 "numpy<2" transformers==4.33.2 torch==2.5.1 torchvision==0.20.1
	-.venv-vbench/bin/pip install --quiet --disable-pip-version-check --no-build-isolation "$(DETECTRON2)"
