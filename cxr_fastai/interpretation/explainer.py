"""`Explainer`, which explains the scores of images by maps, and functions that save the explanations as figures."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import nn

from cxr_fastai.core.errors import ImageError, UsageError, visible
from cxr_fastai.core.figures import save_figure
from cxr_fastai.core.files import StrPath, writing
from cxr_fastai.core.recipe import POSITIVE, VOCAB
from cxr_fastai.data.find import list_images, short_path
from cxr_fastai.images.decode import ImageLike, file_path, open_image
from cxr_fastai.images.decoder_pool import default_pool
from cxr_fastai.images.preprocessing import Preprocessing
from cxr_fastai.inference.config import ModelConfig
from cxr_fastai.inference.engines import TorchEngine, to_probabilities
from cxr_fastai.inference.predictor import Predictor
from cxr_fastai.inference.pretrained import find_model
from cxr_fastai.inference.tables import Predictions
from cxr_fastai.interpretation.cam import (
    METHODS,
    activation_maps,
    check_method,
    enlarge,
    find_layer,
    has_body_and_head,
    name_layer,
    scale,
)
from cxr_fastai.interpretation.overlays import Explanation, plot_explanation
from cxr_fastai.models.inputs import to_input
from cxr_fastai.models.networks import unwrap_network

if TYPE_CHECKING:
    from fastai.learner import Learner

DISPLAY_SIZE = 512
"""Maximum side, in pixels, of an image that is shown with its map."""
BATCH_SIZE = 32
"""Number of images that pass through the network at once."""
PROBE_SHAPE = (80, 96)
"""Height and width of the image that shows how a learner prepares images."""
TOLERANCE = 1e-3
"""Largest difference between normalised pixels that count as equal."""
BURNED_IN_CODE = 'E_BURNED_IN'
"""The error code of an image that may show the patient's name."""


ExplanationResult = tuple[Path | None, Explanation | ImageError]
"""The explanation of an image with the path of its figure, if there is one; the error of an image without a map."""


@dataclass(frozen=True)
class Subject:
    """An image to explain.

    `image` is the path of its file, an image of Pillow, or a grey uint8 array (h, w). `name` is shown instead of the
    path. If known, `label` is its true class and `p` the predicted probability of pneumonia.
    """

    image: ImageLike
    name: str = ''
    label: str | None = None
    p: float | None = None

    @property
    def shown_name(self) -> str:
        """The name, else the path, else `image`."""
        return self.name or file_path(self.image) or 'image'


