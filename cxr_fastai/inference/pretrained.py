"""Models by name: `pretrained`, the trained model that the package contains, and `hf:USER/NAME` from the Hub."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

from cxr_fastai.core.errors import CXRWarning, UsageError
from cxr_fastai.core.files import StrPath
from cxr_fastai.core.foreign import read_json
from cxr_fastai.core.paths import HUB_PREFIX, PRETRAINED

COMMIT = re.compile('[0-9a-f]{40}')
FOLDER = Path(__file__).parents[1] / PRETRAINED
"""The bundle, a part of the installed package."""
FACTS = FOLDER.with_suffix('.json')
"""How the bundle was made: a file next to it, because a bundle contains only the files of its manifest."""
MAX_FACTS = 2**20
"""Largest file of facts, in bytes."""


def find_model(model: StrPath) -> Path:
    """Return the path of `model`: that of the bundle in the package for the text `pretrained`, else the path itself.

    A text such as `hf:USER/NAME` or `hf:USER/NAME@REVISION` means a bundle on the Hugging Face Hub, which is downloaded
    into its cache (see `hub_bundles.download_bundle`). A `Path`, and a text with a separator in front such as
    `./pretrained`, is always a file or folder. Raises `UsageError` if the package contains no trained model, and what
    `download_bundle` raises. Warns if there is also a file or folder with the name `pretrained`.
    """
    if isinstance(model, str) and model.startswith(HUB_PREFIX):
        from cxr_fastai.inference.hub_bundles import download_bundle

        return download_bundle(model)
    if model != PRETRAINED:  # a Path is never equal to a text
        return Path(model)
    if not (FOLDER / 'manifest.json').is_file():
        raise UsageError(
            f'{PRETRAINED}: this copy of the package contains no trained model ({FOLDER} is missing). Install a '
            f'released version, or name a bundle or a run. A folder of this name is written as ./{PRETRAINED}.'
        )
    if Path(PRETRAINED).exists():
        warnings.warn(
            f'{PRETRAINED} means the trained model of the package. The file or folder here is ./{PRETRAINED}.',
            CXRWarning,
            stacklevel=2,
        )
    return FOLDER


def name_model(path: Path) -> str:
    """Return the name of the model at `path` as a user writes it, which messages show in place of an internal path.

    It is `pretrained` for the bundle in the package, `hf:USER/NAME@COMMIT` for one in the cache of the Hub, and the
    path for any other model.
    """
    if path == FOLDER:
        return PRETRAINED
    repository = path.parent.parent.name
    if not (COMMIT.fullmatch(path.name) and path.parent.name == 'snapshots' and repository.startswith('models--')):
        return str(path)
    repo = repository.removeprefix('models--').replace('--', '/')
    return f'{HUB_PREFIX}{repo}@{path.name}'


def pretrained_facts() -> dict[str, Any]:
    """Return how the trained model of the package was made, as `publishing.pretrained` wrote it.

    Raises `UsageError` if the package contains no trained model.
    """
    if not FACTS.is_file():
        find_model(PRETRAINED)
    facts: dict[str, Any] = read_json(FACTS, MAX_FACTS)
    return facts
