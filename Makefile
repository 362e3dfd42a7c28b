# make pilot   installs into .venv, fetches the model and the data, runs examples/pilot.yaml
# make test    installs into .venv, checks style and types, runs the tests
# make bench   installs the peers into .venv-bench, runs every bench on a quiet machine (BENCH="--quick" for a look)
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PEERS := .venv-bench
BENCH ?=
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

bench: $(PEERS)/.installed
	$(PEERS)/bin/python bench/run.py $(BENCH)

$(VENV)/.python $(PEERS)/.python:
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "fourscore needs Python 3.11 or newer; set PYTHON=...")'
	$(PYTHON) -m venv --clear $(@D)
	touch $@

$(VENV)/.installed: $(VENV)/.python $(SOURCES)
	$(PIP) install --quiet -c constraints.txt 'torch==2.13.0'
	$(PIP) install --quiet -c constraints.txt -e .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP) install --quiet -c constraints.txt -e '.[test]'
	touch $@

$(PEERS)/.installed: $(PEERS)/.python bench/requirements.txt $(SOURCES)
	$(PEERS)/bin/python -m pip --disable-pip-version-check install --quiet -r bench/requirements.txt
	$(PEERS)/bin/python -m pip --disable-pip-version-check install --quiet -c constraints.txt -e .
	touch $@

clean:
	rm -rf build $(VENV) $(PEERS)
