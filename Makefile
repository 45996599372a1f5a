# Each target sets up what it needs. Nothing outside this folder is touched.
PYTHON ?= python3.11
VENV := .venv
PY := $(VENV)/bin/python
SEED ?= 1
COUNT ?= 1000000
OUT ?= runs/demo-$(shell date +%Y%m%d-%H%M%S)
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: help docs setup setup-dev browser demo app bench-app pictures test test-quick test-all test-gpu lint bench pruners-table quantizers-table quantized-models-table strategies-table coverage torture mutants fuzz assets clean bench-peers

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-23s %s\n", $$1, $$2}'

setup: $(VENV)/.ready  ## a virtual environment with everything that runs on this machine

$(VENV)/.ready: requirements.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet -r requirements.txt
	touch $@

setup-dev: $(VENV)/.ready-dev

$(VENV)/.ready-dev: $(VENV)/.ready requirements-dev.txt
	$(PY) -m pip install --quiet -r requirements-dev.txt
	touch $@

demo: setup  ## compress the bundled model on the bundled data and print the comparison
	$(PY) -m compress run --model resnet18 --data fashion-mnist --threads 1 --out $(OUT)

app: setup  ## the web app on http://127.0.0.1:7860
	$(PY) app.py

# A file's tests share servers, models and runs, so each file stays on one worker; the longest files start first.
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test: setup-dev lint browser  ## what CI runs, 15 minutes on two cores; tests of the app are skipped where Chromium is missing
	$(PYTEST)

test-quick: setup-dev  ## the unit tests alone, two minutes on two cores
	$(PYTEST) -m "not integration and not browser and not slow and not gpu"

test-all: setup-dev lint browser  ## every test, with the slowest repetitions and 200 random networks
	ESPALIER_RANDOM_NETWORKS=200 $(PYTEST) -m ""

browser: setup-dev
	test -x "$${ESPALIER_CHROMIUM:-/usr/bin/chromium}" || $(PY) -m playwright install chromium \
	  || echo "No Chromium could be installed: the tests of the app will be skipped."

test-gpu: setup-dev  ## the tests that need an NVIDIA GPU
	$(PY) -m pytest -m gpu

lint: setup-dev
	$(PY) -m ruff check .
	$(PY) -m mypy
	$(VENV)/bin/hadolint Dockerfile

bench: setup  ## the figures of the README's table
	$(PY) -m bench.latency
	$(PY) -m bench.accuracy

bench-app: setup-dev browser  ## how quick the web app is, in a real browser
	$(PY) -m bench.app

pictures: setup-dev browser  ## the web app in every state, in build/pictures, to be looked at
	$(PY) scripts/app_pictures.py build/pictures

bench-peers: setup  ## docs/benchmarks.md: the same models through other tools, 7 GB of them; hours; PEERS="--only ..." for some
	$(PY) -m bench.peers $(PEERS)

pruners-table: setup  ## docs/pruners.md: every pruner on the bundled model, the better part of an hour
	$(PY) -m bench.pruners

quantizers-table: setup  ## docs/quantizers.md: every quantizer on the bundled model at 8 and 4 bits
	$(PY) -m bench.quantizers

quantized-models-table: setup  ## docs/quantized-models.md: four dense models on integers; the better part of an hour
	$(PY) -m bench.quantized_models

strategies-table: setup  ## docs/strategies.md: every search strategy on the bundled model; hours
	$(PY) -m bench.strategies

coverage: setup  ## docs/coverage.md: every torchvision classifier, proved; hours
	$(PY) -m bench.coverage

torture: setup-dev  ## hostile uploads and faults, all of them, and the table of what held; ROWS="hostile ..." for some
	PYTHONPATH=tests:tests/helpers:tests/networks $(PY) -W ignore -m torture $(ROWS)

mutants: setup-dev  ## each protection taken out in turn: does a test miss it? an hour; NAMES="names keys" for some
	nice $(PY) scripts/mutate.py $(or $(NAMES),--all)

fuzz: setup-dev  ## a million random mutants of checkpoints and zips, hours; SEED=7 and COUNT=1000 for others
	PYTHONPATH=tests:tests/helpers:tests/networks $(PY) -W ignore -m torture.mutants --seed $(SEED) --count $(COUNT) --folder build/fuzz

docs: setup  ## the generated tables and pictures of the documentation, and the figures of docs/architecture.md
	$(PY) -m scripts.docs_tables
	$(PY) -m scripts.structure --write

clean:  ## removes the environment and all runs
	rm -rf $(VENV) runs
