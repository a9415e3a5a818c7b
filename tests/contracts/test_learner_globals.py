"""The globals that an exported learner names: a contract, because they must exist in every later version.

fastai's `load_learner` imports them. If a name is added or removed, files of earlier versions may no longer open there,
or no longer open with earlier versions. Then raise `SCHEMA` in `inference/config.py`, and update this list.
"""

import pytest
from bundlefiles import named_globals

from cxr_fastai.data.items import read_items
from cxr_fastai.data.loaders import CXRDataLoaders
from cxr_fastai.inference.config import ModelConfig
from cxr_fastai.inference.pickles import save_learner
from cxr_fastai.models.architectures import make_recipe
from cxr_fastai.training.learner import recipe_learner
from cxr_fastai.training.restoring import load_learner

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


def test_the_globals_of_this_package_are_public_modules_in_rooms():
    own = [module for module, _ in map(split, GLOBALS) if module.startswith('cxr_fastai.')]
    assert own
    for module in own:
        _, room, *rest = module.split('.')
        assert rest and not any(part.startswith('_') for part in (room, *rest))


@pytest.mark.parametrize(
    'arch, options',
    [
        ('efficientnet_lite0', {'name': 'tuned'}),
        pytest.param('resnet50', {}, marks=pytest.mark.slow),
    ],
)
def test_learners_of_other_recipes_can_be_opened(images, tmp_path, arch, options):
    recipe = make_recipe(arch, size=48, batch_size=8, weights='none', **options)
    learn = recipe_learner(CXRDataLoaders.from_items(read_items(images), images, recipe), recipe)
    save_learner(learn, tmp_path / 'learner.pkl', ModelConfig.from_recipe(recipe))
    assert load_learner(tmp_path / 'learner.pkl').config['arch'] == arch
