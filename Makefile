# Everything runs in .venv, made here from exact pins. The same as plain commands: README.md.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin

# Nothing that we start may call home or install by itself.
export FLWR_TELEMETRY_ENABLED := 0
export FLWR_DISABLE_UPDATE_CHECK := 1
export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION := 1
export RAY_USAGE_STATS_ENABLED := 0
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: setup demo test test-slow check clean

setup: .venv/ready

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[data,ray,dev]'
	touch .venv/ready

demo: setup
	$(BIN)/hansa simulate --data complete-journey --partition store --label value4 --epsilon 1 --out out/demo --overwrite

test: setup
	$(BIN)/python -m pytest -m "not slow" -n auto --dist worksteal

test-slow: setup
	$(BIN)/python -m pytest -m slow -n auto --dist worksteal --ignore tests/deployed
	$(BIN)/python -m pytest -m slow tests/deployed

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv out build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
