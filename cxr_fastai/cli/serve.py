"""The command `serve`: a web page and a REST service in front of a bundle."""

from __future__ import annotations

from importlib.util import find_spec

import typer

from cxr_fastai.cli import options as opt
from cxr_fastai.cli.output import print_line
from cxr_fastai.core.errors import UsageError

NEEDED = ('fastapi', 'uvicorn', 'python_multipart', 'prometheus_client', 'onnxruntime')


def serve(
    bundle: opt.BundlePath,
    host: opt.Host = '127.0.0.1',
    port: opt.Port = 8000,
    token_file: opt.TokenFile = None,
    allow_host: opt.AllowHost = None,
    max_body: opt.MaxBody = 20,
    max_images: opt.MaxImages = 64,
    queue: opt.QueueLength = 32,
    per_client: opt.ClientShare = 0,
    timeout: opt.RequestTime = 30,
    send_timeout: opt.SendTime = 10,
) -> None:
    """Serve a bundle: a page to drop images on, and a REST service, documented at /docs.

    Images stay in memory and are gone with their answer. It listens on this machine alone unless --host says otherwise.

    Example: cxr-fastai serve bundle --port 8000
    """
    if missing := [name for name in NEEDED if not find_spec(name)]:
        raise UsageError(f'serve needs {", ".join(missing)}: pip install "cxr_fastai[serve]".')
    from cxr_fastai.serving.server import serve
    from cxr_fastai.serving.service import Limits, Settings

    limits = Limits(max_body * 2**20, max_images)
    code = serve(
        Settings(
            bundle,
            host,
            port,
            limits,
            queue,
            per_client,
            timeout,
            send_timeout,
            token=_read_token(token_file),
            hosts=tuple(allow_host or ()),
        ),
        print_line,
    )
    if code:
        raise typer.Exit(code)


def _read_token(file: opt.TokenFile) -> str | None:
    if file is None:
        return None
    try:
        token = file.read_text(encoding='ascii').strip()
    except (OSError, UnicodeError) as error:
        raise UsageError(f'--token-file {file}: {error}.') from None
    if len(token) >= 16 and len(token.split()) == 1:
        return token
    raise UsageError(f'--token-file {file}: at least 16 letters without a space are needed, on one line.')
