"""Bundles of the Hugging Face Hub by name, `hf:USER/NAME`: downloaded, verified, and kept in the cache of the Hub.

Only the files of a bundle are downloaded, and never a pickle. The package `huggingface_hub` (extra `hub`) downloads and
caches them, and finds the address of the Hub and the token of the user.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from cxr_fastai.core.environment import is_installed, require_package
from cxr_fastai.core.errors import CXRError, CXRWarning, UsageError, first_line
from cxr_fastai.core.paths import HUB_PREFIX
from cxr_fastai.inference.bundle import MANIFEST, MAX_JSON_BYTES, Bundle
from cxr_fastai.inference.config import LEARNER
from cxr_fastai.inference.pretrained import COMMIT, name_model

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo

MAX_DOWNLOAD = 2**30
"""Largest size of all files of a bundle that is downloaded, in bytes. A ResNet-50 has 0.2 GB."""
ANSWER_SECONDS = 10
"""How long the Hub may take to describe a repository."""
NAME = re.compile(rf'{HUB_PREFIX}([\w.-]{{1,96}}/[\w.-]{{1,96}})(?:@([\w./-]{{1,200}}))?', re.ASCII)
"""The name of a bundle: the repository, and perhaps a branch, tag or commit."""
DEFAULT_REVISION = 'main'
PICKLES = ('.pkl', '.pickle', '.pt', '.pth', '.bin', '.ckpt', '.joblib')
"""Suffixes of files that are pickles, or may contain some."""
UNREACHABLE = ('ConnectionError', 'TransportError', 'Timeout', 'LocalEntryNotFoundError')
"""Exceptions of Python, httpx, requests and huggingface_hub that mean that there was no answer."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class HubName:
    """The name `hf:USER/NAME@REVISION`, where a revision is a branch, a tag or a commit."""

    repo: str
    revision: str

    @classmethod
    def parse(cls, text: str) -> HubName:
        """Return the name that `text` states, with the revision `main` if it has none. Raises `UsageError`."""
        match = NAME.fullmatch(text)
        if match is None or '..' in text:
            raise UsageError(
                f'{text:.200}: not the name of a bundle on the Hugging Face Hub. Write {HUB_PREFIX}USER/NAME, or '
                f'{HUB_PREFIX}USER/NAME@REVISION with a branch, tag or commit. A file of this name is written as '
                f'./{text:.200}.'
            )
        return cls(match[1], match[2] or DEFAULT_REVISION)

    @property
    def is_pinned(self) -> bool:
        """Whether the revision is a commit, which never changes."""
        return COMMIT.fullmatch(self.revision) is not None

    def __str__(self) -> str:
        return f'{HUB_PREFIX}{self.repo}@{self.revision}'


def download_bundle(name: str) -> Path:
    """Return the folder of the bundle `name`, which is downloaded unless the cache has it. All files are verified.

    The revision is resolved to a commit at each call. If there is no answer, the commit that the cache has for it is
    used, with a warning. A full commit in the cache needs no network. Raises `UsageError` for a wrong name, without the
    extra `hub`, and if there is no such repository, revision or bundle; `CXRError` if the Hub cannot be reached, or if
    the bundle is too large or damaged.
    """
    hub_name = HubName.parse(name)
    require_package('huggingface_hub', str(hub_name), 'hub')
    folder = _find_cached(hub_name) if hub_name.is_pinned else None
    if folder is None:
        folder = _download_or_find(hub_name)
    _verify(folder)
    log.debug('%s: %s', name_model(folder), folder)
    return folder


def _find_cached(name: HubName) -> Path | None:
    """Return the folder of the bundle in the cache; None unless it has all files of the manifest."""
    from huggingface_hub import try_to_load_from_cache

    manifest = try_to_load_from_cache(name.repo, MANIFEST, revision=name.revision)
    if not isinstance(manifest, str):  # None, or the mark of a file that does not exist
        return None
    folder = Path(manifest).parent
    return folder if all((folder / file).is_file() for file in _needed_files(folder)) else None


def _needed_files(folder: Path) -> list[str]:
    """Return the files that the manifest in `folder` names, without the pickle. Raises `CXRError` if it is none."""
    with _advice_to_clean(folder):
        return [file for file in Bundle(folder).manifest if file != LEARNER]


@contextmanager
def _advice_to_clean(folder: Path) -> Iterator[None]:
    """Add to an error about a file in `folder` how to delete the copy, so that the next call downloads it again."""
    try:
        yield
    except CXRError as error:
        raise CXRError(
            f'{error} If the repository was corrected, or if the copy here may be damaged, delete it: cxr-fastai cache '
            f'clean {name_model(folder)}'
        ) from None


def _download_or_find(name: HubName) -> Path:
    try:
        return _download(name)
    except CXRError:
        raise
    except Exception as error:  # includes the errors of the HTTP client, which have no common base
        if not is_unreachable(error):
            raise _explain(name, error) from None
        folder = _find_cached(name)
        if folder is None:
            raise CXRError(
                f'{name}: the Hub cannot be reached ({first_line(error, 200)}), and the bundle was not downloaded '
                'before. Check the network connection, and that HF_HUB_OFFLINE is not set.'
            ) from None
    warnings.warn(
        f'{name}: the Hub cannot be reached, so the commit {folder.name} of the cache is used.',
        CXRWarning,
        stacklevel=4,
    )
    return folder


