"""The predictions that `CXRInterpretation` shows: of a learner for the images of a loader, or of an evaluated run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import fastai.vision.data  # noqa: F401  (registers `show_batch` for images)
import numpy as np
import pandas as pd
import torch
from fastai.data.core import TfmdDL
from fastai.learner import Learner
from fastai.torch_core import to_concat, to_detach
from fastcore.basics import detuplify
from torch import Tensor, nn

from cxr_fastai.core.errors import CXRError, ImageError, UsageError
from cxr_fastai.core.recipe import POSITIVE, VOCAB
from cxr_fastai.core.run import Run
from cxr_fastai.core.run_files import MAX_THRESHOLD
from cxr_fastai.data.loaders import describe_unreadable, find_preprocessing, find_unreadable, locate
from cxr_fastai.data.transforms import OpenImage
from cxr_fastai.evaluation.evaluation import apply_threshold, evaluate
from cxr_fastai.evaluation.metrics import measure
from cxr_fastai.evaluation.split_images import find_split
from cxr_fastai.evaluation.split_predictions import PREDICTION_COLUMNS
from cxr_fastai.images.decode import file_path
from cxr_fastai.images.preprocessing import Preprocessing
from cxr_fastai.inference.config import LEARNER
from cxr_fastai.interpretation.explainer import (
    Explainer,
    Subject,
    copy_network,
    learner_predictor,
    learner_preprocessing,
)
from cxr_fastai.training.restoring import load_learner

SPLITS = ('train', 'valid')
"""The split of each index of `DataLoaders`."""
ITEM_FACTS = ('split', 'patient')
"""Columns of the items of a loader that are also columns of its predictions."""


@dataclass
class LearnerSource:
    """The predictions of `learn` for the images of `dl`, made in one pass. Create it with `predict`.

    `preds` (n, 2) are probabilities, `targs` (n,) class indices and `losses` (n,) those of the learner's loss function,
    all in the order of `dl.items`. `predictions` has a row for each image, with the columns of `PREDICTION_COLUMNS`
    that are known; its paths are relative to `root`. `images` are what the loader opens: paths, images of Pillow, or
    arrays. `network` is a copy of the network on the CPU.
    """

    learn: Learner
    dl: TfmdDL
    act: Any
    preds: Tensor
    targs: Tensor
    losses: Tensor
    threshold: float
    predictions: pd.DataFrame
    images: Sequence[Any]
    root: Path
    split: str | None
    network: nn.Module
    run = None

    @classmethod
    def predict(
        cls, learn: Learner, ds_idx: int = 1, dl: TfmdDL | None = None, act: Any = None, threshold: float = 0.5
    ) -> LearnerSource:
        """Predict the images of `dl`, or of `learn.dls[ds_idx]`; training images without augmentation.

        `act` replaces the activation of the learner's loss function. Raises `UsageError` if the images have no labels
        or other classes than `VOCAB`, and `CXRError` if a probability is NaN.
        """
        if not 0 <= threshold <= MAX_THRESHOLD:
            raise UsageError(f'threshold {threshold:g}: a probability from 0 to 1 is needed.')
        split = SPLITS[ds_idx] if dl is None and ds_idx in range(len(SPLITS)) else None
        dl = _plain_loader(learn, learn.dls[ds_idx] if dl is None else dl)
        if act is None and not hasattr(learn.loss_func, 'activation'):
            act = partial(torch.softmax, dim=-1)  # for a loss of torch, such as nn.CrossEntropyLoss
        preds, targs, losses = learn.get_preds(dl=dl, with_loss=True, act=act)
        _check_probabilities(preds)
        images = [_opened_image(dl, item) for item in _list_items(dl)]
        root = Path(getattr(learn.dls, 'root', '.'))
        table = _describe_items(dl, images, root, split).assign(
            label=np.array(VOCAB)[targs.numpy()],
            p_pneumonia=preds[:, POSITIVE].double().numpy(),
            loss=losses.double().numpy(),
        )
        table = apply_threshold(table, threshold)
        table = table[[column for column in PREDICTION_COLUMNS if column in table]]
        return cls(learn, dl, act, preds, targs, losses, threshold, table, images, root, split, copy_network(learn))

    @cached_property
    def metrics(self) -> dict[str, Any]:
        """The metrics in the form of `metrics.json`. Their intervals take about a second."""
        return measure(self.predictions, self.threshold, f'fixed:{self.threshold:g}')

    @cached_property
    def preprocessing(self) -> Preprocessing | None:
        """How images are prepared; None if `OpenImage` does not open them."""
        try:
            return find_preprocessing(self.learn.dls)
        except UsageError:
            return None

    def subject(self, index: int) -> Subject:
        """Return the image of a row with its name, true class and probability."""
        row = self.predictions.iloc[index]
        return Subject(self.images[index], row.path, row.label, row.p_pneumonia)

    def explainer(self, target: str, method: str, layer: str | None) -> Explainer:
        """Return the explainer of the network as it was when it predicted.

        Raises `UsageError` if the images are prepared in another way than by `OpenImage`, and if the network allows no
        such map.
        """
        predictor = learner_predictor(self.network, learner_preprocessing(self.learn), self.threshold)
        return Explainer(predictor, target, method, layer)


@dataclass
class RunSource:
    """The stored predictions of `run` for the images `items` of a `split`, below `root`. Create it with `read`.

    The attributes are those of `LearnerSource`. `learn` and `dl` are made when they are used.
    """

    run: Run
    split: str
    root: Path
    items: pd.DataFrame
    predictions: pd.DataFrame
    metrics: dict[str, Any]
    device: str = 'auto'
    act = None

    @classmethod
    def read(cls, run: Run, split: str = 'test', data: Path | None = None, device: str = 'auto') -> RunSource:
        """Return the predictions of `run`, which is evaluated first, on `device`, if it has not been."""
        evaluate(run, data, split, again=False, device=device)
        root, items = find_split(run, data, split)
        return cls(run, split, root, items, run.predicted(split), run.metrics[split], device)

    @property
    def threshold(self) -> float:
        """The threshold that `evaluate` chose."""
        return self.metrics['threshold']

    @property
    def preds(self) -> Tensor:
        """The probabilities of the classes (n, 2)."""
        p = torch.tensor(self.predictions.p_pneumonia.to_numpy(float))
        return torch.stack([1 - p, p], dim=1)

    @property
    def targs(self) -> Tensor:
        """The class indices (n,)."""
        return torch.tensor([VOCAB.index(label) for label in self.predictions.label])

    @property
    def losses(self) -> Tensor:
        """The cross-entropy of each image (n,)."""
        return torch.tensor(self.predictions.loss.to_numpy(float))

    @cached_property
    def learn(self) -> Learner:
        """The exported learner of the run. Raises `CXRError` if it is missing or not trusted."""
        path = self.run / LEARNER
        if not path.is_file():
            raise UsageError(f'{path}: no such file. This method of fastai needs the exported learner of the run.')
        return load_learner(path)

    @cached_property
    def dl(self) -> TfmdDL:
        """The loader of the images, in the order of the predictions."""
        return self.learn.dls.test_dl(locate(self.items, self.root), with_labels=True)

    @property
    def preprocessing(self) -> Preprocessing:
        """How images are prepared."""
        return Preprocessing.of(self.run.recipe)

    def subject(self, index: int) -> Subject:
        """Return the image of a row with its name, true class and probability."""
        row = self.predictions.iloc[index]
        return Subject(self.root / row.path, row.path, row.label, row.p_pneumonia)

    def explainer(self, target: str, method: str, layer: str | None) -> Explainer:
        """Return the explainer of the network of the run. Raises `UsageError` if it allows no such map."""
        return Explainer.load(self.run.path, target, method, layer, self.device)


def load_inputs(learn: Learner, dl: TfmdDL, indices: Sequence[int]) -> Any:
    """Return the input of the network for the items of `dl` at `indices`, as `learn.get_preds` would return it."""
    loader = learn.dls.test_dl(select_items(dl, indices), with_labels=True)
    batches = [tuple(to_detach(part) for part in batch[: loader.n_inp]) for batch in loader]
    return detuplify(to_concat(batches))


def select_items(dl: TfmdDL, indices: Sequence[int]) -> Any:
    """Return the items of `dl` at `indices`: rows of a table, or elements of a list."""
    if isinstance(dl.items, pd.DataFrame):
        return dl.items.iloc[list(indices)]
    return [dl.items[i] for i in indices]


def _list_items(dl: TfmdDL) -> list[Any]:
    if isinstance(dl.items, pd.DataFrame):
        return [row for _, row in dl.items.iterrows()]
    return list(dl.items)


def _plain_loader(learn: Learner, dl: TfmdDL) -> TfmdDL:
    """Return a loader of all images of `dl`, in order, and without augmentation. Raises `UsageError` if it is unfit."""
    _check_labels(dl)
    _check_skipped(dl)
    if getattr(dl.dataset, 'split_idx', None) == 0:
        return learn.dls.test_dl(dl.items, with_labels=True)
    return dl.new(shuffle=False, drop_last=False)


def _check_labels(dl: TfmdDL) -> None:
    dataset = getattr(dl, 'dataset', None)
    targets = getattr(dataset, 'tls', [])[getattr(dataset, 'n_inp', 0) :]
    if len(targets) != 1:
        raise UsageError(
            'the loader has no labels. Make it with learn.dls.test_dl(items, with_labels=True), where items is a table '
            'with the columns path and label.'
        )
    if not len(dl.items):
        raise UsageError('the loader has no images. Make one with dl=learn.dls.test_dl(items, with_labels=True).')
    classes = tuple(getattr(targets[0], 'vocab', None) or ())
    if classes != VOCAB:
        raise UsageError(
            f'the classes of the loader are {", ".join(map(str, classes)) or "unknown"}, but {", ".join(VOCAB)} are '
            "needed, in this order. Use fastai's ClassificationInterpretation."
        )


def _check_skipped(dl: TfmdDL) -> None:
    """Raise `ImageError` if the loader skips images: the others would not be in the order of its items."""
    skipping = [transform for transform in dl.dataset.tls[0].tfms.fs if getattr(transform, 'skip', False)]
    if not skipping:
        return
    preprocessing: Preprocessing = skipping[0].preprocessing
    images = [_opened_image(dl, item) for item in _list_items(dl)]
    errors = find_unreadable([image for image in images if file_path(image)], preprocessing.modality)
    if errors:
        first = list(errors.values())[0]
        raise ImageError(f'{describe_unreadable(errors)}. Remove or repair these images.', first.code)


def _check_probabilities(preds: Tensor) -> None:
    if preds.ndim != 2 or preds.shape[1] != len(VOCAB):
        raise UsageError(f'the network returned {tuple(preds.shape)} numbers, but two for each image are needed.')
    if preds.isnan().any():
        raise CXRError('the network returned NaN, so it is damaged or diverged in training. Train it again.')
    if preds.min() < 0 or preds.max() > 1:
        raise UsageError(
            f'act returned values from {preds.min():g} to {preds.max():g}, but probabilities are needed, as '
            'torch.softmax returns them.'
        )


def _opened_image(dl: TfmdDL, item: Any) -> Any:
    """Return what the loader opens for `item`: usually a path, which a column of the item or the item itself contains.

    Loaders of fastai open images with other transforms than `OpenImage`; for them it is the first path.
    """
    transforms = dl.dataset.tls[0].tfms.fs
    has_opener = any(isinstance(transform, OpenImage) for transform in transforms)
    for transform in transforms:
        is_ready = isinstance(transform, OpenImage) if has_opener else file_path(item) is not None
        if is_ready:
            break
        item = transform(item)
    return item


def _describe_items(dl: TfmdDL, images: Sequence[Any], root: Path, split: str | None) -> pd.DataFrame:
    """Return a table of what is known about each item: its `path`, and perhaps its `split` and `patient`."""
    table = pd.DataFrame({'path': [_name_image(image, i, root) for i, image in enumerate(images)]})
    if split:
        table['split'] = split
    if isinstance(dl.items, pd.DataFrame):
        for column in ITEM_FACTS:
            if column in dl.items:
                table[column] = dl.items[column].astype(str).to_numpy()
    return table


def _name_image(image: Any, index: int, root: Path) -> str:
    path = file_path(image)
    if path is None:
        return f'image {index}'
    return Path(path).relative_to(root).as_posix() if Path(path).is_relative_to(root) else path
