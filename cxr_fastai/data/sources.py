"""Download the data set from one of its sources into the folders of the Kaggle layout."""

from __future__ import annotations

import logging
import re
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import requests
from urllib3.exceptions import MaxRetryError

from cxr_fastai.core.errors import CXRError, CXRWarning, OutputError, UsageError
from cxr_fastai.core.files import StrPath, check_new, writing
from cxr_fastai.core.progress import counted, progress_bar
from cxr_fastai.data.archives import check_md5, hash_file, new_folder, unpack_arrays, unpack_images
from cxr_fastai.data.find import find_images
from cxr_fastai.data.http_sessions import (
    Deadline,
    describe_error,
    make_retry,
    make_session,
    next_retry,
    open_url,
    read_body,
    urllib3_warnings_off,
)
from cxr_fastai.data.items import read_items
from cxr_fastai.data.partial_files import PartialFile

CHUNK = 2**16
"""Bytes written at a time."""
CONTENT_RANGE = re.compile(r'bytes (?:(?P<start>\d+)-\d+|\*)/(?P<total>\d+)')
CREDENTIALS = (
    'KAGGLE_API_TOKEN, KAGGLE_USERNAME with KAGGLE_KEY, ~/.kaggle/access_token or ~/.kaggle/kaggle.json, '
    'created at https://www.kaggle.com/settings'
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """A place that offers the images for download.

    Attributes
    ----------
    name : value of the option `--source`.
    page : web page where a person finds the file.
    file : name of the file on that page, of about `size`.
    url : address of the file, or Kaggle's handle.
    fetch : downloads the archive, and returns its path.
    unpack : writes the images of an archive into a folder, and returns the number of ignored files by reason.
    images : number of images in the complete data set.
    md5 : hash of the file; empty if it is unknown.
    limitation : what the images of this source do not allow.
    backoff : seconds to wait before the second retry; doubled for each further one. The first retry does not wait.
    max_bytes : largest size of the file that is downloaded.
    max_seconds : longest time of one download. A later call resumes it.
    """

    name: str
    page: str
    file: str
    size: str
    url: str
    fetch: Callable[[Source, Path], Path]
    unpack: Callable[[Path, Path], Counter[str]]
    images: int = 5856
    licence: str = 'CC BY 4.0'
    md5: str = ''
    limitation: str = ''
    backoff: float = 1.0
    max_bytes: int = 5 * 10**9
    max_seconds: float = 24 * 3600


def download(folder: StrPath, source: str | Source = 'mendeley') -> pd.DataFrame:
    """Download the images of `source` to `folder`/train|val|test/NORMAL|PNEUMONIA, and return their items table.

    The folder appears when it is complete. An incomplete download stays in `folder`.download, and the next call resumes
    it. A file with the source's name in there is used instead of the network, and kept. `.attrs['ignored']` of the
    table counts ignored files by reason. Raises `UsageError` if the folder is not empty, `OutputError` if it cannot be
    written, `CXRError` if the download fails or is not the complete data set.
    """
    folder = Path(folder)
    if isinstance(source, str):
        if source not in SOURCES:
            raise UsageError(f'--source {source}: choose {", ".join(SOURCES)}.')
        source = SOURCES[source]
    check_new(folder)
    folder = folder.resolve()
    manual_file = folder.with_name(f'{folder.name}.download') / source.file
    archive = manual_file if manual_file.exists() else source.fetch(source, manual_file)
    try:
        check_md5(archive, source.md5)
        with new_folder(folder) as temporary:
            ignored = source.unpack(archive, temporary)
            _check_complete(archive, temporary, source)
    except (OutputError, UsageError):
        raise  # the archive is not the cause, so it stays
    except CXRError as error:
        raise CXRError(f'{error} {_discard(archive, manual_file)}') from error
    with suppress(OSError):
        PartialFile.of(manual_file).delete()
        manual_file.parent.rmdir()
    if source.limitation:
        warnings.warn(source.limitation, CXRWarning, stacklevel=2)
    items = read_items(folder)
    items.attrs['ignored'] = dict(ignored)
    return items


def _check_complete(archive: Path, folder: Path, source: Source) -> None:
    images, _ = find_images(folder)
    if len(images) != source.images:
        raise CXRError(f'{archive.name}: holds {counted(len(images))}; expected {source.images:,}.')


def _discard(archive: Path, manual_file: Path) -> str:
    """Delete an invalid archive unless the user put it there; return what to do next."""
    part = PartialFile.of(manual_file)
    if archive != part.path:
        return f'Delete {archive} and run the same command again.'
    part.delete()
    return 'The download was deleted. Run the same command again.'


def fetch_url(source: Source, archive: Path) -> Path:
    """Download the file of `source` to `archive`.part, resuming an earlier download, and return that path.

    Failed requests are repeated. A connection that breaks while the file arrives is resumed with a range
    request. Raises `CXRError` after `RETRIES` repetitions without progress, or at once if the server refuses.
    """
    part = PartialFile.of(archive)
    with writing(part.path):
        part.path.parent.mkdir(parents=True, exist_ok=True)
        part.delete_damaged()
        if source.md5 and part.size and hash_file(part.path) == source.md5:
            return part.path
        try:
            with make_session() as session, urllib3_warnings_off():
                _receive_all(session, source, part)
        except requests.RequestException as error:
            raise CXRError(
                f'{source.url}: {describe_error(error)}. Run the same command again to resume the download, or '
                f'{_manual_download(source, archive)}'
            ) from error
    return part.path


def _receive_all(session: requests.Session, source: Source, part: PartialFile) -> None:
    """Request the missing bytes of `part` until it is complete. Raises `requests.RequestException`."""
    retry = make_retry(source.backoff)
    furthest = 0
    deadline = Deadline(source.max_seconds)
    while not _receive(session, source, part, deadline):
        size = part.size
        if size > furthest:
            furthest = size
            retry = make_retry(source.backoff)
        log.info('%s: interrupted at %s bytes, resuming', source.file, f'{size:,}')
        try:
            retry = next_retry(retry, deadline)
        except MaxRetryError as error:
            raise requests.exceptions.ChunkedEncodingError from error


def _receive(session: requests.Session, source: Source, part: PartialFile, deadline: Deadline) -> bool:
    """Request what `part` lacks and append it until the deadline; return whether `part` is complete then."""
    size = part.size
    headers = {'Accept-Encoding': 'identity'}  # the length of a compressed response is not that of the file
    if size:
        headers['Range'] = f'bytes={size}-'
        if part.etag:
            headers['If-Range'] = part.etag
    with open_url(session, source.url, headers, source.backoff, deadline) as response:
        if size and response.status_code in (206, 416):
            start, total = _read_range(response)
            if start != size:
                part.delete()
                return False
            if start == total:
                return True
        else:
            _check_file_response(response)
            start, total = 0, _content_length(response)
            part.keep_etag(response.headers.get('ETag', ''))
        try:
            _append(response, part.path, source, start, total, deadline)
        except (requests.exceptions.ChunkedEncodingError, requests.ConnectionError):
            return False
    return total in (None, part.size)


def _read_range(response: requests.Response) -> tuple[int | None, int | None]:
    """Return the first byte and the total length in the response to a range request; None if they are missing.

    The response to a request that starts at the end (416) has the total length as its first byte.
    """
    match = CONTENT_RANGE.fullmatch(response.headers.get('Content-Range', ''))
    if not match:
        return None, None
    return int(match['start'] or match['total']), int(match['total'])


def _check_file_response(response: requests.Response) -> None:
    response.raise_for_status()
    if response.headers.get('Content-Type', '').startswith('text/html'):
        raise requests.RequestException('the server sent a web page instead of the file')


def _content_length(response: requests.Response) -> int | None:
    length = response.headers.get('Content-Length')
    return int(length) if length else None


def _append(
    response: requests.Response, part: Path, source: Source, start: int, total: int | None, deadline: Deadline
) -> None:
    """Append the body of a response to `part`. Raises `requests.RequestException` if it is too large or too slow."""
    size = start
    _check_size(total or 0, source)
    with (
        open(part, 'ab' if start else 'wb') as file,
        progress_bar(total, source.file, initial=start, unit='B', unit_scale=True) as bar,
    ):
        for chunk in read_body(response, CHUNK, deadline):
            size += len(chunk)
            _check_size(size, source)
            file.write(chunk)
            bar.update(len(chunk))


def _check_size(size: int, source: Source) -> None:
    if size > source.max_bytes:
        raise requests.RequestException(
            f'the server sends {size:,} bytes or more; {source.file} may have {source.max_bytes:,}'
        )


def fetch_kaggle(source: Source, archive: Path) -> Path:
    """Download the files of `source` with kagglehub, and return their folder in its cache.

    kagglehub shows its own progress, and resumes an earlier download. Raises `CXRError` if the package is missing, if
    Kaggle refuses or if there is no connection.
    """
    advice = f'Kaggle takes credentials from {CREDENTIALS}. Or {_manual_download(source, archive)}'
    try:
        import kagglehub
    except ImportError:
        raise CXRError(
            '--source kaggle needs a package that is not installed: pip install "cxr_fastai[kaggle]". Or '
            f'{_manual_download(source, archive)}'
        ) from None
    try:
        return Path(kagglehub.dataset_download(source.url))
    except requests.RequestException as error:
        raise CXRError(f'Kaggle, {source.url}: {describe_error(error)}. {advice}') from error
    except OSError as error:
        raise OutputError(
            f'the cache of kagglehub cannot be written ({error.strerror}). Free disk space, or choose another folder '
            'with KAGGLEHUB_CACHE.'
        ) from error
    except Exception as error:  # kagglehub's exceptions have no common base class; bad credentials are a ValueError
        raise CXRError(f'Kaggle, {source.url}: {describe_error(error)}. {advice}') from error


def _manual_download(source: Source, archive: Path) -> str:
    return (
        f'download {source.file} ({source.size}) from {source.page}, save it as {archive} and run the same command '
        'again.'
    )


SOURCES = {
    'mendeley': Source(
        name='mendeley',
        page='https://data.mendeley.com/datasets/rscbjbr9sj/2',
        file='ChestXRay2017.zip',
        size='about 1.2 GB',
        url='https://data.mendeley.com/public-files/datasets/rscbjbr9sj/files/f12eaf6d-6023-432f-acc9-80c9d7393433/'
        'file_downloaded',
        fetch=fetch_url,
        unpack=unpack_images,
        limitation='Mendeley offers train and test only; `train` takes validation images from train, by patient.',
    ),
    'kaggle': Source(
        name='kaggle',
        page='https://www.kaggle.com/datasets/paultimothymooney/chest-xray-pneumonia',
        file='archive.zip',
        size='about 2.3 GB',
        url='paultimothymooney/chest-xray-pneumonia',
        fetch=fetch_kaggle,
        unpack=unpack_images,
    ),
    'medmnist': Source(
        name='medmnist',
        page='https://zenodo.org/records/10519652',
        file='pneumoniamnist_224.npz',
        size='about 0.2 GB',
        url='https://zenodo.org/records/10519652/files/pneumoniamnist_224.npz?download=1',
        fetch=fetch_url,
        unpack=unpack_arrays,
        md5='d6a3c71de1b945ea11211b03746c1fe1',
        limitation='MedMNIST has no patient numbers and drew val from train image by image, so a patient can be in '
        'both: metrics on val are too optimistic, and `--valid patients` does not help. The images are cropped and '
        'small.',
    ),
}
"""The sources by name."""
