"""Publishes a bundle on the Hugging Face Hub: as a model repository, or as a Space with a page to try the model."""

from __future__ import annotations

import re
import shutil
from importlib.metadata import requires
from pathlib import Path
from tempfile import TemporaryDirectory

from cxr_fastai.core.environment import require_package
from cxr_fastai.core.errors import CXRError, UsageError, first_line
from cxr_fastai.core.files import StrPath, check_new, write_text, writing
from cxr_fastai.core.templates import render_template
from cxr_fastai.inference.bundle import CARD, MANIFEST, Bundle, is_bundle, manifest_text
from cxr_fastai.inference.config import LEARNER
from cxr_fastai.inference.hub_bundles import is_unreachable
from cxr_fastai.inference.pretrained import FACTS, FOLDER, find_model

PACKAGE_FOLDER = Path(__file__).parents[1]
SPACE_PACKAGES = (
    'numpy',
    'pillow',
    'rich',
    'typer',
    'jinja2',
    'safetensors',
    'filelock',
    'matplotlib',
    'lazy-loader',
    'torch',
    'torchvision',
    'pydicom',
    'pyjpegls',
    'onnxruntime',
)
"""The requirements of the package that prediction and maps need; fastai is not one of them."""
TORCH_INDEX = '--extra-index-url https://download.pytorch.org/whl/cpu'
"""Makes pip install torch without the CUDA libraries, which take 2 GB."""
FRONT_MATTER = re.compile(r'\A---\n.*?\n---\n', re.DOTALL)
"""The metadata at the start of a model card."""


def push(path: StrPath, repo: str, private: bool = False, with_pickle: bool = False) -> str:
    """Upload the files of the bundle `path` to the model repository `repo` (`user/name`) and return its URL.

    The repository is created if it does not exist. Each file is checked before the upload. The pickled learner, which
    could run code when it is loaded, is uploaded only with `with_pickle`. Raises `CXRError` if the bundle is damaged or
    the Hub rejects the upload.
    """
    path = find_model(path)
    require_package('huggingface_hub', 'push-to-hub', 'hub')
    from huggingface_hub import HfApi

    if is_bundle(Path(repo)) and not is_bundle(path):
        raise UsageError(f'{repo}: a bundle, not a repository. Name them the other way round: the bundle first.')
    bundle = Bundle.open(path)
    with TemporaryDirectory() as folder:
        copy_bundle(Path(folder), bundle, with_pickle)
        try:
            api = HfApi()
            api.create_repo(repo, private=private, exist_ok=True)
            api.upload_folder(
                repo_id=repo,
                folder_path=folder,
                commit_message='Bundle of cxr_fastai',
                delete_patterns=None if with_pickle else [LEARNER],
            )
        except Exception as error:  # includes the errors of the HTTP client, which have no common base
            if is_unreachable(error):
                raise CXRError(
                    f'{repo}: the Hub cannot be reached ({first_line(error, 200)}). Check the network connection, and '
                    'that HF_HUB_OFFLINE is not set.'
                ) from None
            raise CXRError(
                f'{repo}: the Hub rejected the upload ({first_line(error, 200)}). Log in with `hf auth login`, and '
                'name a repository of your own as user/name.'
            ) from None
    return f'https://huggingface.co/{repo}'


def copy_bundle(folder: Path, bundle: Bundle, with_pickle: bool = False) -> None:
    """Copy the files of `bundle` to `folder`, with its model card as `README.md`."""
    files = {name: facts for name, facts in bundle.manifest.items() if with_pickle or name != LEARNER}
    for name in files:
        (folder / name).write_bytes(bundle.read(name))
    (folder / MANIFEST).write_text(manifest_text(files), encoding='utf-8')
    (folder / 'README.md').write_bytes(bundle.read(CARD))


def write_space(bundle: Bundle, out: StrPath) -> Path:
    """Write a Space for `bundle` to the new folder `out` and return it.

    The folder contains `app.py`, `requirements.txt`, `README.md` with the model card and the settings of the Space, the
    bundle without its pickle, and a copy of this package, so that the Space does not install it from a package index.
    Raises `UsageError` if the folder is not empty.
    """
    out = Path(out)
    check_new(out)
    with writing(out):
        (out / 'bundle').mkdir(parents=True)
        copy_bundle(out / 'bundle', bundle)
        ignore = shutil.ignore_patterns('__pycache__', FOLDER.name, FACTS.name)  # the Space has its own bundle
        shutil.copytree(PACKAGE_FOLDER, out / PACKAGE_FOLDER.name, ignore=ignore, dirs_exist_ok=True)
    card = FRONT_MATTER.sub('', bundle.read(CARD).decode('utf-8-sig', 'replace'))
    write_text(out / 'app.py', render_template('space_app.py'))
    write_text(out / 'requirements.txt', '\n'.join([TORCH_INDEX, *space_requirements(), '']))
    readme = render_template('space.md', card=card, gradio=_oldest_version('gradio'))
    write_text(out / 'README.md', readme)
    return out


def space_requirements() -> list[str]:
    """Return the requirements of a Space, with the versions that the package requires."""
    requirements = _requirements()
    return [requirements[name].partition(';')[0].strip() for name in SPACE_PACKAGES]


def _requirements() -> dict[str, str]:
    """The requirements of the package, extras included, by the name of the required package."""
    requirements = requires('cxr_fastai') or []
    return {re.split(r'[^\w-]', text)[0].lower(): text for text in requirements}


def _oldest_version(name: str) -> str:
    """The oldest version of the package `name` that the requirements allow."""
    versions = re.findall(r'>=([\d.]+)', _requirements()[name])
    return str(versions[0])
