"""One pass over a split gives the predictions table; threshold and temperature come from valid alone, all figures from
the table."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cxr_fastai.core.errors import CXRWarning, ImageError, UsageError
from cxr_fastai.core.files import write_csv, write_json
from cxr_fastai.core.recipe import POSITIVE, VOCAB
from cxr_fastai.core.run import Run
from cxr_fastai.data.items import data_root, image_root, parse_name, read_items
from cxr_fastai.data.splits import count_images
from cxr_fastai.evaluation.calibration import log_losses
from cxr_fastai.evaluation.metrics import PREVALENCES, is_complete, measure
from cxr_fastai.evaluation.thresholds import DEFAULT, decide, parse_rule
from cxr_fastai.inference.config import identify_network
from cxr_fastai.inference.decision import Decision
from cxr_fastai.inference.predictor import Predictor

COLUMNS = ['path', 'label', 'split', 'patient', 'p_pneumonia', 'prediction', 'loss']


def evaluate(
    run: Run,
    data: Path | None = None,
    split: str = 'test',
    batch_size: int = 32,
    limit: int | None = None,
    rule: str | None = None,
    prevalences: Sequence[float] = PREVALENCES,
    by: Sequence[str] = ('kind',),
    again: bool = True,
) -> dict[str, Any]:
    """Predict the images of `split` once, and all of the run's own valid where that was not done yet; choose the
    threshold on valid by `rule` (default: that of the last time, else `decision.DEFAULT`); measure, and return the
    split's metrics.

    Writes `predictions.csv`, `decision.json` and `metrics.json`, where other splits are kept, judged by the same
    threshold. `by` names columns of the items that tell groups apart. Unless `again`, what the same network predicted
    of the same files before is taken as it is. Raises `UsageError` for a split without images or a rule that does not
    exist, `ImageError` for an unreadable image.
    """
    if rule:
        parse_rule(rule)
    by = [column.strip().lower() for column in by]  # as the header of a listing is read
    root, items = find_split(run, data, split, limit, by)
    predictor, model = Predictor.load(run.path), identify_network(run.path)
    tables, stamps = known_predictions(run, model), {}

    def predict(name: str, items: pd.DataFrame, root: Path) -> None:
        tables[name] = predict_items(predictor, items, root, batch_size)
        stamps[name] = stamp_images(items, root)

    if again or not _has(run, tables, split, items, root):
        predict(split, items, root)
    valid = _own_images(run, 'valid')
    folder = _folder_of(valid, run.images, data)
    if split != 'valid' and not _has(run, tables, 'valid', valid, folder):
        tables.pop('valid', None)
        if folder:
            predict('valid', valid, folder)
    whole = tables['valid'] if 'valid' in tables and _same_paths(tables['valid'], valid) else None
    decision = _decide(run, whole, rule, model)
    tables = {name: judge(table, decision.threshold) for name, table in tables.items()}
    groups = {column: items[column].to_numpy() for column in by}
    measured = {
        name: measure_split(run, tables[name], decision, groups, prevalences, stamps.get(name))
        if name == split
        else _measure_again(run, name, tables[name], decision, stamps.get(name))
        for name in tables
    }
    write_csv(run / 'predictions.csv', pd.concat(tables.values(), ignore_index=True))
    if decision.valid:
        decision.save(run)
    write_json(run / 'metrics.json', measured)
    return measured[split]


def find_split(
    run: Run, data: Path | None, split: str, limit: int | None = None, by: Sequence[str] = ()
) -> tuple[Path, pd.DataFrame]:
    """The images' folder and the items of `split` in it, with the columns `by` beside their own.

    Where the run's own train or valid images are there, also in a copy of the folder, those are meant: never an image
    that it trained on as valid. Without `data` the folder is the one it was trained on. Raises `UsageError`.
    """
    root = data_root(data or (run.images if run.images and run.images.exists() else None))
    own = _own_images(run, split) if split != 'test' else run.items[:0]
    if _folder_of(own, root):
        more = [column for column in by if column not in own]
        items = own.merge(read_items(root, columns=more)[['path', *more]], on='path') if more else own
    else:
        items = read_items(root, columns=by)
        _refuse_known(items, run, split, root)
    chosen = _first(items[items.split == split], limit)
    if chosen.empty:
        found = count_images(items).sum(axis=1)
        raise UsageError(
            f'{root}: the split {split} has no images; found '
            f'{", ".join(f"{name} {n}" for name, n in found.items())}: choose another --split.'
        )
    return image_root(root), chosen.reset_index(drop=True)


def predict_items(predictor: Predictor, items: pd.DataFrame, root: Path, batch_size: int = 32) -> pd.DataFrame:
    """The predictions table of `items`: one row an image, with the cross-entropy of its label as `loss`.

    Raises `ImageError` naming the unreadable images, since figures over the rest would be of another set.
    """
    rows = pd.DataFrame(predictor.predict([root / path for path in items.path], batch_size))
    if (bad := rows[rows.status != 'ok']).size:
        more = f' (and {len(bad) - 1} more: `cxr-fastai predict` lists them)' if len(bad) > 1 else ''
        raise ImageError(
            f'{bad.path.iloc[0]}: {bad.message.iloc[0]}{more}. Remove or mend it, then evaluate again.',
            bad.code.iloc[0],
        )
    p = rows.p_pneumonia.astype(float)
    loss = log_losses((items.label == VOCAB[POSITIVE]).to_numpy(), p.to_numpy())
    return items.reset_index(drop=True).assign(p_pneumonia=p, prediction=rows.prediction, loss=loss)[COLUMNS]


def judge(predictions: pd.DataFrame, threshold: float) -> pd.DataFrame:
    """`predictions` with the column `prediction` as `threshold` has it."""
    called = (predictions.p_pneumonia >= threshold).to_numpy().astype(int)
    return predictions.assign(prediction=np.array(VOCAB)[called])


def known_predictions(run: Run, model: str) -> dict[str, pd.DataFrame]:
    """The predictions of each split that the network with the SHA-256 `model` has made so far."""
    same = [split for split, metrics in run.metrics.items() if metrics.get('model') == model]
    if not same or not (run / 'predictions.csv').exists():
        return {}
    return {split: rows for split, rows in run.predictions.groupby('split', sort=False) if split in same}


def stamp_images(items: pd.DataFrame, root: Path) -> str:
    """A SHA-256 that changes with the paths, sizes and times of the images' files."""
    facts = ((path, (stat := (root / path).stat()).st_size, stat.st_mtime_ns) for path in items.path)
    return hashlib.sha256(repr(list(facts)).encode(errors='surrogateescape')).hexdigest()