@dataclass(frozen=True)
class Explainer:
    """Explains the scores of the network of `predictor` by maps of the evidence for the class `target`.

    `method` is a key of `cam.METHODS`. `layer` is the name of a layer; the default is the last one of the body before
    a final pooling layer. Raises `UsageError` for an unknown target, method or layer.
    """

    predictor: Predictor
    target: str = VOCAB[POSITIVE]
    method: str = 'gradcam'
    layer: str | None = None

    def __post_init__(self) -> None:
        check_choices(self.target, self.method)
        check_method(self.model, self.method, self.layer)

    @classmethod
    def load(
        cls,
        model: StrPath,
        target: str = VOCAB[POSITIVE],
        method: str = 'gradcam',
        layer: str | None = None,
        device: str = 'auto',
        modality: str = '',
    ) -> Explainer:
        """Return the explainer of the run, bundle or trusted learner `model`, which computes on `device`.

        `modality` has the codes of other DICOM modalities to accept (see `Predictor.load`).
        """
        model = find_model(model)
        return cls(Predictor.load(model, engine='torch', device=device, modality=modality), target, method, layer)

    @classmethod
    def from_learner(
        cls,
        learn: Learner,
        target: str = VOCAB[POSITIVE],
        method: str = 'gradcam',
        layer: str | None = None,
        threshold: float = 0.5,
    ) -> Explainer:
        """Return the explainer of a copy of the network of `learn`, on the CPU.

        Raises `UsageError` if the images of `learn` are not prepared by `OpenImage` alone, and if its network is not a
        `Sequential(body, head)` and no `layer` is named.
        """
        predictor = learner_predictor(copy_network(learn), learner_preprocessing(learn), threshold)
        return cls(predictor, target, method, layer)

    @property
    def model(self) -> nn.Module:
        """The torch network."""
        return self.predictor.model

    @property
    def layer_name(self) -> str:
        """The name of the layer that the maps are computed from."""
        return name_layer(self.model, find_layer(self.model, self.layer, self.method))

    def maps(self, images: np.ndarray) -> np.ndarray:
        """Return maps (n, size, size) from 0 to 1 of grey uint8 `images` (n, size, size).

        Each map is divided by its own maximum; it is all 0 if there is no positive evidence for the target.
        """
        return np.concatenate([self._maps(batch) for batch in _batches(images)])

    def _maps(self, images: np.ndarray) -> np.ndarray:
        target = VOCAB.index(self.target)
        inputs = to_input(images, self.predictor.device)
        maps = activation_maps(self.model, inputs, target, self.method, self.layer)
        return np.asarray(scale(enlarge(maps, images.shape[-1])).cpu())

    def scores(self, images: np.ndarray) -> np.ndarray:
        """Return the probability (n,) of the target for grey uint8 `images` (n, size, size)."""
        p = np.concatenate([self.predictor.scores(batch) for batch in _batches(images)])
        if self.target == VOCAB[POSITIVE]:
            return p
        return 1 - p

    def explain(
        self, subjects: Iterable[Subject], batch_size: int = BATCH_SIZE, allow_burned_in: bool = False
    ) -> Iterator[Explanation | ImageError]:
        """Yield the explanation of each subject, in order, or the error if its image cannot be used.

        An image that is marked as containing text, which may name the patient, is an error unless `allow_burned_in`.
        A known probability is not predicted again.
        """
        remaining = iter(subjects)
        while batch := list(islice(remaining, batch_size)):
            yield from self._explain(batch, allow_burned_in)

    def _explain(self, subjects: Sequence[Subject], allow_burned_in: bool) -> list[Explanation | ImageError]:
        preprocessing = self.predictor.preprocessing
        images = [_open(subject, preprocessing, allow_burned_in) for subject in subjects]
        usable = {i: image for i, image in enumerate(images) if isinstance(image, np.ndarray)}
        results: dict[int, Explanation | ImageError] = {
            i: image for i, image in enumerate(images) if isinstance(image, ImageError)
        }
        if usable:
            squares = np.stack([preprocessing.fit(image) for image in usable.values()])
            probabilities = self._probabilities([subjects[i] for i in usable], squares)
            for i, heat, p in zip(usable, self.maps(squares), probabilities, strict=True):
                results[i] = self._explanation(subjects[i], usable[i], heat, p)
        return [results[i] for i in range(len(subjects))]

    def _probabilities(self, subjects: Sequence[Subject], squares: np.ndarray) -> list[float]:
        known = [subject.p for subject in subjects if subject.p is not None]
        if len(known) == len(subjects):
            return known
        return [float(p) for p in self.predictor.scores(squares)]

    def _explanation(self, subject: Subject, image: np.ndarray, heat: np.ndarray, p: float) -> Explanation:
        displayed = reduce(image)
        height, width = displayed.shape
        heat = self.predictor.preprocessing.map_to_image(heat, height, width)
        return Explanation(
            image=displayed,
            heat=np.clip(heat, 0, 1),
            name=subject.shown_name,
            p=self.predictor.displayed(p),
            threshold=self.predictor.threshold,
            target=self.target,
            method=self.method,
            label=subject.label,
        )


