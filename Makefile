# `make demo` and `make test` set everything up by themselves; a second call reuses .venv.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: demo test test-all lint docs notebooks clean

demo: $(INSTALLED)
	$(BIN)/cxr-fastai demo

test: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -n logical --dist worksteal -m "not slow"

# Also what takes long and has a shorter sibling in `make test`.
test-all: .venv/.docs .venv/.space
	$(BIN)/python -m pytest -n logical --dist worksteal

lint: $(INSTALLED)
	$(BIN)/ruff check .

$(INSTALLED): settings.ini setup.py pyproject.toml constraints.txt
	test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

# Builds the site from pages, stored notebooks and docstrings; a warning fails it.
docs: .venv/.docs
	$(BIN)/python -m sphinx -n -W --keep-going -d docs/_build/doctrees docs docs/_build/html
	@echo "Open docs/_build/html/index.html in a browser."

# Gradio wants an older Pillow than the tested one: it lies beside, for the test of a Space alone.
.venv/.space: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --target .venv/space 'gradio>=6.0.0'
	touch $@

# Executes the notebooks anew and stores what they show.
notebooks: .venv/.docs
	$(BIN)/python nbs/execute.py

.venv/.docs: $(INSTALLED)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[docs]'
	touch $@

clean:
	rm -rf .venv demo build dist *.egg-info docs/_build
