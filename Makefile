PYTHON ?= python3
DEMO_CONFIG ?= configs/quickstart_digits.yaml
DEMO_ARGS ?=
TEST_ARGS ?=

BIN := .venv/bin
SETUP := .venv/.installed
ROOMS := $(patsubst %/__init__.py,%,$(wildcard $(addsuffix /__init__.py,kernels vision diffusion configs tools)))

# Hub look-ups without a network cost about 25 s a file; nothing here needs the hub.
export HF_HUB_OFFLINE := 1

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-short test lint typecheck format clean distclean

help:
	@echo "make demo        distil a small DiT into a LiT on handwritten digits, into runs/demo"
	@echo "make demo-short  the same in a few steps: shows that it runs, not how well"
	@echo "make test        the tests that need neither a GPU nor minutes"
	@echo "make lint        ruff, file lengths, ASCII, forbidden words"
	@echo "make typecheck   mypy over the packages"
	@echo "make format      let ruff rewrite the files"
	@echo "make clean       remove caches and build output (distclean: also .venv); runs/ stays"
	@echo "Each sets up .venv first where needed. Choose an interpreter with PYTHON=python3.12."

setup: $(SETUP)

$(SETUP): pyproject.toml Makefile
	@$(PYTHON) -c "" || \
	    { echo "error: '$(PYTHON)' does not run; name a Python >= 3.11: make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || \
	    { echo "error: Python must be >= 3.11, got $$($(PYTHON) --version 2>&1);" \
	           "name another: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c "import ensurepip, venv" 2>/dev/null || \
	    { echo "error: $$($(PYTHON) --version) has no venv module;" \
	           "install it (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -e ".[train,test,dev]"
	@touch $@

demo: $(SETUP)
	$(BIN)/python -m lintra.tools.demo --config $(DEMO_CONFIG) $(DEMO_ARGS)

demo-short: $(SETUP)
	$(BIN)/python -m lintra.tools.demo --config $(DEMO_CONFIG) --short $(DEMO_ARGS)

test: $(SETUP)
	$(BIN)/pytest -n 2 -m "not gpu and not slow" $(TEST_ARGS)

lint: $(SETUP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python .ci/check_tree.py

# The folders are imported as lintra.kernels ...: a link gives mypy the tree under that name.
typecheck: $(SETUP)
	@mkdir -p .cache/typecheck
	@ln -sfn "$(CURDIR)" .cache/typecheck/lintra
	MYPYPATH=.cache/typecheck $(BIN)/mypy --namespace-packages --explicit-package-bases \
	    $(addprefix -p lintra.,$(ROOMS))

format: $(SETUP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .cache/typecheck .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -type d -not -path "./.venv/*" -prune -exec rm -rf {} +

distclean: clean
	rm -rf .venv
