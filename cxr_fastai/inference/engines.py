"""What computes: a torch network, or its ONNX file. Both take grey uint8 images and give probabilities and features."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cxr_fastai.core.errors import CXRError, UsageError, first_line
from cxr_fastai.core.recipe import POSITIVE

if TYPE_CHECKING:
    from torch import nn

EXTERNAL = re.compile(rb'(\x0a|\x8a\x80*\x00)(\x08|\x88\x80*\x00)location')
"""How an ONNX file says, in the bytes of its protocol, that a tensor is in another file; numbers may be padded."""


class TorchEngine:
    """A network `Sequential(body, head)`, in evaluation mode and in the memory layout that is fast on a CPU."""

    def __init__(self, model: nn.Module):
        import torch

        self.model = model.eval().to(memory_format=torch.channels_last)  # half as fast again

    def __call__(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The probability of pneumonia (n,) of grey uint8 images (n, s, s), and the body's mean features (n, c)."""
        import torch

        from cxr_fastai.models.inputs import pool, to_input

        with torch.inference_mode():
            body, head = self.model
            maps = body(to_input(images))
            logits = head(maps).double()  # 32 bits would round 1 - 1e-8 to 1
            return logits.softmax(dim=1)[:, POSITIVE].numpy(), pool(maps).numpy()


class OnnxEngine:
    """What `deploy.to_onnx` wrote, by ONNX Runtime: neither torch nor fastai is loaded. Raises `CXRError` for a file
    that is none of ours."""

    def __init__(self, data: bytes, source: Path, threads: int | None = None):
        os.environ.setdefault('ORT_DISABLE_TELEMETRY', '1')  # it reports to its maker unless told not to
        import onnxruntime

        if EXTERNAL.search(data):
            raise CXRError(f'{source}: it keeps tensors in other files, which is refused.')
        self.source, options = source, onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.add_session_config_entry('session.intra_op.allow_spinning', '0')  # others need the cores meanwhile
        if threads:
            options.intra_op_num_threads = threads
        try:
            self.session = onnxruntime.InferenceSession(data, options, providers=['CPUExecutionProvider'])
        except Exception as error:  # its errors share no base
            raise CXRError(f'{source}: not an ONNX model ({first_line(error, 120)}).') from None
        if {'p_pneumonia', 'features'} - {output.name for output in self.session.get_outputs()}:
            raise CXRError(f'{source}: an ONNX model of another program: `cxr-fastai export` makes ours.')

    def __call__(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As `TorchEngine` does."""
        try:
            p, features = self.session.run(['p_pneumonia', 'features'], {'images': images[:, None]})
        except Exception as error:
            raise CXRError(f'{self.source}: it cannot be computed ({first_line(error, 120)}).') from None
        if len(p) == len(features) == len(images):
            return p, features
        raise CXRError(f'{self.source}: it gives {len(p)} probabilities for {len(images)} images.')

    @property
    def model(self) -> Any:
        """Raises `UsageError`: maps need gradients."""
        raise UsageError('maps need the network itself: load it with `engine="torch"`.')
