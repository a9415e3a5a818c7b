"""The `Predictor`, which loads any model file and gives each image a row with its probability of pneumonia."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from cxr_fastai.core.environment import is_main_process
from cxr_fastai.core.errors import CXRError, CXRWarning, ImageError, UsageError
from cxr_fastai.core.foreign import read_bytes
from cxr_fastai.core.hardware import available_cores
from cxr_fastai.core.progress import in_threads
from cxr_fastai.core.recipe import VOCAB
from cxr_fastai.core.run import Run
from cxr_fastai.images.arrays import check_squares
from cxr_fastai.images.decode import ImageLike, file_path, open_image
from cxr_fastai.images.decoder_pool import DecodeGroup, default_pool
from cxr_fastai.images.dicom_header import parse_modalities
from cxr_fastai.images.limits import DecodedImage
from cxr_fastai.images.preprocessing import Preprocessing
from cxr_fastai.inference.bundle import GATE, Bundle, is_bundle
from cxr_fastai.inference.config import LEARNER, ModelConfig, find_network, identify_network, temper
from cxr_fastai.inference.decision import Decision, or_evaluate, refuse_other_views
from cxr_fastai.inference.engines import Engine, TorchEngine, check_precision
from cxr_fastai.inference.gate import REJECTION, Gate
from cxr_fastai.inference.networks import load_network
from cxr_fastai.inference.pretrained import find_model, name_model
from cxr_fastai.inference.tensors import MAX_BYTES, load_tensors

if TYPE_CHECKING:
    import pandas as pd
    import torch
    from torch import nn

Row = dict[str, Any]
"""A prediction of one image, with the keys `COLUMNS`."""
COLUMNS = ('path', 'status', 'p_pneumonia', 'prediction', 'threshold', 'code', 'message')
MAX_MESSAGE = 200
"""Largest length of a message, in characters."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Predictor:
    """An engine with the settings of its model. `Predictor.load(MODEL)` creates one.

    If `calibrated`, probabilities and threshold are scaled by the temperature that was fitted to validation images. A
    `gate` rejects images that are unlike the training images. With `tta` (test-time augmentation) the probability is
    the mean over two views of the image: itself and its mirror image. `source` is the file or folder of the model,
    which messages name.
    """

    engine: Engine
    config: ModelConfig
    calibrated: bool = False
    gate: Gate | None = None
    tta: bool = False
    source: Path | None = None

    @classmethod
    def load(
        cls,
        model: str | os.PathLike[str],
        calibrated: bool = False,
        engine: str = 'auto',
        gate: bool = True,
        device: str = 'auto',
        precision: str = 'fp32',
        modality: str = '',
    ) -> Predictor:
        """Load a bundle with the `engine` (see `Bundle.engine`), a run folder, or an exported `.pkl` that is trusted.

        The text `pretrained` means the bundle that the package contains, and `hf:USER/NAME` one on the Hugging Face
        Hub; see `inference.pretrained.find_model`.

        The network computes on the `device`, `auto`, `cpu`, `cuda`, `cuda:N` or `mps`, with the `precision` `fp32` or
        `bf16`, which is faster on some processors and changes the probabilities slightly.

        A run folder, or the `learner.pkl` in one, is loaded with the threshold and temperature that `evaluate` chose.
        Other `.pkl` files have the threshold that they were exported with, which is 0.5 for `Learner.export`. Images
        are predicted with test-time views if the threshold was chosen so. With `gate=False` every image gets a
        probability. `modality` has the codes of DICOM modalities, such as `RG,CT`, that are accepted besides those of
        the training. Raises `CXRError` if the model cannot be loaded, and `UsageError` for a wrong `modality`, or if
        the model has no temperature for `calibrated`.
        """
        model = find_model(model)
        parse_modalities(modality)
        if is_bundle(model):
            predictor = _load_bundle(model, engine, device, precision)
        elif model.is_dir():
            predictor = _load_run(Run(model), device)
        else:
            predictor = _load_learner_file(model, device)
        if isinstance(predictor.engine, TorchEngine):
            predictor.engine.precision = check_precision(precision)
        if calibrated and predictor.config.temperature is None:
            raise UsageError(
                f'{name_model(model)}: --calibrated needs a temperature, which is fitted to validation images. Omit '
                f'--calibrated{or_evaluate(model)}.'
            )
        log.debug('%s: loaded into %s', model, predictor.engine)
        if not gate:
            predictor = replace(predictor, gate=None)
        if modality:
            accepted = ','.join(filter(None, [predictor.config.modality, modality]))
            predictor = replace(predictor, config=replace(predictor.config, modality=accepted))
        return replace(predictor, calibrated=calibrated, tta=predictor.config.tta, source=model)

    def with_threshold(self, threshold: float) -> Predictor:
        """Return a predictor with another threshold, on the scale of the probabilities that this one shows."""
        raw = temper(threshold, 1 / self._temperature)
        return replace(self, config=replace(self.config, threshold=raw, threshold_rule=f'fixed:{threshold:g}'))

    def with_tta(self, tta: bool) -> Predictor:
        """Return a predictor that averages over test-time views, or does not.

        Raises `UsageError` if the threshold, or the temperature of a calibrated predictor, was chosen the other way. A
        fixed threshold fits both.
        """
        if tta != self.config.tta:
            temperature = self._temperature if self.calibrated else None
            refuse_other_views(self.source, tta, self.config.threshold_rule, self.threshold, temperature)
        return replace(self, tta=tta)

    @property
    def model(self) -> nn.Module:
        """The torch network. Raises `UsageError` for ONNX Runtime."""
        if not isinstance(self.engine, TorchEngine):
            raise UsageError('maps need the torch network, not ONNX Runtime. Load the model with `engine="torch"`.')
        return self.engine.model

    @property
    def device(self) -> torch.device | str:
        """The device of the torch network; `cpu` for other engines."""
        return getattr(self.engine, 'device', 'cpu')

    @property
    def preprocessing(self) -> Preprocessing:
        """The steps between an image and the input of the network."""
        return Preprocessing.of(self.config)

    @property
    def threshold(self) -> float:
        """An image is classified as pneumonia if its shown probability is at least this threshold."""
        return self.displayed(self.config.threshold)

    def displayed(self, p: float) -> float:
        """Return a probability of the network as this predictor shows it: calibrated, or unchanged."""
        return float(temper(p, self._temperature))

    @property
    def _temperature(self) -> float:
        if not self.calibrated or self.config.temperature is None:
            return 1.0
        return self.config.temperature

    def predict(self, images: Sequence[ImageLike], batch_size: int = 32, workers: int | None = None) -> Iterator[Row]:
        """Yield a row for each image, in order, with the keys `COLUMNS`, and show the progress.

        An image is the path of a file, or an image in memory that `images.decode_image` accepts: an image of Pillow, a
        uint8 array (h, w) or the bytes of a file. The path of a row is that of the file, or `image-N` for number N.

        An image that cannot be used gets the status `error` or `rejected` with a code and a message. The message of
        other images contains notes of their reading, such as the window of a 16-bit image. `workers` threads read
        images ahead (default: two per core). Files are decoded in processes (see `DecoderPool`), so that one
        that takes more than 10 s gets the code `E_TIMEOUT`. Raises `UsageError` if `images` is a single image.
        """
        return self.predict_named(name_images(images), batch_size, workers)

    def predict_named(
        self, images: Sequence[tuple[str, ImageLike]], batch_size: int = 32, workers: int | None = None
    ) -> Iterator[Row]:
        """Yield a row for each pair of a name and an image, as `predict` does. The name is the path of the row."""
        # The threads wait for the processes that decode; with two for each, no process waits for its next image.
        threads = workers or 2 * available_cores()
        with DecodeGroup(default_pool()) as group:
            opened = in_threads(partial(self._open, group), images, threads)
            while batch := list(islice(opened, batch_size)):
                yield from self._predict_batch(batch)

    def _open(self, group: DecodeGroup, named_image: tuple[str, ImageLike]) -> tuple[Row, np.ndarray | None]:
        name, image = named_image
        try:
            decoded = open_image(image, self.preprocessing, name, partial(group.decode, side=0))
        except ImageError as error:
            return self.start_row(name, error), None
        return self.start_row(name, decoded), decoded.square

    def _predict_batch(self, batch: list[tuple[Row, np.ndarray | None]]) -> Iterator[Row]:
        squares = [square for _, square in batch if square is not None]
        decisions = []
        if squares:
            p, distances = self.infer(np.stack(squares))
            decisions = [self.decide(*pair) for pair in zip(p, distances, strict=True)]
        position = 0
        for row, square in batch:
            if square is not None:
                row = row | decisions[position]
                position += 1
            yield row

    def start_row(self, name: str, image: DecodedImage | ImageError) -> Row:
        """Return the row of the image `name` before its prediction; `image` is the error if it cannot be used."""
        row: Row = {**dict.fromkeys(COLUMNS), 'path': name, 'threshold': self.threshold}
        if isinstance(image, ImageError):
            message = str(image).removeprefix(f'{name}: '.replace('\n', ' '))[:MAX_MESSAGE]
            return row | {'status': image.status, 'code': image.code, 'message': message}
        notes = '; '.join(image.notes)[:MAX_MESSAGE]
        return row | {'status': 'ok', 'message': notes or None}

    def infer(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return probabilities (n,) and gate distances (n,) of grey uint8 images (n, size, size).

        A distance above 1 means that the gate rejects the image; without a gate all are 0. Raises `ImageError` E_ARRAY
        for arrays of another type or shape, and `CXRError` if a probability is NaN or not between 0 and 1.
        """
        check_squares(images, self.config.size)
        p, features = self.engine(images)
        if self.tta:
            mirrored, _ = self.engine(mirror(images))
            p = (p + mirrored) / 2
        if not ((p >= 0) & (p <= 1)).all():
            raise CXRError(
                f'{self.config.arch}: the network returned probabilities from {p.min():g} to {p.max():g}, so the model '
                'is damaged. Get it again from its source.'
            )
        if self.gate is None:
            return p, np.zeros(len(p))
        return p, self.gate.measure(features, images)

    def decide(self, p: float, distance: float) -> Row:
        """Return the fields of a row that follow from the results of `infer` for one image."""
        is_known = distance <= 1  # False if the distance is NaN
        if not is_known:
            return REJECTION
        label = VOCAB[int(p >= self.config.threshold)]
        return {'p_pneumonia': self.displayed(float(p)), 'prediction': label}

    def scores(self, images: np.ndarray) -> np.ndarray:
        """Return the probabilities of pneumonia (n,) of grey uint8 images (n, size, size), not calibrated."""
        p, _ = self.infer(images)
        return p


def mirror(images: np.ndarray) -> np.ndarray:
    """Return the mirror images of `images` (..., width), the second of the test-time views."""
    return np.ascontiguousarray(images[..., ::-1])


def load_predictor(
    model: str | os.PathLike[str],
    *,
    calibrated: bool = False,
    threshold: float | None = None,
    tta: bool | None = None,
    use_gate: bool = True,
    engine: str = 'auto',
    device: str = 'auto',
    precision: str = 'fp32',
    modality: str = '',
) -> Predictor:
    """Return the predictor of `model` with the options of `tables.predict_to_table`. Warns if it has no input gate."""
    predictor = Predictor.load(model, calibrated, engine, use_gate, device, precision, modality)
    if threshold is not None:
        predictor = predictor.with_threshold(threshold)
    if tta is not None:
        predictor = predictor.with_tta(tta)
    if use_gate and predictor.gate is None and is_main_process():
        warnings.warn(
            f'{name_model(Path(model))} has no input gate, so every image gets a probability, even if it is not a '
            'chest X-ray. `cxr-fastai export` makes a bundle with a gate.',
            CXRWarning,
            stacklevel=3,
        )
    return predictor


def name_images(images: Iterable[ImageLike]) -> list[tuple[str, ImageLike]]:
    """Return each image with its name in tables: the path of a file, or `image-N` for image number N in memory.

    Raises `UsageError` if `images` is a single image.
    """
    is_single = isinstance(images, str | bytes | os.PathLike | Image.Image)
    if is_single or (isinstance(images, np.ndarray) and images.ndim < 3):
        raise UsageError(f'{type(images).__name__}: a single image, where a list of images is needed. Pass [image].')
    return [(file_path(image) or f'image-{n}', image) for n, image in enumerate(images, 1)]


def prediction_table(rows: Iterable[Row]) -> pd.DataFrame:
    """Return the rows of `Predictor.predict` as a table with the columns `COLUMNS`."""
    import pandas as pd

    return pd.DataFrame(rows, columns=COLUMNS)


def _load_bundle(path: Path, engine: str, device: str, precision: str) -> Predictor:
    bundle = Bundle.open(path)
    predictor = Predictor(bundle.engine(engine, device, precision), bundle.config)
    if GATE not in bundle:
        return predictor
    predictor = replace(predictor, gate=Gate.from_tensors(bundle.tensors(GATE), bundle.shown_file(GATE)))
    try:
        _, distances = predictor.infer(bundle.selftest.images[:1])
        gate_fits = distances.shape == (1,)
    except (ValueError, TypeError, IndexError):
        gate_fits = False
    if not gate_fits:
        raise CXRError(
            f'{bundle.shown_file(GATE)}: not the gate of this network, so the bundle is damaged. Get it again from its '
            'source.'
        )
    return predictor


def load_undecided(run: Run, device: str = 'auto') -> Predictor:
    """Load the network of `run` on `device`, with the threshold of its recipe, whatever `evaluate` decided."""
    file = find_network(run.path)
    if file.name == LEARNER:
        return _load_pickle(file, device)
    settings = asdict(ModelConfig.from_recipe(run.recipe))
    config = ModelConfig.from_dict(settings, run / 'recipe.json')
    return Predictor(TorchEngine(load_network(config, read_bytes(file, MAX_BYTES), file), device), config)


def _load_run(run: Run, device: str) -> Predictor:
    predictor = load_undecided(run, device)
    return replace(predictor, config=_apply_decision(run, predictor.config))


def _apply_decision(run: Run, config: ModelConfig) -> ModelConfig:
    """Return `config` with the decision of `run`; that of the recipe if there is none for its network."""
    run.check_decision()
    decision = Decision.from_run(run, identify_network(run.path))
    if decision:
        return replace(
            config,
            threshold=decision.threshold,
            threshold_rule=decision.rule,
            temperature=decision.temperature,
            tta=decision.tta,
        )
    if run.decision:
        warnings.warn(
            f'{run.path}: its decision.json was made for another network, so the threshold is {config.threshold:g}, '
            f'that of its recipe. `{run.first_evaluation()}` chooses one.',
            CXRWarning,
            stacklevel=4,
        )
    return config


def _load_learner_file(path: Path, device: str) -> Predictor:
    """Load an exported learner; one that is in its run folder with the decision of the run, as the folder is."""
    predictor = _load_pickle(path, device)
    folder = path.parent
    if path.name != LEARNER or not (folder / 'recipe.json').is_file():
        return predictor
    network = find_network(folder)
    if network.name != LEARNER and not _has_weights(predictor.model, network):
        warnings.warn(
            f'{path} is not the network of the run {folder}, so its own threshold {predictor.threshold:g} is used.',
            CXRWarning,
            stacklevel=3,
        )
        return predictor
    return replace(predictor, config=_apply_decision(Run(folder), predictor.config))


def _has_weights(model: nn.Module, path: Path) -> bool:
    """Return True if the safetensors file `path` has the weights of `model`."""
    saved = load_tensors(read_bytes(path, MAX_BYTES), path)
    state = {name: tensor.cpu().numpy() for name, tensor in model.state_dict().items()}
    return state.keys() == saved.keys() and all(np.array_equal(state[name], saved[name]) for name in state)


def _load_pickle(path: Path, device: str) -> Predictor:
    from cxr_fastai.inference.learner_files import read_learner

    if not path.is_file():
        find_network(path)  # raises the error that explains what a model is
    saved = read_learner(path)
    return Predictor(TorchEngine(saved.network, device), saved.config)
