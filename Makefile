# make demo          evaluate dense, ATS untouched and ATS fine-tuned on real handwritten digits; a table and a picture
# make demo-video    the same on videos of digits that move, with the frames in order and shuffled
# make demo-photos   the same on photographs, once CIFAR-10 is prepared: tools/prepare_cifar10.py
# make study         the paper's studies on the digits, three seeds; writes docs/STUDY.md, goes on where it was interrupted
# make test          the tests, without the long ones
# make test-all      all of them: also compiled graphs, exported files, several processes, the demos
# make test-faults   a training killed at 30 moments, each resumed, compared with an undisturbed one
# make test-lowest   a selection of the tests with the lowest versions that pyproject.toml allows, in .venv-lowest
# make lint          ruff and mypy
# make docs          the site, output/site/index.html: this README and docs/, no link that leads nowhere
# make gpu           on a machine with a GPU, 9 minutes at most: the tests that need one, then the suite `gpu` of
#                    docs/BENCHMARKS.md; it installs nothing, and `make gpu PYTHON=python3.12` says whose packages it uses
# Each of the others creates .venv and installs on first use, and works offline from then on. Where a virtual environment
# is active they use that instead, as it is, and install only if it lacks a package of requirements.txt.

PYTHON ?= python3
ACTIVE := $(if $(filter command line,$(origin VENV)),,$(VIRTUAL_ENV))
VENV := $(or $(ACTIVE),.venv)
BIN := $(VENV)/bin
KILLS ?= 30
comma := ,
INSTALLED := $(if $(ACTIVE),active,$(VENV)/.installed)
PIP_INSTALL = set -o pipefail; $(BIN)/python -m pip install --disable-pip-version-check --no-compile --progress-bar off \
	-r requirements.txt | sed -u -n 's/^ *\(Collecting [^ ]*\).*/  \1/p; s/^\(Installing\) collected.*/  \1 .../p'
HAS_ALL = from importlib.metadata import version; [version(l.split("==")[0]) for l in open("requirements.txt") if "==" in l]
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder --max-worker-restart 0 \
	--ignore tests/benchmark/test_peers.py

.PHONY: help active environment lowest-versions demo demo-video demo-photos study test test-all test-lowest test-faults gpu lint docs format clean

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' $(firstword $(MAKEFILE_LIST))

demo: environment
	@$(BIN)/python tools/demo.py

demo-video: environment
	@$(BIN)/python tools/demo_video.py

demo-photos: environment
	@$(BIN)/python tools/demo_photos.py

study: environment
	@$(BIN)/python tools/study.py
	@$(BIN)/python tools/compare.py

# One thread per test process: two processes that share two cores lose more to each other's threads than they gain.
# Files are begun in the order of tests/conftest.py, not by their number of tests: some of the longest have few. A process
# that ends is a failure at once: replaced, it leaves the run waiting for ever. The engines of test_peers.py (OpenVINO,
# ONNX Runtime, inductor) have ended one that had run many other files, so they have a process of their own.
test: environment
	@$(PYTEST) -m "not long"

test-all: environment
	@$(PYTEST)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/benchmark/test_peers.py

test-faults: environment
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/engine/test_faults.py -k any_moment --kills $(KILLS) -s

# The lower bounds of pyproject.toml, also of the extras that these tests need, as pip wants them.
LOWEST = import tomllib; project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
	extras = project["optional-dependencies"]; bounds = [*project["dependencies"], *extras["video"], *extras["hf"]]; \
	print(*(bound.replace(">=", "==") for bound in bounds))
LOWEST_TESTS = tests/config tests/reduction tests/models/test_models.py tests/models/test_xvit.py tests/test_parity.py \
	tests/plugin/test_plugin.py tests/plugin/test_plugin_transformers.py tests/datasets/test_decode.py \
	tests/checkpoint tests/cli/test_run_net.py

# Left out: timm before 1.0.31 cannot compute rotary embeddings in float64, in which these tests compare networks.
NOT_LOWEST = Eva or rope_mixed_ape

lowest-versions:
	@$(PYTHON) -c '$(LOWEST)'

test-lowest: .venv-lowest/.installed
	@OMP_NUM_THREADS=1 .venv-lowest/bin/python -m pytest -m "not long" -k "not ($(NOT_LOWEST))" $(LOWEST_TESTS)

.venv-lowest/.installed: pyproject.toml
	@$(PYTHON) -m venv .venv-lowest
	@.venv-lowest/bin/python -m pip install --disable-pip-version-check --no-compile --progress-bar off -q \
		$$($(MAKE) -s lowest-versions) pytest hypothesis scipy scikit-learn
	@touch $@

# The suite begins nothing after its 6 minutes (ats/benchmark/suites/gpu.yaml).
gpu:
	@for python in "$(PYTHON)" $(BIN)/python ""; do [ -z "$$python" ] || ! "$$python" -c "import torch" 2>/dev/null || break; done; \
	[ -n "$$python" ] || { echo "error: neither $(PYTHON) nor $(BIN)/python has torch; say which has: make gpu PYTHON=python3.12" >&2; exit 1; }; \
	failed=; \
	echo "$$(date +%T) tests that need a GPU"; \
	timeout 140 "$$python" -m pytest -m gpu -rs $$(grep -rl --include="test_*.py" "mark\.gpu" tests) || failed="the tests"; \
	echo "$$(date +%T) tools/benchmark.py --suite gpu"; \
	timeout 400 "$$python" tools/benchmark.py --suite gpu || failed="$${failed:+$$failed and }the suite"; \
	echo "$$(date +%T) end"; \
	[ -z "$$failed" ] || { echo "error: make gpu: $$failed failed, see above" >&2; exit 1; }

docs: environment
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

lint: environment
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: environment
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

ifdef ACTIVE
active:
	@$(BIN)/python -c '$(HAS_ALL)' 2>/dev/null || \
		{ echo "Installing requirements.txt into $(VENV): it lacks some of these packages" >&2; $(PIP_INSTALL); }
else
$(INSTALLED): requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: Python 3.11 or newer is needed; say which with: make PYTHON=python3.12" >&2; exit 1; }
	@echo "Installing into $(VENV), once: 2 to 3 minutes and 6 GB (PyPI's torch comes with CUDA)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP_INSTALL)
	@touch $@
endif

environment: $(INSTALLED)
	@echo "Using $(VENV)$(if $(ACTIVE),$(comma) the environment that is active)" >&2

clean:
	rm -rf .venv .venv-lowest data output build dist *.egg-info

SHELL := /bin/bash
