# demo and test need nothing but Python and a package index: .venv is made once, and installed again when pyproject.toml changes.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-slow lint types check docs clean

demo: .venv/.installed
	$(BIN)/fmdistill demo

test: .venv/.installed
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile -m "not slow"

test-slow: .venv/.installed # kills, several processes, real sizes, the wheel: each takes more than about ten seconds
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile -m slow

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/.installed
	$(BIN)/pyright

check: .venv/.installed
	$(BIN)/fmdistill check

docs: .venv/.installed # the site, into site/; `python -m http.server --directory site` shows it
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

.venv/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --upgrade 'pip>=23'
	$(BIN)/python -m pip install -e '.[dev]'
	touch $@

clean: # leaves .venv, runs/, caches/ and report/, which cost hours
	rm -rf dist build site .pytest_cache .ruff_cache *.egg-info
	find . -path ./.venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
