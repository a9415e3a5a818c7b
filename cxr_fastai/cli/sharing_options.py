"""The arguments and options of commands that share a finished model: export, push-to-hub, trust and serve."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from cxr_fastai.cli.options import find_model

# export, push-to-hub and trust

BundlePath = Annotated[
    Path,
    Argument(
        metavar='BUNDLE',
        parser=find_model,
        help='Bundle (folder or zip), as written by export, pretrained for the model in the package, or '
        'hf:USER/NAME[@REVISION] for one on the Hugging Face Hub.',
    ),
]
NewBundle = Annotated[
    Path | None,
    Option(
        '--out',
        metavar='DIR',
        show_default='RUN/bundle',
        help='Write the bundle to this folder (with --zip: file), and replace an older bundle.',
    ),
]
Half = Annotated[
    bool,
    Option(
        '--half',
        help='Write half the size: weights as float16 in model.onnx alone, computed in float32. For ONNX Runtime only.',
    ),
]
AsZip = Annotated[bool, Option('--zip', help='Write one zip file instead of a folder.')]
NewSpace = Annotated[
    Path | None,
    Option(
        '--space', metavar='DIR', show_default=False, help='Also write a Hugging Face Space (Gradio) to this folder.'
    ),
]
Repo = Annotated[str, Argument(metavar='USER/NAME', help='Repository on the Hugging Face Hub; created if missing.')]
Private = Annotated[bool, Option('--private', help='Make a new repository private.')]
WithPickle = Annotated[bool, Option('--with-pickle', help='Also upload learner.pkl, which users must trust to open.')]
TrustWhat = Annotated[
    list[str], Argument(metavar='FILE|list|remove HEX', help='Pickle file to trust; or list; or remove and a SHA-256.')
]
Hash = Annotated[
    str | None,
    Option('--sha256', metavar='HEX', show_default=False, help='Compare the file with this SHA-256 from its author.'),
]

# serve

Host = Annotated[
    str, Option('--host', metavar='ADDRESS', help='Listen on this address; 0.0.0.0 listens on all networks.')
]
Port = Annotated[int, Option('--port', metavar='N', min=0, max=65535, help='Listen on this port; 0 picks a free one.')]
TokenFile = Annotated[
    Path | None,
    Option('--token-file', metavar='FILE', show_default=False, help='Require the bearer token in this file.'),
]
AllowHost = Annotated[
    list[str] | None,
    Option(
        '--allow-host',
        metavar='NAME',
        show_default='localhost, --host',
        help='Accept this host name. Repeat for more; `*` accepts any.',
    ),
]
MaxBody = Annotated[
    int, Option('--max-body', metavar='MB', min=1, help='Refuse requests that are larger than this, in megabytes.')
]
MaxImages = Annotated[
    int, Option('--max-images', metavar='N', min=1, help='Refuse requests with more images than this.')
]
QueueLength = Annotated[
    int, Option('--queue', metavar='N', min=1, help='Answer at most this number of requests at the same time.')
]
RequestTime = Annotated[
    float, Option('--timeout', metavar='SECONDS', min=1, help='Stop answering a request after this time, in seconds.')
]
SendTime = Annotated[
    float,
    Option('--send-timeout', metavar='SECONDS', min=1, help='Stop receiving a request after this time, in seconds.'),
]
