"""Whatever takes a path takes it as a text, too."""

import inspect
import shutil
from importlib import import_module

import pytest

from cxr_fastai.core.run import Run, read_recipe
from cxr_fastai.data.auditing import audit
from cxr_fastai.data.find import list_images
from cxr_fastai.data.items import read_items
from cxr_fastai.data.loaders import CXRDataLoaders
from cxr_fastai.evaluation.evaluation import evaluate
from cxr_fastai.examples import list_held_out
from cxr_fastai.inference.bundle import Bundle
from cxr_fastai.inference.predictor import Predictor
from cxr_fastai.interpretation.explainer import Explainer
from cxr_fastai.interpretation.interpretation import CXRInterpretation
from cxr_fastai.publishing.exporting import export
from cxr_fastai.publishing.reporting import report

ROOMS = (
    'core',
    'images',
    'models',
    'inference',
    'data',
    'training',
    'evaluation',
    'interpretation',
    'publishing',
    'serving',
)
MESSAGES_ONLY = {'source'}
"""Parameters that only appear in error messages."""


def public_functions():
    """Every public function, and every public method of a public class, with its name."""
    for room in ROOMS:
        module = import_module(f'cxr_fastai.{room}')
        for name in module.__all__:
            value = getattr(module, name)
            if inspect.isfunction(value):
                yield f'{room}.{name}', value
            elif inspect.isclass(value) and value.__module__.startswith('cxr_fastai'):
                methods = [method for method in vars(value) if not method.startswith('_')]
                for method in methods:
                    if callable(getattr(value, method)):
                        yield f'{room}.{name}.{method}', getattr(value, method)


def test_every_public_parameter_that_is_a_path_can_be_a_text():
    narrow = []
    for name, function in public_functions():
        for parameter in inspect.signature(function).parameters.values():
            annotation = str(parameter.annotation)
            is_path = 'Path' in annotation and parameter.name not in MESSAGES_ONLY and 'Callable' not in annotation
            if is_path and not ('StrPath' in annotation or 'str' in annotation):
                narrow.append(f'{name}({parameter.name}: {annotation})')
    assert narrow == []


CALLS = {
    'Run': lambda run, images, bundle, out: Run(run).recipe,
    'Run.open': lambda run, images, bundle, out: Run.open(run).metrics,
    'read_recipe': lambda run, images, bundle, out: read_recipe(f'{run}/recipe.json'),
    'read_items': lambda run, images, bundle, out: len(read_items(images)),
    'audit': lambda run, images, bundle, out: audit(images),
    'from_folder': lambda run, images, bundle, out: CXRDataLoaders.from_folder(images, size=48),
    'list_images of one folder': lambda run, images, bundle, out: list_images(images),
    'list_images of several': lambda run, images, bundle, out: list_images([images, f'{images}/test']),
    'Bundle.open': lambda run, images, bundle, out: Bundle.open(bundle).config,
    'Predictor.load': lambda run, images, bundle, out: Predictor.load(bundle),
    'Explainer.load': lambda run, images, bundle, out: Explainer.load(bundle),
    'evaluate': lambda run, images, bundle, out: evaluate(run, images, 'valid'),
    'export': lambda run, images, bundle, out: export(run, out),
    'report': lambda run, images, bundle, out: report(run),
    'from_run': lambda run, images, bundle, out: CXRInterpretation.from_run(run, 'test', images),
    'list_held_out': lambda run, images, bundle, out: list_held_out(images, f'{out}/held.csv'),
}


@pytest.mark.parametrize('call', CALLS.values(), ids=CALLS)
def test_a_text_is_accepted_as_a_path(call, evaluated, images, bundle, tmp_path):
    run = shutil.copytree(evaluated.path, tmp_path / 'run')
    assert call(str(run), str(images), str(bundle), str(tmp_path / 'out'))
