# `make check` runs what a change must pass. PYTHON is an interpreter with the dev extra installed.
PYTHON ?= $(if $(wildcard .venv/bin/python),.venv/bin/python,python3)

.DEFAULT_GOAL := help

.PHONY: help
help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: install
install: ## Create .venv with Earmark (editable) and the dev extra
	python3 -m venv .venv
	.venv/bin/pip install -e '.[dev]'

.PHONY: check
check: lint types test ## Check format, lint and types, run the tests

.PHONY: lint
lint: ## Check format and lint without changing files
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .

.PHONY: types
types: ## Check types
	$(PYTHON) -m mypy

.PHONY: test
test: ## Run the tests, without the slow ones
	$(PYTHON) -m pytest -n auto

.PHONY: test-slow
test-slow: ## Run the slow tests too
	$(PYTHON) -m pytest -n auto -m 'not network'

.PHONY: fix
fix: ## Format, and apply the linter's automatic fixes
	$(PYTHON) -m ruff format .
	$(PYTHON) -m ruff check --fix .
