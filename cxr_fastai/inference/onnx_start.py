"""The start of ONNX Runtime before it is needed, so that its imports run beside those of a command.

This module imports little itself: it is the first that `cxr-fastai predict` loads.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from cxr_fastai.core.environment import process_count, read_integer
from cxr_fastai.core.hardware import thread_limit
from cxr_fastai.core.workers import quiet_blas, start_ahead
from cxr_fastai.models.devices import may_have_gpu

CPU, GPU = 'CPUExecutionProvider', 'CUDAExecutionProvider'
"""Where ONNX Runtime computes."""
ONNX = 'model.onnx'
"""The file of a bundle that ONNX Runtime loads."""


def onnx_worker(threads: int | None, gpu: bool = False) -> tuple[str, ...]:
    """Return the arguments of the `Worker` in which ONNX Runtime computes with that many threads (None: its choice)."""
    return 'cxr_fastai.inference.onnx_process', 'main', str(threads or 0), GPU if gpu else CPU


def onnx_threads() -> int | None:
    """Return the number of threads of ONNX Runtime in this process, one of several perhaps; None for its own choice."""
    local_processes = read_integer('LOCAL_WORLD_SIZE', default=process_count()) if process_count() > 1 else 1
    return thread_limit(max(local_processes, 1))


def start_onnx(model: Path, engine: str = 'auto', device: str = 'auto', precision: str = 'fp32') -> bool:
    """Start the process of ONNX Runtime if `Predictor.load` with these arguments will probably need it.

    Returns whether it was started; then NumPy computes in one thread, see `quiet_blas`. A process that is not needed
    ends with this one.
    """
    has_onnx = (model / ONNX).is_file() or model.suffix.lower() == '.zip'
    is_on_cpu = device == 'cpu' or (device == 'auto' and not may_have_gpu())
    if not (has_onnx and is_on_cpu and engine in ('auto', 'onnx') and precision == 'fp32' and find_spec('onnxruntime')):
        return False
    quiet_blas()
    start_ahead(*onnx_worker(onnx_threads()))
    return True
