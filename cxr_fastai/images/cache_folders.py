"""The caches of decoded images on this computer: `list_caches` describes them, and `delete_cache` deletes one."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from cxr_fastai.core.errors import CXRError, OutputError
from cxr_fastai.core.files import writing
from cxr_fastai.core.foreign import read_bytes
from cxr_fastai.images.cache import FILES, MAX_INDEX, cache_root

OWN_FILES = ('decoder.json', *FILES, 'lock')
"""Files of a cache. `decoder.json` is deleted first, so that no reader trusts what is left."""


@dataclass(frozen=True)
class CacheFolder:
    """A cache of decoded images.

    Attributes
    ----------
    name : the folder of the images with a hash of its path, then the size and resize method, as `images-1a2b/224-pad`.
    path : its folder.
    images : number of images in it.
    bytes : size of its files.
    changed : when images were added last.
    """

    name: str
    path: Path
    images: int
    bytes: int
    changed: datetime


def list_caches() -> list[CacheFolder]:
    """Return the caches in the cache folder of the user, or in `CXR_CACHE`, sorted by name."""
    root = cache_root()
    return [_describe(path, root) for path in sorted(root.glob('*/*')) if _is_cache(path)]


def _is_cache(path: Path) -> bool:
    """Return True if `prepare` wrote the folder; a link could lead elsewhere."""
    is_linked = path.is_symlink() or path.parent.is_symlink()
    return not is_linked and all((path / name).is_file() for name in FILES)


def _describe(path: Path, root: Path) -> CacheFolder:
    statuses = [file.stat() for file in _own_files(path)]
    try:
        images = read_bytes(path / 'index.jsonl', MAX_INDEX).count(b'\n')
    except CXRError:  # it cannot be read, but it can be deleted
        images = 0
    changed = datetime.fromtimestamp((path / 'index.jsonl').stat().st_mtime)
    name = str(path.relative_to(root))
    return CacheFolder(name, path, images, sum(status.st_size for status in statuses), changed)


def _own_files(path: Path) -> list[Path]:
    return [path / name for name in OWN_FILES if (path / name).is_file()]


def delete_cache(cache: CacheFolder) -> None:
    """Delete the files of a cache, and its folders if nothing else is in them.

    Raises `CXRError` if `data prepare` is at work there, and `OutputError` if the files cannot be deleted. A training
    that reads the cache keeps the pixels that it has opened.
    """
    from filelock import FileLock, Timeout

    try:
        with FileLock(cache.path / 'lock', timeout=0), writing(cache.path, 'CXR_CACHE'):
            for file in _own_files(cache.path):
                file.unlink()
    except Timeout:
        raise CXRError(f'{cache.path}: `data prepare` is at work there. Wait until it ends.') from None
    except OSError as error:
        raise OutputError(f'{cache.path / "lock"}: cannot be opened ({error.strerror}).') from None
    with suppress(OSError):  # other files are not ours, and stay
        cache.path.rmdir()
        cache.path.parent.rmdir()
