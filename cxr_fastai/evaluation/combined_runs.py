"""Write the run of a combined network: its items, its history, and the journal that names its members."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from torch import nn

from cxr_fastai.core.errors import CXRWarning, UsageError
from cxr_fastai.core.files import write_csv, writing
from cxr_fastai.core.folders import replace_folder, temporary_folder
from cxr_fastai.core.recipe import SHIFT, Recipe
from cxr_fastai.core.run import Run
from cxr_fastai.core.run_files import OUT_OF_FOLD
from cxr_fastai.evaluation.selection import ENSEMBLE, Candidate, Selection
from cxr_fastai.inference.config import LEARNER, WEIGHTS, ModelConfig, identify_network, save_weights
from cxr_fastai.inference.pickles import save_learner
from cxr_fastai.models.architectures import describe_network
from cxr_fastai.models.ensembles import name_ensemble
from cxr_fastai.training.hardware import describe_environment
from cxr_fastai.training.restoring import network_learner


def merge_items(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Return one items table for the `tables` of several runs.

    An image on which a run was trained is in `train`. One that is in `valid` or `shift` of all runs stays there, and
    one that is in `test` wherever it is listed. Any other image helped to choose the epoch of a run, so that it is in
    `train`, too.

    Raises `UsageError` if an image has several labels.
    """
    together = pd.concat(tables, ignore_index=True)
    labels = together.groupby('path').label.nunique()
    if (labels > 1).any():
        raise UsageError(f'{labels.idxmax()}: the runs have different labels of this image. Train them on the same.')
    merged = together.drop_duplicates('path').reset_index(drop=True)
    splits = together.groupby('path').split.agg(list)
    return merged.assign(split=[_merge_splits(splits[path], len(tables)) for path in merged.path])


def _merge_splits(splits: Sequence[str], number: int) -> str:
    if set(splits) == {'test'}:
        return 'test'
    for split in ('valid', SHIFT):
        if list(splits) == [split] * number:
            return split
    return 'train'


def merge_histories(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Return the histories of several runs one after the other, with consecutive epochs and phases by network."""
    if len(tables) == 1:
        return tables[0]
    numbered = [table.assign(phase=[f'{n}: {phase}' for phase in table.phase]) for n, table in enumerate(tables, 1)]
    together = pd.concat(numbered, ignore_index=True)
    return together.assign(epoch=np.arange(1, len(together) + 1))


def write_combined_run(
    out: Path,
    how: str,
    members: Mapping[str, Run],
    model: nn.Module,
    data: Path | None,
    selection: Selection | None,
    out_of_fold: pd.DataFrame | None,
    tta: bool = False,
) -> Run:
    """Write the run of the network `model`, which combines those of `members` as `how` says, to `out`, and return it.

    `data` is the folder or CSV file of the images, if it is another than that of the training. `selection` is the
    choice that led to the `members`, and `out_of_fold` has predictions that stand for those of validation images. With
    `tta`, the run is evaluated with test-time views.

    Raises `OutputError` if the run cannot be written, and `UsageError` as `merge_items`.
    """
    (first, *_) = members.values()
    arch = name_ensemble(len(members), first.recipe.arch) if how == ENSEMBLE else first.recipe.arch
    items = merge_items([run.items for run in members.values()])
    has_valid = (items.split == 'valid').any()
    recipe = replace(first.recipe, arch=arch)
    if not has_valid:
        phases = tuple(replace(phase, patience=None) for phase in recipe.phases)
        recipe = replace(recipe, valid='none', patience=0, phases=phases)
    with temporary_folder(out) as folder:
        run = Run.create(folder / 'run')
        run.log_event('start', **_describe_start(members, model, recipe, data))
        run.log_event('combine', **_describe_combination(how, members, selection, tta))
        run.start(recipe, items)
        write_csv(run / 'history.csv', merge_histories([member.history for member in members.values()]))
        if out_of_fold is not None:
            write_csv(run / OUT_OF_FOLD, out_of_fold)
        save_weights(model, run / WEIGHTS)
        config = ModelConfig.from_recipe(recipe)
        save_learner(network_learner(model, config), run / LEARNER, config)
        run.log_event('end', best={})
        with writing(out):
            replace_folder(run.path, out)
    if out_of_fold is None and items[items.split == 'valid'].label.nunique() < 2:
        warnings.warn(
            f'{out}: the members share no validation images of both classes, so evaluate cannot choose a threshold '
            'and uses that of the recipe. Combine runs with the same validation images, or all folds of a series.',
            CXRWarning,
            stacklevel=3,
        )
    return Run(out)


def _describe_start(members: Mapping[str, Run], model: nn.Module, recipe: Recipe, data: Path | None) -> dict[str, Any]:
    """Return the facts about the images and the computer for the journal, as those of a training."""
    runs = list(members.values())
    starts = [run.last_event('start', 'resume') for run in runs]
    images = data.resolve() if data else runs[0].images
    facts: dict[str, Any] = {
        'data': str(images) if images else None,
        'from_table': any(run.is_from_table for run in runs),
        'unreadable': sorted({path for run in runs for path in run.unreadable}),
    }
    facts |= describe_environment(next(model.parameters()).device)
    facts |= describe_network(model, recipe)
    return facts | ({'origin': starts[0]['origin']} if 'origin' in starts[0] else {})


def _describe_combination(
    how: str, members: Mapping[str, Run], selection: Selection | None, tta: bool
) -> dict[str, Any]:
    """Return the facts about the members, and about the choice among them, for the journal."""
    facts: dict[str, Any] = {
        'how': how,
        'tta': tta,
        'members': [
            {'name': name, 'model': identify_network(run.path), 'recipe': asdict(run.recipe)}
            for name, run in members.items()
        ],
    }
    if selection:
        facts['candidates'] = [_describe_candidate(candidate) for candidate in selection.contenders]
        facts['singles'] = [_describe_candidate(candidate) for candidate in selection.singles]
    return facts


def _describe_candidate(candidate: Candidate) -> dict[str, Any]:
    return {**asdict(candidate), 'score': candidate.score}
