# `make demo` and `make test` set everything up by themselves; a second call reuses .venv.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
FUZZ_MINUTES ?= 10
PRETRAINED_RUNS ?= runs/pretrained
PRETRAINED_OPTIONS ?= --arch efficientnet_lite0 --recipe tuned
PRETRAINED_FOLDS ?= 5
# Empty for a copy of the data set without test images.
PRETRAINED_SPLITS ?= test
PYTEST := $(BIN)/python -m pytest -n logical --dist worksteal --durations 10

.PHONY: demo test test-all test-plain test-floors fuzz lint docs notebooks pretrained clean

demo: $(INSTALLED)
	$(BIN)/cxr-fastai demo

test: lint
	$(PYTEST) -m "not slow"

# Adds the slow tests, and the installation of every extra alone.
test-all: lint .venv/.docs .venv/.space
	$(PYTEST)
	$(BIN)/python tests/install/check_extras.py

# The base requirements alone, then each extra alone, in environments of their own.
test-plain:
	$(PYTHON) tests/install/check_extras.py

# The security tests with the oldest permitted versions of the packages that read foreign files.
test-floors: $(INSTALLED)
	$(BIN)/python tests/install/check_floors.py

# Feeds damaged files to the readers of foreign formats, FUZZ_MINUTES for each format.
fuzz: $(INSTALLED)
	$(BIN)/python tests/fuzz/fuzz.py --minutes $(FUZZ_MINUTES)

# The same checks as .pre-commit-config.yaml.
lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo
	$(BIN)/mypy

$(INSTALLED): settings.ini setup.py pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

# Builds the site from pages, stored notebooks and docstrings; a warning fails it.
docs: .venv/.docs
	$(BIN)/python -m sphinx -n -W --keep-going -d docs/_build/doctrees docs docs/_build/html
	@echo "Open docs/_build/html/index.html in a browser."

# Gradio needs an older Pillow than the tested one, so it is installed apart, for the test of a Space only.
.venv/.space: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --target .venv/space 'gradio>=6.7.0'
	touch $@

# Executes the notebooks and stores their outputs without metadata, then runs them again as the tests do.
notebooks: .venv/.docs
	$(BIN)/python nbs/execute.py
	$(BIN)/nbdev-clean
	$(BIN)/nbdev-test --timing

.venv/.docs: $(INSTALLED)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[docs]'
	touch $@

# Trains the model that the package contains on the real images (CXR_DATA, else data/chest_xray): folds for the threshold
# and the metrics, then one network on all images of train and valid, which is measured once on the test images.
pretrained: $(INSTALLED)
	$(BIN)/cxr-fastai train $(PRETRAINED_OPTIONS) --folds $(PRETRAINED_FOLDS) --out $(PRETRAINED_RUNS)/folds
	$(BIN)/cxr-fastai evaluate $(PRETRAINED_RUNS)/folds
	$(BIN)/cxr-fastai train $(PRETRAINED_OPTIONS) --valid none --out $(PRETRAINED_RUNS)/final
	$(BIN)/cxr-fastai evaluate $(PRETRAINED_RUNS)/final --out-of-fold $(PRETRAINED_RUNS)/folds
	$(foreach split,$(PRETRAINED_SPLITS),$(BIN)/cxr-fastai evaluate $(PRETRAINED_RUNS)/final --split $(split) &&) true
	$(BIN)/python -c "from cxr_fastai.publishing import publish_pretrained; \
	    publish_pretrained('$(PRETRAINED_RUNS)/final', '$(PRETRAINED_RUNS)/folds')"

clean:
	rm -rf .venv demo build dist *.egg-info docs/_build
