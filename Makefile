# Plain `make` lists what there is. Needs make and Python 3.11, 3.12 or 3.13; everything else goes into .venv.
PYTHON := .venv/bin/python
.DEFAULT_GOAL := help
.PHONY: help run test lab preflight site slides gpu-rehearsal setup-git clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-13s %s\n", $$1, $$2}' Makefile

run:  ## run every notebook top to bottom on the mini profile; results go to runs/course
	@sh scripts/setup.sh notebooks
	@$(PYTHON) scripts/run_course.py

test:  ## install what the tests need, check the style, run all tests
	@sh scripts/setup.sh dev
	@sh scripts/install_chromium.sh
	@$(PYTHON) -m ruff check .
	@.venv/bin/lint-imports --no-cache
	@$(PYTHON) -m pytest

lab:  ## open the course in JupyterLab
	@sh scripts/setup.sh notebooks
	@$(PYTHON) -m jupyter lab notebooks/00_start_here.ipynb

gpu-rehearsal:  ## all that the large profiles do, with stand-in weights, on a GPU; a table in runs/rehearsal
	@sh scripts/setup.sh dev
	@$(PYTHON) scripts/gpu_rehearsal.py

preflight:  ## is this machine ready? versions, memory, disk, one diagnosis; what is missing, and its mend
	@sh scripts/setup.sh notebooks
	@$(PYTHON) scripts/preflight.py

site:  ## the executed course, its pages and the module as a website in build/site, every link checked
	@sh scripts/setup.sh site
	@$(PYTHON) -m sphinx -q -W --keep-going -c docs/site -d build/doctrees . build/site
	@cp build/site/README.html build/site/index.html
	@$(PYTHON) scripts/check_links.py build/site
	@echo "Open build/site/index.html in a browser."

slides:  ## a deck of the course's figures in build/slides
	@sh scripts/setup.sh site
	@$(PYTHON) scripts/make_slides.py
	@$(PYTHON) scripts/check_links.py build/slides

setup-git:  ## let git diff and merge notebooks cell by cell (nbdime), in this clone
	@sh scripts/setup.sh notebooks
	@git config diff.jupyternotebook.command ".venv/bin/git-nbdiffdriver diff"
	@git config merge.jupyternotebook.name "jupyter notebook merge driver"
	@git config merge.jupyternotebook.driver ".venv/bin/git-nbmergedriver merge %O %A %B %L %P"
	@echo "git diff and git merge now understand notebooks in this clone."

clean:  ## remove .venv, runs and caches; weights and data stay
	rm -rf .venv runs build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
