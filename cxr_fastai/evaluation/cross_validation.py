"""Evaluate the folds of a cross-validation: out-of-fold predictions, their metrics, and the spread over the folds.

Each image is predicted by the one network of the series that was not trained on any image of its patient. So the
threshold and the temperature rest on all images and not on a tenth of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pandas as pd

from cxr_fastai.core.errors import UsageError
from cxr_fastai.core.figures import save_figure
from cxr_fastai.core.files import StrPath, write_csv, write_json, writing
from cxr_fastai.core.recipe_texts import differences
from cxr_fastai.core.run import Run
from cxr_fastai.core.run_files import OUT_OF_FOLD, read_json, read_table
from cxr_fastai.core.series import FOLDS, Series
from cxr_fastai.evaluation.comparison import mean_and_sd
from cxr_fastai.evaluation.evaluation import apply_threshold, evaluate, find_kinds
from cxr_fastai.evaluation.figures import CURVES
from cxr_fastai.evaluation.metrics import (
    PREVALENCES,
    ConfusionMatrix,
    Sample,
    measure,
    measure_auc,
    measure_average_precision,
)
from cxr_fastai.evaluation.plots import plot_confusion_matrix
from cxr_fastai.evaluation.split_images import find_split
from cxr_fastai.evaluation.thresholds import decide, parse_rule
from cxr_fastai.inference.config import identify_network
from cxr_fastai.inference.decision import DEFAULT_RULE, Decision

METRICS = 'out_of_fold.json'
SPREAD = ('auc', 'average_precision', 'sensitivity', 'specificity')
"""Metrics whose mean, standard deviation and range over the folds are computed."""


def evaluate_folds(
    series: Series,
    data: StrPath | None = None,
    batch_size: int = 32,
    rule: str | None = None,
    prevalences: Sequence[float] | None = None,
    device: str = 'auto',
    again: bool = True,
    tta: bool | None = None,
) -> dict[str, Any]:
    """Evaluate every network of a cross-validation on its own validation images, and all of these images together.

    Writes `out_of_fold.csv`, a predictions table with the column `fold`, `out_of_fold.json` and figures into the folder
    of the series, and the usual files into its runs. With test-time views the table has the column `tta`, always True.

    Args:
        series: a finished series of the kind `folds`.
        data, batch_size, device: as in `evaluate`.
        rule: rule for the threshold, which is chosen on all out-of-fold predictions (default: `DEFAULT_RULE`).
        prevalences: as in `measure`.
        again: predict also what was predicted before.
        tta: as in `evaluate`, and the same for all folds.

    Returns:
        The contents of `out_of_fold.json`: `metrics` as `measure` returns them, on all images at one threshold; the
        `decision`; `folds`, the most important metrics of each fold at that threshold; and their `spread`.

    Raises `UsageError` for a series of another kind, and if trainings are missing.
    """
    if series.kind != FOLDS:
        raise UsageError(
            f'{series.path}: its runs differ in the seed, so there are no folds. Evaluate them by --split.'
        )
    if rule:
        parse_rule(rule)
    runs = dict(zip(series.recipes, series.open_runs(), strict=True))
    _check_recipes(series, runs)
    _check_images(series, runs, data)
    if tta is None:
        tta = evaluated_with_views(series)
    networks = [
        evaluate(run, data, 'valid', batch_size, rule=rule, again=again, device=device, tta=tta)['model']
        for run in runs.values()
    ]
    tables = [run.predicted('valid').assign(fold=name) for name, run in runs.items()]
    together = pd.concat(tables, ignore_index=True).sort_values('path', ignore_index=True)
    decision = decide(together, rule or DEFAULT_RULE, _identify(networks), tta)
    predictions = apply_threshold(together, decision.threshold)
    results = {'decision': asdict(decision), **_measure(predictions, list(runs), decision, prevalences or PREVALENCES)}
    write_csv(series.path / OUT_OF_FOLD, predictions.assign(tta=True) if tta else predictions)
    write_json(series.path / METRICS, results)
    _draw(series, predictions, results['metrics'])
    return results


def read_out_of_fold(
    series: Series,
    data: StrPath | None = None,
    batch_size: int = 32,
    device: str = 'auto',
    tta: bool | None = None,
) -> pd.DataFrame:
    """Return the out-of-fold predictions of `series`, sorted by path: a predictions table with the column `fold`.

    They are those that `evaluate_folds` wrote. If there are none, or if a network has changed since, or if they were
    made with other views than `tta` says, the folds are evaluated first. The arguments and errors are those of
    `evaluate_folds`.
    """
    if not _is_evaluated(series, tta):
        evaluate_folds(series, data, batch_size, device=device, again=False, tta=tta)
    return read_table(series.path / OUT_OF_FOLD)


def evaluated_with_views(series: Series) -> bool:
    """Return whether the last evaluation of `series` was made with test-time views."""
    return bool(_stored_decision(series).get('tta'))


def find_folder(series: Series, data: StrPath | None = None) -> Path:
    """Return the folder that the paths of the images are relative to.

    Raises `UsageError` if the validation images of a fold are not there.
    """
    runs = dict(zip(series.recipes, series.open_runs(), strict=True))
    _check_images(series, runs, data)
    folder, _ = find_split(runs[list(runs)[0]], Path(data) if data is not None else None, 'valid')
    return folder


def _is_evaluated(series: Series, tta: bool | None) -> bool:
    """Return whether the stored out-of-fold predictions are of the networks that are in the folder now.

    With `tta`, they must have been made with test-time views, or without.
    """
    if series.kind != FOLDS or not (series.path / OUT_OF_FOLD).is_file():
        return False
    decision = _stored_decision(series)
    networks = [identify_network(run.path) for run in series.open_runs()]
    return decision.get('model') == _identify(networks) and tta in (None, decision.get('tta', False))


def _stored_decision(series: Series) -> dict[str, Any]:
    """Return the decision of the last evaluation of `series`; empty if there is none, or if its file is damaged."""
    decision = None
    with suppress(UsageError):
        decision = read_json(series.path / METRICS).get('decision')
    return decision if isinstance(decision, dict) else {}


def _identify(networks: Sequence[str]) -> str:
    """Return one SHA-256 for those of the `networks` of all folds."""
    return hashlib.sha256(' '.join(networks).encode()).hexdigest()


def _measure(
    predictions: pd.DataFrame, names: Sequence[str], decision: Decision, prevalences: Sequence[float]
) -> dict[str, Any]:
    """Return the metrics of all images together, those of each fold of the `names`, and their spread."""
    with_kinds = predictions.assign(kind=find_kinds(predictions))
    threshold, rule = decision.threshold, decision.rule
    folds = {name: _measure_fold(predictions[predictions.fold == name], threshold) for name in names}
    return {
        'metrics': measure(with_kinds, threshold, rule, decision.temperature, prevalences, ['kind']),
        'folds': folds,
        'spread': {metric: _spread([fold[metric] for fold in folds.values()]) for metric in SPREAD},
    }


def _check_recipes(series: Series, runs: Mapping[str, Run]) -> None:
    """Raise `UsageError` if the folds were trained in different ways, as if one of them was trained longer."""
    recipes = {name: replace(run.recipe, fold=0) for name, run in runs.items()}
    first = list(recipes)[0]
    for name, recipe in recipes.items():
        changes = differences(recipes[first], recipe)
        if changes:
            raise UsageError(
                f'{series.path}: {name} was trained in another way than {first} ({"; ".join(changes)}), so their '
                'predictions cannot be taken together. Train all folds by one recipe, into another --out.'
            )


def _check_images(series: Series, runs: Mapping[str, Run], data: StrPath | None) -> None:
    """Raise `UsageError` unless the validation images of each fold are found, and are of no other fold."""
    fold_of: dict[str, str] = {}
    for name, run in runs.items():
        _, found = find_split(run, Path(data) if data is not None else None, 'valid')
        own = run.used_items.query('split == "valid"')
        if found.path.to_list() != own.path.to_list():
            raise UsageError(
                f'{series.path}: the validation images of {name} are not in {data or run.images}. Name the folder that '
                'the folds were trained on with --data.'
            )
        for path in own.path:
            if fold_of.setdefault(path, name) != name:
                raise UsageError(
                    f'{series.path}: {path} is a validation image of {fold_of[path]} and of {name}, so the folds were '
                    'trained on different images. Train again into another --out.'
                )


def _measure_fold(predictions: pd.DataFrame, threshold: float) -> dict[str, Any]:
    sample = Sample.from_predictions(predictions)
    confusion = ConfusionMatrix(sample, threshold)
    return {
        'n': len(sample.p),
        'positives': int(sample.targs.sum()),
        'auc': measure_auc(sample)['value'],
        'average_precision': measure_average_precision(sample)['value'],
        'sensitivity': confusion.rate('sensitivity')['value'],
        'specificity': confusion.rate('specificity')['value'],
    }


def _spread(values: Sequence[float | None]) -> dict[str, float | None]:
    """Return the mean, the standard deviation and the range of the `values`; None if one of them is undefined."""
    defined = [value for value in values if value is not None]
    extremes = (min(defined), max(defined)) if len(defined) == len(values) else (None, None)
    return {**mean_and_sd(values), 'low': extremes[0], 'high': extremes[1]}


def _draw(series: Series, predictions: pd.DataFrame, metrics: dict[str, Any]) -> None:
    title = f'{series.recipe.arch}, {series.number} folds'
    figures = {'confusion': plot_confusion_matrix(metrics, title)}
    if metrics['auc']['value'] is not None:
        figures |= {name: plot(predictions, metrics, title) for name, plot in CURVES.items()}
    with writing(series.path):
        (series.path / 'figures').mkdir(exist_ok=True)
    for name, figure in figures.items():
        save_figure(figure, series.path / 'figures' / f'{name}.png')
