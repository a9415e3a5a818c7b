"""Evaluation of a run: predict a split once, choose the threshold on the validation images, and compute the metrics."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cxr_fastai.core.errors import CXRWarning, ImageError, UsageError
from cxr_fastai.core.files import StrPath, check_writable
from cxr_fastai.core.recipe import POSITIVE, SHIFT, VOCAB
from cxr_fastai.core.run import Run, as_run
from cxr_fastai.core.run_files import OUT_OF_FOLD
from cxr_fastai.data.items import log_ignored, parse_name
from cxr_fastai.evaluation.calibration import log_losses
from cxr_fastai.evaluation.metrics import PREVALENCES, is_complete, measure
from cxr_fastai.evaluation.split_images import NO_IMAGES, find_images, folder_with, own_images
from cxr_fastai.evaluation.thresholds import DEFAULT_RULE, decide, deciding_split, parse_rule
from cxr_fastai.inference.config import identify_network, sha256
from cxr_fastai.inference.decision import Decision
from cxr_fastai.inference.predictor import Predictor, load_undecided

PREDICTION_COLUMNS = ['path', 'label', 'split', 'patient', 'p_pneumonia', 'prediction', 'loss']
"""Columns of `predictions.csv`."""


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

    Raises `UsageError` for a split without images and for an invalid rule, `ImageError` for an unreadable image.
    """
    run = as_run(run)
    data = Path(data) if data is not None else None
    if rule:
        parse_rule(rule)
    check_writable(run.path)
    run.remove_partial_files()
    known = run.intact_metrics('predictions', 'training', 'metrics')  # with whatever decision
    stored = known.get(split, {})
    if prevalences is None:
        prevalences = _stored_prevalences(stored)
    root, items, columns = find_images(run, data, split, limit, by, stored)
    log_ignored(items, data or root)
    model = identify_network(run.path)
    deciding = deciding_split(_rule_or_previous(run, rule, model))
    images = _Images(split, items, root)
    predicted = _predict_missing(run, model, known, images, deciding, data, batch_size, again, device)
    decision = _decide(run, predicted.deciding, rule, model)
    groups = {column: items[column].to_numpy() for column in columns}
    tables = {name: apply_threshold(table, decision.threshold) for name, table in predicted.tables.items()}
    metrics = {}
    for name, table in tables.items():
        stamp = predicted.stamps.get(name)
        if name == split:
            metrics[name] = _measure(table, decision, groups, prevalences, stamp or stored.get('images'))
        else:
            metrics[name] = _update_metrics(known.get(name, {}), table, decision, stamp)
    if run.has_out_of_fold and 'valid' in metrics:
        metrics['valid']['out_of_fold'] = run.out_of_fold.fold.nunique()
    run.write_results(pd.concat(tables.values(), ignore_index=True), metrics, asdict(decision))
    return metrics[split]


def _stored_prevalences(stored: Mapping[str, Any]) -> Sequence[float]:
    return [row['prevalence'] for row in stored.get('prevalences', ())] or PREVALENCES


@dataclass(frozen=True)
class _Images:
    """The images of a split."""

    split: str
    items: pd.DataFrame
    root: Path


@dataclass(frozen=True)
class _Predicted:
    """Predictions of one network: `tables` by split, and `stamps` of the splits whose predictions may be new.

    `deciding` are those of the complete split that the threshold is chosen on; None if its images were not found.
    """

    tables: dict[str, pd.DataFrame]
    stamps: dict[str, str]
    deciding: pd.DataFrame | None


def _predict_missing(
    run: Run,
    model: str,
    known: Mapping[str, Any],
    images: _Images,
    deciding: str,
    data: Path | None,
    batch_size: int,
    again: bool,
    device: str,
) -> _Predicted:
    """Predict `images`, and those of the run's split `deciding`, unless the same files were predicted before.

    `known` are the metrics by split of the predictions that are stored unchanged.
    """
    tables = _known_predictions(run, model, known)
    missing = []
    if again or not _is_current(run, known, tables, images.split, images.items, images.root):
        missing.append(images)
    own = own_images(run, deciding)
    folder = folder_with(own, run.images, data)
    if images.split != deciding and not _is_current(run, known, tables, deciding, own, folder):
        tables.pop(deciding, None)
        if folder or (deciding == 'valid' and run.has_out_of_fold):
            missing.append(_Images(deciding, own, folder or images.root))
    stamps = {}
    predictor = None
    for part in missing:
        if part.split == 'valid' and run.has_out_of_fold:
            tables['valid'], stamps['valid'] = _read_out_of_fold(run, part.items), sha256(run / OUT_OF_FOLD)
            continue
        predictor = predictor or load_undecided(run, device)
        tables[part.split] = predict_items(predictor, part.items, part.root, batch_size)
        stamps[part.split] = stamp_images(part.items, part.root)
    is_complete_split = deciding in tables and _have_same_paths(tables[deciding], own)
    return _Predicted(tables, stamps, tables[deciding] if is_complete_split else None)


