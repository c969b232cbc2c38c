# `make check` is what a change must pass. PYTHON is the environment that has the dev extra.
PYTHON ?= $(if $(wildcard .venv/bin/python),.venv/bin/python,python3)

.DEFAULT_GOAL := help

.PHONY: help
help: ## List what there is to make
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: install
install: ## Make .venv with Earmark (editable) and what development needs
	python3 -m venv .venv
	.venv/bin/pip install -e '.[dev]'

.PHONY: check
check: lint types test ## Format check, lint, types, tests

.PHONY: lint
lint: ## Check format and lint, change nothing
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
fix: ## Format, and mend what the linter can
	$(PYTHON) -m ruff format .
	$(PYTHON) -m ruff check --fix .
