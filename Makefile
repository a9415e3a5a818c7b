# `make demo` and `make test` set everything up by themselves; a second call reuses .venv.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: demo test lint clean

demo: $(INSTALLED)
	$(BIN)/cxr-fastai demo

test: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -n logical --dist worksteal

lint: $(INSTALLED)
	$(BIN)/ruff check .

$(INSTALLED): settings.ini setup.py pyproject.toml constraints.txt
	test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv demo build dist *.egg-info
