"""A model file becomes a `Predictor`: images go in, a row of facts for each comes out."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cxr_fastai.core.errors import CXRError, CXRWarning, ImageError, UsageError
from cxr_fastai.core.progress import in_threads
from cxr_fastai.core.recipe import VOCAB
from cxr_fastai.core.run import Run
from cxr_fastai.images.decode import open_image
from cxr_fastai.images.limits import DecodedImage
from cxr_fastai.images.preprocessing import Preprocessing
from cxr_fastai.inference.bundle import GATE, Bundle, is_bundle
from cxr_fastai.inference.config import LEARNER, ModelConfig, find_network, load_network, sha256, temper
from cxr_fastai.inference.engines import TorchEngine
from cxr_fastai.inference.gate import OUTSIDE, Gate
from cxr_fastai.inference.selftest import Engine

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = ('path', 'status', 'p_pneumonia', 'prediction', 'threshold', 'code', 'message')
SHORT = 200
"""Letters of a message."""


@dataclass(frozen=True)
class Predictor:
    """What computes, and what it was trained for. `Predictor.load(MODEL)` makes one.

    A `calibrated` one gives probabilities, and the threshold, at the temperature fitted on validation images. One with a
    `gate` gives none of a picture that is no chest image. With `tta` an image's probability is the mean of its own and
    that of its mirror image.
    """

    engine: Engine
    config: ModelConfig
    calibrated: bool = False
    gate: Gate | None = None
    tta: bool = False

    @classmethod
    def load(cls, model: Path, calibrated: bool = False, engine: str = 'auto', gate: bool = True) -> Predictor:
        """The predictor of a bundle (by the `engine` of `Bundle.engine`), of a run folder, with what `evaluate` decided
        there, or of an exported `.pkl` that is trusted. Raises `CXRError`."""
        load = _of_bundle if is_bundle(model) else _of_run if model.is_dir() else _of_pickle
        found = load(model, engine)
        if calibrated and found.config.temperature is None:
            raise UsageError(
                f'{model}: --calibrated needs the temperature that `cxr-fastai evaluate RUN` fits on '
                'validation images: evaluate the run, and name its folder.'
            )
        return replace(found, calibrated=calibrated, gate=found.gate if gate else None)

    def at(self, threshold: float) -> Predictor:
        """The same with another threshold, told as this one tells probabilities."""
        raw = float(temper(threshold, 1 / self.config.temperature)) if self.calibrated else threshold
        return replace(self, config=replace(self.config, threshold=raw, threshold_rule=f'fixed:{threshold:g}'))

    @property
    def model(self) -> Any:
        """The torch network. Raises `UsageError` for an engine that has none."""
        return self.engine.model

    @property
    def preprocessing(self) -> Preprocessing:
        """What every image goes through on its way to the network."""
        return Preprocessing.of(self.config)

    @property
    def threshold(self) -> float:
        """From what probability on an image is called pneumonia."""
        return self.show(self.config.threshold)

    def show(self, score: float) -> float:
        """A raw probability as this predictor tells it."""
        return float(temper(score, self.config.temperature)) if self.calibrated else score

    def scores(self, images: np.ndarray) -> np.ndarray:
        """The probability of pneumonia (n,) of grey uint8 images (n, size, size)."""
        return self.judge(images)[0]

    def predict(
        self, images: Sequence[Path], batch_size: int = 32, workers: int | None = None
    ) -> Iterator[dict[str, Any]]:
        """A row an image, in their order, with the keys `COLUMNS`; an image that cannot be used gets the status `error` or
        `rejected` and its code, and stops nothing. The message of others tells what reading it took, such as the window
        of a 16-bit image. `workers` threads read ahead (default: the cores). The progress is shown."""
        opened = in_threads(self._open, images, workers)
        while batch := list(islice(opened, batch_size)):
            yield from self._rows(batch)

    def take(
        self, name: str, read: Callable[[Preprocessing], DecodedImage]
    ) -> tuple[dict[str, Any], DecodedImage | None]:
        """The row that `predict` begins for the image `name`, which `read` decodes for the preprocessing that it is
        given; and the image, None where the row tells why there is none."""
        row = dict.fromkeys(COLUMNS) | {'path': name, 'threshold': self.threshold}
        try:
            image = read(self.preprocessing)
        except ImageError as error:
            why = str(error).removeprefix(f'{name}: '.replace('\n', ' '))[:SHORT]
            return row | {'status': error.status, 'code': error.code, 'message': why}, None
        return row | {'status': 'ok', 'message': '; '.join(image.notes)[:SHORT] or None}, image

    def judge(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Probabilities, and how far each image is from those of the gate over what it allows; 0 without a gate."""
        p, features = self.engine(images)
        if self.tta:
            p = (p + self.engine(np.ascontiguousarray(images[:, :, ::-1]))[0]) / 2
        if not ((p >= 0) & (p <= 1)).all():
            raise CXRError(
                f'{self.config.arch}: it gives {p.min():g} to {p.max():g} for a probability: the model is '
                'damaged, get it anew.'
            )
        return p, self.gate.measure(features, images) if self.gate else np.zeros(len(p))

    def tell(self, score: float, distance: float) -> dict[str, Any]:
        """What `judge` found of an image, in the words of a row."""
        if not distance <= 1:
            return OUTSIDE
        return {'p_pneumonia': self.show(float(score)), 'prediction': VOCAB[int(score >= self.config.threshold)]}

    def _open(self, path: Path) -> tuple[dict, np.ndarray | None]:
        row, image = self.take(str(path), lambda wanted: open_image(path, wanted))
        return row, None if image is None else self.preprocessing.fit(image.pixels)

    def _rows(self, batch: list[tuple[dict, np.ndarray | None]]) -> Iterator[dict]:
        readable = [image for _, image in batch if image is not None]
        found = zip(*self.judge(np.stack(readable)), strict=True) if readable else iter(())
        for row, image in batch:
            yield row if image is None else row | self.tell(*next(found))


