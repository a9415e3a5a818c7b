"""CONTRIBUTING and README are true: the examples run, and the names, rooms, scripts and targets in them exist."""

import io
import re
import tomllib
from contextlib import chdir
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from markupsafe import Markup
from rich.console import Console

from cxr_fastai.cli.output import metrics_tables
from cxr_fastai.core.run import Run
from cxr_fastai.evaluation.metrics import THRESHOLD_METRICS
from cxr_fastai.models.architectures import ARCHS
from cxr_fastai.publishing import reporting

ROOT = Path(__file__).parents[2]
CONTRIBUTING = (ROOT / 'CONTRIBUTING.md').read_text()
README = (ROOT / 'README.md').read_text()
EXAMPLES = re.findall(r'^```python\n(.*?)^```', CONTRIBUTING, re.M | re.S)
LAYERS = tomllib.loads((ROOT / 'pyproject.toml').read_text())['tool']['importlinter']['contracts'][0]['layers']
ROOMS = LAYERS[::-1]


def first_column(text: str, title: str) -> list[str]:
    """The first column of the last table below the heading `title`, without the header."""
    section = re.search(rf'^## {title}\n(.*?)(^## |\Z)', text, re.M | re.S)[1]
    table = section[section.rindex('|---|') :]
    return re.findall(r'^\| (.*?) \|', table, re.M)


@pytest.fixture(scope='module')
def example_names(tmp_path_factory) -> dict[str, Any]:
    """The names that the examples define, executed one after the other in a folder of their own."""
    names: dict[str, Any] = {}
    folder = tmp_path_factory.mktemp('contributing')
    with chdir(folder), patch.dict(ARCHS), patch.dict(THRESHOLD_METRICS):
        for example in EXAMPLES:
            exec(compile(example, 'CONTRIBUTING.md', 'exec'), names)
    return names | {'run': Run(folder / names['run'].path)}


def test_the_example_architecture_trains_loads_and_explains(example_names):
    run, learn, maps = (example_names[name] for name in ('run', 'learn', 'maps'))
    assert run.recipe.arch == 'small'
    assert len(run.history) == 1 and run.history.train_loss.iloc[0] < 1
    assert sum(weight.numel() for weight in learn.model.parameters()) == 5_250
    assert maps.shape == (1, 64, 64)
    assert 0 <= maps.min() <= maps.max() <= 1


def test_the_example_metric_is_computed_at_both_thresholds(example_names):
    metrics = example_names['metrics']
    for at_threshold in (metrics, metrics['at_half']):
        rates = [at_threshold[name]['value'] for name in ('sensitivity', 'specificity')]
        assert at_threshold['geometric_mean']['value'] == pytest.approx((rates[0] * rates[1]) ** 0.5)
    assert example_names['run'].metrics['test']['geometric_mean'] == metrics['geometric_mean']


def test_the_example_metric_is_in_the_tables_and_in_the_report(example_names, monkeypatch):
    figures = dict.fromkeys(('losses', 'validation', *reporting.CURVES), Markup())
    monkeypatch.setattr(reporting, 'draw', lambda *_: figures)  # the figures take seconds
    with patch.dict(THRESHOLD_METRICS, geometric_mean=example_names['geometric_mean']):
        console = Console(record=True, width=100, file=io.StringIO())
        console.print(metrics_tables(example_names['metrics']))
        assert 'geometric mean' in console.export_text()
        assert '<th scope="row">geometric mean</th>' in reporting.render(example_names['run'], 'test')


def test_the_examples_leave_the_tables_unchanged(example_names):
    assert 'small' not in ARCHS
    assert 'geometric_mean' not in THRESHOLD_METRICS


def test_the_readme_lists_the_rooms_in_the_order_of_imports():
    assert [room.strip('`') for room in first_column(README, 'How it is built')] == ROOMS
    folders = {path.parent.name for path in (ROOT / 'cxr_fastai').glob('*/__init__.py')}
    assert folders == set(ROOMS)


def test_contributing_names_the_rooms_in_the_order_of_imports():
    assert ' · '.join(ROOMS) in CONTRIBUTING


def test_every_term_of_the_glossary_is_used_by_the_package():
    package = '\n'.join(path.read_text() for path in (ROOT / 'cxr_fastai').rglob('*.py'))
    terms = [term for row in first_column(CONTRIBUTING, 'Glossary') for term in row.split(', ')]
    assert len(terms) > 30
    assert [term for term in terms if not re.search(rf'\b{term}', package)] == []


def test_every_dotted_name_exists():
    names = re.findall(rf'`((?:{"|".join(ROOMS)})\.(?!py`)\w+)(?:\.(\w+))?`', CONTRIBUTING)
    assert len(names) > 15
    for module, name in names:
        assert hasattr(import_module(f'cxr_fastai.{module}'), name or '__doc__'), f'{module}.{name}'


def test_every_file_of_the_package_and_the_tests_exists():
    rooms = '|'.join(ROOMS)
    files = re.findall(rf'((?:tests/)?(?:{rooms}|docs|faults|security)/\w+\.py)', CONTRIBUTING)
    assert len(files) > 5
    for file in files:
        assert (ROOT / file).exists() or (ROOT / 'cxr_fastai' / file).exists(), file


def test_every_benchmark_is_listed():
    listed = {name.strip('`') for name in first_column(CONTRIBUTING, 'Benchmarks')}
    assert listed == {path.name for path in (ROOT / 'benchmarks').glob('*.py')}


def test_every_target_of_make_exists():
    targets = set(re.findall(r'^([a-z-]+):', (ROOT / 'Makefile').read_text(), re.M))
    named = set(re.findall(r'^ .*\bmake ([a-z-]+)|`make ([a-z-]+)', CONTRIBUTING, re.M))
    named = {name for pair in named for name in pair if name}
    assert named >= {'test', 'test-all', 'test-plain', 'lint', 'demo', 'docs', 'notebooks'}
    assert named <= targets


@pytest.mark.parametrize('arch', ARCHS)
def test_the_readme_names_every_architecture(arch):
    assert f'`{arch}`' in README