def _download(name: HubName) -> Path:
    """Return the folder of the bundle in the cache, after all its files that were missing there are downloaded."""
    from huggingface_hub import HfApi, hf_hub_download

    info = HfApi().model_info(name.repo, revision=name.revision, files_metadata=True, timeout=ANSWER_SECONDS)
    sizes = _file_sizes(name, info)
    _check_size(name, sizes[MANIFEST], MAX_JSON_BYTES, MANIFEST)
    # Downloaded by the revision, because this also notes its commit in the cache.
    folder = Path(hf_hub_download(name.repo, MANIFEST, revision=name.revision)).parent
    if folder.name != info.sha:
        raise CXRError(f'{name}: the repository has changed during the download. Try again.')
    files = _needed_files(folder)
    missing = [file for file in files if file not in sizes]
    if missing:
        raise CXRError(f'{name}: the repository lacks {missing[0]}, a file of the bundle. Ask its author to add it.')
    _check_size(name, sum(sizes[file] for file in files), MAX_DOWNLOAD, 'the bundle')
    for file in files:
        hf_hub_download(name.repo, file, revision=folder.name)
    return folder


def _file_sizes(name: HubName, info: ModelInfo) -> dict[str, int]:
    """Return the size in bytes of each file in the repository. Raises `UsageError` if there is no bundle among them."""
    if not COMMIT.fullmatch(str(info.sha)):
        raise CXRError(f'{name}: the Hub named no commit of the repository ({info.sha!s:.80}). Check HF_ENDPOINT.')
    sizes = {file.rfilename: file.size for file in info.siblings or [] if file.size is not None}
    if MANIFEST not in sizes:
        pickles = [file for file in sizes if file.endswith(PICKLES)]
        reason = f'but {pickles[0]:.80}, which can run code and is never downloaded' if pickles else f'no {MANIFEST}'
        raise UsageError(
            f'{name}: no bundle in this repository, {reason}. Name one with a bundle, which `cxr-fastai export RUN` '
            'makes and `cxr-fastai push-to-hub` uploads.'
        )
    return sizes


def _check_size(name: HubName, size: int, limit: int, what: str) -> None:
    if size > limit:
        raise CXRError(
            f'{name}: {what} has {size:,} bytes, more than {limit:,}, so it was not downloaded. Download the '
            'repository by other means if you trust it, and name its folder.'
        )


def _verify(folder: Path) -> None:
    """Compare all files with the manifest. Raises `CXRError` if one differs."""
    files = _needed_files(folder)
    bundle = Bundle(folder)
    with _advice_to_clean(folder):
        for file in files:
            bundle.read(file)


def _explain(name: HubName, error: Exception) -> CXRError:
    """Return the error to raise in place of one of huggingface_hub."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    if isinstance(error, GatedRepoError):
        return UsageError(
            f'{name}: its author shares this repository on request. Accept the conditions on its page, and log in '
            'with `hf auth login`, or set HF_TOKEN.'
        )
    if isinstance(error, RepositoryNotFoundError):
        return UsageError(
            f'{name}: no such repository, or a private one. Check the name; for a private one, log in with '
            '`hf auth login`, or set HF_TOKEN to a token that may read it.'
        )
    if isinstance(error, RevisionNotFoundError):
        return UsageError(
            f'{name}: the repository has no revision {name.revision}. Name a branch, a tag or a full commit.'
        )
    return CXRError(f'{name}: the Hub did not provide the bundle ({first_line(error, 200)}). Try again later.')


def is_unreachable(error: Exception) -> bool:
    """Return whether there was no answer of the Hub, by the names of the exceptions of all HTTP clients in use."""
    status = getattr(getattr(error, 'response', None), 'status_code', None) or 0
    return status >= 500 or any(kind.__name__ in UNREACHABLE for kind in type(error).__mro__)


@dataclass(frozen=True)
class CachedBundle:
    """A bundle in the cache of the Hub.

    Attributes
    ----------
    name : `hf:USER/NAME@COMMIT`, by which it can be used.
    bytes : size of its files.
    changed : when it was downloaded.
    """

    name: str
    bytes: int
    changed: datetime


def hub_cache() -> Path:
    """Return the folder of the cache, which other programs use as well. Needs the extra `hub`."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def list_hub_bundles() -> list[CachedBundle]:
    """Return the bundles in the cache of the Hub, sorted by name; nothing else in it. Empty without the extra `hub`."""
    if not is_installed('huggingface_hub') or not hub_cache().is_dir():
        return []
    from huggingface_hub import scan_cache_dir

    revisions = [revision for repo in scan_cache_dir(hub_cache()).repos for revision in repo.revisions]
    bundles = [
        CachedBundle(
            name_model(revision.snapshot_path),
            revision.size_on_disk,
            datetime.fromtimestamp(revision.last_modified),
        )
        for revision in revisions
        if _is_bundle(revision.snapshot_path)
    ]
    return sorted(bundles, key=lambda bundle: bundle.name)


def _is_bundle(folder: Path) -> bool:
    try:
        return name_model(folder).startswith(HUB_PREFIX) and bool(Bundle(folder).manifest)
    except CXRError:
        return False


def delete_hub_bundle(bundle: CachedBundle) -> None:
    """Delete the files of a bundle from the cache of the Hub, except for those that another commit shares."""
    from huggingface_hub import scan_cache_dir

    scan_cache_dir(hub_cache()).delete_revisions(HubName.parse(bundle.name).revision).execute()
