"""The places that hand out the real images, and the one function that brings them to disk in the Kaggle layout."""

from __future__ import annotations

import re
import time
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import requests

from cxr_fastai.core.errors import CXRError, CXRWarning, OutputError, UsageError
from cxr_fastai.core.files import check_new, writing
from cxr_fastai.core.progress import progress_bar
from cxr_fastai.data.archives import check_hash, draw_images, hash_file, new_folder, unpack_images
from cxr_fastai.data.find import find_images
from cxr_fastai.data.items import read_items

TIMEOUT = (10, 60)
"""Seconds to wait for a connection, and for the next bytes."""
PAUSES = (1, 2, 4)
"""Seconds before each new attempt; they count from the first again whenever the download got further."""
CHUNK = 2**16
TRANSIENT = (408, 429, *range(500, 600))
"""Status codes after which a new attempt may help."""
REASONS = (
    (requests.Timeout, 'no answer in time'),
    (requests.exceptions.ProxyError, 'the proxy refuses'),
    (requests.exceptions.SSLError, 'the certificate is not trusted'),
    (requests.exceptions.ChunkedEncodingError, 'the connection was cut'),
    (requests.ConnectionError, 'there is no connection, or it was lost'),
)
"""Told in place of the text of `requests`, which spans lines and may hold signed addresses."""
CONTENT_RANGE = re.compile(r'bytes (?:(?P<start>\d+)-\d+|\*)/(?P<total>\d+)')
CREDENTIALS = (
    'KAGGLE_API_TOKEN, KAGGLE_USERNAME with KAGGLE_KEY, ~/.kaggle/access_token or ~/.kaggle/kaggle.json, '
    'made at https://www.kaggle.com/settings'
)


@dataclass(frozen=True)
class Source:
    """One place that hands out the images: `get` brings the archive to disk, `arrange` makes images of it.

    A person finds `file`, of about `size`, on `page`. `url` is an address, or Kaggle's handle; `doubt` is what the
    images of this source cannot show.
    """

    name: str
    page: str
    file: str
    size: str
    url: str
    get: Callable[[Source, Path], Path]
    arrange: Callable[[Path, Path], Counter]
    images: int = 5856
    licence: str = 'CC BY 4.0'
    md5: str = ''
    doubt: str = ''


def download(folder: Path, source: str | Source = 'mendeley') -> pd.DataFrame:
    """Bring the images of `source` to `folder`/train|val|test/NORMAL|PNEUMONIA, which appears whole or not at all.

    What is still incomplete waits in `folder`.download for the next call; a file of the source's name that lies there
    is used instead of the network, and kept. Returns the items table, with `.attrs['ignored']` counting what was
    passed over. Raises `UsageError` where the folder has something in it,
    `OutputError` where it cannot be written, `CXRError` where the images cannot be had or are not what they should be.
    """
    if isinstance(source, str):
        if source not in SOURCES:
            raise UsageError(f'--source {source}: choose {", ".join(SOURCES)}.')
        source = SOURCES[source]
    check_new(folder)
    folder = folder.resolve()
    archive = folder.with_name(f'{folder.name}.download') / source.file
    got = archive if archive.exists() else source.get(source, archive)
    try:
        check_hash(got, source.md5)
        with new_folder(folder) as temporary:
            skipped = source.arrange(got, temporary)
            images = find_images(temporary)[0]
            if len(images) != source.images:
                raise CXRError(f'{got.name}: holds {len(images):,} images, and {source.images:,} are expected.')
    except (OutputError, UsageError):
        raise  # the archive is not to blame
    except CXRError as error:
        raise CXRError(f'{error} {_discard(got, archive)}') from error
    with suppress(OSError):
        _forget(_part(archive))
        archive.parent.rmdir()
    if source.doubt:
        warnings.warn(source.doubt, CXRWarning, stacklevel=2)
    items = read_items(folder)
    items.attrs['ignored'] = dict(skipped)
    return items


def fetch_url(source: Source, archive: Path) -> Path:
    """Download the source's archive to the neighbour `.part` of `archive`, going on where an earlier call stopped.

    Raises `CXRError` after some attempts without progress, or at once where the server refuses.
    """
    part, failures, furthest = _part(archive), 0, 0
    with writing(part):
        part.parent.mkdir(parents=True, exist_ok=True)
        if source.md5 and part.exists() and hash_file(part) == source.md5:
            return part
        while True:
            try:
                _receive(source, part)
                return part
            except requests.RequestException as error:
                status = getattr(error.response, 'status_code', None)
                size = _size(part)
                failures, furthest = (1, size) if size > furthest else (failures + 1, furthest)
                if failures > len(PAUSES) or status and status not in TRANSIENT:
                    raise CXRError(
                        f'{source.url}: {explain(error)}. Run the same command again to go on, or '
                        f'{_by_hand(source, archive)}'
                    ) from error
                time.sleep(PAUSES[failures - 1])


