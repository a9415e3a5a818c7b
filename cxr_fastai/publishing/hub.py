"""A bundle goes to the Hugging Face Hub, with its card as the page that people see first."""

from __future__ import annotations

import re
import shutil
from importlib.metadata import requires
from pathlib import Path
from tempfile import TemporaryDirectory

from cxr_fastai.core.environment import require_package
from cxr_fastai.core.errors import CXRError, first_line
from cxr_fastai.core.files import check_new, write_text, writing
from cxr_fastai.core.templates import fill
from cxr_fastai.inference.bundle import CARD, MANIFEST, Bundle, manifest_text
from cxr_fastai.inference.config import LEARNER


def push(path: Path, repo: str, private: bool = False, with_pickle: bool = False) -> str:
    """Upload the files of the bundle `path`, each checked, to the repository `repo` (`user/name`), which is made if it
    is not there; returns its address. The learner, which could run code, goes only `with_pickle`.

    Raises `CXRError` where the bundle is damaged, or the Hub refuses.
    """
    require_package('huggingface_hub', 'push-to-hub', 'hub')
    from huggingface_hub import HfApi

    bundle = Bundle.open(path)
    with TemporaryDirectory() as made:
        copy_bundle(Path(made), bundle, with_pickle)
        try:
            api = HfApi()
            api.create_repo(repo, private=private, exist_ok=True)
            api.upload_folder(
                repo_id=repo,
                folder_path=made,
                commit_message='Bundle of cxr_fastai',
                delete_patterns=None if with_pickle else [LEARNER],
            )
        except Exception as error:  # what carries its requests has errors of its own
            raise CXRError(
                f'{repo}: the Hub refused ({first_line(error, 200)}): log in by `hf auth login`, and name a '
                'repository of yours as user/name.'
            ) from None
    return f'https://huggingface.co/{repo}'


def copy_bundle(folder: Path, bundle: Bundle, with_pickle: bool = False) -> None:
    """Put into `folder` what goes to the Hub: the bundle, with its card as README.md."""
    files = {name: facts for name, facts in bundle.manifest.items() if with_pickle or name != LEARNER}
    for name in files:
        (folder / name).write_bytes(bundle.read(name))
    (folder / MANIFEST).write_text(manifest_text(files), encoding='utf-8')
    (folder / 'README.md').write_bytes(bundle.read(CARD))


PACKAGE = Path(__file__).parents[1]
NEEDED = (
    'numpy',
    'pillow',
    'rich',
    'typer',
    'jinja2',
    'safetensors',
    'filelock',
    'matplotlib',
    'torch',
    'torchvision',
    'pydicom',
    'pyjpegls',
    'onnxruntime',
)
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
        (out / 'bundle').mkdir(parents=True)
        copy_bundle(out / 'bundle', bundle)
        shutil.copytree(PACKAGE, out / PACKAGE.name, ignore=shutil.ignore_patterns('__pycache__'), dirs_exist_ok=True)
    card = FRONT.sub('', bundle.read(CARD).decode())
    for name, text in {
        'app.py': fill('space_app.py'),
        'requirements.txt': '\n'.join([CPU, *needed(), '']),
        'README.md': fill('space.md', card=card, gradio=_version('gradio')),
    }.items():
        write_text(out / name, text)
    return out


def needed() -> list[str]:
    """The requirements of a Space, as the package states them."""
    stated = {name: text for text in requires('cxr_fastai') or [] if (name := _name(text)) in NEEDED}
    return [stated[name].partition(';')[0].strip() for name in NEEDED]


def _version(name: str) -> str:
    """The oldest version of `name` that the package states."""
    text = next(text for text in requires('cxr_fastai') or [] if _name(text) == name)
    return re.search(r'>=([\d.]+)', text)[1]


def _name(requirement: str) -> str:
    return re.match(r'[\w-]+', requirement)[0].lower()
