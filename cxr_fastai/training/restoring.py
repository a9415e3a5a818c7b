"""`load_learner` opens an exported learner as a `CXRLearner` that predicts and can be trained further."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
from torch import nn

from cxr_fastai.core.recipe import UNKNOWN, VOCAB, data_recipe
from cxr_fastai.data.loaders import CXRDataLoaders, cxr_block, follow_parent
from cxr_fastai.data.transforms import OpenImage
from cxr_fastai.images.preprocessing import Preprocessing
from cxr_fastai.inference.config import SCHEMA, ModelConfig
from cxr_fastai.inference.learner_files import read_learner
from cxr_fastai.training.learner import CXRLearner, cxr_learner


def load_learner(path: str | Path) -> CXRLearner:
    """Return the learner in the file `path`, on the CPU, with its network, preprocessing and settings.

    Nothing in the file is executed: the network is built by the name of its architecture, and only its weights are
    taken from the file. So the loss, the optimiser, the metrics and the augmentation are those that `cxr_learner` sets
    by default. `dls` has no images; `dls.test_dl` and `predict` prepare any.

    Raises `UntrustedError` if the SHA-256 of the file is not trusted; nothing of it is read then. Raises `CXRError` if
    it is not an exported learner of this package, `UsageError` if its network cannot be built by its name (see
    `add_arch`), and `ParityError` if it fails its self-test.
    """
    saved = read_learner(Path(path))
    learn = network_learner(saved.network, saved.config)
    learn.config = {'schema': SCHEMA, **asdict(saved.config), 'selftest': saved.selftest.as_dict()}
    return learn


def network_learner(network: nn.Module, config: ModelConfig) -> CXRLearner:
    """Return the learner of `network`, a trained `Sequential(body, head)` on the CPU, with loaders without images.

    The loaders prepare any image as `config` says. The loss, the optimiser and the metrics are those of `cxr_learner`.
    """
    learn = cxr_learner(_empty_loaders(config), network, pretrained=False)
    learn.arch, learn.pretrained = config.arch, UNKNOWN
    return learn


def _empty_loaders(config: ModelConfig) -> CXRDataLoaders:
    """Return loaders without images that prepare any image as `config` says."""
    recipe = data_recipe('reference', **asdict(Preprocessing.of(config)))
    opened = OpenImage.to_tensor(np.zeros((config.size, config.size), np.uint8))  # loaders try their transforms once
    images = pd.Series([opened, opened], dtype=object)
    table = pd.DataFrame({'path': images, 'label': VOCAB, 'split': ['train', 'valid']})
    loaders = cxr_block(recipe).dataloaders(table, bs=recipe.batch_size, num_workers=0, wif=follow_parent, device='cpu')
    return CXRDataLoaders(*loaders.loaders, path=Path('.'), device=loaders.device).new_empty()
