"""How the loss answers to the learning rate: fastai's `lr_find`, a mock training whose rate grows at every step."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd
from fastai.callback.progress import ProgressCallback  # noqa: F401  (gives `Learner.no_bar`)
from fastai.callback.schedule import valley
from fastai.torch_core import set_seed

from cxr_fastai.core.errors import CXRError
from cxr_fastai.core.recipe import Recipe
from cxr_fastai.data.items import image_root, read_items
from cxr_fastai.data.loaders import make_dls
from cxr_fastai.data.splits import check_trainable
from cxr_fastai.images.cache import find_cache
from cxr_fastai.images.preprocessing import Preprocessing
from cxr_fastai.training.callbacks import recipe_callbacks
from cxr_fastai.training.learner import make_learner, reuse_memory, start_phase


@dataclass(frozen=True)
class Rates:
    """What `find_rates` saw: a `curve` with the columns lr and loss (smoothed), and the `suggestion`."""

    curve: pd.DataFrame
    suggestion: float


def find_rates(recipe: Recipe, data: Path, steps: int = 100) -> Rates:
    """Train the first phase of `recipe` for up to `steps` batches of images from `data`, at rates from 1e-7 to 10, until
    the loss blows up; suggest the middle of the longest valley. Nothing is kept of the network.

    Raises `CXRError`, also where the loss never falls.
    """
    items, root = read_items(data, recipe.valid, recipe.seed, recipe.limit), image_root(data)
    check_trainable(items)
    reuse_memory()
    set_seed(recipe.seed, reproducible=True)
    learn = make_learner(make_dls(items, root, recipe, find_cache(root, Preprocessing.of(recipe))), recipe)
    start_phase(learn, recipe.phases[0])
    cbs = recipe_callbacks(replace(recipe, ema=0.0, start_size=1.0))
    with TemporaryDirectory() as folder, learn.no_bar(), learn.added_cbs(cbs):
        learn.path = Path(folder)  # for the copy of the network that fastai goes back to
        try:
            suggestion = learn.lr_find(num_it=steps, show_plot=False, suggest_funcs=(valley,)).valley
        except (IndexError, ValueError) as error:  # too few points before the loss blew up
            raise CXRError(
                f'the loss of {recipe.arch} never falls, so there is no rate to suggest ({error}): check '
                '--weights and the images.'
            ) from error
    curve = pd.DataFrame({'lr': map(float, learn.recorder.lrs), 'loss': map(float, learn.recorder.losses)})
    return Rates(curve, float(suggestion))
