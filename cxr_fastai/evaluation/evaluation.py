"""Evaluation of a run: predict a split once, choose the threshold on the validation images, and compute the metrics."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cxr_fastai.core.errors import CXRWarning, UsageError
from cxr_fastai.core.files import StrPath, check_writable
from cxr_fastai.core.recipe import SHIFT, VOCAB
from cxr_fastai.core.run import Run, as_run
from cxr_fastai.data.items import log_ignored, parse_name
from cxr_fastai.evaluation.metrics import PREVALENCES, is_complete, measure
from cxr_fastai.evaluation.split_images import NO_IMAGES, find_images, own_images
from cxr_fastai.evaluation.split_predictions import (
    OutOfFold,
    Predicted,
    Source,
    SplitImages,
    choose_tta,
    predict_missing,
)
from cxr_fastai.evaluation.thresholds import decide, deciding_split, parse_rule
from cxr_fastai.inference.config import identify_network
from cxr_fastai.inference.decision import DEFAULT_RULE, Decision


@dataclass(frozen=True)
class Evaluation:
    """How a run is evaluated: the arguments of `evaluate`."""

    data: Path | None = None
    split: str = 'test'
    batch_size: int = 32
    limit: int | None = None
    rule: str | None = None
    prevalences: Sequence[float] | None = None
    by: Sequence[str] | None = None
    again: bool = True
    device: str = 'auto'
    tta: bool | None = None


def evaluate(
    run: Run | StrPath,
    data: StrPath | None = None,
    split: str = 'test',
    batch_size: int = 32,
    limit: int | None = None,
    rule: str | None = None,
    prevalences: Sequence[float] | None = None,
    by: Sequence[str] | None = None,
    again: bool = True,
    device: str = 'auto',
    tta: bool | None = None,
) -> dict[str, Any]:
    """Evaluate a run on a split, and return the metrics of the split.

    Writes `predictions.csv`, `decision.json` and `metrics.json` into the run. Other splits that were evaluated before
    stay in these files, with metrics at the same threshold. The validation images of the run are predicted too if that
    was not done before, because the threshold and the temperature are chosen on them alone. With a rule that ends in
    `@shift`, the split `shift` takes their place. A run with out-of-fold predictions is evaluated on `valid` by these.

    Args:
        run: the run, or its folder.
        data: folder or CSV file of the images; by default the one that the run was trained on.
        split: `train`, `valid`, `test` or `shift`.
        batch_size: number of images predicted at once.
        limit: only the first images of each class, for trials.
        rule: rule for the threshold; by default the one used last, else `DEFAULT_RULE`.
        prevalences: prevalences in (0, 1) for which predictive values are computed; by default those used last for this
            split, else `PREVALENCES`.
        by: columns of the items that define subgroups; by default those used last for this split, else `kind`. Without
            such a column now, a `CXRWarning` says so.
        again: predict the split again even if this network has predicted the same files before.
        device: where the network computes; see `models.devices`.
        tta: average the probabilities of each image and its mirror image, as `Predictor` does; by default as before,
            else not. Splits that were evaluated the other way are dropped, and a `CXRWarning` says so.

    Raises `UsageError` for a split without images and for an invalid rule, `ImageError` for an unreadable image.
    """
    data = Path(data) if data is not None else None
    how = Evaluation(data, split, batch_size, limit, rule, prevalences, by, again, device, tta)
    metrics, _ = evaluate_split(as_run(run), how)
    return metrics


def evaluate_split(run: Run, how: Evaluation) -> tuple[dict[str, Any], Path]:
    """Evaluate a run as `evaluate` does; return the metrics of the split, and the folder of its images."""
    if how.rule:
        parse_rule(how.rule)
    check_writable(run.path)
    run.remove_partial_files()
    known = run.intact_metrics('predictions', 'training', 'metrics')  # with whatever decision
    stored = known.get(how.split, {})
    out_of_fold = OutOfFold.read(run)
    others = out_of_fold.table if out_of_fold else None
    root, items, columns = find_images(run, how.data, how.split, how.limit, how.by, stored, others)
    log_ignored(items, how.data or root)
    model = identify_network(run.path)
    tta = choose_tta(run, how.tta, model, out_of_fold)
    source = Source(run, model, tta, out_of_fold, how.batch_size, how.device)
    images = SplitImages(how.split, items, root)
    deciding = deciding_split(_rule_or_previous(run, how.rule, model))
    predicted = predict_missing(source, known, images, deciding, how.data, how.again)
    _warn_of_dropped(known, predicted, source)
    decision = _decide(run, predicted.deciding, how.rule, source)
    groups = {column: items[column].to_numpy() for column in columns}
    prevalences = _stored_prevalences(stored) if how.prevalences is None else how.prevalences
    tables = {name: apply_threshold(table, decision.threshold) for name, table in predicted.tables.items()}
    metrics = {}
    for name, table in tables.items():
        stamp = predicted.stamps.get(name)
        if name == how.split:
            metrics[name] = _measure(table, decision, groups, prevalences, stamp or stored.get('images'))
        else:
            metrics[name] = _update_metrics(known.get(name, {}), table, decision, stamp)
    if out_of_fold and 'valid' in metrics:
        metrics['valid']['out_of_fold'] = out_of_fold.table.fold.nunique()
    run.write_results(pd.concat(tables.values(), ignore_index=True), metrics, asdict(decision))
    return metrics[how.split], root


def _warn_of_dropped(known: Mapping[str, Any], predicted: Predicted, source: Source) -> None:
    """Warn of stored splits whose predictions were made by the same network, but with other views."""
    dropped = [
        split
        for split, metrics in known.items()
        if split not in predicted.tables and metrics.get('model') == source.model and not source.made(metrics)
    ]
    if dropped:
        manner = 'without' if source.tta else 'with'
        warnings.warn(
            f'the metrics of {", ".join(dropped)} were computed {manner} test-time views, so they are dropped. '
            'Evaluate these splits again.',
            CXRWarning,
            stacklevel=4,
        )


def _stored_prevalences(stored: Mapping[str, Any]) -> Sequence[float]:
    return [row['prevalence'] for row in stored.get('prevalences', ())] or PREVALENCES


def find_kinds(predictions: pd.DataFrame) -> np.ndarray:
    """Return the kind (n,) of each image of a predictions table, by its file name."""
    kinds = [parse_name(path, label).kind for path, label in zip(predictions.path, predictions.label, strict=True)]
    return np.array(kinds)


def apply_threshold(predictions: pd.DataFrame, threshold: float) -> pd.DataFrame:
    """Return `predictions` with the column `prediction` according to `threshold`."""
    is_positive = (predictions.p_pneumonia >= threshold).to_numpy()
    return predictions.assign(prediction=np.array(VOCAB)[is_positive.astype(int)])


def _measure(
    predictions: pd.DataFrame,
    decision: Decision,
    groups: Mapping[str, np.ndarray],
    prevalences: Sequence[float],
    stamp: str | None,
) -> dict[str, Any]:
    """Compute the metrics of one split as `measure` does, and add the network and the `stamp` of the image files.

    `groups` has the subgroup of each image by column, (n,) each.
    """
    metrics = measure(
        predictions.assign(**groups), decision.threshold, decision.rule, decision.temperature, prevalences, list(groups)
    )
    metrics['model'] = decision.model
    metrics['tta'] = decision.tta
    metrics['images'] = stamp
    return metrics


def _previous_decision(run: Run, model: str) -> Decision | None:
    """Return the decision of `run` for the network `model`, if a rule was given or could be followed."""
    previous = Decision.from_run(run, model)
    return None if previous and previous.is_default else previous


def _rule_or_previous(run: Run, rule: str | None, model: str) -> str:
    previous = _previous_decision(run, model)
    return rule or (previous.rule if previous else DEFAULT_RULE)


def _decide(run: Run, deciding: pd.DataFrame | None, rule: str | None, source: Source) -> Decision:
    """Choose the threshold by `rule` (default: the one used last) on the predictions of the images that decide.

    Without them it is the stored decision, a fixed threshold, or that of the recipe with a warning. Raises `UsageError`
    if the stored decision is not that of the stored metrics, or was made for probabilities of other views.
    """
    model, tta = source.model, source.tta
    previous = _previous_decision(run, model)
    if deciding is not None:
        return decide(deciding, _rule_or_previous(run, rule, model), model, tta)
    if previous and previous.tta != tta:
        _refuse_other_views(rule, tta)
        previous = None
    if previous and rule in (None, previous.rule) and not (rule or '').startswith('fixed:'):
        _check_stored_decision(run)
        return previous
    if rule is None:
        threshold = run.recipe.threshold
        warnings.warn(
            f'no threshold was chosen, because not all validation images of the run were found: {threshold:g} is used.',
            CXRWarning,
            stacklevel=3,
        )
        return Decision(threshold, f'fixed:{threshold:g}', model=model, is_default=True, tta=tta)
    if not rule.startswith('fixed:'):
        if run.recipe.valid == 'none':
            raise UsageError(
                f'--threshold {rule}: the run has no validation images. Give it the predictions of a cross-validation, '
                f'`{run.out_of_fold_evaluation()}`, or choose fixed:T.'
            )
        if deciding_split(rule) == SHIFT and own_images(run, SHIFT).empty:
            raise UsageError(f'--threshold {rule}: the run has no images of the split {SHIFT}. {NO_IMAGES[SHIFT]}')
        raise UsageError(
            f'--threshold {rule}: this rule requires all validation images of the run, and not all were found. '
            'Evaluate with the folder that the run was trained on and without --limit, or choose fixed:T.'
        )
    _, (threshold,) = parse_rule(rule)
    return Decision(threshold, rule, _fitted_temperature(run, previous), model, tta=tta)


def _refuse_other_views(rule: str | None, tta: bool) -> None:
    """Raise `UsageError` unless the `rule` is a fixed threshold, which fits the probabilities of any views."""
    option = '--tta' if tta else '--no-tta'
    if not (rule or '').startswith('fixed:'):
        raise UsageError(
            f'{option}: the threshold has to be chosen again, and not all validation images of the run were found. '
            f'Name the folder that the run was trained on, omit {option}, or choose --threshold fixed:T.'
        )


def _fitted_temperature(run: Run, previous: Decision | None) -> float | None:
    """Return the temperature of the stored decision, if that is the one of the stored metrics."""
    with suppress(UsageError):
        run.check_decision()
        return previous.temperature if previous else None
    return None


def _check_stored_decision(run: Run) -> None:
    try:
        run.check_decision()
    except UsageError as error:
        raise UsageError(
            f'{error} The validation images of the run are needed for that, and not all were found: name the folder '
            'that the run was trained on, or choose --threshold fixed:T.'
        ) from None


def _update_metrics(
    stored: dict[str, Any], predictions: pd.DataFrame, decision: Decision, stamp: str | None
) -> dict[str, Any]:
    """Return the metrics of a split that was not asked for.

    They are those `stored`, unless the split was predicted just now, the decision has changed, or metrics are missing.
    """
    if stamp is None and decision.matches(stored) and is_complete(stored):
        return stored
    lost_columns = {group['column'] for group in stored.get('subgroups', ())} - {'kind'}
    if lost_columns:
        warnings.warn(
            f'the metrics of the split {predictions.split.iloc[0]} were computed again with another threshold, without '
            f'the subgroups by {", ".join(sorted(lost_columns))}: evaluate this split again.',
            CXRWarning,
            stacklevel=3,
        )
    groups = {'kind': find_kinds(predictions)}
    return _measure(predictions, decision, groups, _stored_prevalences(stored), stamp or stored.get('images'))
