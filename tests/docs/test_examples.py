"""The Python examples of the pages: that of README and the quickstart runs, and the names in all of them exist."""

from __future__ import annotations

import ast
import builtins
import re
from contextlib import chdir
from pathlib import Path
from typing import Any

import fastai.vision.all
import matplotlib
import pytest

import cxr_fastai.all

matplotlib.use('Agg')
ROOT = Path(__file__).parents[2]
PAGES = ['README.md', *(f'docs/{name}.md' for name in ('quickstart', 'from_fastai', 'data', 'training', 'explanation'))]
GIVEN = {'path', 'df', 'dls', 'learn', 'run', 'root', 'items', 'recipe'}
"""Names that an example may use without defining them."""


def examples(page: str) -> list[str]:
    """The blocks of Python in a page."""
    return re.findall(r'^```python\n(.*?)^```', (ROOT / page).read_text(encoding='utf-8'), re.M | re.S)


@pytest.mark.parametrize('page', PAGES)
def test_examples_use_only_names_that_exist(page):
    exported = {*vars(fastai.vision.all), *cxr_fastai.all.__all__, *vars(builtins)}
    assert examples(page)
    for example in examples(page):
        names = [node for node in ast.walk(ast.parse(example)) if isinstance(node, ast.Name)]
        stored = {name.id for name in names if isinstance(name.ctx, ast.Store)}
        assert {name.id for name in names} - stored - exported - GIVEN == set()


def test_the_example_of_the_readme_is_that_of_the_quickstart():
    assert examples('README.md')[0].replace('resnet50', 'efficientnet_lite0') in examples('docs/quickstart.md')


@pytest.mark.filterwarnings('ignore:torch.jit.script')  # of fastai
def test_the_example_of_the_readme_runs(images, tmp_path, monkeypatch):
    example = examples('README.md')[0]
    for old, new in {'resnet50': 'baseline', '224': '32', 'fine_tune(4)': 'fine_tune(1)'}.items():
        assert old in example
        example = example.replace(old, new)
    monkeypatch.setenv('CXR_DATA', str(images))
    (tmp_path / 'new_images').symlink_to(images / 'test', target_is_directory=True)
    names: dict[str, Any] = {}
    with chdir(tmp_path):
        exec(compile(example, 'README.md', 'exec'), names)
    assert (tmp_path / 'runs/mine/report.html').exists()
    assert len(names['rows']) == names['metrics']['n'] == len(list((images / 'test').rglob('*.jpeg')))
