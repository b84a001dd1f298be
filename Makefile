# Everything a developer or a new user types. The first target that needs the environment makes it.
.DEFAULT_GOAL := help
SHELL := /bin/sh
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2
STAMP := $(VENV)/.installed
MINUTES ?= 10

.PHONY: help setup demo up test bench check docs format lock clean

help: ## show this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-8s %s\n", $$1, $$2}'

setup: $(STAMP) ## install everything into .venv, from locked and hashed requirements

$(STAMP): requirements/dev.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Sluice needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; name another with: make setup PYTHON=python3.12")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing the locked requirements into $(VENV) (once; a minute or so)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/dev.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@$(BIN)/python -m services.embedded
	@touch $(STAMP)

demo: $(STAMP) ## start everything and send real pictures through it, live
	@$(BIN)/sluice demo

up: $(STAMP) ## start Kafka, Postgres and the three services on this machine, until Ctrl-C
	@$(BIN)/sluice up

check: $(STAMP) ## the quick loop: format, lint, imports, types, unit tests
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/lint-imports --no-logo
	@$(BIN)/mypy
	@$(BIN)/pytest -q tests/unit

test: $(STAMP) ## every test, on real servers; WORKERS=1 for one after the other
	@$(BIN)/pytest -n $(WORKERS) --dist loadfile

bench: $(STAMP) ## measure how fast Sluice is here
	@$(BIN)/python -m tests.bench

drill: $(STAMP) ## break everything at random for ten minutes: make drill MINUTES=2 SEED=1
	@$(BIN)/python -m tests.faults.drill --minutes $(MINUTES) $(if $(SEED),--seed $(SEED))

docs: $(STAMP) ## write the generated schemas anew
	@$(BIN)/python -m schemas.generate
	@$(BIN)/python -m services.api.openapi > schemas/generated/openapi.json

format: $(STAMP) ## format and fix what can be fixed
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

lock: $(STAMP) ## renew the locked requirements from requirements/*.in
	@$(BIN)/python -m pip install --quiet uv
	@for name in run dev; do $(BIN)/uv pip compile --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
		--no-header --quiet requirements/$$name.in -o requirements/$$name.txt; done

clean: ## remove the environment and the data of `make up`
	@rm -rf $(VENV) .sluice
