"""Printing of a page to PDF by the browser of this computer."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory

from cxr_fastai.core.errors import CXRError
from cxr_fastai.core.files import StrPath, atomic

BROWSERS = (
    'chromium',
    'chromium-browser',
    'google-chrome',
    'google-chrome-stable',
    'chrome',
    'msedge',
    '/Applications/Google Chrome.app/Contents/MacOS/Google Chrome',
)
BROWSER_OPTIONS = (
    '--headless',
    '--disable-gpu',
    '--disable-quic',
    '--no-first-run',
    '--disable-background-networking',
    '--disable-component-update',
    '--disable-sync',
    '--no-pdf-header-footer',
)
PRINT_TIMEOUT = 120
"""Maximum duration of printing in seconds."""


def find_browser() -> str | None:
    """Return the path of Chromium, Chrome or Edge on this computer, None if there is none."""
    for name in BROWSERS:
        path = shutil.which(name)
        if path:
            return path
    return None


def print_pdf(page: StrPath, pdf: StrPath) -> None:
    """Print the HTML file `page` to `pdf`, atomically. Raises `CXRError` if no browser is found or printing fails."""
    pdf = Path(pdf)
    page = Path(page)
    browser = find_browser()
    if browser is None:
        raise CXRError(f'--pdf: no Chromium, Chrome or Edge was found. Install one, or print {page} from a browser.')
    is_root = hasattr(os, 'geteuid') and os.geteuid() == 0
    sandbox_options = ['--no-sandbox'] if is_root else []  # Chromium has no sandbox for root
    with TemporaryDirectory() as folder, atomic(pdf) as temporary:
        printed = Path(folder) / 'page.pdf'
        command = [
            browser,
            *BROWSER_OPTIONS,
            *sandbox_options,
            f'--user-data-dir={folder}/user',
            f'--print-to-pdf={printed}',
            page.resolve().as_uri(),
        ]
        try:
            subprocess.run(command, capture_output=True, timeout=PRINT_TIMEOUT, check=True)
        except (subprocess.SubprocessError, OSError) as error:
            raise CXRError(f'--pdf: {browser} failed ({error}). Print {page} from a browser.') from error
        if not printed.is_file():
            raise CXRError(f'--pdf: {browser} wrote no file. Print {page} from a browser.')
        temporary.write_bytes(printed.read_bytes())
