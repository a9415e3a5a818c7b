"""What stands behind the server's door: uploaded bytes become prediction rows, and pictures of why. Knows no HTTP."""

from __future__ import annotations

import asyncio
import base64
import logging
import os
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from cxr_fastai.core.errors import CXRError, UsageError
from cxr_fastai.images.decode import decode_image
from cxr_fastai.images.limits import DecodedImage
from cxr_fastai.inference.bundle import MANIFEST, ONNX, Bundle
from cxr_fastai.inference.predictor import Predictor

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Limits:
    """What one request may bring: `body` bytes in all and `images` files."""

    body: int = 20 * 2**20
    images: int = 64


@dataclass(frozen=True)
class Settings:
    """How the service of `bundle` is offered. `token` None asks for none, `per_client` 0 counts nobody; `seconds` are
    for the answer to a request, `sending` for the request itself, `drain` for those under way when the service ends,
    `wait` for other images to be computed with."""

    bundle: Path
    host: str = '127.0.0.1'
    port: int = 8000
    limits: Limits = field(default_factory=Limits)
    queue: int = 32
    per_client: int = 0
    seconds: float = 30
    sending: float = 10
    drain: float = 8
    batch: int = 16
    wait: float = 0.004
    token: str | None = field(default=None, repr=False)
    hosts: tuple[str, ...] = ()


Judge = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
"""Images, grey uint8 (n, s, s), become probabilities (n,) and distances (n,): `Predictor.judge`."""


class Batcher:
    """Gives images to `judge` in batches of at most `most`, in a thread of `pool`, one batch at a time.

    The first image waits `wait` seconds for others, while nothing is computed; images that arrive during a batch make the
    next. An image whose request is gone is left out; where a batch fails, each of its images is tried alone.
    """

    def __init__(
        self,
        judge: Judge,
        pool: Executor,
        most: int = 16,
        wait: float = 0.004,
        watch: Callable[[int], None] = lambda size: None,
    ):
        self.judge, self.pool, self.most, self.wait, self.watch = judge, pool, most, wait, watch
        self.waiting: asyncio.Queue[tuple[np.ndarray, asyncio.Future]] = asyncio.Queue()

    async def submit(self, image: np.ndarray) -> tuple[float, float]:
        """The probability and the distance of the image, grey uint8 (s, s). Raises what `judge`
        raises."""
        found = asyncio.get_running_loop().create_future()
        self.waiting.put_nowait((image, found))
        return await found

    async def run(self) -> None:
        """Compute what is submitted, until cancelled."""
        while True:
            batch = [(image, found) for image, found in await self._gather() if not found.done()]
            if batch:
                await self._compute(*zip(*batch, strict=True))

    async def _gather(self) -> list[tuple[np.ndarray, asyncio.Future]]:
        batch = [await self.waiting.get()]
        with suppress(TimeoutError):
            async with asyncio.timeout(self.wait):
                while len(batch) < self.most:
                    batch.append(await self.waiting.get())
        return batch

    async def _compute(self, images: tuple[np.ndarray, ...], found: tuple[asyncio.Future, ...]) -> None:
        self.watch(len(images))
        try:
            loop = asyncio.get_running_loop()
            p, distances = await loop.run_in_executor(self.pool, self.judge, np.stack(images))
        except Exception as error:  # an image's, not the end of all others
            if len(images) == 1:
                return None if found[0].done() else found[0].set_exception(error)
            for image, one in zip(images, found, strict=True):
                if not one.done():
                    await self._compute((image,), (one,))
            return
        for one, score, distance in zip(found, p, distances, strict=True):
            if not one.done():
                one.set_result((float(score), float(distance)))


log = logging.getLogger('cxr_fastai.serving.server')
SIDE = 640
"""Pixels of the longer side of an image that is shown."""
BURNED_IN = 'its file says that text in the picture may name the patient, so it is not shown'
NO_MAPS = 'maps need PyTorch, which is not installed here'
FAILED = {'status': 'error', 'code': 'E_INTERNAL', 'message': 'it failed here: tell the operator'}
"""What a row says of an image that broke the network."""
NO_EVIDENCE = 'nothing in it speaks for pneumonia'


class Busy(CXRError):
    """More is asked for than can wait."""


