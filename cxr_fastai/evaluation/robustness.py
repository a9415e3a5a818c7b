"""Robustness of a model: its AUC on corrupted images, without the sharpness shortcut, and with parts hidden.

Every image is read once and resized to a square of `SQUARE_SIZE` pixels (larger only for a network with a larger
input). The square is corrupted and then preprocessed for the model, so models of different input sizes are measured on
the same corrupted images. For a network with a smaller input the image is resampled twice, unlike in `evaluate`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np
import pandas as pd

from cxr_fastai.core.errors import CXRWarning, UsageError
from cxr_fastai.core.files import StrPath
from cxr_fastai.core.progress import in_threads
from cxr_fastai.core.run import Run
from cxr_fastai.core.run_files import ROBUSTNESS_FACTS, hash_rows
from cxr_fastai.evaluation.figures import save_robustness_figure
from cxr_fastai.evaluation.metrics import ConfusionMatrix, Sample, measure_auc
from cxr_fastai.evaluation.results import is_of_network
from cxr_fastai.evaluation.split_images import find_split
from cxr_fastai.images.anatomy import ANATOMY, EXCHANGED, FILLS, HIDINGS, PARTS, Hiding, exchange_surroundings
from cxr_fastai.images.corruptions import CLEAN, CORRUPTIONS, SHORTCUT, STRENGTHS, Equaliser, corrupt, image_rng
from cxr_fastai.images.decode import open_image
from cxr_fastai.images.preprocessing import Preprocessing
from cxr_fastai.inference.config import identify_network
from cxr_fastai.inference.decision import Decision
from cxr_fastai.inference.predictor import Predictor

SQUARE_SIZE = 224
"""Side of the squares in pixels."""
MAX_IN_MEMORY = 2**30
"""Bytes of squares above which they are kept in a temporary file."""
ROBUSTNESS_COLUMNS = ['corruption', 'strength', 'n', 'auc', 'auc_low', 'auc_high', 'sensitivity', 'specificity']
ROBUSTNESS_COLUMNS += ROBUSTNESS_FACTS
Variant = Callable[[np.ndarray, str], np.ndarray]
"""A function of a square, grey uint8 (s, s), and the path of its image, which returns another square."""


def evaluate_robustness(
    run: Run,
    data: StrPath | None = None,
    split: str = 'valid',
    batch_size: int = 32,
    limit: int | None = None,
    device: str = 'auto',
) -> pd.DataFrame:
    """Measure the robustness of a run on a split as `measure_robustness` does.

    Writes the table into the run's `robustness.csv` with the SHA-256 of the network, where the rows of other splits
    stay, and draws its figure; `read_robustness` reads it. Raises `UsageError` for a split without images, `ImageError`
    for an unreadable image.
    """
    data = Path(data) if data is not None else None
    if split == 'valid' and run.has_out_of_fold:
        raise UsageError(
            f'{run.path}: the network was trained on the images of its out-of-fold predictions, so its robustness on '
            'them says nothing. Measure it on --split test, or measure a run of the folds.'
        )
    root, items = find_split(run, data, split, limit)
    table = measure_robustness(Predictor.load(run.path, device=device), items, root, batch_size)
    rows = table.assign(split=split, model=identify_network(run.path))
    run.write_split('robustness.csv', rows.assign(sha256=hash_rows(rows)), split)
    save_robustness_figure(run, split)
    return table


def read_robustness(run: Run, split: str) -> pd.DataFrame | None:
    """Return the rows of `split` in the robustness table of `run`; None if it has none, or none that are current.

    Rows that are not of the network, the threshold and the views of the run are left out, with a `CXRWarning`.
    """
    return _current_rows(run, run.robustness, split) if (run / 'robustness.csv').exists() else None


def warn_of_stale_robustness(run: Run) -> None:
    """Warn of each split in the robustness table of `run` as `read_robustness` does, and of a damaged table."""
    if not (run / 'robustness.csv').exists():
        return
    try:
        table = run.robustness
    except UsageError as error:
        warnings.warn(str(error), CXRWarning, stacklevel=2)
        return
    for split in table.split.unique():
        _current_rows(run, table, split)


def _current_rows(run: Run, table: pd.DataFrame, split: str) -> pd.DataFrame | None:
    rows = table[table.split == split].reset_index(drop=True)
    problem = _find_problem(run, rows) if len(rows) else ''
    if problem:
        warnings.warn(
            f'{run / "robustness.csv"}: the rows of {split} {problem}, so they are not used. '
            f'Run `{run.evaluation(split)} --robustness` again.',
            CXRWarning,
            stacklevel=3,
        )
    return rows if len(rows) and not problem else None


def _find_problem(run: Run, rows: pd.DataFrame) -> str:
    """Return why the `rows` of a split are not those that the run would have now; empty if they are."""
    if not set(ROBUSTNESS_FACTS) <= set(rows):
        return 'were measured by an older version'
    if set(rows.sha256) != {hash_rows(rows)}:
        return 'were edited'
    first = rows.iloc[0]
    if not is_of_network(run, {'model': first.model}):
        return 'are of another network'
    decision = Decision.from_run(run, first.model)
    threshold, tta = (decision.threshold, decision.tta) if decision else (run.recipe.threshold, False)
    if bool(first.tta) != tta:
        manner = ('with', 'without') if first.tta else ('without', 'with')
        return f'were measured {manner[0]} test-time views, and the run was evaluated {manner[1]} them since'
    if first.threshold != threshold:
        return f'were measured at the threshold {first.threshold:g}, and that of the run is {threshold:g} now'
    return ''


def measure_robustness(
    predictor: Predictor,
    items: pd.DataFrame,
    root: StrPath,
    batch_size: int = 32,
    seed: int = 0,
    workers: int | None = None,
) -> pd.DataFrame:
    """Measure the AUC on clean and on corrupted images, without the sharpness shortcut, and with parts hidden.

    Args:
        predictor: the model.
        items: table of the images with the columns `path` (unique) and `label`, and optionally `patient`.
        root: folder of the images.
        batch_size: number of images predicted at once.
        seed: seed of the corruptions.
        workers: number of threads that read and corrupt images (default: the number of cores).

    Returns:
        Table with `ROBUSTNESS_COLUMNS`: the AUC with the 95% interval of `measure_auc`, sensitivity and specificity at
        the model's threshold, NaN where a class is missing; the threshold, and whether the images were predicted with
        test-time views (`tta`). Strength 0 marks uncorrupted images.

    Raises `ImageError` for an unreadable image.
    """
    preprocessing = Preprocessing.of(predictor.config)
    names, images = make_images(items, Path(root), preprocessing, seed, workers)
    scores = score_images(predictor, images, batch_size).reshape(len(names), -1)
    facts = {'threshold': predictor.config.threshold, 'tta': predictor.tta}
    rows = []
    for (corruption, strength), p in zip(names, scores, strict=True):
        sample = Sample.from_predictions(items.assign(p_pneumonia=p))
        metrics = _measure_variant(sample, predictor.config.threshold)
        rows.append({'corruption': corruption, 'strength': strength, 'n': len(items), **metrics, **facts})
    return pd.DataFrame(rows, columns=ROBUSTNESS_COLUMNS)


def make_images(
    items: pd.DataFrame,
    root: Path,
    preprocessing: Preprocessing,
    seed: int = 0,
    workers: int | None = None,
    hidden: bool = True,
) -> tuple[list[tuple[str, int]], Iterator[np.ndarray]]:
    """Return the names of the variants, kind and strength, and an iterator over their images.

    The other arguments are those of `measure_robustness`. The images are grey uint8 (size, size): those of `items` as
    they are, then those with each corruption, and without the sharpness shortcut. With `hidden`, also with parts hidden
    or exchanged. Raises `ImageError` for an unreadable image.
    """
    square_size = max(SQUARE_SIZE, preprocessing.size)
    squares, sides = read_squares(
        items, root, Preprocessing(square_size, preprocessing.resize, modality=preprocessing.modality), workers
    )
    variants = _make_variants(Equaliser.of(squares, sides), seed)
    if hidden:
        variants |= _make_hidden_variants(items, squares, seed)

    def make(job: tuple[Variant, int]) -> np.ndarray:
        variant, index = job
        return preprocessing.fit(variant(squares[index], items.path.iloc[index]))

    jobs = [(variant, index) for variant in variants.values() for index in range(len(items))]
    return list(variants), in_threads(make, jobs, workers)


def score_images(predictor: Predictor, images: Iterable[np.ndarray], batch_size: int = 32) -> np.ndarray:
    """Return the probabilities (n,) of grey uint8 `images` (size, size), predicted `batch_size` at once."""
    return np.concatenate([predictor.scores(batch) for batch in _batches(iter(images), batch_size)])


def read_squares(
    items: pd.DataFrame,
    root: Path,
    preprocessing: Preprocessing,
    workers: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Read the images of `items` and make them square.

    Returns:
        The squares, uint8 (n, size, size), in a temporary file where they would need much memory; and the shorter sides
        (n,) of the image files in pixels.

    Raises `ImageError` for an unreadable image.
    """
    squares = empty_squares(len(items), preprocessing.size)
    sides = np.empty(len(items), int)
    paths = [root / path for path in items.path]
    for i, (square, side) in enumerate(in_threads(partial(_read, preprocessing=preprocessing), paths, workers)):
        squares[i] = square
        sides[i] = side
    return squares, sides


