"""What runs in the process that ONNX Runtime has for itself: it loads a model, and predicts batches of images."""

from __future__ import annotations

import os
import struct
from contextlib import suppress
from typing import Any

import numpy as np

from cxr_fastai.core.workers import Parts, serve
from cxr_fastai.inference.onnx_start import CPU

BATCH = struct.Struct('<II')
"""Head of a batch: number of images, and their side in pixels."""


def main(threads: str, provider: str = CPU) -> None:
    """Answer requests: the first contains the model, each other one a batch. `threads` is a number; 0: all cores."""
    sessions: list[Any] = []
    os.environ.setdefault('ORT_DISABLE_TELEMETRY', '1')
    with suppress(ImportError):  # which the first request reports
        import onnxruntime  # noqa: F401  # while the other side prepares the request

    def handle(parts: Parts) -> Parts:
        if not sessions:
            sessions.append(_load(parts[0], int(threads), provider))
            return []
        return _predict(sessions[0], *parts)

    serve(handle)


def _load(model: bytes, threads: int, provider: str) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    # Threads that wait actively would take the cores from other processes.
    options.add_session_config_entry('session.intra_op.allow_spinning', '0')
    options.add_session_config_entry('session.load_model_format', 'ONNX')
    options.intra_op_num_threads = threads
    if provider not in onnxruntime.get_available_providers():
        raise RuntimeError(f'this build of ONNX Runtime has no {provider}; onnxruntime-gpu has it')
    session = onnxruntime.InferenceSession(model, options, providers=[provider])
    if session.get_providers()[0] != provider:
        raise RuntimeError(f'{provider} found no GPU that it can use')
    return session


def _predict(session: Any, head: bytes, pixels: bytes) -> Parts:
    n, side = BATCH.unpack(head)
    images = np.frombuffer(pixels, np.uint8).reshape(n, 1, side, side)
    p, features = session.run(['p_pneumonia', 'features'], {'images': images})
    return [np.ascontiguousarray(p, np.float64).tobytes(), np.ascontiguousarray(features, np.float32).tobytes()]
