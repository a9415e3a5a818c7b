"""A bundle as an asynchronous service: uploaded bytes become prediction rows and explanations, in micro-batches.

This module knows nothing of HTTP, and loads torch only for the first explanation.
"""

from __future__ import annotations

import asyncio
import base64
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from cxr_fastai.core.errors import CXRError, ImageError, UsageError
from cxr_fastai.core.files import StrPath
from cxr_fastai.images.decoder_pool import DECODE_SECONDS, QUICK_SECONDS, DecoderPool
from cxr_fastai.images.decoder_start import DECODE_MEMORY
from cxr_fastai.images.limits import DecodedImage
from cxr_fastai.inference.bundle import MANIFEST, Bundle
from cxr_fastai.inference.onnx_start import ONNX
from cxr_fastai.inference.predictor import Predictor
from cxr_fastai.inference.pretrained import find_model

if TYPE_CHECKING:
    from torch import nn

    from cxr_fastai.publishing.dicom_reports import Algorithm
    from cxr_fastai.serving.reports import Reports

log = logging.getLogger('cxr_fastai.serving')

DISPLAY_SIDE = 640
"""Longer side of the images in explanations, in pixels."""
BURNED_IN = 'the file says that its picture contains text, which may name the patient, so it is not shown'
NEEDS_TORCH = 'maps need PyTorch, which is not installed here'
NO_WEIGHTS = 'maps need the weights for PyTorch, which this bundle does not contain'
EMPTY_MAP = 'no part of the image raises the score for pneumonia'
INTERNAL_ERROR = {'status': 'error', 'code': 'E_INTERNAL', 'message': 'internal error; contact the operator'}
"""Row of an image for which the network failed."""

Infer = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
"""`Predictor.infer`: grey uint8 images (n, size, size) -> probabilities (n,) and distances of the input gate (n,)."""


class Busy(CXRError):
    """The maximum number of requests is being answered."""


@dataclass
class _Job:
    """One image that waits for its batch. The result is its probability and its distance."""

    image: np.ndarray
    result: asyncio.Future[tuple[float, float]]


class Batcher:
    """Collects single images into batches of at most `max_batch` and runs `infer` on one batch at a time.

    A batch starts as soon as no other image is expected (see `expecting`) or it is full, and at the latest `max_delay`
    seconds after its first image. Images that arrive during a computation form the next batch. Images of cancelled
    requests are dropped. If a batch fails, each of its images is tried alone. `observe` is called with the size of
    every batch.
    """

    def __init__(
        self,
        infer: Infer,
        executor: Executor,
        max_batch: int = 16,
        max_delay: float = 0.004,
        observe: Callable[[int], None] | None = None,
    ) -> None:
        self.infer = infer
        self.executor = executor
        self.max_batch = max_batch
        self.max_delay = max_delay
        self.observe = observe
        self.jobs: asyncio.Queue[_Job] = asyncio.Queue()
        self.expected = 0

    @contextmanager
    def expecting(self) -> Iterator[None]:
        """Announce an image that is being decoded within this context, so that a batch waits for it."""
        self.expected += 1
        try:
            yield
        finally:
            self.expected -= 1

    async def submit(self, image: np.ndarray) -> tuple[float, float]:
        """Return the probability and the distance of one image, grey uint8 (size, size). Raises what `infer` raises."""
        job = _Job(image, asyncio.get_running_loop().create_future())
        self.jobs.put_nowait(job)
        return await job.result

    async def run(self) -> None:
        """Compute batches until this task is cancelled."""
        while True:
            jobs = [job for job in await self._collect() if not job.result.done()]
            if jobs:
                await self._compute(jobs)

    async def _collect(self) -> list[_Job]:
        jobs = [await self.jobs.get()]
        with suppress(TimeoutError):
            async with asyncio.timeout(self.max_delay):
                while len(jobs) < self.max_batch and (self.expected or not self.jobs.empty()):
                    jobs.append(await self.jobs.get())
        return jobs

    async def _compute(self, jobs: list[_Job]) -> None:
        if self.observe:
            self.observe(len(jobs))
        images = np.stack([job.image for job in jobs])
        try:
            scores, distances = await asyncio.get_running_loop().run_in_executor(self.executor, self.infer, images)
        except Exception as error:
            await self._handle_failure(jobs, error)
            return
        for job, score, distance in zip(jobs, scores, distances, strict=True):
            if not job.result.done():
                job.result.set_result((float(score), float(distance)))

    async def _handle_failure(self, jobs: list[_Job], error: Exception) -> None:
        """Compute each image of a failed batch alone, so that one image cannot fail the others."""
        if len(jobs) > 1:
            for job in jobs:
                if not job.result.done():
                    await self._compute([job])
        elif not jobs[0].result.done():
            jobs[0].result.set_exception(error)


