"""Batches that a second thread prepares during the steps are those that the main thread prepares between them."""

import threading
import warnings
from collections.abc import Callable
from contextlib import suppress

import pytest
import torch
from fastai.callback.core import Callback, CancelBatchException, CancelFitException
from fastai.data.transforms import Transform
from fastai.learner import load_learner
from fastai.vision.augment import RandomErasing
from fastcore.basics import first
from torch import Tensor, nn

from cxr_fastai.core.errors import ImageError
from cxr_fastai.core.recipe import Recipe
from cxr_fastai.data.items import read_items
from cxr_fastai.data.loaders import CXRDataLoaders
from cxr_fastai.data.transforms import AugmentImages, PerImageTransform
from cxr_fastai.models.architectures import make_recipe
from cxr_fastai.training.ahead import BatchesAhead, PrepareAhead, can_prepare_ahead
from cxr_fastai.training.learner import CXRLearner, recipe_learner


class Record(Callback):
    """Record the images of each training batch, and the loss of each step."""

    order = 70

    def __init__(self) -> None:
        self.images: list[Tensor] = []
        self.losses: list[float] = []

    def after_batch(self) -> None:
        if self.training:
            self.images.append(self.xb[0].clone())
            self.losses.append(self.loss.item())


@pytest.fixture
def make(images) -> Callable[..., CXRLearner]:
    """Makes a learner of 20 images, in batches of 8, with a network that has dropout."""

    def make(overlap: bool | None, **fields) -> CXRLearner:
        fields = {'size': 128, 'batch_size': 8, 'limit': 10, 'workers': 0, 'epochs': 2, 'weights': 'none'} | fields
        recipe: Recipe = make_recipe('baseline', 'tuned', **fields)
        torch.manual_seed(recipe.seed)
        loaders = CXRDataLoaders.from_items(read_items(images, limit=recipe.limit), images, recipe, device='cpu')
        loaders.train.rng.seed(0)
        learn = recipe_learner(loaders, recipe)
        learn.prepare_ahead.overlap = overlap
        return learn

    return make


def fit(learn: CXRLearner, *cbs: Callback) -> Record:
    """Fit by the recipe of the loaders, and return what was recorded."""
    record = Record()
    with learn.no_bar(), learn.no_logging():
        learn.fit_recipe(learn.dls.recipe, cbs=[record, *cbs])
    return record


@pytest.mark.parametrize('workers', [0, 2])
def test_a_second_thread_changes_no_batch_and_no_step(make, workers):
    between, during = fit(make(False, workers=workers)), fit(make(True, workers=workers))
    assert len(between.images) == 2 * 3 and len({image.shape[-1] for image in between.images}) > 1
    for one, other in zip(between.images, during.images, strict=True):
        assert torch.equal(one, other)
    assert between.losses == during.losses
    assert len(set(between.losses)) == len(between.losses)


def test_the_second_thread_prepares_the_next_batch_during_the_step(make, monkeypatch):
    learn = make(True)
    prepared = threading.Event()
    threads: list[str] = []
    was_prepared: list[bool] = []

    draw = AugmentImages.draw

    def watched_draw(self, *shape: int) -> dict[str, Tensor]:
        threads.append(threading.current_thread().name)
        prepared.set()
        return draw(self, *shape)

    monkeypatch.setattr(AugmentImages, 'draw', watched_draw)

    class BeforeAhead(Callback):
        order = PrepareAhead.order - 1

        def before_batch(self) -> None:
            prepared.clear()  # the current batch is prepared, the next one not yet

    class Step(Callback):
        order = PrepareAhead.order + 1

        def before_batch(self) -> None:
            if self.training and self.iter < 2:  # there is no batch after the third
                was_prepared.append(prepared.wait(timeout=60))

    fit(learn, BeforeAhead(), Step())
    assert was_prepared == [True] * 4
    assert sum(name.startswith('prepare-batches') for name in threads) == 4  # the first of each epoch is not


