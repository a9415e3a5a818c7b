"""The two engines that run a network: torch, and ONNX Runtime."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cxr_fastai.core.errors import CXRError, first_line
from cxr_fastai.core.recipe import POSITIVE

if TYPE_CHECKING:
    from torch import nn

Engine = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
"""Maps grey uint8 images (n, s, s) to probabilities of pneumonia (n,) and the mean features of the body (n, c)."""

EXTERNAL_DATA = re.compile(rb'(\x0a|\x8a\x80*\x00)(\x08|\x88\x80*\x00)location')
"""The bytes by which an ONNX file refers to a tensor in another file: the key `location`, a protobuf field of 8 bytes.
Protobuf may pad the tag and the length of a field with 0x80 bytes."""


class TorchEngine:
    """Runs a network `Sequential(body, head)` on the CPU, in evaluation mode."""

    def __init__(self, model: nn.Module) -> None:
        import torch

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

    `threads` is the number of threads of a prediction (default: the physical cores). Raises `CXRError` if `data`, the
    bytes of the file `source`, are another kind of file.
    """

    def __init__(self, data: bytes, source: Path, threads: int | None = None) -> None:
        os.environ.setdefault('ORT_DISABLE_TELEMETRY', '1')
        import onnxruntime

        if EXTERNAL_DATA.search(data):
            raise CXRError(f'{source}: refused, because it refers to tensors in other files. Export the run again.')
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        # Threads that wait actively would take the cores from other processes.
        options.add_session_config_entry('session.intra_op.allow_spinning', '0')
        if threads:
            options.intra_op_num_threads = threads
        self.source = source
        try:
            self.session = onnxruntime.InferenceSession(data, options, providers=['CPUExecutionProvider'])
        except Exception as error:  # the exceptions of ONNX Runtime have no common base class
            raise CXRError(f'{source}: not an ONNX model ({first_line(error, 120)}).') from None
        outputs = {output.name for output in self.session.get_outputs()}
        if not {'p_pneumonia', 'features'} <= outputs:
            raise CXRError(
                f'{source}: an ONNX model of another program. `cxr-fastai export` makes one for this program.'
            )

    def __call__(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the probabilities of pneumonia (n,) and the mean features (n, c) of grey uint8 images (n, s, s)."""
        try:
            p, features = self.session.run(['p_pneumonia', 'features'], {'images': images[:, None]})
        except Exception as error:
            raise CXRError(f'{self.source}: the prediction failed ({first_line(error, 120)}).') from None
        if len(p) != len(images) or len(features) != len(images):
            raise CXRError(f'{self.source}: returned {len(p)} probabilities for {len(images)} images.')
        return p, features
