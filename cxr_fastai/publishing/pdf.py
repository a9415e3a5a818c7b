"""A page on paper: Chromium prints it, as the screen shows it."""
from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory

from cxr_fastai.core.files import CXRError, atomic

BROWSERS = ('chromium', 'chromium-browser', 'google-chrome', 'google-chrome-stable', 'chrome', 'msedge',
            '/Applications/Google Chrome.app/Contents/MacOS/Google Chrome')
QUIET = ('--headless', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking',
         '--disable-component-update', '--disable-sync', '--no-pdf-header-footer')
PATIENCE = 120
"""Seconds that printing may take."""


def find_browser() -> str | None:
    """The Chromium, Chrome or Edge on this machine, if there is one."""
    return next((found for name in BROWSERS if (found := shutil.which(name))), None)


def print_pdf(page: Path, pdf: Path) -> None:
    """Print the HTML file `page` to `pdf`, atomically. Raises `CXRError` where no browser is found or it fails."""
    if not (browser := find_browser()):
        raise CXRError(f'--pdf: neither Chromium nor Chrome was found: install one, or print {page} from a browser.')
    sandbox = ['--no-sandbox'] if hasattr(os, 'geteuid') and os.geteuid() == 0 else []  # root has none
    with TemporaryDirectory() as profile, atomic(pdf) as temporary:
        made = Path(profile)/'page.pdf'
        command = [browser, *QUIET, *sandbox, f'--user-data-dir={profile}/user', f'--print-to-pdf={made}',
                   page.resolve().as_uri()]
        try: subprocess.run(command, capture_output=True, timeout=PATIENCE, check=True)
        except (subprocess.SubprocessError, OSError) as error:
            raise CXRError(f'--pdf: {browser} failed ({error}): print {page} from a browser.') from error
        if not made.is_file(): raise CXRError(f'--pdf: {browser} wrote nothing: print {page} from a browser.')
        temporary.write_bytes(made.read_bytes())
