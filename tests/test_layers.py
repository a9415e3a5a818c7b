"""Imports point only down the layers of the house plan."""
import ast
import re
from pathlib import Path

import pytest

import cxr_fastai

PACKAGE = Path(cxr_fastai.__file__).parent
LAYERS = {'__init__': -1, 'core': 0, 'recipe': 0, 'run': 0, 'limits': 1, 'windows': 1, 'dicom': 1, 'images': 1,
          'cache': 1, 'names': 1, 'listing': 1, 'items': 1, 'weights': 1, 'models': 1, 'intervals': 1, 'bootstrap': 1,
          'pages': 1, 'drawing': 1, 'similarity': 1, 'temperature': 1, 'shards': 1, 'folders': 1, 'writers': 1,
          'trust': 1, 'unpickler': 1, 'demo': 2, 'archives': 2, 'sources': 2, 'traits': 2, 'probes': 2, 'audit': 2,
          'corruptions': 2, 'shortcut': 2, 'augment': 2, 'data': 2, 'calibration': 2, 'artefacts': 2, 'gate': 2,
          'engines': 2, 'deploy': 2, 'quantise': 2, 'learner': 3, 'devices': 3, 'callbacks': 3, 'checkpoint': 3,
          'ranks': 3, 'tracking': 3, 'metrics': 3, 'canary': 3, 'rates': 4, 'training': 4, 'decision': 4,
          'tradeoffs': 4, 'pickles': 4, 'bundle': 4, 'inference': 5, 'evaluation': 5, 'comparison': 5, 'curves': 5,
          'cams': 5, 'overlays': 5, 'plots': 5, 'interpret': 6, 'explanations': 6, 'robustness': 6, 'ablations': 6,
          'sanity': 6, 'examples': 6, 'card': 7, 'checklist': 7, 'report': 7, 'printing': 7, 'options': 7,
          'display': 7, 'scores': 7, 'terminal': 7, 'batching': 6, 'settings': 6, 'service': 6, 'uploads': 6,
          'answers': 6, 'counts': 6, 'guards': 6, 'protocol': 6, 'rest': 7, 'site': 7, 'web': 7, 'serve': 7,
          'cli_serve': 8, 'export': 7, 'hub': 7, 'space': 7, 'cli_data': 8, 'cli_train': 8, 'cli_evaluate': 8,
          'cli_explain': 8, 'cli': 8, 'all': 8, 'cli_predict': 8, '__main__': 9}
# Within a layer these, and no others, may look at a neighbour.
NEIGHBOURS = {('recipe', 'core'), ('run', 'core'), ('run', 'recipe'), ('dicom', 'windows'), ('dicom', 'limits'),
              ('images', 'limits'), ('images', 'windows'), ('images', 'dicom'), ('cache', 'images'),
              ('names', 'images'), ('folders', 'images'),
              ('items', 'folders'), ('items', 'images'), ('items', 'listing'), ('models', 'images'),
              ('models', 'weights'), ('sources', 'archives'), ('probes', 'traits'), ('audit', 'traits'),
              ('audit', 'probes'), ('shortcut', 'traits'), ('shortcut', 'corruptions'), ('augment', 'corruptions'),
              ('data', 'augment'), ('devices', 'learner'), ('callbacks', 'learner'),
              ('callbacks', 'devices'), ('checkpoint', 'learner'), ('ranks', 'checkpoint'), ('training', 'pickles'),
              ('evaluation', 'inference'), ('explanations', 'interpret'), ('ablations', 'explanations'),
              ('sanity', 'explanations'), ('sanity', 'ablations'), ('sanity', 'robustness'), ('report', 'card'),
              ('report', 'checklist'), ('report', 'scores'), ('export', 'card'),
              ('export', 'report'), ('cli_predict', 'cli_explain'), ('cli', 'cli_predict'),
              ('cli', 'cli_data'), ('cli', 'cli_train'), ('cli', 'cli_evaluate'), ('cli', 'cli_explain'),
              ('cli', 'cli_serve'), ('service', 'batching'),
              ('uploads', 'settings'), ('guards', 'uploads'), ('site', 'rest'), ('web', 'rest'), ('web', 'site'),
              ('serve', 'web'), ('space', 'hub')}


def imported(module: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, 'imports are absolute, so that this test sees them'
            if node.module == 'cxr_fastai': names |= {a.name if a.name in LAYERS else '__init__' for a in node.names}
            elif node.module.startswith('cxr_fastai.'): names.add(node.module.split('.')[1])
        elif isinstance(node, ast.Import):
            names |= {alias.name.split('.')[1] for alias in node.names if alias.name.startswith('cxr_fastai.')}
    return names


@pytest.mark.parametrize('module', sorted(PACKAGE.glob('*.py')), ids=lambda path: path.stem)
def test_a_module_imports_only_from_below(module):
    assert module.stem in LAYERS, 'a new module has to be given its layer'
    for name in imported(module):
        assert LAYERS[name] < LAYERS[module.stem] or (module.stem, name) in NEIGHBOURS, f'{module.stem} imports {name}'


def test_only_the_command_line_knows_typer():
    assert {path.stem for path in PACKAGE.glob('*.py') if re.search('(import|from) typer', path.read_text())} == {
        'cli', 'cli_data', 'cli_train', 'cli_explain', 'cli_predict', 'cli_serve', 'options'}


def test_the_readme_shows_every_module_at_its_layer():
    readme = (PACKAGE.parent/'README.md').read_text()
    told = [(name, int(layer)) for layer, names in re.findall(r'^\| (\d) \| ((?:`\w+` ?)+)\|', readme, re.M)
            for name in re.findall(r'\w+', names)]
    assert dict(told) == {name: layer for name, layer in LAYERS.items() if not name.startswith('__')}
    assert len(told) == len(dict(told)), 'a module is shown twice'


def test_every_neighbour_that_is_allowed_is_one():
    assert {(name, other) for name, other in NEIGHBOURS if other in imported(PACKAGE/f'{name}.py')} == NEIGHBOURS
