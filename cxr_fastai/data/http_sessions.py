"""The HTTP sessions of downloads: repeated requests, redirects that stay encrypted, and errors in a few words.

Only the body of the last response is read. Those of redirects and of temporary errors can be endless.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from urllib.parse import urljoin, urlsplit

import requests
from urllib3.exceptions import DecodeError, HTTPError, MaxRetryError
from urllib3.util import Retry

TIMEOUT = (10, 60)
"""Seconds to wait for a connection, and for the next bytes."""
RETRIES = 3
"""Number of further requests after one that failed; the count starts again when the download has made progress."""
RETRY_STATUS = (408, 429, *range(500, 600))
"""Status codes of temporary failures."""
MAX_REDIRECTS = 5
ERROR_TEXTS = (
    (requests.Timeout, 'no answer in time'),
    (requests.exceptions.ProxyError, 'the proxy refuses the connection'),
    (requests.exceptions.SSLError, 'the certificate is not trusted'),
    (requests.exceptions.ChunkedEncodingError, 'the connection was interrupted'),
    (requests.ConnectionError, 'no connection, or the connection was lost'),
)
"""Replacements for the messages of `requests`, which have several lines and can contain signed addresses."""


@dataclass(frozen=True)
class Deadline:
    """The end of a download, `seconds` after its start."""

    seconds: float
    start: float = field(default_factory=time.monotonic)

    def remaining(self) -> float:
        """Return the remaining seconds. Raises `requests.RequestException` if there are none."""
        remaining = self.start + self.seconds - time.monotonic()
        if remaining <= 0:
            raise requests.RequestException(f'the download takes longer than {self.seconds:,g} seconds')
        return remaining


def make_retry(backoff: float) -> Retry:
    """Return the count of repetitions of a failed request; `backoff` is in seconds, doubled for each repetition."""
    return Retry(RETRIES, backoff_factor=backoff)


def next_retry(retry: Retry, deadline: Deadline) -> Retry:
    """Return `retry` with one repetition less, after its backoff.

    Raises `MaxRetryError` if none is left, and `requests.RequestException` after the deadline.
    """
    retry = retry.increment()
    time.sleep(min(retry.get_backoff_time(), deadline.remaining()))
    return retry


class _SecureSession(requests.Session):
    """A session that never leaves an encrypted connection for a plain one, and reads no body of a redirect."""

    def __init__(self) -> None:
        super().__init__()
        self.max_redirects = MAX_REDIRECTS
        self.hooks['response'].append(_close_redirect)

    def get_redirect_target(self, response: requests.Response) -> str | None:
        try:
            target = super().get_redirect_target(response)
            schemes = urlsplit(response.url).scheme, urlsplit(urljoin(response.url, target or '')).scheme
        except ValueError as error:
            raise requests.exceptions.InvalidURL('the server redirects to an invalid address') from error
        if target and schemes[0] == 'https' and schemes[1] != 'https':
            raise requests.exceptions.InvalidURL(
                f'the server redirects from https to {schemes[1]}, which is not encrypted'
            )
        return target


def _close_redirect(response: requests.Response, **_: object) -> None:
    """Close the connection of a redirect, so that `requests`, which reads its body, finds that empty."""
    if response.is_redirect:
        response.close()


def make_session() -> requests.Session:
    """Return a session that follows a few encrypted redirects, whose bodies it does not read."""
    return _SecureSession()


def open_url(
    session: requests.Session, url: str, headers: Mapping[str, str], backoff: float, deadline: Deadline
) -> requests.Response:
    """Return the response to a request of `url`, whose body is not yet read. The caller closes it.

    Requests that fail, and those with a status in `RETRY_STATUS`, are repeated as `make_retry` says. Raises
    `requests.RequestException` if the last one fails, or after the deadline.
    """
    retry = make_retry(backoff)
    while True:
        remaining = deadline.remaining()
        timeout = min(TIMEOUT[0], remaining), min(TIMEOUT[1], remaining)
        try:
            response = session.get(url, headers=dict(headers), stream=True, timeout=timeout)
            if response.status_code not in RETRY_STATUS:
                return response
            response.close()
            response.raise_for_status()
        except (requests.ConnectionError, requests.Timeout, requests.HTTPError) as error:
            failure = error
        try:
            retry = next_retry(retry, deadline)
        except MaxRetryError as exhausted:
            raise failure from exhausted


def read_body(response: requests.Response, size: int, deadline: Deadline) -> Iterator[bytes]:
    """Yield the body of a response as it arrives, at most `size` bytes at a time.

    Raises `requests.RequestException` after the deadline, even if the server sends a byte a minute.
    """
    while True:
        try:
            chunk = response.raw.read1(size, decode_content=True)
        except DecodeError as error:
            raise requests.exceptions.ContentDecodingError(error) from error
        except HTTPError as error:
            raise requests.exceptions.ChunkedEncodingError(error) from error
        if not chunk:
            return
        deadline.remaining()
        yield chunk


@contextmanager
def urllib3_warnings_off() -> Iterator[None]:
    """Hide urllib3's warnings, such as those of damaged headers, which would reach standard error."""
    logger = logging.getLogger('urllib3')
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def describe_error(error: Exception) -> str:
    """Return the cause of a failed download in a few words on one line."""
    response = getattr(error, 'response', None)
    if response is not None:
        return f'the server answers {response.status_code} {response.reason}'
    for kind, text in ERROR_TEXTS:
        if isinstance(error, kind):
            return text
    return ' '.join(str(error).split())