class WholeNetworkEngine(TorchEngine):
    """Runs any network for normalised images, in evaluation mode. It gives no features."""

    def __call__(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the probabilities of pneumonia (n,) of grey uint8 images (n, s, s), and features (n, 0)."""
        with torch.inference_mode(), self.autocast():
            logits = self.model(to_input(images, self.device))
        return to_probabilities(logits), np.zeros((len(images), 0))


def check_choices(target: str, method: str) -> None:
    """Raise `UsageError` for an unknown target or method."""
    if target not in VOCAB:
        raise UsageError(f'--target {target}: choose {" or ".join(VOCAB)}.')
    if method not in METHODS:
        raise UsageError(f'--method {method}: choose {", ".join(METHODS)}.')


def copy_network(learn: Learner) -> nn.Module:
    """Return a copy of the network of `learn` on the CPU, without the wrapper that it has in distributed training."""
    return copy.deepcopy(unwrap_network(learn.model)).cpu().float()


def learner_preprocessing(learn: Learner) -> Preprocessing:
    """Return how the images of `learn` are prepared.

    Raises `UsageError` if `OpenImage` does not open them, or if other transforms change images of validation too.
    """
    from cxr_fastai.data.loaders import find_preprocessing

    problem = (
        f'maps need images that OpenImage alone prepares, but these {type(learn.dls).__name__} prepare them in another '
        'way. Use heatmap=False, or CXRDataLoaders without transforms of validation images.'
    )
    try:
        preprocessing = find_preprocessing(learn.dls)
    except UsageError:
        raise UsageError(problem) from None
    image = np.random.default_rng(0).integers(0, 256, PROBE_SHAPE, dtype=np.uint8)
    (actual,) = learn.dls.test_dl([image], num_workers=0).one_batch()
    expected = to_input(preprocessing.fit(image)[None])
    actual = actual.as_subclass(torch.Tensor).cpu().float()
    if actual.shape != expected.shape or not torch.allclose(actual, expected, atol=TOLERANCE):
        raise UsageError(problem)
    return preprocessing


def learner_predictor(model: nn.Module, preprocessing: Preprocessing, threshold: float) -> Predictor:
    """Return the predictor of `model`, a network on the CPU that was trained on images prepared by `preprocessing`."""
    engine = TorchEngine(model) if has_body_and_head(model) else WholeNetworkEngine(model)
    settings = {field.name: getattr(preprocessing, field.name) for field in fields(preprocessing)}
    return Predictor(engine, ModelConfig(arch=type(model).__name__, threshold=threshold, **settings))


def read_subjects(
    subjects: Iterable[Subject], threshold: float, preprocessing: Preprocessing | None = None
) -> Iterator[Explanation | ImageError]:
    """Yield each image with its known probability and no map, or the error if it cannot be used.

    A large JPEG is decoded at no more pixels than `preprocessing` needs, if given.
    """
    for subject in subjects:
        image = _open(subject, preprocessing, allow_burned_in=False)
        if isinstance(image, ImageError):
            yield image
        else:
            displayed = reduce(image)
            p = float('nan') if subject.p is None else subject.p
            no_map = np.zeros(displayed.shape, np.float32)
            yield Explanation(displayed, no_map, subject.shown_name, p, threshold, label=subject.label)


def reduce(image: np.ndarray) -> np.ndarray:
    """Return `image`, grey uint8 (h, w), with sides of at most `DISPLAY_SIZE`."""
    displayed = Image.fromarray(image)
    displayed.thumbnail((DISPLAY_SIZE, DISPLAY_SIZE))
    return np.asarray(displayed)


def _batches(images: np.ndarray) -> list[np.ndarray]:
    return [images[start : start + BATCH_SIZE] for start in range(0, len(images), BATCH_SIZE)]


def _open(subject: Subject, preprocessing: Preprocessing | None, allow_burned_in: bool) -> np.ndarray | ImageError:
    """Decode an image as for prediction; return its error if it cannot be used."""
    try:
        name = file_path(subject.image) or subject.shown_name
        image = open_image(subject.image, preprocessing, name, default_pool().decode)
    except ImageError as error:
        return error
    if image.burned_in and not allow_burned_in:
        message = (
            'the file says that the image contains text, which may name the patient. `cxr-fastai explain MODEL IMAGE '
            '--allow-burned-in` shows it.'
        )
        return ImageError(message, BURNED_IN_CODE).with_path(file_path(subject.image) or subject.shown_name)
    return image.pixels


def explain_images(
    explainer: Explainer,
    images: Iterable[Path],
    folder: Path,
    batch_size: int = BATCH_SIZE,
    allow_burned_in: bool = False,
) -> Iterator[ExplanationResult]:
    """Explain `images` (files, folders or CSV files) and save the figures; see `save_explanations`."""
    subjects = [_subject_of_file(path) for path in list_images(images)]
    return save_explanations(explainer.explain(subjects, batch_size, allow_burned_in), folder)


def explain_predictions(
    predictions: Predictions, images: Sequence[StrPath], folder: Path | None, positions: Sequence[int] | None = None
) -> Iterator[ExplanationResult]:
    """Explain the predictions of `images` at these `positions`, and save the figures; see `save_explanations`.

    The default `positions` are those of `Predictions.scored`. The file of each figure is named by the number of its row
    in `predictions`. Without a `folder` nothing is saved.
    """
    explained = predictions.scored if positions is None else positions
    subjects = (_subject_of_file(images[position]) for position in explained)
    explanations = Explainer(predictions.predictor).explain(subjects)
    if folder is None:
        return ((None, explanation) for explanation in explanations)
    return save_explanations(explanations, folder, [position + 1 for position in explained])


def _subject_of_file(file: StrPath) -> Subject:
    return Subject(file, visible(short_path(os.fspath(file))))


def save_explanations(
    explanations: Iterable[Explanation | ImageError], folder: StrPath, numbers: Iterable[int] | None = None
) -> Iterator[ExplanationResult]:
    """Save each explanation as a figure in `folder` and yield its path and itself; for an error, nothing is saved.

    The files are named by `numbers` (default: 1, 2, ...), for example `0001.png`. The folder is created. Raises
    `OutputError`.
    """
    folder = Path(folder)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for number, explanation in zip(numbers or count(1), explanations, strict=False):
        path = folder / f'{number:04d}.png'
        if isinstance(explanation, Explanation):
            save_figure(plot_explanation(explanation), path)
        yield path, explanation