def prediction_table(rows: Iterable[dict]) -> pd.DataFrame:
    """The rows of `Predictor.predict` as a table."""
    import pandas as pd

    return pd.DataFrame(rows, columns=COLUMNS)


def _of_bundle(path: Path, engine: str) -> Predictor:
    bundle = Bundle.open(path)
    found = Predictor(bundle.engine(engine), bundle.config)
    if GATE not in bundle:
        return found
    found = replace(found, gate=Gate.from_tensors(bundle.tensors(GATE), path / GATE))
    try:
        fits = found.judge(bundle.canary.images[:1])[1].shape == (1,)
    except (ValueError, TypeError, IndexError):
        fits = False
    if not fits:
        raise CXRError(f'{path / GATE}: not a gate of this network: the bundle is damaged, get it anew.')
    return found


def _of_run(path: Path, _: str) -> Predictor:
    run, file = Run(path), find_network(path)
    if file.name == LEARNER:
        found = _of_pickle(file)  # a run of before there were safetensors
    else:
        config = ModelConfig.from_dict(asdict(ModelConfig.of(run.recipe)), run / 'recipe.json')
        found = Predictor(TorchEngine(load_network(config.arch, file.read_bytes(), file)), config)
    return replace(found, config=_decided(run, file, found.config))


def _of_pickle(path: Path, _: str = 'auto') -> Predictor:
    if not path.is_file():
        find_network(path)  # which tells what a model is
    from cxr_fastai.inference.pickles import load_learner

    learn = load_learner(path)
    return Predictor(TorchEngine(learn.model), ModelConfig.from_dict(learn.config, path))


def _decided(run: Run, file: Path, config: ModelConfig) -> ModelConfig:
    """`config` with what was decided for the network in `file`; with a warning as it is, where that was for another."""
    from cxr_fastai.inference.decision import Decision

    known = Decision.of(run, sha256(file))
    if known:
        return replace(config, threshold=known.threshold, threshold_rule=known.rule, temperature=known.temperature)
    if run.decision:
        warnings.warn(
            f'{run / "decision.json"} was chosen for another network, so it is not used: evaluate the run again.',
            CXRWarning,
            stacklevel=4,
        )
    return config
