"""`find_rates` suggests a learning rate with fastai's `lr_find`, a trial training whose rate grows at every step."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd
from fastai.callback.progress import ProgressCallback  # noqa: F401  (adds `Learner.no_bar`)
from fastai.callback.schedule import valley
from fastai.learner import Learner
from fastai.torch_core import set_seed

from cxr_fastai.core.environment import Launch
from cxr_fastai.core.errors import CXRError, UsageError
from cxr_fastai.core.files import StrPath
from cxr_fastai.core.recipe import Recipe
from cxr_fastai.data.items import image_root, log_ignored, read_recipe_items
from cxr_fastai.data.loaders import CXRDataLoaders
from cxr_fastai.data.splits import check_trainable
from cxr_fastai.images.cache import find_cache
from cxr_fastai.images.preprocessing import Preprocessing
from cxr_fastai.training.callbacks import recipe_callbacks
from cxr_fastai.training.hardware import reuse_memory
from cxr_fastai.training.learner import recipe_learner
from cxr_fastai.training.recipes import start_phase


@dataclass(frozen=True)
class Rates:
    """The result of `find_rates`: a `curve` with the columns `lr` and `loss` (smoothed), and the `suggestion`."""

    curve: pd.DataFrame
    suggestion: float


def find_rates(recipe: Recipe, data: StrPath, steps: int = 100, device: str | None = None) -> Rates:
    """Return the loss against the learning rate, from 1e-7 to 10, and the middle of its longest valley.

    Trains the first phase of `recipe` on the images of `data` for up to `steps` batches, or until the loss diverges.
    The trained network is discarded. `device` is that of `train`. Raises `CXRError`, also if the loss never decreases.
    """
    processes = Launch.from_environment().processes
    if processes > 1:
        raise UsageError(f'WORLD_SIZE={processes}: a learning rate is found by one process. Start the command alone.')
    data = Path(data)
    items = read_recipe_items(data, recipe)
    log_ignored(items, data)
    check_trainable(items, recipe.valid)
    reuse_memory()
    set_seed(recipe.seed, reproducible=True)
    root = image_root(data)
    cache = find_cache(root, Preprocessing.of(recipe))
    dls = CXRDataLoaders.from_items(items, root, recipe, cache, device=device)
    learn = recipe_learner(dls, recipe)
    start_phase(learn, recipe.phases[0])
    suggestion = _run_lr_find(learn, recipe, steps)
    lrs = [float(lr) for lr in learn.recorder.lrs]
    losses = [float(loss) for loss in learn.recorder.losses]
    return Rates(pd.DataFrame({'lr': lrs, 'loss': losses}), suggestion)


def _run_lr_find(learn: Learner, recipe: Recipe, steps: int) -> float:
    callbacks = recipe_callbacks(replace(recipe, ema=0.0, start_size=1.0))
    with TemporaryDirectory() as folder, learn.no_bar(), learn.added_cbs(callbacks):
        learn.path = Path(folder)  # fastai saves the initial weights there and restores them
        try:
            result = learn.lr_find(num_it=steps, show_plot=False, suggest_funcs=(valley,))
        except (IndexError, ValueError) as error:  # too few losses before the divergence
            raise CXRError(
                f'no learning rate can be suggested for {recipe.arch}: its loss never decreases ({error}). '
                'Check --weights and the images.'
            ) from error
    return float(result.valley)
