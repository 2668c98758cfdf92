# `make quickstart` and `make test` need only Python 3.11 or 3.12, a C compiler and a package index.
# They share the environment .venv, built once. To build it from another Python: make clean, then
# make PYTHON=/path/to/python3.12 quickstart

VENV := .venv
STAMP := $(VENV)/.stamp
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check
JOBS ?= 2

# The first Python of a tested version that can make environments; any newer one as a last resort.
ifndef PYTHON
PYTHON := $(shell \
	for range in "(3, 11) <= v <= (3, 12)" "v >= (3, 11)"; do \
		for p in python3 python3.11 python3.12; do \
			$$p -c "import sys, ensurepip, venv; v = sys.version_info[:2]; sys.exit(not ($$range))" 2>/dev/null && echo $$p && exit; \
		done; \
	done)
endif

.PHONY: help venv test test-slow lint docs quickstart clean

help:
	@echo "make quickstart   teacher, student alone and distilled student on a small data set, from nothing (CPU)"
	@echo "make test         lint and the test suite without the long tests"
	@echo "make test-slow    the long tests"
	@echo "make lint         ruff, and import-linter on the order of the rooms"
	@echo "make docs         the documentation as a site (output/docs), its links checked"
	@echo "make venv         only build the environment ($(VENV))"
	@echo "make clean        remove the environment and caches; results and data sets stay"

venv: $(STAMP)

# A Python that has Detectron2 already lends its packages to the environment, and only what it lacks is added: the
# Detectron2 and torch of the user stay. Otherwise the pinned set is installed, Detectron2 v0.6 included.
$(STAMP): requirements.txt setup.py tools/install_detectron2.py
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or newer (with venv and pip) on PATH: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and f'$(PYTHON) is Python {sys.version.split()[0]}; 3.11 or newer is needed')"
	$(PYTHON) -m venv $(VENV)
	@if $(PYTHON) -c "import sys, detectron2; sys.exit(sys.prefix == '$(abspath $(VENV))')" 2>/dev/null; then \
		$(PYTHON) tools/lend_packages.py $(RUN); \
	fi
	@set -e; if $(RUN) -c "import lent_packages" 2>/dev/null; then \
		echo "using the Detectron2 that is there and the packages beside it"; \
		$(PIP) install -q -e ".[dev,docs,timm,offline-data]"; \
	else \
		echo "installing requirements.txt into $(VENV) (some minutes, 6 GB)"; \
		$(PIP) install -q -r requirements.txt; \
		$(RUN) tools/install_detectron2.py; \
		PYTHONWARNINGS=ignore $(PIP) install -q --no-deps --no-build-isolation -e .; \
	fi
	@touch $@

test: lint
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n $(JOBS) --dist loadfile

test-slow: $(STAMP)
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -m slow

lint: $(STAMP)
	$(RUN) -m ruff check .
	$(VENV)/bin/lint-imports --no-cache

# Links inside of the site are checked as it is built; those to others where there is a network.
SITE := output/docs
docs: $(STAMP)
	$(RUN) -m sphinx --nitpicky --fail-on-warning --keep-going -q -b html docs $(SITE)
	@if $(RUN) -c "import socket; socket.create_connection(('arxiv.org', 443), timeout=5)" 2>/dev/null; then \
		$(RUN) -m sphinx -q -b linkcheck docs $(SITE)/.links; \
	else \
		echo "no network: links to other sites are not checked"; \
	fi
	@echo "open $(SITE)/index.html"

quickstart: $(STAMP)
	$(RUN) tools/quickstart.py

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
	find kd_det tests tools -name __pycache__ -type d -prune -exec rm -rf {} +
