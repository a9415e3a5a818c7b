"""The globals that an exported learner names: a contract, because they must exist in every later version.

If a name is added or removed, files of earlier versions may no longer open, or no longer open with earlier versions.
Then raise `SCHEMA` in `inference/config.py`, and update this list and the tables in `inference/_unpickler.py`.
"""

import pytest
from bundlefiles import named_globals

from cxr_fastai.data.items import read_items
from cxr_fastai.data.loaders import CXRDataLoaders
from cxr_fastai.inference._unpickler import CALLABLE, CLASSES, REPLACED, is_allowed
from cxr_fastai.inference.config import ModelConfig
from cxr_fastai.inference.pickles import load_learner, save_learner
from cxr_fastai.models.architectures import make_recipe
from cxr_fastai.training.learner import recipe_learner

GLOBALS = [
    '__builtin__ float',
    '__builtin__ getattr',
    '__builtin__ long',
    '__builtin__ object',
    '__builtin__ print',
    '__builtin__ set',
    '__builtin__ tuple',
    '__builtin__ unicode',
    '_codecs encode',
    'collections OrderedDict',
    'cxr_fastai.data.loaders CXRDataLoaders',
    'cxr_fastai.data.loaders follow_parent',
    'cxr_fastai.data.transforms AugmentImages',
    'cxr_fastai.data.transforms NormalizeImage',
    'cxr_fastai.data.transforms OpenImage',
    'cxr_fastai.images.preprocessing Preprocessing',
    'cxr_fastai.models.architectures BaselineCNN',
    'cxr_fastai.training.learner CXRLearner',
    'cxr_fastai.training.learner body_and_head',
    'cxr_fastai.training.learner roc_auc',
    'cxr_fastai.training.learner sensitivity',
    'cxr_fastai.training.learner specificity',
    'cxr_fastai.training.optimizer TorchOptimizer',
    'fastai.callback.core TrainEvalCallback',
    'fastai.callback.progress ProgressCallback',
    'fastai.callback.training BnFreeze',
    'fastai.data.core Datasets',
    'fastai.data.core TfmdDL',
    'fastai.data.core TfmdLists',
    'fastai.data.load _FakeLoader',
    'fastai.data.load _wif',
    'fastai.data.transforms Categorize',
    'fastai.data.transforms CategoryMap',
    'fastai.data.transforms ColReader',
    'fastai.data.transforms IntToFloatTensor',
    'fastai.data.transforms ToTensor',
    'fastai.learner AvgLoss',
    'fastai.learner AvgMetric',
    'fastai.learner AvgSmoothLoss',
    'fastai.learner CastToTensor',
    'fastai.learner Recorder',
    'fastai.losses CrossEntropyLossFlat',
    'fastai.metrics AccumMetric',
    'fastai.metrics accuracy',
    'fastai.torch_core TensorBase',
    'fastai.torch_core TensorCategory',
    'fastai.torch_core TensorImage',
    'fastai.torch_core TensorImageBW',
    'fastcore.foundation L',
    'fasttransform.transform Pipeline',
    'functools partial',
    'inspect Parameter',
    'inspect Signature',
    'inspect _ParameterKind',
    'inspect _empty',
    'pandas Series',
    'pathlib PosixPath',
    'random Random',
    'torch FloatStorage',
    'torch LongStorage',
    'torch device',
    'torch._tensor _rebuild_from_type_v2',
    'torch._utils _rebuild_parameter',
    'torch._utils _rebuild_tensor_v2',
    'torch.nn.modules.activation ReLU',
    'torch.nn.modules.batchnorm BatchNorm2d',
    'torch.nn.modules.container Sequential',
    'torch.nn.modules.conv Conv2d',
    'torch.nn.modules.dropout Dropout',
    'torch.nn.modules.flatten Flatten',
    'torch.nn.modules.linear Linear',
    'torch.nn.modules.loss CrossEntropyLoss',
    'torch.nn.modules.pooling AdaptiveAvgPool2d',
    'torch.nn.modules.pooling MaxPool2d',
    'torch.optim.adam Adam',
]
"""Module and name, as in the `learner.pkl` of a baseline that was trained with the reference recipe."""


def split(line: str) -> tuple[str, str]:
    module, name = line.split()
    return module, name


def test_a_learner_names_exactly_these_globals(run):
    assert named_globals((run / 'learner.pkl').read_bytes()) == GLOBALS


def test_the_unpickler_allows_every_global_of_a_learner():
    assert [line for line in GLOBALS if not is_allowed(*split(line))] == []


def test_the_globals_of_this_package_are_public_modules_in_rooms():
    own = [module for module, _ in map(split, GLOBALS) if module.startswith('cxr_fastai.')]
    assert own
    for module in own:
        _, room, *rest = module.split('.')
        assert rest and not any(part.startswith('_') for part in (room, *rest))


@pytest.mark.parametrize(
    'module, name',
    [('torchvision.models.resnet', 'Bottleneck'), ('timm.models._efficientnet_blocks', 'InvertedResidual')],
)
def test_the_unpickler_allows_layers_of_libraries(module, name):
    assert is_allowed(module, name)


@pytest.mark.parametrize(
    'module, name',
    [('os', 'system'), ('builtins', 'exec'), ('functools', 'reduce'), ('timm.layers.config', 'os.system')],
)
def test_the_unpickler_refuses_other_globals(module, name):
    assert not is_allowed(module, name)


def test_no_global_is_in_two_tables_of_the_unpickler():
    names = [(module, name) for table in (REPLACED, CALLABLE, CLASSES) for module in table for name in table[module]]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    'arch, options',
    [
        ('efficientnet_lite0', {'name': 'tuned'}),
        pytest.param('resnet50', {}, marks=pytest.mark.slow),
    ],
)
def test_learners_of_other_recipes_name_only_allowed_globals(images, tmp_path, arch, options):
    recipe = make_recipe(arch, size=48, batch_size=8, weights='none', **options)
    learn = recipe_learner(CXRDataLoaders.from_items(read_items(images), images, recipe), recipe)
    save_learner(learn, tmp_path / 'learner.pkl', ModelConfig.from_recipe(recipe))
    names = named_globals((tmp_path / 'learner.pkl').read_bytes())
    assert [line for line in names if not is_allowed(*split(line))] == []
    assert load_learner(tmp_path / 'learner.pkl').config['arch'] == arch
