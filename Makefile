# make demo | test | lint | bench. Each sets up .venv by itself; torch is held by constraints-dev.txt, here only.
PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed

.PHONY: demo test lint bench clean

$(STAMP): pyproject.toml constraints-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --constraint constraints-dev.txt torch
	$(VENV)/bin/pip install --quiet --constraint constraints-dev.txt --editable '.[engine,train,dev]'
	touch $(STAMP)

demo: $(STAMP)
	$(VENV)/bin/evdit demo

# Many tests wait for processes that they start: shared out, they take half the time on two cores. With two threads each they
# would spin for one another.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest --numprocesses 3 --dist loadfile --durations 30

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright

bench: $(STAMP)
	$(VENV)/bin/evdit tinyworld eval --json out/tinyworld.json

clean:
	rm -rf $(VENV) build dist *.egg-info
