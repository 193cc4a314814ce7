# Each target is one documented command, run in .venv. Without make:
#   python3 -m venv .venv && . .venv/bin/activate
#   pip install -r requirements.txt -c constraints.txt
# and then the command of the target below. Paths are relative, so that a space in the folder's
# name does no harm.

PYTHON ?= python3
RUN := .venv/bin/python
AS_ROOT := $(shell [ "$$(id -u)" = 0 ] && echo --allow-root)

.PHONY: help lab test browser notebooks exercises index figures site slides bench mutants coverage faults clean

help: ## list the targets
	@grep -E '^[a-z]+:.*## ' Makefile | sed -e 's/:.*## /	/' | expand -t 12

lab: .venv/.ready ## open JupyterLab on the first notebook (loopback only, token on)
	$(RUN) -m jupyterlab --ip=127.0.0.1 $(AS_ROOT) --LabApp.default_url=/lab/tree/notebooks/00_start_here.ipynb

test: .venv/.ready ## lint, types, unit tests, every notebook against its committed outputs
	$(RUN) -m tests

browser: .venv/.ready ## explorers, site and slides in Chromium, where one is installed
	$(RUN) -m tests browser

notebooks: .venv/.ready ## re-execute every notebook in place, ready to commit
	$(RUN) -m tests.notebooks.execute

exercises: .venv/.ready ## write the student's notebooks from those with solutions
	$(RUN) -m dsv3_mini.course.hand_out

index: .venv/.ready ## write docs/equations.md, and which cell settles each claim
	$(RUN) -m dsv3_mini.course.equations --write
	$(RUN) -m dsv3_mini.course.settled --write

figures: .venv/.ready ## redraw everything in figures/
	$(RUN) -m dsv3_mini.viz.figures

site: .venv/.ready ## everything to read in a browser, without Python: build/site/index.html
	$(RUN) -m sphinx -q -W --keep-going -E -c docs -d build/doctrees . build/site

slides: .venv/.ready ## a deck for each notebook: build/slides
	$(RUN) -m sphinx -q -W --keep-going -E -c docs -d build/doctrees -b slides . build/slides

bench: .venv/.ready ## beside transformers and a Llama, half an hour: the README's table, figures/bench.*
	$(RUN) -m tests.bench --notebooks --publish

mutants: .venv/.ready ## mistakes on purpose, large and small, an hour: a test must catch each
	$(RUN) -m tests.mutants --write --jobs 2
	$(RUN) -m tests.mutants.notebooks --write
	$(RUN) -m tests.mutants.general --write

coverage: .venv/.ready ## which lines of the package do unit tests reach? At least 95 %
	$(RUN) -m tests.coverage

faults: .venv/.ready ## kill training 50 times, read 20,000 broken files, twenty minutes
	$(RUN) -m tests.faults --kills 50 --fuzz 10000

clean: ## remove .venv and all caches
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

.venv/.ready: requirements.txt constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("dsv3_mini needs Python 3.11 or newer, and %s is %s. Name another: make PYTHON=python3.12 ..." % (sys.executable, sys.version.split()[0]))'
	@echo "Installing into .venv: 1.5 GB, a few minutes the first time ..."
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt -c constraints.txt
	@touch $@
