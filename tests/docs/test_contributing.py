"""What CONTRIBUTING tells is so: its examples run, and what it lists is there."""

import io
import re
from contextlib import chdir
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from markupsafe import Markup
from rich.console import Console
from test_layers import LAYERS

from cxr_fastai.cli import options
from cxr_fastai.cli.output import metrics_tables
from cxr_fastai.core.run import Run
from cxr_fastai.evaluation.metrics import AT_A_THRESHOLD
from cxr_fastai.models.architectures import ARCHS
from cxr_fastai.publishing import reporting as pages

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / 'CONTRIBUTING.md').read_text()
README = (ROOT / 'README.md').read_text()
FILES = ('csv', 'ini', 'json', 'pkl', 'py')
EXAMPLES = re.findall(r'^```python\n(.*?)^```', TEXT, re.M | re.S)


def rows(title: str) -> list[str]:
    """The first column of the table below the heading `title`, without its own heading."""
    section = re.search(rf'^## {title}\n(.*?)^## ', TEXT, re.M | re.S)[1]
    return re.findall(r'^\| (.*?) \|', section, re.M)[1:]


@pytest.fixture(scope='module')
def told(tmp_path_factory) -> dict[str, Any]:
    """The names that the examples leave, executed one after the other in a folder of their own."""
    names, folder = {}, tmp_path_factory.mktemp('contributing')
    with chdir(folder), patch.dict(ARCHS), patch.dict(AT_A_THRESHOLD):
        for example in EXAMPLES:
            exec(compile(example, 'CONTRIBUTING.md', 'exec'), names)
    return names | {'run': Run(folder / names['run'].path)}


def test_the_example_network_trains_is_opened_and_explains_itself(told):
    run, learn = told['run'], told['learn']
    assert run.recipe.arch == 'small' and len(run.history) == 1 and run.history.train_loss.iloc[0] < 1
    assert sum(weight.numel() for weight in learn.model.parameters()) == 5_250
    assert told['maps'].shape == (1, 64, 64) and 0 <= told['maps'].min() <= told['maps'].max() <= 1


def test_the_example_metric_is_measured_at_both_thresholds(told):
    for found in (metrics := told['metrics'], metrics['at_half']):
        rates = [found[name]['value'] for name in ('sensitivity', 'specificity')]
        assert found['geometric_mean']['value'] == pytest.approx((rates[0] * rates[1]) ** 0.5)
    assert told['run'].metrics['test']['geometric_mean'] == metrics['geometric_mean']


def test_the_example_metric_is_shown_in_the_terminal_and_in_the_report(told, monkeypatch):
    monkeypatch.setattr(pages, 'draw', lambda *_: dict.fromkeys(('losses', 'validation', *pages.CURVES), Markup()))
    with patch.dict(AT_A_THRESHOLD, geometric_mean=told['geometric_mean']):
        console = Console(record=True, width=100, file=io.StringIO())
        console.print(metrics_tables(told['metrics']))
        assert 'geometric mean' in console.export_text()
        assert '<th scope="row">geometric mean</th>' in pages.render(told['run'], 'test')


def test_the_examples_leave_nothing_behind(told):
    assert 'small' not in ARCHS and 'geometric_mean' not in AT_A_THRESHOLD


def test_every_word_of_the_glossary_is_used_by_the_package():
    package = '\n'.join(path.read_text() for path in (ROOT / 'cxr_fastai').glob('*.py'))
    words = [word for row in rows('Words') for word in row.split(', ')]
    assert len(words) > 30 and [word for word in words if not re.search(rf'\b{word}', package)] == []


def test_every_name_of_a_module_that_is_told_is_there():
    told = [place for place in re.findall(r'`(\w+)\.(\w+)`', TEXT) if place[0] in LAYERS and place[1] not in FILES]
    assert len(told) > 15
    for module, name in told:
        assert hasattr(import_module(f'cxr_fastai.{module}'), name), f'{module}.{name}'


def test_every_benchmark_is_listed():
    assert {name.strip('`') for name in rows('Benchmarks')} == {
        path.name for path in (ROOT / 'benchmarks').glob('*.py')
    }


def test_every_target_of_make_that_is_named_is_there():
    makefile = (ROOT / 'Makefile').read_text()
    named = set(re.findall(r'^ .*\bmake ([a-z-]+)', TEXT, re.M))
    assert named >= {'test', 'demo', 'docs', 'notebooks'} and named <= set(re.findall(r'^([a-z-]+):', makefile, re.M))


@pytest.mark.parametrize('arch', ARCHS)
def test_the_help_and_readme_name_every_architecture(arch):
    assert arch in options.Arch.__metadata__[0].help and f'`{arch}`' in README