def test_without_an_accelerator_the_main_thread_prepares_the_batches(make):
    learn = make(None)
    overlaps: list[bool] = []

    class Look(Callback):
        def before_batch(self) -> None:
            if self.training:
                overlaps.append(self.dl.overlap)

    fit(learn, Look())
    assert overlaps == [False] * 6


class OwnAugmentation(AugmentImages):
    """It may draw random numbers from anywhere."""


@pytest.mark.parametrize('place', ['batch', 'item', 'dataset'])
@pytest.mark.parametrize(
    'step', [RandomErasing(p=0.5), Transform(lambda image: image), OwnAugmentation()], ids=['fastai', 'own', 'derived']
)
def test_loaders_with_other_transforms_are_left_as_they_are(make, step, place):
    learn = make(True)
    train = learn.dls.train
    assert can_prepare_ahead(train)
    {'batch': train.after_batch, 'item': train.after_item, 'dataset': train.dataset.tls[1].tfms}[place].add(step)
    assert not can_prepare_ahead(train)


def test_a_learner_with_other_transforms_trains_with_its_loader(make):
    learn = make(True)
    learn.dls.train.after_batch.add(RandomErasing(p=0.5))
    seen: list[object] = []

    class Look(Callback):
        def before_batch(self) -> None:
            seen.append(self.dl)

    fit(learn, Look())
    assert seen and not any(isinstance(loader, BatchesAhead) for loader in seen)


@pytest.mark.parametrize('overlap', [False, True])
def test_a_step_that_is_cancelled_at_its_start_costs_no_batch(make, overlap):
    class Skip(Callback):
        order = 0

        def before_batch(self) -> None:
            if self.training and self.iter == 1:
                raise CancelBatchException

    learn = make(overlap)
    batches = fit(learn, Skip()).images
    assert [len(images) for images in batches] == 2 * [8, 8, 4]
    assert not torch.equal(batches[0], batches[1])


@pytest.mark.parametrize('overlap', [False, True])
def test_an_image_that_cannot_be_read_ends_the_training_with_its_error(make, overlap):
    learn = make(overlap)
    items = learn.dls.train_ds.items
    items.loc[items.index[3], 'path'] = 'missing.jpeg'
    with pytest.raises(ImageError, match='missing.jpeg'):
        fit(learn)
    assert all(step.generator is None for step in per_image_transforms(learn))


def per_image_transforms(learn: CXRLearner) -> list[PerImageTransform]:
    return [step for step in learn.dls.train.after_batch.fs if isinstance(step, PerImageTransform)]


def test_a_fit_that_is_cancelled_leaves_a_learner_that_can_be_trained_and_exported(make, tmp_path):
    learn = make(True)

    class Cancel(Callback):
        def after_batch(self) -> None:
            raise CancelFitException

    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-3, cbs=Cancel())
        learn.fit(1, 1e-3)
    learn.path = tmp_path
    path = learn.export()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # fastai warns of every pickle
        assert isinstance(load_learner(path).model, nn.Module)


@pytest.mark.parametrize('error', [None, KeyboardInterrupt])
def test_the_number_of_threads_stays_the_same(make, error):
    class Stop(Callback):
        def after_pred(self) -> None:
            if error:
                raise error

    learn = make(True)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with suppress(KeyboardInterrupt):
            fit(learn, Stop())
        later: list[int] = []
        thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert torch.get_num_threads() == 2 and later == [2]
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize('overlap', [False, True])
def test_a_callback_can_look_at_the_batches_during_a_step(make, overlap):
    class Look(Callback):
        def after_batch(self) -> None:
            if self.training and self.iter == 0:
                images, _ = first(self.dl)
                assert len(images) == 8

    batches = fit(make(overlap), Look()).images
    assert [len(images) for images in batches] == 2 * [8, 8, 4]
    assert not torch.equal(batches[0], batches[1])
