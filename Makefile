PYTHON ?= python3
PROFILE ?= quick
VENV := .venv
BIN := $(VENV)/bin
TORCH := torch==2.13.0
TRITON := triton==3.7.1
STAMP := $(VENV)/.ready
TRITON_STAMP := $(VENV)/.triton

.PHONY: setup reproduce publish publish-quick figures bench test test-all lint book bundle lock clean

setup: $(STAMP)

# Made anew whenever the lock changes; otherwise nothing is fetched.
$(STAMP): requirements.lock
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

# Tests run the GPU's kernels in Triton's interpreter. A torch for CUDA has brought its own Triton;
# other systems than Linux on x86-64 have none, and skip these tests.
$(TRITON_STAMP): $(STAMP)
	$(BIN)/python -c "import triton" 2>/dev/null || [ "$$(uname -sm)" != "Linux x86_64" ] || \
	  $(BIN)/python -m pip install --disable-pip-version-check --no-deps $(TRITON)
	touch $@

reproduce: $(STAMP)
	$(BIN)/saesub reproduce --profile $(PROFILE)

# Takes a `full` run, of all notebooks or of some, over into notebooks/, data/results/, the README
# and docs/; the scorecard is run once more, with the recorded claims of those left out.
# `publish-quick` takes over what a `quick` run of all notebooks measured and took.
publish: $(STAMP)
	$(BIN)/python notebooks/publish.py --seed results/full
	$(BIN)/saesub reproduce --profile full --notebook 12 --again
	$(BIN)/python notebooks/publish.py results/full

publish-quick: $(STAMP)
	$(BIN)/python notebooks/publish.py results/quick

# Draws the figures of the notebooks and the README again from the records, into build/figures.
figures: $(STAMP)
	$(BIN)/python notebooks/figures.py

# Times a training step of saesub and of four other libraries, an hour or two: leave the machine
# alone meanwhile. Writes benchmarks/results/ and docs/speed.md.
bench: $(STAMP)
	$(BIN)/python benchmarks/run.py
	$(BIN)/python benchmarks/report.py

# What to run while working, in minutes; `test-all` adds kills, browsers, several processes and every
# notebook, in a process beside the others'.
test: $(TRITON_STAMP)
	$(BIN)/python -m pytest -m "not slow"

test-all: $(TRITON_STAMP)
	$(BIN)/python tests/halves.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python saesub
	$(BIN)/lint-imports

# The site: the committed notebooks, the README and the pages in docs/, into build/book. Nothing is
# run.
book: figures
	rm -rf build/book
	$(BIN)/python -m sphinx -q -W -b html -d build/doctrees -c docs/book . build/book
	cp build/book/README.html build/book/index.html

# One archive to keep: the book, the records and the wheel. The book opens from a file system.
bundle: book
	rm -rf build/saesub build/saesub.zip
	mkdir -p build/saesub
	cp -r build/book build/saesub/book
	cp -r data/results build/saesub/records
	cp README.md CHANGELOG.md CITATION.cff build/saesub
	$(BIN)/python -m build --wheel --no-isolation --outdir build/saesub . > build/wheel.log
	cd build && ../$(BIN)/python -m zipfile -c saesub.zip saesub

# Pins what a fresh environment resolves to; the local part of torch's version (+cpu) is dropped.
lock:
	rm -rf build/lock
	$(PYTHON) -m venv build/lock
	build/lock/bin/python -m pip install --disable-pip-version-check $(TORCH)
	build/lock/bin/python -m pip install --disable-pip-version-check hatchling editables '.[dev]'
	{ head -n 1 requirements.lock; build/lock/bin/python -m pip freeze --exclude saesub \
	  | sed 's/+.*//' | grep -vE '^(nvidia-|triton|cuda-)'; } > build/requirements.lock
	mv build/requirements.lock requirements.lock

clean:
	rm -rf $(VENV) build dist results .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
