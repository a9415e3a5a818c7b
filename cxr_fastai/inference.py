"""A model file becomes a `Predictor`: films go in, a table of probabilities comes out."""
from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from rich.console import Console
from torch import nn

from cxr_fastai.artefacts import ModelConfig, find_learner, load_learner, sha256
from cxr_fastai.calibration import temper
from cxr_fastai.core import POSITIVE, VOCAB, CXRWarning, FilmError, UsageError, progress
from cxr_fastai.decision import Decision
from cxr_fastai.images import Preprocessing, open_film
from cxr_fastai.items import find_films
from cxr_fastai.listing import read_listing
from cxr_fastai.models import to_input
from cxr_fastai.run import Run

COLUMNS = ['path', 'status', 'p_pneumonia', 'prediction', 'threshold', 'code', 'message']


@dataclass(frozen=True)
class Predictor:
    """A network in evaluation mode and what it was trained for. `Predictor.load(MODEL)` makes one.

    A `calibrated` one gives probabilities, and the threshold, at the temperature fitted on validation films.
    """
    model: nn.Module
    config: ModelConfig
    calibrated: bool = False

    @classmethod
    def load(cls, model: Path, calibrated: bool = False) -> Predictor:
        """The predictor of an exported `.pkl`, or of a run folder, with what `evaluate` decided there. Raises
        `CXRError`."""
        file = find_learner(model)
        learn = load_learner(file)
        config = ModelConfig(**learn.config)
        if model.is_dir(): config = _decided(Run(model), file, config)
        if calibrated and config.temperature is None:
            raise UsageError(f'{model}: --calibrated needs the temperature that `cxr-fastai evaluate RUN` fits on '
                             'validation films: evaluate the run, and name its folder.')
        network = learn.model.eval().to(memory_format=torch.channels_last)  # half as fast again on a CPU
        return cls(network, config, calibrated)

    @property
    def threshold(self) -> float:
        """From what probability on a film is called pneumonia."""
        return self.show(self.config.threshold)

    def show(self, score: float) -> float:
        """A raw probability as this predictor tells it."""
        return float(temper(score, self.config.temperature)) if self.calibrated else score

    @torch.inference_mode()
    def scores(self, films: np.ndarray) -> np.ndarray:
        """The probability of pneumonia (n,) of grey uint8 films (n, size, size)."""
        logits = self.model(to_input(films)).double()  # 32 bits would round 1 - 1e-8 to 1
        return logits.softmax(dim=1)[:, POSITIVE].numpy()

    def predict(self, films: Sequence[Path], batch_size: int = 32, console: Console | None = None) -> Iterator[dict]:
        """A row a film, in their order, with the keys `COLUMNS`; a film that cannot be used gets the status `error` or
        `rejected` and its code, and stops nothing. The message of others tells what reading it took, such as the window
        of a 16-bit film. A `console` that is a terminal gets a progress bar."""
        batches = (films[start:start + batch_size] for start in range(0, len(films), batch_size))
        return progress(chain.from_iterable(map(self._rows, batches)), console, len(films))

    def _rows(self, films: Sequence[Path]) -> Iterator[dict]:
        rows, pixels = zip(*map(self._open, films), strict=True)
        readable = [film for film in pixels if film is not None]
        scores = iter(self.scores(np.stack(readable)).tolist() if readable else [])
        for row, film in zip(rows, pixels, strict=True): yield row if film is None else row | self._judge(next(scores))

    def _open(self, path: Path) -> tuple[dict, np.ndarray | None]:
        row, wanted = dict.fromkeys(COLUMNS), Preprocessing.of(self.config)
        row |= {'path': str(path), 'threshold': self.threshold}
        try: film = open_film(path, wanted)
        except FilmError as error:
            why = str(error).removeprefix(f'{path}: ')[:200]
            return row | {'status': error.status, 'code': error.code, 'message': why}, None
        return row | {'status': 'ok', 'message': '; '.join(film.notes)[:200] or None}, wanted.fit(film.pixels)

    def _judge(self, score: float) -> dict:
        return {'p_pneumonia': self.show(score), 'prediction': VOCAB[int(score >= self.config.threshold)]}


def list_films(sources: Iterable[Path]) -> list[Path]:
    """The films that `sources` mean: files as they are, folders with all films below them, sorted, and what a CSV has
    in its column path. Raises `UsageError` where a folder or a CSV has none."""
    films = []
    for source in sources:
        if source.is_dir(): found = find_films(source)[0]
        elif source.suffix.lower() != '.csv': found = [source]
        else: found = [source.parent/path for path in read_listing(source, ('path',)).path]
        if not found: raise UsageError(f'{source}: no films there (links are not followed).')
        films += found
    return films


def prediction_table(rows: Iterable[dict]) -> pd.DataFrame:
    """The rows of `Predictor.predict` as a table."""
    return pd.DataFrame(rows, columns=COLUMNS)


def _decided(run: Run, file: Path, config: ModelConfig) -> ModelConfig:
    """`config` with what was decided for the learner in `file`; with a warning as it is, where that was for another."""
    known = Decision.of(run, sha256(file))
    if known: return replace(config, threshold=known.threshold, threshold_rule=known.rule,
                             temperature=known.temperature)
    if run.decision: warnings.warn(f'{run/"decision.json"} was chosen for another learner.pkl, so it is not used: '
                                   'evaluate the run again.', CXRWarning, stacklevel=3)
    return config
