# Two commands: `make train` and `make test`. They make .venv by themselves.
RECIPE ?= dcgan_digits
ARGS ?=
VENV ?= .venv
PYTHON ?= $(shell for p in python3 python3.12 python3.11; do \
  $$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null \
  && echo $$p && break; done)
RUN = $(VENV)/bin/python

.PHONY: train test test-slurm lint bench bench-accept bench-compare soak
train: $(VENV)/.installed
	$(RUN) -m engine.train $(RECIPE) $(ARGS)

test: $(VENV)/.installed-test
	$(RUN) -m pytest -n 2 --dist loadfile $(ARGS)

test-slurm: $(VENV)/.installed-test
	$(RUN) -m pytest tests/test_slurm.py -m 'slow or not slow' -rs $(ARGS)

lint: $(VENV)/.installed-test
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

bench: $(VENV)/.installed-test
	$(RUN) -m pytest bench/ --benchmark-only $(ARGS)

bench-accept: $(VENV)/.installed-test
	$(RUN) -m bench.accept $(ARGS)

bench-compare: $(VENV)/.installed-test
	$(RUN) -m bench.compare $(ARGS)

soak: $(VENV)/.installed-test
	$(RUN) -m bench.soak $(ARGS)

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "error: Python 3.11 to 3.13 is needed; name it: make PYTHON=/path/to/python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet -e .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(RUN) -m pip install --quiet -e '.[test]'
	touch $@
