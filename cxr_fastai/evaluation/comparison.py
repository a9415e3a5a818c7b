"""Comparison of several runs on the same images: paired tests, and the variation over random seeds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cxr_fastai.core.errors import CXRError, UsageError
from cxr_fastai.core.figures import save_figure
from cxr_fastai.core.files import StrPath, check_new, write_json, writing
from cxr_fastai.core.folders import describe_own_folder
from cxr_fastai.core.foreign import read_json
from cxr_fastai.core.run import Run
from cxr_fastai.core.series import Series, is_series
from cxr_fastai.data.items import identify_images
from cxr_fastai.data.splits import unknown_patients
from cxr_fastai.evaluation.clusters import compare_clustered_auc
from cxr_fastai.evaluation.curves import plot_comparison
from cxr_fastai.evaluation.intervals import compare_auc
from cxr_fastai.evaluation.metrics import Sample
from cxr_fastai.evaluation.results import check_results
from cxr_fastai.inference.config import identify_network

RESULTS = 'comparison.json'
"""The file in the folder of a comparison that has its results."""
SEED_METRICS = (
    'auc',
    'average_precision',
    'sensitivity',
    'specificity',
    'balanced_accuracy',
    'accuracy',
    'mcc',
    'brier',
)
"""Metrics for which mean and standard deviation over seeds are computed."""


@dataclass(frozen=True)
class Comparison:
    """The contents of `comparison.json`: metrics by run, the results of `compare`, and those of `summarise_seeds`."""

    split: str
    runs: dict[str, dict[str, Any]]
    pairs: list[dict[str, Any]]
    seeds: list[dict[str, Any]]


def compare_runs(runs: Sequence[Run], split: str, folder: StrPath) -> Comparison:
    """Compare runs that were evaluated on `split`; write `comparison.json` and `comparison.png` into a new `folder`.

    An earlier comparison of the same runs is replaced (see `is_comparison_of`). `pairs` is empty where the runs have
    too few images in common. Raises `UsageError` if `folder` has other files.
    """
    folder = Path(folder)
    check_comparison_folder(folder, runs, split)
    named_runs = name_runs(runs)
    metrics = {name: check_results(run, split) for name, run in named_runs.items()}
    tables = {name: run.predicted(split) for name, run in named_runs.items()}
    thresholds = {name: metrics[name]['threshold'] for name in named_runs}
    shared = same_images(tables)
    pairs = compare(shared, thresholds) if shared else []
    comparison = Comparison(split, metrics, pairs, summarise_seeds(named_runs, split))
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / RESULTS, asdict(comparison))
    save_figure(plot_comparison(shared or tables, metrics, f'{split} split'), folder / 'comparison.png')
    return comparison


def check_comparison_folder(folder: Path, runs: Sequence[Run], split: str) -> None:
    """Raise what `check_new` raises, unless `folder` has a comparison of the same runs on `split`."""
    if not is_comparison_of(folder, runs, split):
        check_new(folder)


def is_comparison_of(folder: Path, runs: Sequence[Run], split: str) -> bool:
    """Return whether `folder` has a comparison of the networks of `runs`, in this order and by these names, on `split`.

    Raises `UsageError` if a run has no network.
    """
    if not (folder / RESULTS).is_file():
        return False
    networks = [(name, identify_network(run.path)) for name, run in name_runs(runs).items()]
    try:
        contents = read_json(folder / RESULTS)
        compared = [(name, metrics['model']) for name, metrics in contents['runs'].items()]
        return bool(contents['split'] == split and compared == networks)
    except (CXRError, TypeError, AttributeError, KeyError):  # not written by `compare_runs`
        return False


def find_runs(folders: Sequence[Path]) -> list[Run]:
    """Return the runs in `folders`, each a run folder or a folder of run folders.

    Raises `UsageError` for a folder without a run, for an unfinished series, and for a run that is named twice.
    """
    _check_order(folders)
    runs: list[Run] = []
    for folder in folders:
        if is_series(folder):
            runs.extend(Series.open(folder).open_runs())
            continue
        inside = sorted(path.parent for path in folder.glob('*/recipe.json'))
        is_run = (folder / 'recipe.json').is_file()
        paths = [folder] if is_run or not inside else inside
        runs.extend(Run.open(path) for path in paths)
    counts = Counter(run.path.resolve() for run in runs)
    for run in runs:
        if counts[run.path.resolve()] > 1:
            raise UsageError(f'{run.path} is named twice: a run cannot be compared with itself. Name it once.')
    return runs


def _check_order(folders: Sequence[Path]) -> None:
    """Raise `UsageError` if images are named among the runs."""
    is_run = [_contains_run(folder) for folder in folders]
    for folder, is_known in zip(folders, is_run, strict=True):
        if any(is_run) and not is_known and folder.exists() and describe_own_folder(folder) is None:
            raise UsageError(
                f'{folder}: not a run folder. Name the run first and images with --data: '
                f'`cxr-fastai evaluate {folders[is_run.index(True)]} --data {folder}`.'
            )


def _contains_run(folder: Path) -> bool:
    return (folder / 'recipe.json').is_file() or any(folder.glob('*/recipe.json'))


def name_runs(runs: Sequence[Run]) -> dict[str, Run]:
    """Name the runs by the shortest endings of their paths that are all different."""
    paths = [run.path.resolve().parts for run in runs]
    longest = max(len(path) for path in paths)
    depth = 1
    while depth < longest and len({path[-depth:] for path in paths}) < len(runs):
        depth += 1
    return {'/'.join(path[-depth:]): run for path, run in zip(paths, runs, strict=True)}


def same_images(tables: Mapping[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """Select the images that all predictions `tables` contain with the same label, in the same order.

    Returns an empty dict where the runs cannot be compared: fewer than half of the images of a table are shared, as for
    the validation images of different seeds, or the shared images are of a single class.
    """
    by_image = {}
    for name, table in tables.items():
        by_image[name] = table.drop_duplicates('path').set_index(['path', 'label'], drop=False)
    first, *others = by_image.values()
    shared = [image for image in first.index if all(image in other.index for other in others)]
    labels = {label for _, label in shared}
    largest = max(len(table) for table in by_image.values())
    if len(shared) < largest / 2 or len(labels) < 2:
        return {}
    return {name: table.loc[shared].reset_index(drop=True) for name, table in by_image.items()}


def compare(tables: Mapping[str, pd.DataFrame], thresholds: Mapping[str, float]) -> list[dict[str, Any]]:
    """Compare each run with the first on the same images, each at its own threshold.

    Args:
        tables: predictions by run, as `same_images` returns them.
        thresholds: threshold by run.

    Returns:
        One object per run after the first: `auc`, the difference of the AUCs with interval and p-value by DeLong, or by
        `compare_clustered_auc` where patients have several images (`grouped_by_patient`); `mcnemar`, McNemar's exact
        test on the correct predictions, which assumes independent images. Each p-value also has a value adjusted for
        the number of runs (Holm 1979).
    """
    (base_name, base_table), *others = tables.items()
    base = Sample.from_predictions(base_table)
    base_correct = (base.p >= thresholds[base_name]) == base.targs
    rows = []
    for name, table in others:
        p = table.p_pneumonia.to_numpy(float)
        correct = (p >= thresholds[name]) == base.targs
        if base.grouped:
            auc = compare_clustered_auc(base.targs, p, base.p, base.patients)
        else:
            auc = compare_auc(base.targs, p, base.p)
        rows.append(
            {
                'run': name,
                'against': base_name,
                'n': len(p),
                'grouped_by_patient': base.grouped,
                'unknown_patients': int(unknown_patients(base_table).sum()),
                'auc': auc,
                'mcnemar': mcnemar(base_correct, correct),
            }
        )
    return _add_adjusted(rows)


def mcnemar(first: np.ndarray, second: np.ndarray) -> dict[str, Any]:
    """McNemar's exact test (1947) of whether two classifiers are correct equally often.

    `first` and `second` (n,) are true for images that a classifier predicts correctly.
    """
    from statsmodels.stats import contingency_tables

    only_first = int((first & ~second).sum())
    only_second = int((~first & second).sum())
    table = [[int((first & second).sum()), only_first], [only_second, int((~first & ~second).sum())]]
    test = contingency_tables.mcnemar(table, exact=True)
    return {'only_first': only_first, 'only_second': only_second, 'p': float(test.pvalue)}


def _add_adjusted(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add the p-values adjusted by Holm to the objects of `compare`."""
    auc = _holm([row['auc']['p'] for row in rows])
    mcnemar = _holm([row['mcnemar']['p'] for row in rows])
    adjusted = []
    for i, row in enumerate(rows):
        adjusted.append(
            {
                **row,
                'auc': {**row['auc'], 'p_holm': auc[i]},
                'mcnemar': {**row['mcnemar'], 'p_holm': mcnemar[i]},
            }
        )
    return adjusted


