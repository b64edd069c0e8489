# `make` alone lists the targets. All but help and clean first run `make setup`, which is quick when nothing has changed.
#   make test ARGS="-k walks -x"        more arguments for pytest
#   make setup PYTHON=python3.12        another Python for .venv
.DEFAULT_GOAL := help
.PHONY: help setup demo test lint audit cluster-test airflow airflow-test bench clean

PYTHON ?=
ARGS ?=

help: ## this list
	@sed -n -E 's/^([a-z-]+):[a-z ]*## (.*)/  make \1\t\2/p' Makefile | expand -t 22

setup: ## everything the rest needs: .venv with pinned packages, and Java 17 or newer
	@PYTHON='$(PYTHON)' bash infra/setup.sh

demo: setup ## the whole pipeline on a real shop's two years of sales; a few minutes
	@.venv/bin/pinsage demo $(ARGS)

test: setup ## every test, in two processes; with ARGS, in one
	@.venv/bin/python -m pytest $(or $(ARGS),-n 2 --dist loadfile --no-loadscope-reorder)

lint: setup ## ruff and mypy
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy pipeline model jobs tests $$(find infra -name '*.py')

audit: setup ## the list of all packages (dist/sbom.cdx.json), and advisories about them where these can be reached
	@.venv/bin/python -m infra.audit $(ARGS)

cluster-test: setup ## only the tests that start a Spark master and workers on this machine
	@.venv/bin/python -m pytest -m cluster $(ARGS)

airflow: setup ## Airflow 3 in .airflow, an environment of its own; a minute the first time
	@bash infra/airflow/setup.sh

airflow-test: airflow ## the DAG loaded and run in that Airflow, a whole night with every stage included; two minutes
	@PINSAGE_AIRFLOW_NIGHT=1 .venv/bin/python -m pytest -m airflow $(ARGS)

bench: setup ## neighbourhoods a second, and how good they are, against DGL's sampler; 5 minutes
	@.venv/bin/python -m infra.bench.walks $(ARGS)

clean: ## remove caches, build output and .venv, but not runs/
	rm -rf .venv .venv.lock .airflow .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist *.egg-info spark-warehouse metastore_db derby.log
	find pipeline model jobs infra tests -name __pycache__ -type d -prune -exec rm -rf {} +
