"""Checks before the first batch of a training: its images, the folder and disk space of its run, and the trust store.

A training can take hours. What would make it fail, or make its result useless, is found before it starts.
"""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

from fastai.data.core import DataLoaders
from torch import nn

from cxr_fastai.core.environment import is_main_process
from cxr_fastai.core.errors import CXRError, CXRWarning, OutputError, UsageError
from cxr_fastai.core.files import check_writable, nearest_folder
from cxr_fastai.core.progress import are, counted
from cxr_fastai.core.recipe import VOCAB
from cxr_fastai.data.loaders import CXRDataLoaders
from cxr_fastai.data.transforms import list_labels
from cxr_fastai.inference.pickles import check_store

COPIES_ON_DISK = 10
"""Size of the files of a run in multiples of that of the weights. A state has the weights, those of the best epoch and
two moments of each; while it is written, the previous one exists too. The model files are two more."""


def check_loaders(dls: DataLoaders) -> None:
    """Raise `UsageError` if `dls` has no batch to train on, or none to validate on."""
    for split, dl in (('training', dls.train), ('validation', dls.valid)):
        n = getattr(dl, 'n', None)  # None for an iterable of unknown length
        if n == 0 and not (split == 'validation' and trains_on_all(dls)):
            raise UsageError(
                f'the learner has no {split} images. Give it DataLoaders with images first: learn.dls = dls.'
            )
        if n and len(dl) == 0:
            raise UsageError(
                f'there {are(n)} {counted(n, f"{split} image")}, fewer than a batch of {dl.bs}, and incomplete '
                f'batches are dropped. Choose a batch size (bs) of at most {n}, or drop_last=False.'
            )


def trains_on_all(dls: DataLoaders) -> bool:
    """Return whether `dls` are those of a recipe without validation images, `valid='none'`."""
    recipe = getattr(dls, 'recipe', None)
    return recipe is not None and recipe.valid == 'none'


def check_labels(dls: DataLoaders) -> None:
    """Raise `UsageError` if the training images of `dls` are of a single class; warn if the validation images are.

    `CXRDataLoaders` have warned before.
    """
    for split, dataset in (('training', dls.train_ds), ('validation', dls.valid_ds)):
        if not hasattr(dataset, 'tls') or len(dataset) == 0:  # data sets of tensors have no pipelines
            continue
        labels = set(list_labels(dataset))
        if len(labels) >= len(VOCAB):
            continue
        text = f'all {split} images ({len(dataset):,}) are {VOCAB[labels.pop()]}'
        if split == 'training':
            raise UsageError(f'{text}, so nothing can be learned. Use images of both classes.')
        if isinstance(dls, CXRDataLoaders):
            continue
        warnings.warn(
            f'{text}, so their AUC is undefined and no threshold can be chosen on them. Use images of both classes.',
            CXRWarning,
            stacklevel=3,
        )


def check_place(folder: Path) -> None:
    """Raise `OutputError` if no files can be written to the run `folder`, new or resumed; warn about the trust store.

    Without a trust store that can be written, the training succeeds, but its `learner.pkl` cannot be opened.
    """
    if not is_main_process():
        return
    check_writable(folder)
    try:
        check_store()
    except CXRError as error:
        warnings.warn(
            f'this program will not open the learner.pkl of this training, because its hash cannot be stored: {error}',
            CXRWarning,
            stacklevel=3,
        )


def check_space(folder: Path, network: nn.Module) -> None:
    """Raise `OutputError` if the disk of `folder`, which need not exist, has no space for the run of `network`."""
    if not is_main_process():
        return
    weights = sum(tensor.numel() * tensor.element_size() for tensor in network.state_dict().values())
    written = sum(file.stat().st_size for file in folder.glob('*') if file.is_file())  # by a run that is resumed
    needed = COPIES_ON_DISK * weights - written
    free = shutil.disk_usage(nearest_folder(folder)).free
    if free < needed:
        raise OutputError(
            f'{folder}: the run needs about {needed / 1e6:,.0f} MB, but {free / 1e6:,.0f} MB are free on this disk. '
            'Free disk space, or choose another place with --out.'
        )
