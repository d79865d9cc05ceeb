# make demo   train the one-step student on the tiny teacher, write contact sheets and a table
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
	$(BIN)/python dmd.py

test: .venv/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q

format: .venv/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
