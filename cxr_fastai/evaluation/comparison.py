"""Several runs on the same images: their figures side by side, what sets them apart, and how seeds vary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cxr_fastai.core.errors import UsageError
from cxr_fastai.core.run import Run
from cxr_fastai.data.items import identify_images
from cxr_fastai.evaluation.intervals import auc_draws, compare_auc, deviation, difference
from cxr_fastai.evaluation.metrics import Sample

FIGURES = ('auc', 'average_precision', 'sensitivity', 'specificity', 'balanced_accuracy', 'accuracy', 'mcc', 'brier')
"""What the mean over seeds is told of."""


def find_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs that `folders` mean: run folders as they are, and those directly inside other folders. Raises
    `UsageError` where there is none, or one twice."""
    found = []
    for folder in folders:
        inside = sorted(path.parent for path in folder.glob('*/recipe.json'))
        found += [Run.open(folder)] if (folder / 'recipe.json').is_file() or not inside else map(Run.open, inside)
    paths = [run.path.resolve() for run in found]
    if twice := [str(run.path) for run in found if paths.count(run.path.resolve()) > 1]:
        raise UsageError(f'{twice[0]} is named twice: a run cannot be compared with itself.')
    return found


def name_runs(runs: Sequence[Run]) -> dict[str, Run]:
    """The runs by the shortest ends of their paths that tell them apart."""
    parts = [run.path.resolve().parts for run in runs]
    depth = next(
        depth for depth in range(1, max(map(len, parts)) + 1) if len({path[-depth:] for path in parts}) == len(runs)
    )
    return {'/'.join(path[-depth:]): run for path, run in zip(parts, runs, strict=True)}


def same_images(tables: Mapping[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """The rows of images that all `tables` have with one label, in one order. Empty where that is less than half of any
    table, as with the validation images of other seeds, or images of one class alone: such runs are not compared."""
    keyed = {
        name: table.drop_duplicates('path').set_index(['path', 'label'], drop=False) for name, table in tables.items()
    }
    first, *others = keyed.values()
    shared = [image for image in first.index if all(image in other.index for other in others)]
    enough = len(shared) >= max(map(len, keyed.values())) / 2 and len({label for _, label in shared}) > 1
    return {name: table.loc[shared].reset_index(drop=True) for name, table in keyed.items()} if enough else {}


def compare(tables: Mapping[str, pd.DataFrame], thresholds: Mapping[str, float]) -> list[dict[str, Any]]:
    """What sets each run apart from the first, on the same images, each at its own threshold.

    The difference of the AUCs with DeLong's interval and p, which take images as independent, and `p_patients`, which
    the bootstrap of patients shows where patients have several images; McNemar's exact test of which images are called
    rightly; and each p as Holm (1979) adjusts it for the number of runs. `tables` are those of `same_images`.
    """
    (base, first), *others = tables.items()
    sample = Sample.of(first)
    rows = []
    for name, table in others:
        other = table.p_pneumonia.to_numpy(float)
        gap = compare_auc(sample.targs, other, sample.p)
        right = [(scores >= thresholds[run]) == sample.targs for run, scores in ((base, sample.p), (name, other))]
        rows.append(
            {
                'run': name,
                'against': base,
                'n': len(other),
                'auc': gap,
                'mcnemar': mcnemar(*right),
                'p_patients': _by_patients(sample, other, gap['value']),
            }
        )
    return _adjusted(rows)


def mcnemar(first: np.ndarray, second: np.ndarray) -> dict[str, Any]:
    """McNemar's exact test (1947) that two classifiers are right, (n,) each, equally often on the same images."""
    from statsmodels.stats.contingency_tables import mcnemar as test

    cells = [[int((a & b).sum()) for b in (second, ~second)] for a in (first, ~first)]
    return {'only_first': cells[0][1], 'only_second': cells[1][0], 'p': float(test(cells, exact=True).pvalue)}


def summarise_seeds(runs: Mapping[str, Run], split: str) -> list[dict[str, Any]]:
    """Mean and standard deviation of `FIGURES` on `split` over runs on the same images that differ in their seed alone:
    an object for each recipe that has several seeds, with the names of its `runs` and {mean, sd} of each figure."""
    alike: dict[Any, list[str]] = {}
    for name, run in runs.items():
        alike.setdefault((replace(run.recipe, seed=0, workers=0), identify_images(run.items)), []).append(name)
    return [
        {'runs': names, **_spread([runs[name].metrics[split] for name in names])}
        for names in alike.values()
        if len({runs[name].recipe.seed for name in names}) > 1
    ]


def _spread(metrics: Sequence[dict[str, Any]]) -> dict[str, dict[str, float | None]]:
    values = {
        figure: [one[figure]['value'] if isinstance(one[figure], dict) else one[figure] for one in metrics]
        for figure in FIGURES
    }
    return {
        figure: {'mean': None, 'sd': None}
        if None in found
        else {'mean': float(np.mean(found)), 'sd': float(np.std(found, ddof=1))}
        for figure, found in values.items()
    }


def _by_patients(sample: Sample, other: np.ndarray, gap: float | None) -> float | None:
    """The p of the AUCs' difference `gap` with the standard error that the bootstrap of patients shows; None where no
    patient has several images."""
    if gap is None or not sample.grouped:
        return None
    ours, theirs = (auc_draws(sample.weights, sample.targs, scores) for scores in (sample.p, other))
    return difference(gap, deviation(theirs - ours))['p']


def _adjusted(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    from statsmodels.stats.multitest import multipletests

    def holm(values: list[float | None]) -> list[float | None]:
        known = [value for value in values if value is not None]
        found = iter(multipletests(known, method='holm')[1].tolist() if known else [])
        return [None if value is None else next(found) for value in values]

    aucs, calls = [row['auc']['p'] for row in rows], [row['mcnemar']['p'] for row in rows]
    adjusted = map(holm, (aucs, calls, [row['p_patients'] for row in rows]))
    return [
        {
            **row,
            'auc': row['auc'] | {'p_holm': auc},
            'mcnemar': row['mcnemar'] | {'p_holm': call},
            'p_patients_holm': patients,
        }
        for row, auc, call, patients in zip(rows, *adjusted, strict=True)
    ]
