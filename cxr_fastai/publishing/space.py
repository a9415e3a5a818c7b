"""A Hugging Face Space in front of a bundle: a Gradio page that anybody can try, in a folder that is ready to push."""
from __future__ import annotations

import re
import shutil
from importlib.metadata import requires
from pathlib import Path

from cxr_fastai.core.files import check_new, write_text, writing
from cxr_fastai.core.templates import fill
from cxr_fastai.inference.bundle import CARD, Bundle
from cxr_fastai.publishing.hub import fill as copy_bundle

PACKAGE = Path(__file__).parents[1]
NEEDED = ('numpy', 'pillow', 'rich', 'typer', 'jinja2', 'safetensors', 'filelock', 'matplotlib', 'torch', 'torchvision',
          'pydicom', 'pyjpegls', 'onnxruntime')
"""What predicting and maps need of the package's requirements: fastai is not imported."""
CPU = '--extra-index-url https://download.pytorch.org/whl/cpu'
"""Where torch is to be had without two gigabytes for GPUs."""
FRONT = re.compile(r'\A---\n.*?\n---\n', re.DOTALL)
"""What a card says to the Hub, above what it says to people."""


def write_space(bundle: Bundle, out: Path) -> Path:
    """Write the Space of `bundle` to the new folder `out` and return it: `app.py`, `requirements.txt`, the card as
    `README.md` with what the Hub has to know, the bundle without its pickle, and this package, so that nothing is
    installed by a name that anybody could take. Raises `UsageError` where the folder has something in it."""
    check_new(out)
    with writing(out):
        (out/'bundle').mkdir(parents=True)
        copy_bundle(out/'bundle', bundle)
        shutil.copytree(PACKAGE, out/PACKAGE.name, ignore=shutil.ignore_patterns('__pycache__'), dirs_exist_ok=True)
    card = FRONT.sub('', bundle.read(CARD).decode())
    for name, text in {'app.py': fill('space_app.py'), 'requirements.txt': '\n'.join([CPU, *needed(), '']),
                       'README.md': fill('space.md', card=card, gradio=_version('gradio'))}.items():
        write_text(out/name, text)
    return out


def needed() -> list[str]:
    """The requirements of a Space, as the package states them."""
    stated = {name: text for text in requires('cxr_fastai') or [] if (name := _name(text)) in NEEDED}
    return [stated[name].partition(';')[0].strip() for name in NEEDED]


def _version(name: str) -> str:
    """The oldest version of `name` that the package states."""
    text = next(text for text in requires('cxr_fastai') or [] if _name(text) == name)
    return re.search(r'>=([\d.]+)', text)[1]


def _name(requirement: str) -> str: return re.match(r'[\w-]+', requirement)[0].lower()
