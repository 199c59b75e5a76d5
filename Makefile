# What the targets run is also in README.md as plain pip and python lines.
PYTHON ?= python3
VENV ?= .venv
PY = $(VENV)/bin/python
STAMP = $(VENV)/.installed
DEV_STAMP = $(VENV)/.installed-dev

.PHONY: help quickstart test test-slow test-gpu lint types docs clean

help:
	@echo "make quickstart  train on CMUdict in one to four minutes on two CPU cores"
	@echo "make test        run the test suite"
	@echo "make test-slow   run the tests that take longer: interrupted runs, several processes"
	@echo "make test-gpu    run the tests that need a CUDA device"
	@echo "make lint        ruff and mypy"
	@echo "make docs        build the documentation as a site, and show it at http://127.0.0.1:8001"
	@echo "make clean       remove $(VENV) and caches; runs/ stays"

quickstart: $(STAMP)
	$(PY) -m dllm_var fit --config configs/quickstart.yaml

test: $(DEV_STAMP)
	$(PY) -m pytest -n 2 --durations 15

test-slow: $(DEV_STAMP)
	$(PY) -m pytest -n 2 --dist worksteal --durations 15 -m "slow and not gpu and not real_weights and not reasoning_gym"

# On a machine that has torch, lightning and the rest already: python3 -m pytest -m gpu tests/gpu
test-gpu: $(DEV_STAMP)
	$(PY) -m pytest -m gpu --durations 15 tests/gpu

lint: $(DEV_STAMP)
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(MAKE) types MYPY="$(abspath $(VENV))/bin/mypy"

# mypy knows nothing of dllm_var/__init__.py's search path: it gets the folders as the wheel lays them out.
MYPY ?= mypy
types:
	@rm -rf build/types && mkdir -p build/types/dllm_var
	@ln -s $(CURDIR)/dllm_var/* $(CURDIR)/callbacks $(CURDIR)/datamodules build/types/dllm_var/
	cd build/types && $(MYPY) --cache-dir $(CURDIR)/.mypy_cache --config-file $(CURDIR)/pyproject.toml

docs: $(DEV_STAMP)
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict
	$(PY) -m http.server --bind 127.0.0.1 --directory build/site 8001

$(PY):
	$(PYTHON) -m venv $(VENV)

$(STAMP): constraints.txt pyproject.toml | $(PY)
	$(PY) -m pip install --quiet -c constraints.txt -e .
	@touch $@

$(DEV_STAMP): constraints.txt pyproject.toml | $(PY)
	$(PY) -m pip install --quiet -c constraints.txt -e ".[dev]"
	@touch $(STAMP) $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
