"""The command `serve`: a web page and a REST API for a bundle."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from cxr_fastai.cli import sharing_options as opt
from cxr_fastai.cli.options import Device, Modality
from cxr_fastai.cli.output import print_line
from cxr_fastai.core.errors import CXRError, UsageError
from cxr_fastai.core.foreign import read_bytes

REQUIRED_MODULES = ('fastapi', 'hypercorn', 'python_multipart', 'prometheus_client', 'onnxruntime')
MIN_TOKEN_LENGTH = 16
MAX_TOKEN = 2**12
"""Largest token file, in bytes."""


def serve(
    bundle: opt.BundlePath,
    host: opt.Host = '127.0.0.1',
    port: opt.Port = 8000,
    token_file: opt.TokenFile = None,
    allow_host: opt.AllowHost = None,
    modality: Modality = '',
    max_body: opt.MaxBody = 20,
    max_images: opt.MaxImages = 64,
    queue: opt.QueueLength = 32,
    timeout: opt.RequestTime = 30,
    send_timeout: opt.SendTime = 10,
    device: Device = 'cpu',
) -> None:
    """Serve a bundle: a web page for images, and a REST API, which is documented at /docs.

    Images are kept in memory only, until their request is answered. Other computers have no access unless --host allows
    it.

    Example: cxr-fastai serve bundle --port 8000
    """
    missing = [name for name in REQUIRED_MODULES if not find_spec(name)]
    if missing:
        raise UsageError(f'serve needs {", ".join(missing)}. Install them with pip install "cxr_fastai[serve]".')
    from cxr_fastai.inference.onnx_start import start_onnx

    start_onnx(bundle, 'onnx', device)
    from cxr_fastai.serving.app import Settings
    from cxr_fastai.serving.server import serve
    from cxr_fastai.serving.uploads import Limits

    settings = Settings(
        bundle,
        host,
        port,
        limits=Limits(max_body * 2**20, max_images),
        max_requests=queue,
        answer_seconds=timeout,
        send_seconds=send_timeout,
        token=_read_token(token_file),
        hosts=tuple(allow_host or ()),
        device=device,
        modality=modality,
    )
    serve(settings, print_line)


def _read_token(file: Path | None) -> str | None:
    if file is None:
        return None
    try:
        token = read_bytes(file, MAX_TOKEN).decode('ascii').strip()
    except CXRError as error:
        raise UsageError(f'--token-file {error}') from None
    except UnicodeError:
        raise UsageError(f'--token-file {file}: not a token, because it has other characters than ASCII.') from None
    if len(token) < MIN_TOKEN_LENGTH or len(token.split()) != 1:
        raise UsageError(
            f'--token-file {file}: not a token. Write at least {MIN_TOKEN_LENGTH} ASCII characters without a space.'
        )
    return token
