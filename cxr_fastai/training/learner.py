"""`make_learner` turns `DataLoaders` and a recipe into a fastai `Learner`: network, loss, optimiser and metrics."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from fastai.callback.training import BnFreeze
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import AccumMetric, ActivationType, accuracy
from fastai.optimizer import OptimWrapper
from torch import nn

from cxr_fastai.core.recipe import POSITIVE, VOCAB, Phase, Recipe
from cxr_fastai.models.architectures import build_model

OPTIMIZERS = {'adam': torch.optim.Adam, 'adamw': torch.optim.AdamW}
"""Optimisers by name. `adam` applies weight decay as an L2 penalty, `adamw` decouples it from the gradient."""
M_TRIM_THRESHOLD = -1
M_MMAP_MAX = -4
"""Parameters of glibc's `mallopt`, from malloc.h."""


def make_learner(dls: DataLoaders, recipe: Recipe) -> Learner:
    """Return the `Learner` of `recipe` for `dls`.

    It uses torch's own optimiser with weight decay on all parameters, cross-entropy, and the metrics of `history.csv`.
    Raises `CXRError` if the pretrained weights are not available.
    """
    model = build_model(recipe.arch, recipe.weights).to(memory_format=torch.channels_last)
    class_weights = _class_weights(dls) if recipe.class_weights else None
    return Learner(
        dls,
        model,
        loss_func=CrossEntropyLossFlat(weight=class_weights, label_smoothing=recipe.label_smoothing),
        opt_func=partial(OptimWrapper, opt=OPTIMIZERS[recipe.optimizer]),
        splitter=body_and_head,
        wd=recipe.weight_decay,
        train_bn=False,
        cbs=BnFreeze(),
        metrics=[accuracy, _score_metric(roc_auc), _class_metric(sensitivity), _class_metric(specificity)],
    )


def _class_weights(dls: DataLoaders) -> torch.Tensor:
    """Return the loss weight of each class, (2,): inverse to its frequency, with a mean of 1 over the images."""
    labels = torch.tensor([int(label) for label in dls.train_ds.tls[1]])
    counts = torch.bincount(labels, minlength=len(VOCAB))
    return (len(labels) / len(VOCAB) / counts).to(dls.device)


def _score_metric(func: Callable[[np.ndarray, np.ndarray], float]) -> AccumMetric:
    """Return `func` of (labels, probabilities of the positive class) as a fastai metric."""
    return AccumMetric(
        func, dim_argmax=-1, activation=ActivationType.BinarySoftmax, to_np=True, invert_arg=True, flatten=False
    )


def _class_metric(func: Callable[[np.ndarray, np.ndarray], float]) -> AccumMetric:
    """Return `func` of (labels, predicted classes) as a fastai metric."""
    return AccumMetric(func, dim_argmax=-1, to_np=True, invert_arg=True, flatten=False)


def network(learn: Learner) -> nn.Sequential:
    """Return the network of `learn`, without the wrapper that it has in distributed training."""
    return getattr(learn.model, 'module', learn.model)


def start_phase(learn: Learner, phase: Phase) -> None:
    """Create a new optimiser, and freeze or unfreeze the body. A frozen body keeps its BatchNorm statistics."""
    learn.create_opt()
    if phase.frozen:
        learn.freeze()
    else:
        learn.unfreeze()


def body_and_head(model: nn.Sequential) -> list[list[nn.Parameter]]:
    """Return the two parameter groups of a `Sequential(body, head)`."""
    return [list(part.parameters()) for part in model]


def roc_auc(targs: np.ndarray, scores: np.ndarray) -> float:
    """Return the area under the ROC curve.

    `targs` (n,) are the class indices and `scores` (n,) the probabilities of the positive class. The result is NaN if
    only one class is present, or if a score is NaN or infinite.
    """
    from sklearn.metrics import roc_auc_score

    both_classes = len(np.unique(targs)) == len(VOCAB)
    if not both_classes or not np.isfinite(scores).all():
        return float('nan')
    return float(roc_auc_score(targs, scores))


def sensitivity(targs: np.ndarray, preds: np.ndarray) -> float:
    """Return the proportion of PNEUMONIA images that are classified as PNEUMONIA; NaN if there are none.

    `targs` (n,) and `preds` (n,) are class indices.
    """
    return _recall(targs, preds, POSITIVE)


def specificity(targs: np.ndarray, preds: np.ndarray) -> float:
    """Return the proportion of NORMAL images that are classified as NORMAL; NaN if there are none.

    `targs` (n,) and `preds` (n,) are class indices.
    """
    return _recall(targs, preds, 1 - POSITIVE)


def _recall(targs: np.ndarray, preds: np.ndarray, label: int) -> float:
    of_label = targs == label
    if not of_label.any():
        return float('nan')
    return float((preds[of_label] == label).mean())


def reuse_memory() -> bool:
    """Make glibc keep freed memory for the next step. Returns True if it took effect (Linux with glibc).

    By default glibc returns every freed block of more than 32 MB to the system, and the next step has to map its pages
    again. On two cores this takes half of a training step of the baseline at 224 px, as
    `benchmarks/train_throughput.py` measures. The process then keeps its peak memory until it ends.
    """
    if not sys.platform.startswith('linux'):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, -1))
