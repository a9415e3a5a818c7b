"""Decoding of images of strangers in processes that can be ended: a deadline and a memory limit for each image.

A decoder written in C cannot be interrupted in a thread. Here an image that takes too long, or needs too much memory,
costs its own process, which is replaced; all other images are decoded as if it did not exist.
"""

from __future__ import annotations

import atexit
import math
import os
import time
from concurrent.futures import CancelledError, Future
from dataclasses import asdict, replace
from functools import cache
from itertools import count

import numpy as np
from PIL import Image

from cxr_fastai.core.hardware import available_cores
from cxr_fastai.images.decode import decode_image
from cxr_fastai.images.decoder_lane import Lane, Task
from cxr_fastai.images.decoder_start import DECODE_MEMORY
from cxr_fastai.images.limits import DecodedImage
from cxr_fastai.images.preprocessing import Preprocessing

DECODE_SECONDS = 10.0
"""Default deadline of one image, from the moment when a process begins to decode it."""
QUICK_SECONDS = 0.25
"""CPU time in which an image of usual size is decoded, with a wide margin."""
SPACING_SECONDS = 0.05
"""Image number n of a request is treated as if it had arrived n times this later than the first."""
SLOW_PRIORITY = 10
"""Priority (`nice`) of processes for slow images."""
MAX_SLOW_IMAGES = 16
"""Number of slow images that may wait, half as many as the requests that the service answers at a time."""
FINGERPRINT_BYTES = 512
"""Length of the beginning and of the end of a file by which it is recognised."""


class DecoderPool:
    """Decodes images in at most `workers` processes (default: the number of cores), which are started when needed.

    An image that takes longer than `seconds` has the error E_TIMEOUT, and one that needs more than `memory` bytes
    E_TOO_LARGE. Images come in the order of their arrival, but those of one request are spread by `SPACING_SECONDS`, so
    that a large request does not keep the others waiting.

    With `quick_seconds`, an image that takes more CPU time, or `BUSY_FACTOR` times longer, while others wait is begun
    again in one more process of lower priority, where such images follow one after the other. Slow images of some
    clients then cannot delay the others. The same file goes there at once if it comes again. If `MAX_SLOW_IMAGES` wait
    there, it has the error E_TIMEOUT.
    """

    def __init__(
        self,
        workers: int | None = None,
        seconds: float = DECODE_SECONDS,
        memory: int = DECODE_MEMORY,
        quick_seconds: float = math.inf,
    ) -> None:
        self.seconds = seconds
        self.numbers = count()
        atexit.register(self.close)
        slow = None
        if quick_seconds < math.inf:
            slow = Lane(1, seconds, memory, SLOW_PRIORITY, max_waiting=MAX_SLOW_IMAGES)
        self.lane = Lane(workers or available_cores(), seconds, memory, slow=slow, quick_seconds=quick_seconds)

    def start(self, images: int) -> None:
        """Start the processes for so many images now, so that the first images do not wait for them."""
        self.lane.start(images)

    def submit(
        self,
        data: bytes,
        preprocessing: Preprocessing | None = None,
        suffix: str = '',
        modality: str = '',
        side: int | None = None,
        position: int = 0,
    ) -> Future[DecodedImage]:
        """Decode the contents of a file as `decode_image` does; the result of the future raises `ImageError`.

        The image has a `square` if there is a `preprocessing`. Its pixels are reduced to a longer side of `side`; 0
        leaves them out. `position` is that of the image in its request. A future that is cancelled frees its process
        after at most `CANCELLED_SECONDS`.
        """
        request = {
            'preprocessing': preprocessing and asdict(preprocessing),
            'suffix': suffix,
            'modality': modality,
            'side': side,
            'seconds': self.seconds,
        }
        turn = time.monotonic() + position * SPACING_SECONDS
        fingerprint = (len(data), data[:FINGERPRINT_BYTES], data[-FINGERPRINT_BYTES:])
        task = Task(turn, next(self.numbers), data, request, fingerprint)
        task.result.add_done_callback(lambda _: task.drop_data())
        self.lane.put(task)
        return task.result

    def decode(
        self,
        image: bytes | Image.Image | np.ndarray,
        preprocessing: Preprocessing | None = None,
        suffix: str = '',
        modality: str = '',
        side: int | None = None,
    ) -> DecodedImage:
        """Decode an image in memory as the function `decode_image` does, and wait for it. Raises `ImageError`.

        Only the contents of files need a process: an image of Pillow or an array is converted here. `side` is that of
        `submit`, for files only.
        """
        return DecodeGroup(self).decode(image, preprocessing, suffix, modality, side)

    def close(self) -> None:
        """End all processes. Images that are not decoded yet are cancelled."""
        atexit.unregister(self.close)
        self.lane.close()

    def __enter__(self) -> DecoderPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class DecodeGroup:
    """Images that several threads decode in one pool. At the end of its context those that still wait are cancelled.

    A command that is interrupted therefore does not wait for its slow images.
    """

    def __init__(self, pool: DecoderPool) -> None:
        self.pool = pool
        self.is_open = True
        self.results: set[Future[DecodedImage]] = set()

    def decode(
        self,
        image: bytes | Image.Image | np.ndarray,
        preprocessing: Preprocessing | None = None,
        suffix: str = '',
        modality: str = '',
        side: int | None = None,
    ) -> DecodedImage:
        """Decode an image as `DecoderPool.decode` does. Raises `CancelledError` after the end of the context."""
        if not isinstance(image, bytes):
            decoded = decode_image(image, preprocessing, suffix, modality)
            return replace(decoded, square=preprocessing.fit(decoded.pixels)) if preprocessing else decoded
        if not self.is_open:
            raise CancelledError
        result = self.pool.submit(image, preprocessing, suffix, modality, side)
        self.results.add(result)
        try:
            return result.result()
        finally:
            self.results.discard(result)

    def __enter__(self) -> DecodeGroup:
        return self

    def __exit__(self, *_: object) -> None:
        self.is_open = False
        for result in tuple(self.results):
            result.cancel()


@cache
def default_pool() -> DecoderPool:
    """Return the pool that all predictions of this process share. Its processes end when they have nothing to do."""
    pool = DecoderPool()
    if hasattr(os, 'register_at_fork'):
        os.register_at_fork(after_in_child=default_pool.cache_clear)  # a forked process has none of the threads
    return pool
