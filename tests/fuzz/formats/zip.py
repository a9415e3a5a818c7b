"""Zip and array files through the readers of archives."""

import tempfile
import warnings
from pathlib import Path

from archivefiles import write_arrays, write_images_zip

from cxr_fastai.core.errors import CXRError
from cxr_fastai.data.archives import unpack_arrays, unpack_images

DEADLINE = 5


def seeds() -> list[bytes]:
    """Return a valid zip file of images, and an array file."""
    with tempfile.TemporaryDirectory() as folder:
        write_arrays(Path(folder, 'a.npz'))
        return [write_images_zip(Path(folder, 'a.zip')).read_bytes(), Path(folder, 'a.npz').read_bytes()]


def check(data: bytes) -> None:
    """Unpack an archive; images in the folder, or a `CXRError` of one line, are expected."""
    for unpack in (unpack_images, unpack_arrays):
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter('ignore')
            archive = Path(folder, 'a.zip')
            archive.write_bytes(data)
            try:
                unpack(archive, Path(folder, 'images'))
            except CXRError as error:
                assert '\n' not in str(error)
            assert {path.name for path in Path(folder).iterdir()} <= {'a.zip', 'images'}
