# Every target sets up .venv by itself where it is missing or older than what it is made from.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-slow check bench clean

demo: .venv/ready
	$(BIN)/fusionbench run \
	    method=pretrained,simple_average,task_arithmetic,ties_merging,simple_ensemble,individual \
	    modelpool=clip-mini taskpool=clip-mini report=demo/reports overwrite=true
	$(BIN)/fusionbench run method=task_arithmetic modelpool=clip-mini out=demo/task_arithmetic overwrite=true

test: .venv/ready
	$(BIN)/python -m pytest -m "not slow and not oracle"

test-slow: .venv/ready
	$(BIN)/python -m pytest -m slow

check: .venv/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

bench: .venv/ready
	$(BIN)/python benchmarks/out_of_core.py

clean:
	rm -rf .venv demo .pytest_cache .ruff_cache .hypothesis

.venv/ready: pyproject.toml zoo/pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[hf,plot,dev]" -e ./zoo
	touch .venv/ready