def _read_out_of_fold(run: Run, items: pd.DataFrame) -> pd.DataFrame:
    """Return the out-of-fold predictions for `items`, in their order, with the columns of a predictions table."""
    predictions = run.out_of_fold.set_index('path', drop=False).loc[items.path]
    return predictions.assign(split='valid')[PREDICTION_COLUMNS].reset_index(drop=True)


def _known_predictions(run: Run, model: str, known: Mapping[str, Any]) -> dict[str, pd.DataFrame]:
    """Return the stored predictions by split of those `known` that the network with the SHA-256 `model` made."""
    splits = [split for split, metrics in known.items() if metrics.get('model') == model]
    if not splits:
        return {}
    return {str(split): rows for split, rows in run.predictions.groupby('split', sort=False) if split in splits}


def _is_current(
    run: Run,
    known: Mapping[str, Any],
    tables: Mapping[str, pd.DataFrame],
    split: str,
    items: pd.DataFrame,
    root: Path | None,
) -> bool:
    """Return whether `tables` has the predictions of `items`, and what they were made from has not changed since.

    These are the files below `root`, or the out-of-fold predictions. Without `root` the files are no longer there, and
    the stored predictions count.
    """
    if split not in tables or not _have_same_paths(tables[split], items):
        return False
    if split == 'valid' and run.has_out_of_fold:
        return bool(known[split].get('images') == sha256(run / OUT_OF_FOLD))
    return root is None or known[split].get('images') == stamp_images(items, root)


def _have_same_paths(predictions: pd.DataFrame, items: pd.DataFrame) -> bool:
    return predictions.path.to_list() == items.path.to_list()


def stamp_images(items: pd.DataFrame, root: Path) -> str:
    """Return a SHA-256 of the paths, sizes and modification times of the image files."""
    facts = []
    for path in items.path:
        stat = (root / path).stat()
        facts.append((path, stat.st_size, stat.st_mtime_ns))
    return hashlib.sha256(repr(facts).encode(errors='surrogateescape')).hexdigest()


def predict_items(predictor: Predictor, items: pd.DataFrame, root: Path, batch_size: int = 32) -> pd.DataFrame:
    """Predict the images of `items`; return a table with `PREDICTION_COLUMNS`, where `loss` is the cross-entropy.

    Raises `ImageError` with the name of an unreadable image: metrics of the others would be those of another set.
    """
    rows = pd.DataFrame(predictor.predict([root / path for path in items.path], batch_size))
    failed = rows[rows.status != 'ok']
    if len(failed):
        first = failed.iloc[0]
        others = f' ({len(failed) - 1} more; `cxr-fastai predict` lists them)' if len(failed) > 1 else ''
        raise ImageError(f'{first.path}: {first.message}{others}. Remove or fix it, then evaluate again.', first.code)
    p = rows.p_pneumonia.astype(float)
    targs = (items.label == VOCAB[POSITIVE]).to_numpy()
    losses = log_losses(targs, p.to_numpy())
    table = items.reset_index(drop=True).assign(p_pneumonia=p, prediction=rows.prediction, loss=losses)
    return table[PREDICTION_COLUMNS]


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
    metrics['images'] = stamp
    return metrics


def _previous_decision(run: Run, model: str) -> Decision | None:
    """Return the decision of `run` for the network `model`, if a rule was given or could be followed."""
    previous = Decision.from_run(run, model)
    return None if previous and previous.is_default else previous


def _rule_or_previous(run: Run, rule: str | None, model: str) -> str:
    previous = _previous_decision(run, model)
    return rule or (previous.rule if previous else DEFAULT_RULE)


def _decide(run: Run, deciding: pd.DataFrame | None, rule: str | None, model: str) -> Decision:
    """Choose the threshold by `rule` (default: the one used last) on the predictions of the images that decide.

    Without them it is the stored decision, a fixed threshold, or that of the recipe with a warning. Raises `UsageError`
    if the stored decision is not that of the stored metrics.
    """
    previous = _previous_decision(run, model)
    if deciding is not None:
        return decide(deciding, _rule_or_previous(run, rule, model), model)
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
        return Decision(threshold, f'fixed:{threshold:g}', model=model, is_default=True)
    if not rule.startswith('fixed:'):
        if run.recipe.valid == 'none':
            raise UsageError(
                f'--threshold {rule}: the run has no validation images. Give it the predictions of a cross-validation, '
                '`cxr-fastai evaluate RUN --out-of-fold FOLDS`, or choose fixed:T.'
            )
        if deciding_split(rule) == SHIFT and own_images(run, SHIFT).empty:
            raise UsageError(f'--threshold {rule}: the run has no images of the split {SHIFT}. {NO_IMAGES[SHIFT]}')
        raise UsageError(
            f'--threshold {rule}: this rule requires all validation images of the run, and not all were found. '
            'Evaluate with the folder that the run was trained on and without --limit, or choose fixed:T.'
        )
    _, (threshold,) = parse_rule(rule)
    return Decision(threshold, rule, _fitted_temperature(run, previous), model)


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
