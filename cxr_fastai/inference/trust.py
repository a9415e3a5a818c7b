"""Whose pickles may be opened: a list of SHA-256, one file of the user's own."""
from __future__ import annotations

import hashlib
import json
import os
import re
from datetime import date
from pathlib import Path

from cxr_fastai.core.files import CXRError, UsageError, write_json, writing

HEX = re.compile(r'[0-9a-f]{64}')


class UntrustedError(CXRError):
    """A model file that could run code, and that nobody has vouched for."""
    exit_code = 4


def trust_store() -> Path:
    """The file with the user's trusted hashes: CXR_TRUST, else `cxr_fastai/trust.json` in the user's settings."""
    settings = os.environ.get('XDG_CONFIG_HOME') or '~/.config'
    try: return Path(os.environ.get('CXR_TRUST') or Path(settings, 'cxr_fastai', 'trust.json')).expanduser()
    except RuntimeError: raise UsageError('no home folder: name a file for the trusted hashes by CXR_TRUST.') from None


def trusted() -> dict[str, dict[str, str]]:
    """SHA-256 -> when and why it was trusted. Raises `CXRError` for a store that cannot be read."""
    path = trust_store()
    if not path.exists(): return {}
    try:
        known = json.loads(path.read_text(encoding='utf-8'))
        if isinstance(known, dict) and all(map(HEX.fullmatch, known)): return known
    except (ValueError, OSError): pass
    raise CXRError(f'{path}: not a store of trusted hashes: mend or delete it; then nothing is trusted.')


def trust(sha256: str, why: str) -> None:
    """Add a hash to the store. Raises `UsageError` for what is no SHA-256."""
    _write(trusted() | {check_hash(sha256): {'why': why, 'since': date.today().isoformat()}})


def vouch(path: Path, sha256: str) -> str:
    """Trust the file `path`, whose hash its maker told; returns it. Raises `UsageError` where the file has another."""
    try: found = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error: raise UsageError(f'{path}: cannot be read ({error.strerror}).') from None
    if found != check_hash(sha256):
        raise UsageError(f'{path}: its SHA-256 is {found}, not what you were told: it is another file, so it was not '
                         'trusted.')
    trust(found, f'vouched for: {path.name}')
    return found


def distrust(sha256: str) -> None:
    """Take a hash out of the store. Raises `UsageError` where it is not in it."""
    known = trusted()
    if check_hash(sha256) not in known: raise UsageError(f'{sha256}: not among the trusted hashes.')
    _write({name: facts for name, facts in known.items() if name != sha256.lower()})


def check_hash(sha256: str) -> str:
    """`sha256` in small letters. Raises `UsageError` where it is none."""
    if not HEX.fullmatch(sha256.lower()): raise UsageError(f'{sha256}: not a SHA-256 (64 hexadecimal digits).')
    return sha256.lower()


def check_trusted(sha256: str, path: Path) -> None:
    """Raise `UntrustedError` unless the bytes of `path`, whose hash this is, are trusted."""
    if sha256 not in trusted():
        raise UntrustedError(f'{path} is a pickle, which can run code while it opens, and nobody has vouched for it: '
                             f'nothing of it was opened. Compare its SHA-256 {sha256} with what its maker tells you by '
                             f'another way, then `cxr-fastai trust {path} --sha256 {sha256}`; or ask for a bundle '
                             'without pickle.')


def _write(known: dict[str, dict[str, str]]) -> None:
    path = trust_store()
    with writing(path, 'CXR_TRUST'): path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, known)
    path.chmod(0o600)
