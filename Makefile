# Everything sets up what it needs in .venv; nothing has to be installed or running beforehand.
.PHONY: demo test lint oldest bench faults spark docs sql screenshots clean
SHELL := /bin/bash
VENV ?= .venv
PYTHON := $(VENV)/bin/python

demo: $(VENV)/ready  ## run the product on a PostgreSQL of its own
	@$(VENV)/bin/tracevault demo

test: $(VENV)/ready lint  ## lint, types, import rule, and every test on real PostgreSQL
	$(PYTHON) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/ready
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports --no-cache

oldest: $(VENV)-oldest/ready  ## the tests of integrations, with the oldest versions of what is integrated
	$(VENV)-oldest/bin/python -m pytest -n 2 --dist loadfile tests/integrations \
		tests/test_catalog.py tests/test_context.py tests/test_testing.py

faults: $(VENV)/ready  ## break everything around the writer, and compare a ledger with the table
	$(PYTHON) -m pytest tests/faults -o norecursedirs='.*'

spark: $(VENV)/ready  ## the archive's job for Spark, which is installed for that; needs Java
	$(PYTHON) -m pip install --quiet --disable-pip-version-check "pyspark>=4"
	$(PYTHON) -m pytest tests/spark -o norecursedirs='.*'

bench: $(VENV)/ready  ## ratios against plain psycopg, measured in one run
	$(PYTHON) -m benchmarks.run

docs: $(VENV)/ready  ## write the tables of README and docs anew from their source
	$(PYTHON) -m tests.docs.tables

sql: $(VENV)/ready  ## write the SQL files of the package anew from their source
	$(PYTHON) -c 'from tracevault.schema.ddl import write_sql_files; write_sql_files()'

screenshots: $(VENV)/ready  ## make the pictures of the viewer anew; needs Chromium
	$(PYTHON) -m scripts.screenshots

$(VENV)/ready: pyproject.toml scripts/setup
	@scripts/setup $(VENV)

$(VENV)-oldest/ready: pyproject.toml scripts/setup
	@scripts/setup $(VENV)-oldest oldest

clean:
	rm -rf $(VENV) $(VENV)-oldest .mypy_cache .ruff_cache .pytest_cache .hypothesis
