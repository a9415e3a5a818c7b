"""`DataLoaders` and a network become a fastai `Learner`: loss, optimiser, metrics, parameter groups."""

from __future__ import annotations

import ctypes
import sys
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
"""Weight decay as L2, and decoupled."""


def make_learner(dls: DataLoaders, recipe: Recipe) -> Learner:
    """The `Learner` of `recipe`: torch's own optimiser with weight decay on every parameter, cross-entropy, and the
    metrics of the history. Raises `CXRError` where the weights cannot be had."""
    model = build_model(recipe.arch, recipe.weights).to(memory_format=torch.channels_last)
    loss_func = CrossEntropyLossFlat(
        weight=_class_weights(dls) if recipe.class_weights else None, label_smoothing=recipe.label_smoothing
    )
    return Learner(
        dls,
        model,
        loss_func=loss_func,
        opt_func=partial(OptimWrapper, opt=OPTIMIZERS[recipe.optimizer]),
        splitter=body_and_head,
        wd=recipe.weight_decay,
        train_bn=False,
        cbs=BnFreeze(),
        metrics=[accuracy, _of_scores(roc_auc), _of_classes(sensitivity), _of_classes(specificity)],
    )


def network(learn: Learner) -> nn.Sequential:
    """The network of `learn` itself, also while several processes train it in a wrapper."""
    return getattr(learn.model, 'module', learn.model)


def start_phase(learn: Learner, phase: Phase) -> None:
    """Give `learn` a new optimiser and freeze or unfreeze the body; frozen includes its BatchNorm statistics."""
    learn.create_opt()
    (learn.freeze if phase.frozen else learn.unfreeze)()


def body_and_head(model: nn.Sequential) -> list[list[nn.Parameter]]:
    """The two parameter groups of a `Sequential(body, head)`."""
    return [list(part.parameters()) for part in model]


def roc_auc(targs: np.ndarray, scores: np.ndarray) -> float:
    """Area under the ROC curve of the scores (n,) of the positive class; NaN where only one class is present, or where
    a score is no finite number."""
    from sklearn.metrics import roc_auc_score

    defined = len(np.unique(targs)) == 2 and np.isfinite(scores).all()
    return float(roc_auc_score(targs, scores)) if defined else float('nan')


def sensitivity(targs: np.ndarray, preds: np.ndarray) -> float:
    """The share of pneumonia that is called so; NaN where there is none."""
    return _recall(targs, preds, POSITIVE)


def specificity(targs: np.ndarray, preds: np.ndarray) -> float:
    """The share of normals that are called so; NaN where there is none."""
    return _recall(targs, preds, 1 - POSITIVE)


def reuse_memory() -> bool:
    """Let glibc keep freed memory for the next step; True where that took effect (Linux with glibc).

    By default each activation of over 32 MB goes back to the system when freed, and its pages are faulted in anew in
    the next step: on two cores half of a training step of the baseline at 224 px (measured by
    `benchmarks/train_throughput.py`). The process then stays at its peak memory until it ends.
    """
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
    if not sys.platform.startswith('linux'):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(mmap_max, 0) and mallopt(trim_threshold, -1))


def _class_weights(dls: DataLoaders) -> torch.Tensor:
    """For each class the inverse of its share of the training images, of mean 1 over the images: (2,)."""
    counts = torch.bincount(torch.tensor([int(label) for label in dls.train_ds.tls[1]]), minlength=len(VOCAB))
    return (len(dls.train_ds) / len(VOCAB) / counts).to(dls.device)


def _recall(targs: np.ndarray, preds: np.ndarray, label: int) -> float:
    among = targs == label
    return float((preds[among] == label).mean()) if among.any() else float('nan')


def _of_scores(func) -> AccumMetric:
    return AccumMetric(
        func, dim_argmax=-1, activation=ActivationType.BinarySoftmax, to_np=True, invert_arg=True, flatten=False
    )


def _of_classes(func) -> AccumMetric:
    return AccumMetric(func, dim_argmax=-1, to_np=True, invert_arg=True, flatten=False)
