"""The two engines that run a network: torch, and ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import numpy as np

from cxr_fastai.core.errors import CXRError, UsageError
from cxr_fastai.core.files import StrPath
from cxr_fastai.core.progress import counted
from cxr_fastai.core.recipe import POSITIVE
from cxr_fastai.core.workers import Worker, WorkerCrash, WorkerError, WorkerTimeout
from cxr_fastai.inference.onnx_format import check_onnx
from cxr_fastai.inference.onnx_process import BATCH
from cxr_fastai.inference.onnx_start import onnx_worker
from cxr_fastai.models.devices import choose_device

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

Engine = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
"""Maps grey uint8 images (n, s, s) to probabilities of pneumonia (n,) and the mean features of the body (n, c)."""

PRECISIONS = ('fp32', 'bf16')
"""Numbers in which a torch engine computes: of 32 bits, or mostly of 16 bits (bfloat16)."""
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
    """Runs a network `Sequential(body, head)` in evaluation mode, on a `device` of `models.devices` (default: the CPU).

    With the `precision` `bf16` the network computes in bfloat16 where that is safe; the probabilities then differ.
    """

    def __init__(self, model: nn.Module, device: torch.device | str = 'cpu', precision: str = 'fp32') -> None:
        import torch

        self.device = choose_device(device)
        self.precision = check_precision(precision)
        # This memory layout makes prediction on a CPU about 1.5 times as fast.
        self.model = model.eval().to(self.device).to(memory_format=torch.channels_last)

    def __call__(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the probabilities of pneumonia (n,) and the mean features (n, c) of grey uint8 images (n, s, s)."""
        import torch

        from cxr_fastai.models.inputs import pool, to_input

        body, head = self.model.children()
        with torch.inference_mode(), self.autocast():
            maps = body(to_input(images, self.device))
            logits = head(maps)
            features = pool(maps)
        return to_probabilities(logits), features.float().cpu().numpy()

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context in which the network computes with the precision of this engine."""
        import torch

        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == 'bf16')


def to_probabilities(logits: Tensor) -> np.ndarray:
    """Return the probabilities of pneumonia (n,) of logits (n, 2). In single precision 1 - 1e-8 would become 1."""
    p: np.ndarray = logits.cpu().double().softmax(dim=1)[:, POSITIVE].numpy()
    return p


def check_precision(precision: str) -> str:
    """Return `precision`. Raises `UsageError` if it is not one of `PRECISIONS`."""
    if precision not in PRECISIONS:
        raise UsageError(f'--precision {precision}: choose {" or ".join(PRECISIONS)}.')
    return precision


class OnnxEngine:
    """Runs an ONNX file that `export` wrote with ONNX Runtime; it loads neither torch nor fastai.

    The file is checked by `check_onnx`. ONNX Runtime then works in a process of its own, which is ended if loading, or
    a prediction beyond its share of time for each image, takes longer than `seconds`. `threads` is the number of
    threads of a prediction (default: the physical cores). With `size`, the model must take images of that side. With
    `gpu` it computes on the first NVIDIA GPU, which needs another build of ONNX Runtime. Raises `CXRError` if `data`,
    the bytes of the file `source`, are another kind of file, or cannot be loaded in time.
    """

    def __init__(
        self,
        data: bytes,
        source: StrPath,
        threads: int | None = None,
        size: int | None = None,
        seconds: float = SECONDS,
        gpu: bool = False,
    ) -> None:
        check_onnx(data, source, size)
        self.source = source
        self.seconds = seconds
        self.model_bytes = len(data)
        self.gpu = gpu
        self.worker = Worker.take(*onnx_worker(threads, gpu))
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
            raise CXRError(f'{self.source}: returned {counted(len(p), "probability")} for {counted(n)}.')
        return p, np.frombuffer(parts[1], np.float32).reshape(n, -1)

    def _ask(self, parts: list[bytes], pixels: int, failure: str) -> list[bytes]:
        """Return the answer of the process about `parts`, which contain images with that many `pixels`."""
        seconds = self.seconds + pixels / PIXELS_PER_SECOND
        memory = BASE_MEMORY + MEMORY_PER_MODEL_BYTE * self.model_bytes + MEMORY_PER_PIXEL * pixels
        if self.gpu:
            memory = 0  # CUDA reserves addresses for the memory of the GPU
        try:
            return self.worker.ask(parts, seconds, memory, MAX_ANSWER)
        except WorkerTimeout:
            reason = f'it took longer than {seconds:.0f} s'
        except (WorkerError, WorkerCrash) as error:
            reason = str(error)
        raise CXRError(f'{self.source}: {failure} ({reason}).') from None