def _holm(values: list[float | None]) -> list[float | None]:
    """Adjust p-values for multiple testing; undefined ones stay None and do not count."""
    from statsmodels.stats.multitest import multipletests

    adjusted: list[float | None] = [None] * len(values)
    defined = [i for i, value in enumerate(values) if value is not None]
    if defined:
        _, corrected, *_ = multipletests([values[i] for i in defined], method='holm')
        for i, p in zip(defined, corrected, strict=True):
            adjusted[i] = float(p)
    return adjusted


def summarise_seeds(runs: Mapping[str, Run], split: str) -> list[dict[str, Any]]:
    """Summarise runs on the same images whose recipes differ in the seed alone.

    Returns:
        One object per recipe with several seeds: the names of its `runs`, and `mean` and `sd` of each of `SEED_METRICS`
        on `split`; None where a metric of a run is undefined.
    """
    groups: dict[Any, list[str]] = {}
    for name, run in runs.items():
        key = (replace(run.recipe, seed=0, workers=0), identify_images(run.items))
        groups.setdefault(key, []).append(name)
    summaries = []
    for names in groups.values():
        seeds = {runs[name].recipe.seed for name in names}
        if len(seeds) > 1:
            metrics = [runs[name].metrics[split] for name in names]
            spread = {metric: mean_and_sd([_value(of_run[metric]) for of_run in metrics]) for metric in SEED_METRICS}
            summaries.append({'runs': names, **spread})
    return summaries


def _value(metric: float | dict[str, float | None]) -> float | None:
    """Return the value of a metric of `metrics.json` with or without an interval."""
    return metric['value'] if isinstance(metric, dict) else metric


def mean_and_sd(values: Sequence[float | None]) -> dict[str, float | None]:
    """Return the `mean` and the standard deviation `sd` of the `values`; None if one of them is undefined."""
    defined = [value for value in values if value is not None]
    if len(defined) < len(values):
        return {'mean': None, 'sd': None}
    return {'mean': float(np.mean(defined)), 'sd': float(np.std(defined, ddof=1))}