class Service:
    """A bundle that answers many at once. `open` makes one; between `running`'s ends it predicts.

    Images are decoded in as many threads as there are cores, computed together by `Batcher` in one more, and explained
    in another. At most `queue` requests wait at a time.
    """

    def __init__(
        self,
        bundle: Bundle,
        predictor: Predictor,
        queue: int = 32,
        batch: int = 16,
        wait: float = 0.004,
        watch: Callable[[int], None] = lambda size: None,
    ):
        self.bundle, self.predictor, self.queue, self.waiting = bundle, predictor, queue, 0
        self.decoding, self.computing, self.explaining = (ThreadPoolExecutor(threads) for threads in (_cores(), 1, 1))
        self.batcher = Batcher(predictor.judge, self.computing, batch, wait, watch)

    @classmethod
    def open(cls, path: Path, **how: Any) -> Service:
        """The service of the bundle `path`, or of a `model.onnx` inside one, computed by ONNX Runtime. Raises
        `CXRError` for what is none, `ParityError` unless all canary images are predicted as when it was exported."""
        bundle = Bundle.open(find_bundle(path))
        predictor = Predictor.load(bundle.path, engine='onnx')
        bundle.canary.check(predictor.engine, bundle.path, threshold=bundle.config.threshold)
        return cls(bundle, predictor, **how)

    def facts(self) -> dict[str, Any]:
        """What predicts, and how its probability becomes a decision."""
        config = self.predictor.config
        return {
            'arch': config.arch,
            'size': config.size,
            'threshold': self.predictor.threshold,
            'threshold_rule': config.threshold_rule,
            'sha256': self.bundle.identity,
            'gate': self.predictor.gate is not None,
        }

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Service]:
        """Answers while the context lasts."""
        task = asyncio.create_task(self.batcher.run())
        try:
            yield self
        finally:
            task.cancel()
            for pool in (self.decoding, self.computing, self.explaining):
                pool.shutdown(wait=False, cancel_futures=True)

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """A place among the requests that wait. Raises `Busy` where there is none."""
        if self.waiting >= self.queue:
            raise Busy(f'{self.waiting} requests wait already: try again in a moment.')
        self.waiting += 1
        try:
            yield
        finally:
            self.waiting -= 1

    async def predict(self, images: list[bytes], explain: bool = False) -> list[dict[str, Any]]:
        """A row an image, in their order, with the keys of `inference.COLUMNS`: `image-1` and so on in the place of a
        path. With `explain`, each has a key `explanation` too: None, or what `picture` tells."""
        return list(await asyncio.gather(*(self._row(f'image-{i}', data, explain) for i, data in enumerate(images, 1))))

    def answer(self, data: bytes) -> dict[str, Any]:
        """The row of one image, explained, at once: for a program that has no others waiting."""
        row, image, square = self._take('image', data, True)
        if image is None:
            return row | {'explanation': None}
        (p,), (distance,) = self.predictor.judge(square[None])
        row |= self.predictor.tell(p, distance)
        return row | {'explanation': self.picture(image, square, row['status'] == 'ok')}

    async def _row(self, name: str, data: bytes, explain: bool) -> dict[str, Any]:
        row, image, square = await self._run(self.decoding, self._take, name, data, explain)
        if explain:
            row['explanation'] = None
        if image is None:
            return row
        try:
            row |= self.predictor.tell(*await self.batcher.submit(square))
        except Exception as error:  # this image's, not the end of those beside it
            log.error('an image failed: %s', type(error).__name__)
            return row | FAILED
        if explain:
            row['explanation'] = await self._run(self.explaining, self.picture, image, square, row['status'] == 'ok')
        return row

    def _take(
        self, name: str, data: bytes, show: bool
    ) -> tuple[dict[str, Any], DecodedImage | None, np.ndarray | None]:
        """The row that is begun, the image, and what the network sees of it. Its pixels, which may be 40 million, do not
        wait with it: they are made as small as it is shown, or dropped."""
        row, image = self.predictor.take(name, lambda wanted: decode_image(data, wanted))
        if image is None:
            return row, None, None
        square = self.predictor.preprocessing.fit(image.pixels)
        return row, replace(image, pixels=_small(image.pixels) if show else square), square

    def picture(self, image: DecodedImage, square: np.ndarray, judged: bool) -> dict[str, Any]:
        """What the file was, and the image as PNG in base64, alone (`image`) and under its map (`overlay`); each is None
        where the `note` says why."""
        facts = {
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
        facts['image'] = _png(Image.fromarray(image.pixels))
        if not judged:
            return facts
        try:
            overlay = self.overlay(image.pixels, square)
        except UsageError as error:
            return facts | {'note': str(error)}
        return facts | ({'note': NO_EVIDENCE} if overlay is None else {'overlay': _png(Image.fromarray(overlay))})

    def overlay(self, shown: np.ndarray, square: np.ndarray) -> np.ndarray | None:
        """The image, grey uint8 (h, w), under the map of what the network saw in `square`: uint8 (h, w, 3), or None for
        an empty map. Raises `UsageError` where PyTorch is missing."""
        network = self.network
        from cxr_fastai.interpretation.cam import activation_maps, enlarge, scale
        from cxr_fastai.interpretation.overlays import blend_map
        from cxr_fastai.models.inputs import to_input

        heat = scale(enlarge(activation_maps(network, to_input(square[None])), square.shape[-1])).numpy()[0]
        if not heat.any():
            return None
        return blend_map(shown, np.clip(self.predictor.preprocessing.spread(heat, *shown.shape), 0, 1))

    @cached_property
    def network(self) -> nn.Module:
        """The torch network, loaded when the first map is asked for. Raises `UsageError` where PyTorch is missing."""
        try:
            import torch
        except ImportError:
            raise UsageError(NO_MAPS) from None
        torch.set_num_threads(1)  # more of them wait for each other, at ten times the cost where the cores are busy
        return self.bundle.engine('torch').model

    async def _run(self, pool: ThreadPoolExecutor, work: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(pool, partial(work, *args))


def _small(image: np.ndarray) -> np.ndarray:
    """`image`, grey uint8 (h, w), with its longer side at most `SIDE`."""
    shown = Image.fromarray(image)
    shown.thumbnail((SIDE, SIDE))
    return np.asarray(shown)


def _cores() -> int:
    """The cores that this process may use, which in a container are fewer than the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def find_bundle(path: Path) -> Path:
    """The bundle that `path` means. Raises `UsageError` for a pickle or any other file."""
    if path.name == ONNX and (path.parent / MANIFEST).is_file():
        return path.parent
    if path.suffix in ('.pkl', '.onnx', '.safetensors'):
        raise UsageError(
            f'{path}: a service opens bundles alone, since they say how to use the network and cannot run '
            'code: `cxr-fastai export RUN` makes one.'
        )
    return path


def _png(image: Image.Image) -> str:
    buffer = BytesIO()
    image.save(buffer, 'PNG', compress_level=3)
    return base64.b64encode(buffer.getvalue()).decode()
