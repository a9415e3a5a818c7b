"""The incomplete file of a download, and the ETag that names its version on the server.

Both files lie in the folder of the user, so they are checked before they are read: a pipe would wait forever, and a
damaged ETag would resume another version of the file.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from cxr_fastai.core.errors import CXRError
from cxr_fastai.core.foreign import read_text

ETAG = re.compile(r'"[!#-~]*"')
"""A strong ETag. A weak one, `W/"..."`, cannot distinguish two versions of a file."""
MAX_ETAG = 1000
"""Largest number of characters of an ETag that is stored."""


@dataclass(frozen=True)
class PartialFile:
    """The incomplete file at `path`, and the file of its ETag next to it. Either may be missing."""

    path: Path

    @classmethod
    def of(cls, archive: Path) -> PartialFile:
        """Return the partial file of the download of `archive`."""
        return cls(archive.with_name(f'{archive.name}.part'))

    @property
    def etag_path(self) -> Path:
        """Path of the file that contains the ETag."""
        return self.path.with_suffix('.etag')

    @property
    def size(self) -> int:
        """Number of bytes that are there; 0 if the file is missing."""
        return self.path.stat().st_size if self.path.exists() else 0

    @property
    def etag(self) -> str:
        """The stored ETag; empty if there is none. Raises `CXRError` if it is damaged."""
        if not os.path.lexists(self.etag_path):
            return ''
        etag = read_text(self.etag_path, MAX_ETAG)
        if not ETAG.fullmatch(etag):
            raise CXRError(f'{self.etag_path}: {etag!r:.80} is not an ETag. Delete the file.')
        return etag

    def keep_etag(self, etag: str) -> None:
        """Store the `etag` of a response, so that a resumed download does not join two versions. Raises `OSError`."""
        self.etag_path.unlink(missing_ok=True)
        if len(etag) <= MAX_ETAG and ETAG.fullmatch(etag):
            self.etag_path.write_text(etag, encoding='utf-8')

    def delete(self) -> None:
        """Delete both files. Raises `OSError`."""
        for path in (self.path, self.etag_path):
            path.unlink(missing_ok=True)

    def delete_damaged(self) -> None:
        """Delete both files if they cannot be resumed: no regular file, or of an unknown version. Raises `OSError`."""
        is_usable = self.path.is_file() or not os.path.lexists(self.path)
        try:
            _ = self.etag
        except CXRError:
            is_usable = False
        if not is_usable:
            self.delete()