def empty_squares(number: int, size: int) -> np.ndarray:
    """Return memory for squares, uint8 (number, size, size), in a temporary file where they would need much."""
    shape = (number, size, size)
    if np.prod(shape) <= MAX_IN_MEMORY:
        return np.empty(shape, np.uint8)
    with TemporaryFile() as file:  # the mapping keeps the file open
        return np.memmap(file, np.uint8, shape=shape)


def _read(path: Path, preprocessing: Preprocessing) -> tuple[np.ndarray, int]:
    image = open_image(path, preprocessing)
    return preprocessing.fit(image.pixels), min(image.width, image.height)


def _make_variants(equaliser: Equaliser, seed: int) -> dict[tuple[str, int], Variant]:
    """Return the functions that corrupt an image, by kind and strength."""
    variants: dict[tuple[str, int], Variant] = {(CLEAN, 0): _keep}
    for kind in CORRUPTIONS:
        for strength in STRENGTHS:
            variants[kind, strength] = partial(_corrupt, kind=kind, strength=strength, seed=seed)
    variants[SHORTCUT, 0] = partial(_equalise, equaliser=equaliser)
    return variants


def _make_hidden_variants(items: pd.DataFrame, squares: np.ndarray, seed: int) -> dict[tuple[str, int], Variant]:
    """Return the functions that hide or exchange parts of an image, by their name."""
    variants: dict[tuple[str, int], Variant] = {}
    for name, hiding in HIDINGS.items():
        variants[name, 0] = partial(_hide, name=name, hiding=hiding, seed=seed)
    variants[EXCHANGED, 0] = partial(_exchange, others=_find_others(items, squares, seed))
    return variants


