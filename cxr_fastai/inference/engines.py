"""The two engines that run a network: torch, and ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cxr_fastai.core.errors import CXRError
from cxr_fastai.core.hardware import limit_torch_threads
from cxr_fastai.core.recipe import POSITIVE
from cxr_fastai.core.workers import Worker, WorkerCrash, WorkerError, WorkerTimeout
from cxr_fastai.inference.onnx_format import check_onnx
from cxr_fastai.inference.onnx_process import BATCH

if TYPE_CHECKING:
    from torch import nn

Engine = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
"""Maps grey uint8 images (n, s, s) to probabilities of pneumonia (n,) and the mean features of the body (n, c)."""

SECONDS = 30.0
"""Time in which ONNX Runtime must load a model, and time of a prediction in addition to that for its pixels."""
PIXELS_PER_SECOND = 50_000
"""Pixels of a batch for which a prediction gets a second: about one image of 224 px."""
BASE_MEMORY = 2**30
MEMORY_PER_MODEL_BYTE = 8
MEMORY_PER_PIXEL = 4096
"""Bytes of memory that ONNX Runtime may use: a base, and for each byte of the model and each pixel of a batch."""
MAX_ANSWER = 2**28
"""Largest answer of the process, in bytes."""


class TorchEngine:
    """Runs a network `Sequential(body, head)` on the CPU, in evaluation mode."""

    def __init__(self, model: nn.Module) -> None:
        import torch

        limit_torch_threads()
        # This memory layout makes prediction on a CPU about 1.5 times as fast.
        self.model = model.eval().to(memory_format=torch.channels_last)

    def __call__(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the probabilities of pneumonia (n,) and the mean features (n, c) of grey uint8 images (n, s, s)."""
        import torch

        from cxr_fastai.models.inputs import pool, to_input

        body, head = self.model.children()
        with torch.inference_mode():
            maps = body(to_input(images))
            # In single precision the softmax would round 1 - 1e-8 to 1.
            p = head(maps).double().softmax(dim=1)[:, POSITIVE]
            return p.numpy(), pool(maps).numpy()


class OnnxEngine:
    """Runs an ONNX file that `export` wrote with ONNX Runtime; it loads neither torch nor fastai.

    The file is checked by `check_onnx`. ONNX Runtime then works in a process of its own, which is ended if loading, or
    a prediction beyond its share of time for each image, takes longer than `seconds`. `threads` is the number of
    threads of a prediction (default: the physical cores). With `size`, the model must take images of that side. Raises
    `CXRError` if `data`, the bytes of the file `source`, are another kind of file, or cannot be loaded in time.
    """

    def __init__(
        self, data: bytes, source: Path, threads: int | None = None, size: int | None = None, seconds: float = SECONDS
    ) -> None:
        check_onnx(data, source, size)
        self.source = source
        self.seconds = seconds
        self.model_bytes = len(data)
        self.worker = Worker('cxr_fastai.inference.onnx_process', 'main', str(threads or 0))
        self._ask([data], 0, 'not a model that ONNX Runtime can load')

    def __call__(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the probabilities of pneumonia (n,) and the mean features (n, c) of grey uint8 images (n, s, s).

        Raises `CXRError` if the prediction fails or takes too long.
        """
        n, side = images.shape[:2]
        head = BATCH.pack(n, side)
        parts = self._ask([head, np.ascontiguousarray(images).tobytes()], n * side**2, 'the prediction failed')
        p = np.frombuffer(parts[0], np.float64)
        if len(p) != n or n == 0 or len(parts[1]) % (4 * n) != 0:
            raise CXRError(f'{self.source}: returned {len(p)} probabilities for {n} images.')
        return p, np.frombuffer(parts[1], np.float32).reshape(n, -1)

    def _ask(self, parts: list[bytes], pixels: int, failure: str) -> list[bytes]:
        """Return the answer of the process about `parts`, which contain images with that many `pixels`."""
        seconds = self.seconds + pixels / PIXELS_PER_SECOND
        memory = BASE_MEMORY + MEMORY_PER_MODEL_BYTE * self.model_bytes + MEMORY_PER_PIXEL * pixels
        try:
            return self.worker.ask(parts, seconds, memory, MAX_ANSWER)
        except WorkerTimeout:
            reason = f'it took longer than {seconds:.0f} s'
        except (WorkerError, WorkerCrash) as error:
            reason = str(error)
        raise CXRError(f'{self.source}: {failure} ({reason}).') from None
