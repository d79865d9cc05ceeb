# make demo   dmd2.py, then dfd.py on the tiny teacher; a contact sheet and a table beside data and teacher
# make test   format and lint checks, then the tests
# Both make .venv first, with the pinned packages of requirements.txt. PYTHON names another Python 3.11 or newer.
PYTHON ?= python3.11
BIN = .venv/bin

.PHONY: demo test format

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --no-compile --requirement requirements.txt
	@# byte-compile on all cores, where pip would use one; a few packages ship files that are no valid Python
	-@$(BIN)/python -m compileall -q -j 0 .venv/lib > /dev/null || true
	touch $@

demo: .venv/installed
	$(BIN)/python dmd2.py --runs-dir runs/demo --preview-every 0
	$(BIN)/python dfd.py --runs-dir runs/demo --preview-every 0 --init "$$(ls -td runs/demo/dmd2__tiny__* | head -1)"
	$(BIN)/python tools/evidence.py "$$(ls -td runs/demo/dmd2__tiny__* | head -1)" \
		"$$(ls -td runs/demo/dfd__tiny__* | head -1)" --seeds 4 --repeats 1 --teacher-steps 50 --transpose --out runs/demo

test: .venv/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q

format: .venv/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
