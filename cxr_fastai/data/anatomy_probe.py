"""How well an image tells its label with the lungs hidden: what a data set gives away around them.

A small network is trained on images whose lungs are black, in plain PyTorch, in a cross-validation with all images of a
patient in one fold. Its AUC cannot come from the disease. It is a lower bound: a larger network may find more.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from cxr_fastai.core.files import StrPath
from cxr_fastai.core.progress import ShownProgress, in_threads
from cxr_fastai.core.recipe import POSITIVE, VOCAB
from cxr_fastai.data.probes import ANATOMY, MIN_PROBED, assign_folds
from cxr_fastai.images.anatomy import HIDINGS
from cxr_fastai.images.preprocessing import Preprocessing
from cxr_fastai.models.architectures import BaselineCNN
from cxr_fastai.models.inputs import normalize

PARTS = ('lungs hidden', 'thorax hidden')
"""What is hidden, the traits of the probe."""
SIZE = 64
"""Side of the images in pixels."""
MAX_IMAGES = 1000
"""Largest number of images of a class; more are drawn at random."""
FOLDS = 3
EPOCHS = 5
BATCH_SIZE = 64
LR = 2e-3
CHANNELS = (3, 16, 32, 64, 128)


def probe_anatomy(
    images: pd.DataFrame, root: StrPath, workers: int | None = None, modality: str = '', seed: int = 0
) -> pd.DataFrame:
    """Return the out-of-fold AUC of a small network with `PARTS` hidden: columns `probe trait auc`.

    Args:
        images: table with the columns `path split label patient`, of images that can be read. At most `MAX_IMAGES` of
            each class in train and valid are used.
        root: folder of the images.
        workers: number of threads that read images (default: the number of cores).
        modality: DICOM modalities that are accepted besides radiographs.
        seed: seed of the networks and of the order of images.

    The result is empty if a class has fewer than `MIN_PROBED` images or patients. On the CPU two calls give the same.
    """
    from sklearn.metrics import roc_auc_score

    pool = images[images.split.isin(['train', 'valid'])].reset_index(drop=True)
    per_class = pool.groupby('label').agg(images=('path', 'size'), patients=('patient', 'nunique'))
    if len(per_class) < len(VOCAB) or per_class.min(axis=None) < MIN_PROBED:
        return pd.DataFrame(columns=['probe', 'trait', 'auc'])
    drawn = [rows.sample(min(MAX_IMAGES, len(rows)), random_state=seed) for _, rows in pool.groupby('label')]
    pool = pd.concat(drawn, ignore_index=True)
    paths = [Path(root, path) for path in pool.path]
    squares = np.stack(list(in_threads(Preprocessing(SIZE, modality=modality).load, paths, workers)))
    targs = (pool.label == VOCAB[POSITIVE]).to_numpy()
    folds = assign_folds(pool, targs, FOLDS)
    rows = []
    shown = ShownProgress(len(PARTS) * FOLDS * EPOCHS, 'a small network without the lungs', 'epoch')
    try:
        for part in PARTS:
            hide = HIDINGS[f'{part}, black']
            rng = np.random.default_rng(seed)
            hidden = torch.from_numpy(np.stack([hide(square, rng) for square in squares])[:, None])
            scores = _cross_validate(hidden, torch.tensor(targs).long(), folds, seed, shown)
            rows.append((ANATOMY, part, float(roc_auc_score(targs, scores))))
    finally:
        shown.close()
    return pd.DataFrame(rows, columns=['probe', 'trait', 'auc'])


def _cross_validate(images: Tensor, targs: Tensor, folds: np.ndarray, seed: int, shown: ShownProgress) -> np.ndarray:
    """Return a score (n,) of each of `images`, grey uint8 (n, 1, s, s), by a network trained on other folds."""
    scores = np.empty(len(images), np.float32)
    for number in range(FOLDS):
        held_out = torch.tensor(folds == number)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = BaselineCNN(CHANNELS).to(memory_format=torch.channels_last)
            _train(network, images[~held_out], targs[~held_out], shown)
        with torch.no_grad():
            parts = [network(_prepare(batch)) for batch in images[held_out].split(BATCH_SIZE)]
        scores[folds == number] = torch.cat(parts).softmax(1)[:, POSITIVE].numpy()
    return scores


def _train(network: BaselineCNN, images: Tensor, targs: Tensor, shown: ShownProgress) -> None:
    """Train `network` with classes of equal weight, and leave it in the mode of evaluation."""
    weight = len(targs) / len(VOCAB) / torch.bincount(targs, minlength=len(VOCAB))
    optimizer = torch.optim.AdamW(network.parameters())
    steps = EPOCHS * -(-len(images) // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, steps)
    network.train()
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(images)).split(BATCH_SIZE):
            cross_entropy(network(_prepare(images[rows])), targs[rows], weight).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        shown.update(len(images))
    network.eval()


def _prepare(images: Tensor) -> Tensor:
    return normalize(images.float() / 255).contiguous(memory_format=torch.channels_last)
