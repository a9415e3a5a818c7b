"""Give a run that was trained on all images the out-of-fold predictions of a cross-validation.

Such a run has no validation images. Networks that were trained in the same way, each without one part of the patients,
tell what can be expected of it. Its threshold and its temperature then rest on every image instead of a tenth of them.
"""

from __future__ import annotations

from dataclasses import fields

from cxr_fastai.core.errors import UsageError
from cxr_fastai.core.files import StrPath, write_csv
from cxr_fastai.core.progress import counted
from cxr_fastai.core.recipe import Recipe
from cxr_fastai.core.run import Run, as_run
from cxr_fastai.core.run_files import OUT_OF_FOLD
from cxr_fastai.core.series import Series
from cxr_fastai.evaluation.cross_validation import read_out_of_fold

FIELDS_OF_FOLDS = ('valid', 'valid_pct', 'fold', 'workers', 'precision', 'threshold')
"""Fields of the recipe in which a run on all images may differ from the folds."""


def adopt_out_of_fold(
    run: Run | StrPath,
    series: Series,
    data: StrPath | None = None,
    batch_size: int = 32,
    device: str = 'auto',
    tta: bool | None = None,
) -> None:
    """Write the out-of-fold predictions of `series` into `run`, where they stand for those of validation images.

    The folds are evaluated first where that was not done, or not with these test-time views; `data`, `batch_size`,
    `device` and `tta` are those of `evaluate`.

    Raises `UsageError` if the run has validation images of its own, if it was trained by another recipe than the folds,
    or on other images.
    """
    run = as_run(run)
    _check_recipe(run, series)
    items = run.used_items
    if (items.split == 'valid').any():
        raise UsageError(
            f'{run.path}: the run has validation images of its own, so it needs no out-of-fold predictions. Train it '
            'with --valid none.'
        )
    predictions = read_out_of_fold(series, data, batch_size, device, tta)
    trained_on = items[items.split == 'train']
    if set(predictions.path) != set(trained_on.path):
        raise UsageError(
            f'{series.path}: its folds have {counted(len(predictions))}, and {run.path} was trained on '
            f'{len(trained_on)}, which are not the same. Train both on the same images.'
        )
    write_csv(run / OUT_OF_FOLD, predictions)


def _check_recipe(run: Run, series: Series) -> None:
    first, own = Run.open(series.folder_of_first).recipe, run.recipe
    if first.can_stop_early and own.valid == 'none':
        raise UsageError(
            f'{series.path}: its folds were trained with --patience, and {run.path}, which has no '
            'validation images, cannot stop early, so it was trained in another way. Train the folds without '
            '--patience.'
        )
    names = [field.name for field in fields(Recipe) if field.name not in FIELDS_OF_FOLDS]
    differing = [name for name in names if getattr(first, name) != getattr(own, name)]
    if differing:
        name = differing[0]
        raise UsageError(
            f'{run.path}: trained by another recipe than the folds of {series.path} ({name} {getattr(own, name)}, not '
            f'{getattr(first, name)}). Train it with --recipe {series.folder_of_first}/recipe.json --valid none.'
        )
