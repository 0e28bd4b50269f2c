# make demo   evaluate dense, ATS untouched and ATS fine-tuned on real handwritten digits; a table and a picture
# make test   the whole test suite
# make lint   ruff
# Each creates .venv and installs on first use, and works offline from then on.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test lint format clean

demo: $(INSTALLED)
	@$(BIN)/python tools/demo.py

test: $(INSTALLED)
	@$(BIN)/python -m pytest

lint: $(INSTALLED)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

format: $(INSTALLED)
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

$(INSTALLED): requirements.txt setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: Python 3.11 or newer is needed; say which with: make PYTHON=python3.12" >&2; exit 1; }
	@echo "Installing into $(VENV), once (about 2 minutes, 6 GB with PyPI's CUDA build of torch) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --progress-bar on -r requirements.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e . || true
	@touch $@

clean:
	rm -rf $(VENV) data output build dist *.egg-info
