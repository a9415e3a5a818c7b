"""`cxr_learner` turns `DataLoaders` and an architecture into a `CXRLearner`, a fastai `Learner` that knows recipes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import fastai.vision.learner  # noqa: F401  (registers `show_results` for images)
import numpy as np
import torch
from fastai.callback.core import Callback, CancelEpochException
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.progress import ProgressCallback  # noqa: F401  (adds fastai's progress bars)
from fastai.callback.schedule import ParamScheduler  # noqa: F401  (adds `fine_tune`, `fit_one_cycle` and `lr_find`)
from fastai.callback.training import BnFreeze
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import AccumMetric, ActivationType, accuracy
from fastcore.basics import listify
from fastcore.meta import delegates
from torch import nn

from cxr_fastai.core.environment import forget_blank_variables
from cxr_fastai.core.errors import OutputError, UsageError
from cxr_fastai.core.recipe import POSITIVE, UNKNOWN, VOCAB, Recipe
from cxr_fastai.data.loaders import find_preprocessing
from cxr_fastai.data.transforms import without_mixing
from cxr_fastai.inference.config import ModelConfig
from cxr_fastai.inference.pickles import save_learner
from cxr_fastai.models.networks import create_network, unwrap_network
from cxr_fastai.models.registry import OWN_WEIGHTS
from cxr_fastai.training.ahead import PrepareAhead
from cxr_fastai.training.callbacks import DivergenceGuard, History, KeepBest, recipe_callbacks
from cxr_fastai.training.checks import check_labels, check_loaders
from cxr_fastai.training.hardware import reuse_memory
from cxr_fastai.training.optimizer import TorchOptimizer
from cxr_fastai.training.precision import Precision
from cxr_fastai.training.recipes import (
    OPTIMIZERS,
    apply_recipe,
    check_recipe_of,
    choose_recipe,
    fit_phase,
    known_arch,
    warn_of_cut_cycle,
)
from cxr_fastai.training.single_images import SingleImages


class Position(NamedTuple):
    """A point of a training by a recipe: the number of the phase, and the completed epochs of that phase."""

    phase: int = 0
    epochs: int = 0


class Diverged(OutputError):
    """The loss became NaN or infinite.

    `failure` says where, and `best` is the `history.csv` row of the best epoch before, or None.
    """

    def __init__(self, failure: dict[str, Any], best: dict[str, Any] | None) -> None:
        where = f'epoch {failure["epoch"]}'
        if failure['batch']:
            where += f', batch {failure["batch"]}'
        kept = 'No epoch was completed before.'
        if best:
            kept = f'The best network so far, of epoch {best["epoch"]}, was kept.'
        super().__init__(
            f'training stopped: the {failure["where"]} loss is {failure["loss"]} in {where}. {kept} '
            'Train again with a lower --lr, or check --weights and the images.'
        )
        self.failure = failure
        self.best = best


START = Position()
TRAINING_STATE = ('recipe', 'recipe_dls', 'best_row', 'pretrained', 'has_own_loss', 'has_own_optimizer', 'has_own_wd')
"""Attributes that an exported learner does not contain."""


class CXRLearner(Learner):
    """A fastai `Learner` of a network `Sequential(body, head)`; `cxr_learner` makes one.

    All methods of fastai work on it. Exported files open with fastai's `load_learner` and contain no path.

    Attributes:
        arch, pretrained: names of the architecture and of the weights that training started from.
        history: the callback with one row per epoch of all fits, `history.rows`.
        recipe: the recipe of the last `fit_recipe`; None without one, and if something else than it was used: another
            loss or optimiser, or further callbacks.
    """

    arch: str
    pretrained: str = UNKNOWN
    recipe: Recipe | None = None
    recipe_dls: DataLoaders | None = None
    best_row: dict[str, Any] | None = None
    has_own_loss = False
    has_own_optimizer = False
    has_own_wd = False
    first_epoch = 0

    @property
    def network(self) -> nn.Sequential:
        """The network, without the wrapper that it has in distributed training."""
        return cast(nn.Sequential, unwrap_network(self.model))

    def fit_recipe(
        self,
        recipe: str | Recipe = 'tuned',
        epochs: int | None = None,
        lr: float | None = None,
        cbs: Callback | Sequence[Callback] | None = None,
        start: Position = START,
        **fields: Any,
    ) -> dict[str, Any]:
        """Train through the phases of a recipe, keep the weights of the best epoch, and return its row of the history.

        A recipe sets the loss, the optimiser, the schedule and the phases. A loss or an optimiser that was passed to
        `cxr_learner` stays. The images and their augmentation are those of the loaders: pass the name of the recipe to
        `CXRDataLoaders`, too. The best epoch is the one with the highest validation AUC.

        Args:
            recipe: `reference`, `tuned`, or a `Recipe`.
            epochs: total number of epochs (default: that of the recipe).
            lr: learning rate of the first phase; those of later phases keep their ratio to it.
            cbs: further callbacks.
            start: where to continue an interrupted training.
            fields: `freeze_epochs`, and fields of `Recipe` about the optimisation, such as `patience` or `ema`.

        Raises `Diverged` if the loss becomes NaN or infinite; the learner then has the best weights so far.
        """
        recipe = choose_recipe(self, recipe, epochs, lr, **fields)
        check_recipe_of(self, recipe)
        warn_of_cut_cycle(recipe)
        check_loaders(self.dls)
        reuse_memory()
        self._add_history()
        is_complete = apply_recipe(self, recipe)
        self.recipe = recipe if is_complete and cbs is None else None
        self.recipe_dls = self.dls
        best, guard = KeepBest(), DivergenceGuard()
        with self.added_cbs([best, guard, *recipe_callbacks(recipe), *listify(cbs)]):
            self._fit_phases(recipe, start)
        if best.weights:
            self.model.load_state_dict(best.weights)
        if guard.failure:
            raise Diverged(guard.failure, best.row)
        if best.row is None:
            raise UsageError('no epoch was completed, because a callback ended the fit before. Remove the callback.')
        self.best_row = best.row
        return best.row

    def _fit_phases(self, recipe: Recipe, start: Position) -> None:
        for number, phase in enumerate(recipe.phases[start.phase :], start.phase):
            self.first_epoch = start.epochs if number == start.phase else 0
            try:
                fit_phase(self, phase, recipe)
            finally:
                self.first_epoch = 0
                self.history.phase = ''
            if self.divergence_guard.failure:
                return

    def _do_fit(self) -> None:
        """Run the epochs from `first_epoch`. With fastai's `start_epoch`, skipped epochs still call all callbacks."""
        for epoch in range(self.first_epoch, self.n_epoch):
            self.epoch = epoch
            self._with_events(self._do_epoch, 'epoch', CancelEpochException)

    def one_batch(self, i: int, b: Any) -> None:
        """Train or validate with one batch; also if an exception ends it, a lower precision ends with it."""
        try:
            super().one_batch(i, b)
        finally:
            if 'precision' in vars(self):
                self.precision.leave()

    def tta(self, *args: Any, **kwargs: Any) -> Any:
        """Return fastai's predictions with augmentation, without that which hides or exchanges parts of an image."""
        with without_mixing(self.dls.train):
            return super().tta(*args, **kwargs)

    def to_fp16(self) -> CXRLearner:
        """Train with 16-bit floats, on a GPU or a CPU. Validation and prediction keep 32 bits."""
        return self.remove_cb(MixedPrecision).add_cb(Precision('fp16'))

    def to_bf16(self) -> CXRLearner:
        """Train with bfloat16, on a GPU or a CPU. Validation and prediction keep 32 bits."""
        return self.remove_cb(MixedPrecision).add_cb(Precision('bf16'))

    def export(self, fname: str | Path = 'export.pkl') -> Path:
        """Write the learner without its data to `path / fname`, and return that path.

        The file opens with fastai's `load_learner`. It contains the preprocessing, the classes and a self-test, but no
        path and no image name. Callbacks of the user are left out. Raises `CXRError` if it cannot be written.
        """
        path = Path(self.path, fname)
        save_learner(self, path, model_config(self))
        return path

    def fit(
        self,
        n_epoch: int,
        lr: Any = None,
        wd: float | None = None,
        cbs: Any = None,
        reset_opt: bool = False,
        start_epoch: int = 0,
    ) -> None:
        """Fit for `n_epoch` epochs, as fastai does; a learner from a file gets a history first."""
        check_loaders(self.dls)
        self._add_history()
        trained_from = self.pretrained, self.recipe
        super().fit(n_epoch, lr, wd, cbs, reset_opt, start_epoch)
        self.pretrained, self.recipe = trained_from  # `lr_find` and `SaveModelCallback` load weights of this learner

    def _add_history(self) -> None:
        if 'history' not in vars(self):
            self.add_cbs([History(), SingleImages(), PrepareAhead()])

    def load(self, file: Any, device: Any = None, **kwargs: Any) -> CXRLearner:
        """Load weights as fastai does. What trained them is then not known."""
        self.pretrained, self.recipe = UNKNOWN, None
        return super().load(file, device, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        # Only the training needs these, and the recipe and the name of the weights can contain a path.
        return {name: value for name, value in state.items() if name not in TRAINING_STATE}


@delegates(Learner.__init__)
def cxr_learner(
    dls: DataLoaders,
    arch: str | Callable[..., nn.Module] | nn.Module,
    pretrained: bool | str = True,
    metrics: Any = None,
    cbs: Any = None,
    loss_func: Any = None,
    opt_func: Any = None,
    wd: float | None = None,
    **kwargs: Any,
) -> CXRLearner:
    """Return a learner of the network `arch` for `dls`, by default with the settings of the specification.

    As with fastai's `vision_learner`, the body of a pretrained network is frozen: `fine_tune` trains the head, then
    everything. A frozen body keeps its BatchNorm statistics.

    Args:
        arch: `baseline`, `resnet50`, another name that `cxr-fastai archs` lists, a function of torchvision such as
            `resnet34`, or any `nn.Module`. A network that is not `Sequential(body, head)` is cut, and gets a new head.
        pretrained: True for the default weights of `arch`, False for random ones; or a name or file of weights.
        metrics: metrics of fastai; by default accuracy, AUC, sensitivity and specificity.
        cbs: further callbacks.
        loss_func: by default cross-entropy.
        opt_func: by default torch's Adam, with the weight decay `wd` (1e-4) as an L2 penalty on all parameters.

    Raises `CXRError` if the weights are not available or `arch` cannot be used.
    """
    forget_blank_variables()
    _check_classes(dls)
    check_labels(dls)
    network = create_network(arch, pretrained, _image_size(dls))
    _check_size(dls, network.arch)
    options = {'splitter': body_and_head, 'train_bn': False} | kwargs
    learn = CXRLearner(
        dls,
        network.model.to(memory_format=torch.channels_last),
        loss_func=loss_func or CrossEntropyLossFlat(),
        opt_func=opt_func or partial(TorchOptimizer, opt=OPTIMIZERS['adam']),
        wd=1e-4 if wd is None else wd,
        cbs=[BnFreeze(), History(), SingleImages(), PrepareAhead(), *listify(cbs)],
        metrics=default_metrics() if metrics is None else metrics,
        **options,
    )
    learn.arch, learn.pretrained = network.arch, network.weights
    learn.has_own_loss = loss_func is not None
    learn.has_own_optimizer = opt_func is not None
    learn.has_own_wd = wd is not None
    if network.weights not in ('none', OWN_WEIGHTS):
        learn.freeze()
    return learn


def recipe_learner(dls: DataLoaders, recipe: Recipe, **kwargs: Any) -> CXRLearner:
    """Return the learner of `recipe`, with its network, loss and optimiser. `kwargs` are those of `cxr_learner`."""
    learn = cxr_learner(dls, recipe.arch, recipe.weights, **kwargs)
    apply_recipe(learn, recipe)
    return learn


def default_metrics() -> list[Any]:
    """Return the metrics of `history.csv`."""
    return [accuracy, _score_metric(roc_auc), _class_metric(sensitivity), _class_metric(specificity)]


def _score_metric(func: Callable[[np.ndarray, np.ndarray], float]) -> AccumMetric:
    """Return `func` of (labels, probabilities of the positive class) as a fastai metric."""
    return AccumMetric(
        func, dim_argmax=-1, activation=ActivationType.BinarySoftmax, to_np=True, invert_arg=True, flatten=False
    )


def _class_metric(func: Callable[[np.ndarray, np.ndarray], float]) -> AccumMetric:
    """Return `func` of (labels, predicted classes) as a fastai metric."""
    return AccumMetric(func, dim_argmax=-1, to_np=True, invert_arg=True, flatten=False)


def _check_classes(dls: DataLoaders) -> None:
    vocab = getattr(dls, 'vocab', VOCAB)  # loaders of tensors have none
    if tuple(vocab) != VOCAB:
        raise UsageError(
            f'the classes of the DataLoaders are {", ".join(map(str, vocab))}, but {", ".join(VOCAB)} are expected, in '
            'this order. Make the DataLoaders with CXRDataLoaders.'
        )


def _image_size(dls: DataLoaders) -> int | None:
    """Return the side of the images of `dls`, or None if it is not known."""
    recipe = getattr(dls, 'recipe', None)
    return recipe.size if recipe else None


def _check_size(dls: DataLoaders, arch: str) -> None:
    """Raise `UsageError` if `arch` accepts only images of another size than those of `dls`."""
    size = _image_size(dls)
    facts = known_arch(arch)
    if size and facts and facts.size not in (None, size):
        raise UsageError(
            f'size {size}: {arch} accepts only {facts.size} pixels. Make the DataLoaders with size={facts.size}.'
        )


def model_config(learn: Learner) -> ModelConfig:
    """Return the settings for prediction with the network of `learn`: its preprocessing, and the threshold 0.5.

    A learner from a file, which was not trained since, keeps its settings.
    """
    stored = getattr(learn, 'config', None)
    history = vars(learn).get('history')
    if stored and not (history and history.rows):
        return ModelConfig.from_dict(stored, Path(learn.path))
    preprocessing = find_preprocessing(learn.dls)
    return ModelConfig(
        arch=learn.arch,
        size=preprocessing.size,
        threshold=0.5,
        resize=preprocessing.resize,
        low_pass=preprocessing.low_pass,
        modality=preprocessing.modality,
    )


def body_and_head(model: nn.Sequential) -> list[list[nn.Parameter]]:
    """Return the two parameter groups of a `Sequential(body, head)`."""
    return [list(part.parameters()) for part in model]


def roc_auc(targs: np.ndarray, scores: np.ndarray) -> float:
    """Return the area under the ROC curve.

    `targs` (n,) are the class indices and `scores` (n,) the probabilities of the positive class. The result is NaN if
    only one class is present, or if a score is NaN or infinite.
    """
    from sklearn.metrics import roc_auc_score

    both_classes = len(np.unique(targs)) == len(VOCAB)
    if not both_classes or not np.isfinite(scores).all():
        return float('nan')
    return float(roc_auc_score(targs, scores))


def sensitivity(targs: np.ndarray, preds: np.ndarray) -> float:
    """Return the proportion of PNEUMONIA images that are classified as PNEUMONIA; NaN if there are none.

    `targs` (n,) and `preds` (n,) are class indices.
    """
    return _recall(targs, preds, POSITIVE)


def specificity(targs: np.ndarray, preds: np.ndarray) -> float:
    """Return the proportion of NORMAL images that are classified as NORMAL; NaN if there are none.

    `targs` (n,) and `preds` (n,) are class indices.
    """
    return _recall(targs, preds, 1 - POSITIVE)


def _recall(targs: np.ndarray, preds: np.ndarray, label: int) -> float:
    of_label = targs == label
    if not of_label.any():
        return float('nan')
    return float((preds[of_label] == label).mean())