def measure_split(
    run: Run,
    predictions: pd.DataFrame,
    decision: Decision,
    groups: Mapping[str, np.ndarray],
    prevalences: Sequence[float],
    stamp: str | None = None,
) -> dict[str, Any]:
    """The metrics of a split's `predictions`, in `groups` by column; with the network and the files they are of."""
    split = predictions.split.iloc[0]
    metrics = measure(
        predictions.assign(**groups), decision.threshold, decision.rule, decision.temperature, prevalences, list(groups)
    )
    return metrics | {'model': decision.model, 'images': stamp or run.metrics.get(split, {}).get('images')}


def _has(run: Run, tables: Mapping[str, pd.DataFrame], split: str, items: pd.DataFrame, root: Path | None) -> bool:
    """Whether `tables` has the predictions of `items`, of the files as they are now below `root` (None: are gone)."""
    return (
        split in tables
        and _same_paths(tables[split], items)
        and (root is None or run.metrics[split].get('images') == stamp_images(items, root))
    )


def _same_paths(predictions: pd.DataFrame, items: pd.DataFrame) -> bool:
    return predictions.path.to_list() == items.path.to_list()


def _own_images(run: Run, split: str) -> pd.DataFrame:
    """The items that `run` had in `split`, without images that training skipped as unreadable."""
    return run.used_items[lambda items: items.split == split]


def _folder_of(items: pd.DataFrame, *roots: Path | None) -> Path | None:
    """The folder of the first of `roots` that has all images of `items`; None where none has, or there are no items."""
    folders = [image_root(root) for root in roots if root and len(items)]
    return next((folder for folder in folders if all((folder / path).exists() for path in items.path)), None)


def _refuse_known(items: pd.DataFrame, run: Run, split: str, root: Path) -> None:
    known = items.path[items.split == split].isin(run.items.path).sum() if split != 'test' else 0
    if known:
        raise UsageError(
            f'{root}: {known} images of its {split} split are among those of the run, but not all of '
            "the run's are there: name the folder it was trained on, whole."
        )


def _first(items: pd.DataFrame, limit: int | None) -> pd.DataFrame:
    return items if limit is None else items.groupby('label', sort=False).head(limit)


def _decide(run: Run, valid: pd.DataFrame | None, rule: str | None, model: str) -> Decision:
    """By `rule`, or the rule of the last time, on the predictions of `valid`; without them what was decided before, or
    the recipe's own threshold, with a warning."""
    known = Decision.of(run, model)
    if valid is not None:
        return decide(valid, rule or (known.rule if known else DEFAULT), model)
    if known and rule in (None, known.rule):
        return known
    if rule and not rule.startswith('fixed:'):
        raise UsageError(
            f'--threshold {rule}: it is chosen on all validation images of the run, which are not at hand: '
            'evaluate where they are, without --limit, or give fixed:T.'
        )
    threshold = parse_rule(rule)[1][0] if rule else run.recipe.threshold
    if not rule:
        warnings.warn(
            f'not all validation images of the run are at hand, so no threshold was chosen on them: '
            f'{threshold:g} is used.',
            CXRWarning,
            stacklevel=3,
        )
    return Decision(threshold, rule or f'fixed:{threshold:g}', model=model)


def _measure_again(
    run: Run, split: str, predictions: pd.DataFrame, decision: Decision, stamp: str | None
) -> dict[str, Any]:
    """The metrics of a split that was not asked for: as they are known, or measured anew, where it was predicted just
    now, the decision is another one, or figures are missing."""
    known = run.metrics.get(split, {})
    if (
        stamp is None
        and decision.fits(known)
        and is_complete(known)
        and (known['calibrated']['temperature'] == decision.temperature)
    ):
        return known
    if lost := sorted({group['column'] for group in known.get('subgroups', ())} - {'kind'}):
        warnings.warn(
            f'the split {split} is judged by another threshold now, without its groups by {", ".join(lost)}: '
            'evaluate it again.',
            CXRWarning,
            stacklevel=3,
        )
    kinds = [parse_name(*image)[0] for image in zip(predictions.path, predictions.label, strict=True)]
    prevalences = [row['prevalence'] for row in known.get('prevalences', ())] or PREVALENCES
    return measure_split(run, predictions, decision, {'kind': np.array(kinds)}, prevalences, stamp)