class Service:
    """A bundle that answers many requests at a time. `Service.open` opens one; `running` starts its batches.

    Images are decoded in processes (see `DecoderPool`), computed in one thread, and explained in another.
    At most `max_requests` requests are answered at a time.
    """

    def __init__(
        self,
        bundle: Bundle,
        predictor: Predictor,
        max_requests: int = 32,
        max_batch: int = 16,
        max_delay: float = 0.004,
        observe: Callable[[int], None] | None = None,
        decode_seconds: float = DECODE_SECONDS,
        decode_memory: int = DECODE_MEMORY,
    ) -> None:
        self.bundle = bundle
        self.predictor = predictor
        self.max_requests = max_requests
        self.active_requests = 0
        self.decoding = DecoderPool(None, decode_seconds, decode_memory, QUICK_SECONDS)
        self.computing = ThreadPoolExecutor(1)
        self.explaining = ThreadPoolExecutor(1)
        self.batcher = Batcher(predictor.infer, self.computing, max_batch, max_delay, observe)

    @classmethod
    def open(cls, path: StrPath, device: str = 'cpu', modality: str = '', **options: Any) -> Service:
        """Open the bundle `path` and verify it on all of its reference images.

        ONNX Runtime computes on the device `cpu`, torch on others. `path` may also be the `model.onnx` in a bundle, or
        the text `pretrained` or `hf:USER/NAME` (see `find_model`). `modality` has the codes of other DICOM modalities
        to accept (see `Predictor.load`); `options` are those of the constructor. Raises `UsageError` if `path` is not a
        bundle or the device is missing, `ParityError` if the bundle fails its self-test, and `CXRError` if it is
        damaged.
        """
        bundle = Bundle.open(find_bundle(path))
        engine = 'onnx' if device == 'cpu' else 'torch'
        predictor = Predictor.load(bundle.path, engine=engine, device=device, modality=modality)
        bundle.selftest.check(predictor.engine, bundle.shown)
        return cls(bundle, predictor, **options)

    def model_facts(self) -> dict[str, Any]:
        """Return the architecture, image size, threshold and identity of the model."""
        config = self.predictor.config
        return {
            'arch': config.arch,
            'size': config.size,
            'threshold': self.predictor.threshold,
            'threshold_rule': config.threshold_rule,
            'tta': self.predictor.tta,
            'sha256': self.bundle.identity,
            'gate': self.predictor.gate is not None,
        }

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Service]:
        """Answer requests within this context."""
        batches = asyncio.create_task(self.batcher.run())
        self.decoding.start(self.max_requests)
        try:
            yield self
        finally:
            batches.cancel()
            self.decoding.close()
            for executor in (self.computing, self.explaining):
                executor.shutdown(wait=False, cancel_futures=True)

    @contextmanager
    def admit_request(self) -> Iterator[None]:
        """Count a request within this context. Raises `Busy` if the maximum number is being answered already."""
        if self.active_requests >= self.max_requests:
            raise Busy(f'{self.active_requests} requests are being answered already: try again in a moment.')
        self.active_requests += 1
        try:
            yield
        finally:
            self.active_requests -= 1

    async def predict(self, images: list[bytes], explain: bool = False) -> list[dict[str, Any]]:
        """Return one row per image, in their order, with the keys `inference.COLUMNS`.

        The path of a row is `image-1`, `image-2`, ... With `explain` each row also has the key `explanation`: the
        result of the method `explanation`, or None if the image cannot be read.
        """
        rows = [self._predict_image(number, image, explain) for number, image in enumerate(images, start=1)]
        return list(await asyncio.gather(*rows))

    async def report(self, images: list[bytes], rows: list[dict[str, Any]]) -> list[Reports]:
        """Return the DICOM files of `rows`, the result of `predict` for `images`, in their order.

        They are made one after the other, in the thread for explanations. The extra `dicom` must be installed.
        """
        from cxr_fastai.serving.reports import make_reports

        return [
            await _run(self.explaining, make_reports, image, row, self.algorithm)
            for image, row in zip(images, rows, strict=True)
        ]

    @cached_property
    def algorithm(self) -> Algorithm:
        """The description of the model in DICOM reports."""
        from cxr_fastai.publishing.dicom_reports import Algorithm

        return Algorithm.of(self.predictor, self.bundle.identity)

    async def _predict_image(self, number: int, data: bytes, explain: bool) -> dict[str, Any]:
        try:
            with self.batcher.expecting():
                image: DecodedImage | ImageError = await asyncio.wrap_future(self._decode(data, explain, number))
        except ImageError as error:
            image = error
        row = self.predictor.start_row(f'image-{number}', image)
        if explain:
            row['explanation'] = None
        if isinstance(image, ImageError):
            return row
        try:
            score, distance = await self.batcher.submit(image.square)
            row |= self.predictor.decide(score, distance)
        except Exception as error:  # the other images of the request are still answered
            log.error('inference failed for one image: %s', type(error).__name__)
            return row | INTERNAL_ERROR
        if explain:
            row['explanation'] = await _run(self.explaining, self.explanation, image, row['status'] == 'ok')
        return row

    def explain(self, data: bytes) -> dict[str, Any]:
        """Return the row of one image with its explanation, computed in this thread, without a running service."""
        try:
            image = self._decode(data, True).result()
        except ImageError as error:
            return self.predictor.start_row('image', error) | {'explanation': None}
        row = self.predictor.start_row('image', image)
        scores, distances = self.predictor.infer(image.square[None])
        row |= self.predictor.decide(scores[0], distances[0])
        return row | {'explanation': self.explanation(image, row['status'] == 'ok')}

    def _decode(self, data: bytes, explain: bool, position: int = 0) -> Future[DecodedImage]:
        """Decode an image in a process to the network's view, and to the pixels that an explanation shows."""
        side = DISPLAY_SIDE if explain else 0
        return self.decoding.submit(data, self.predictor.preprocessing, side=side, position=position)

    def explanation(self, image: DecodedImage, has_score: bool) -> dict[str, Any]:
        """Return facts about the file of `image`, and the image as PNG in base64 without and with its Grad-CAM map.

        `image` or `overlay` is None where `note` says why.
        """
        facts: dict[str, Any] = {
            'format': image.format,
            'mode': image.mode,
            'width': image.width,
            'height': image.height,
            'image': None,
            'overlay': None,
            'note': None,
        }
        if image.burned_in:
            return facts | {'note': BURNED_IN}
        facts['image'] = _encode_png(image.pixels)
        if not has_score:
            return facts
        try:
            overlay = self.overlay(image.pixels, image.square)
        except UsageError as error:
            return facts | {'note': str(error)}
        if overlay is None:
            return facts | {'note': EMPTY_MAP}
        return facts | {'overlay': _encode_png(overlay)}

    def overlay(self, image: np.ndarray, square: np.ndarray) -> np.ndarray | None:
        """Return `image`, grey uint8 (h, w), under the Grad-CAM map of `square`: uint8 (h, w, 3).

        None if the map is empty. Raises `UsageError` if PyTorch is not installed.
        """
        network = self.network
        from cxr_fastai.interpretation.cam import activation_maps, enlarge, scale
        from cxr_fastai.interpretation.overlays import blend_map
        from cxr_fastai.models.inputs import to_input

        maps = activation_maps(network, to_input(square[None]))
        heat = scale(enlarge(maps, square.shape[-1])).numpy()[0]
        if not heat.any():
            return None
        heat = self.predictor.preprocessing.map_to_image(heat, *image.shape)
        return blend_map(image, np.clip(heat, 0, 1))

    @cached_property
    def network(self) -> nn.Sequential:
        """The torch network, loaded for the first map. Raises `UsageError` without PyTorch, or without its weights."""
        if not self.bundle.has_weights:
            raise UsageError(NO_WEIGHTS)
        try:
            import torch
        except ImportError:
            raise UsageError(NEEDS_TORCH) from None
        torch.set_num_threads(1)  # with more, the threads wait for each other, at ten times the cost on busy cores
        engine: Any = self.bundle.engine('torch', 'cpu')
        return engine.model


def find_bundle(path: StrPath) -> Path:
    """Return the bundle `path`, that of the `model.onnx` at `path`, or that of a name such as `pretrained`.

    Raises `UsageError` for other files.
    """
    path = find_model(path)
    if path.name == ONNX and (path.parent / MANIFEST).is_file():
        return path.parent
    if path.suffix in ('.pkl', '.onnx', '.safetensors'):
        raise UsageError(
            f'{path}: only bundles can be served, because they contain all settings and cannot run code. '
            'Make one with `cxr-fastai export RUN`.'
        )
    return path


async def _run(executor: Executor, function: Callable[..., Any], *args: Any) -> Any:
    return await asyncio.get_running_loop().run_in_executor(executor, function, *args)


def _encode_png(pixels: np.ndarray) -> str:
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, 'PNG', compress_level=3)
    return base64.b64encode(buffer.getvalue()).decode()
