# make pilot   installs into .venv, fetches the model and the data, runs examples/pilot.yaml
# make test    installs into .venv, checks style and types, runs the tests
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
SOURCES := pyproject.toml constraints.txt CMakeLists.txt $(wildcard native/*)

.PHONY: pilot test bench clean

# A verdict of FAIL (3) or INCONCLUSIVE (4) is a result, not an error of make.
pilot: $(VENV)/.installed
	$(BIN)/fourscore run examples/pilot.yaml || { code=$$?; [ $$code -eq 3 ] || [ $$code -eq 4 ] || exit $$code; }

test: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --durations 12

bench: $(VENV)/.installed-test
	$(BIN)/python bench/kernels.py
	$(BIN)/python bench/train_step.py
	$(BIN)/python bench/scoring.py

$(VENV)/.python:
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "fourscore needs Python 3.11 or newer; set PYTHON=...")'
	$(PYTHON) -m venv --clear $(VENV)
	touch $@

$(VENV)/.installed: $(VENV)/.python $(SOURCES)
	$(PIP) install --quiet -c constraints.txt 'torch==2.13.0'
	$(PIP) install --quiet -c constraints.txt -e .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP) install --quiet -c constraints.txt -e '.[test]'
	touch $@

clean:
	rm -rf build $(VENV)
