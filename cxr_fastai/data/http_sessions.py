"""The HTTP sessions of downloads: repeated requests, redirects that stay encrypted, and errors in a few words."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urljoin

import requests
from requests.adapters import HTTPAdapter
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


def make_retry(backoff: float) -> Retry:
    """Return the count of repetitions of a failed request; `backoff` is in seconds, doubled for each repetition."""
    return Retry(
        RETRIES,
        status_forcelist=RETRY_STATUS,
        backoff_factor=backoff,
        raise_on_status=False,  # the last response is reported
        respect_retry_after_header=False,  # it can ask for hours
    )


class _SecureSession(requests.Session):
    """A session that never leaves an encrypted connection for a plain one."""

    def get_redirect_target(self, response: requests.Response) -> str | None:
        target = super().get_redirect_target(response)
        if target and response.url.startswith('https:') and urljoin(response.url, target).startswith('http:'):
            raise requests.exceptions.InvalidURL('the server redirects from https to http, which is not encrypted')
        return target


def make_session(backoff: float) -> requests.Session:
    """Return a session that repeats failed requests as `make_retry` says and follows a few encrypted redirects."""
    session = _SecureSession()
    session.max_redirects = MAX_REDIRECTS
    for scheme in ('https://', 'http://'):
        session.mount(scheme, HTTPAdapter(max_retries=make_retry(backoff)))
    return session


@contextmanager
def urllib3_warnings_off() -> Iterator[None]:
    """Hide urllib3's warning for each retry, which would reach standard error."""
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