def fetch_kaggle(source: Source, archive: Path) -> Path:
    """The folder in kagglehub's cache that holds the source's files; kagglehub shows its own progress, and resumes.

    Raises `CXRError` where the package is missing, Kaggle refuses or there is no connection.
    """
    advice = f'Kaggle takes credentials from {CREDENTIALS}. Or {_by_hand(source, archive)}'
    try:
        import kagglehub
    except ImportError:
        raise CXRError(
            '--source kaggle needs a package that is not installed: pip install "cxr_fastai[kaggle]". Or '
            f'{_by_hand(source, archive)}'
        ) from None
    try:
        return Path(kagglehub.dataset_download(source.url))
    except requests.RequestException as error:
        raise CXRError(f'Kaggle, {source.url}: {explain(error)}. {advice}') from error
    except OSError as error:
        raise OutputError(
            f"kagglehub's cache: cannot be written ({error.strerror}). Free the disk, or name another "
            'place by KAGGLEHUB_CACHE.'
        ) from error
    # kagglehub's own errors have no base, and those of its credentials are ValueError.
    except Exception as error:
        raise CXRError(f'Kaggle, {source.url}: {explain(error)}. {advice}') from error


def explain(error: Exception) -> str:
    """What went wrong, in a few words on one line."""
    response = getattr(error, 'response', None)
    if response is not None:
        return f'the server answers {response.status_code} {response.reason}'
    known = (text for kind, text in REASONS if isinstance(error, kind))
    return next(known, ' '.join(str(error).split()))


def _receive(source: Source, part: Path) -> None:
    """Ask for what `part` still lacks and append it. Raises `requests.RequestException`."""
    have, etag = _size(part), _etag(part)
    headers = {'Accept-Encoding': 'identity'}  # the lengths of a packed answer would not be the file's
    if have:
        headers['Range'] = f'bytes={have}-'
    if have and etag.exists():
        headers['If-Range'] = etag.read_text(encoding='utf-8')
    with requests.get(source.url, headers=headers, stream=True, timeout=TIMEOUT) as response:
        start, total = _place(response, have)
        if start is None:
            _forget(part)
            raise requests.RequestException('the server did not go on where the download had stopped')
        if have and start == total:
            return
        if not start:
            _note_version(response, etag)
        with (
            open(part, 'ab' if start else 'wb') as file,
            progress_bar(total, source.file, initial=start, unit='B', unit_scale=True) as bar,
        ):
            for chunk in response.iter_content(CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
    if total not in (None, _size(part)):
        raise requests.exceptions.ChunkedEncodingError


def _place(response: requests.Response, have: int) -> tuple[int | None, int | None]:
    """At which byte the answer starts, None where that is not where `have` bytes end; and the length of the whole."""
    if have and response.status_code in (206, 416):
        found = CONTENT_RANGE.fullmatch(response.headers.get('Content-Range', ''))
        if not found or int(found['start'] or found['total']) != have:
            return None, None
        return have, int(found['total'])
    response.raise_for_status()
    if response.headers.get('Content-Type', '').startswith('text/html'):
        raise requests.RequestException('a web page came in place of the file')
    length = response.headers.get('Content-Length')
    return 0, int(length) if length else None


def _note_version(response: requests.Response, etag: Path) -> None:
    """Keep the ETag, so that a later call does not join the parts of two versions; a weak one does not tell them."""
    etag.unlink(missing_ok=True)
    if (value := response.headers.get('ETag', '')).startswith('"'):
        etag.write_text(value, encoding='utf-8')


def _discard(got: Path, archive: Path) -> str:
    """Delete an archive found bad if it is our own download; what to do next, in words."""
    if got != _part(archive):
        return f'Delete {got} and run the same command again.'
    _forget(got)
    return 'The download was deleted: run the same command again.'


def _by_hand(source: Source, archive: Path) -> str:
    return f'fetch {source.file} ({source.size}) from {source.page} as {archive} and run the same command again.'


def _part(archive: Path) -> Path:
    return archive.with_name(f'{archive.name}.part')


def _etag(part: Path) -> Path:
    return part.with_suffix('.etag')


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _forget(part: Path) -> None:
    for path in (part, _etag(part)):
        path.unlink(missing_ok=True)


SOURCES = {
    source.name: source
    for source in (
        Source(
            'mendeley',
            'https://data.mendeley.com/datasets/rscbjbr9sj/2',
            'ChestXRay2017.zip',
            'about 1.2 GB',
            'https://data.mendeley.com/public-files/datasets/rscbjbr9sj/files/f12eaf6d-6023-432f-acc9-80c9d7393433/'
            'file_downloaded',
            fetch_url,
            unpack_images,
            doubt='Mendeley hands out train and test only: `--valid patients` takes validation images from train.',
        ),
        Source(
            'kaggle',
            'https://www.kaggle.com/datasets/paultimothymooney/chest-xray-pneumonia',
            'archive.zip',
            'about 2.3 GB',
            'paultimothymooney/chest-xray-pneumonia',
            fetch_kaggle,
            unpack_images,
        ),
        Source(
            'medmnist',
            'https://zenodo.org/records/10519652',
            'pneumoniamnist_224.npz',
            'about 0.2 GB',
            'https://zenodo.org/records/10519652/files/pneumoniamnist_224.npz?download=1',
            fetch_url,
            draw_images,
            md5='d6a3c71de1b945ea11211b03746c1fe1',
            doubt='MedMNIST names no patients and drew val from train image by image, so a patient may be in both: '
            'figures on val flatter, and `--valid patients` cannot help. Its images are also cropped and small.',
        ),
    )
}
"""By the name that --source takes."""