def _keep(square: np.ndarray, path: str) -> np.ndarray:
    return square


def _corrupt(square: np.ndarray, path: str, kind: str, strength: int, seed: int) -> np.ndarray:
    return corrupt(square, kind, strength, path, seed)


def _equalise(square: np.ndarray, path: str, equaliser: Equaliser) -> np.ndarray:
    return equaliser(square)


def _hide(square: np.ndarray, path: str, name: str, hiding: Hiding, seed: int) -> np.ndarray:
    return hiding(square, image_rng(seed, path, name))


def _exchange(square: np.ndarray, path: str, others: dict[str, np.ndarray]) -> np.ndarray:
    return exchange_surroundings(square, others[path])


def _find_others(items: pd.DataFrame, squares: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """Return an image of the other class for the path of each image; the image itself if there is none."""
    of_other_class = {label: np.flatnonzero(items.label != label) for label in items.label.unique()}
    others = {}
    for index, (path, label) in enumerate(zip(items.path, items.label, strict=True)):
        candidates = of_other_class[label]
        rng = image_rng(seed, path, EXCHANGED)
        others[path] = squares[rng.choice(candidates) if len(candidates) else index]
    return others


def _batches(images: Iterator[np.ndarray], size: int) -> Iterator[np.ndarray]:
    while batch := list(islice(images, size)):
        yield np.stack(batch)


def summarise(table: pd.DataFrame) -> dict[str, float]:
    """Return the most important AUCs of a robustness table with the columns `corruption` and `auc`.

    `clean` is the AUC on clean images, `corrupted` the mean over the kinds of corruption, `shortcut` the AUC on
    equalised images, and `loss` the difference of `clean` and `shortcut`. `exchanged` is the AUC with the surroundings
    of another image. `lungs_hidden` and `thorax_hidden` are the greatest AUC over the ways to hide the pixels, and
    `lungs_only` is the smallest. A table of an earlier version has none of the last four.
    """
    auc = table.groupby('corruption', sort=False).auc.mean()
    summary = {
        'clean': float(auc[CLEAN]),
        'corrupted': float(auc.drop([CLEAN, SHORTCUT, *ANATOMY], errors='ignore').mean()),
        'shortcut': float(auc[SHORTCUT]),
        'loss': float(auc[CLEAN] - auc[SHORTCUT]),
    }
    for part, values in anatomy_aucs(table).items():
        summary[part.replace(' ', '_')] = float(min(values) if part == 'lungs only' else max(values))
    if EXCHANGED in auc:
        summary['exchanged'] = float(auc[EXCHANGED])
    return summary


def anatomy_aucs(table: pd.DataFrame) -> dict[str, list[float]]:
    """Return the AUCs of a robustness table with parts hidden: a list in the order of `FILLS` for each of `PARTS`.

    Empty if the table has none, because it was measured before they were.
    """
    auc = dict(zip(table.corruption, table.auc, strict=True))
    if EXCHANGED not in auc:
        return {}
    return {part: [auc[f'{part}, {fill}'] for fill in FILLS] for part in PARTS}


def _measure_variant(sample: Sample, threshold: float) -> dict[str, Any]:
    auc = measure_auc(sample)
    rates = ConfusionMatrix(sample, threshold)
    metrics = {
        'auc': auc['value'],
        'auc_low': auc['low'],
        'auc_high': auc['high'],
        'sensitivity': rates.rate('sensitivity')['value'],
        'specificity': rates.rate('specificity')['value'],
    }
    return {name: np.nan if value is None else float(value) for name, value in metrics.items()}
