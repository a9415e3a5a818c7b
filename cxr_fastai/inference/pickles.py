"""Exported learners: written without a name of a folder or image, opened only when trusted, and then by a list of what a
learner may hold."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import pickle
import pickletools
import re
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import date
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

from cxr_fastai.core.errors import CXRError, CXRWarning, UsageError, first_line
from cxr_fastai.core.files import atomic, write_json, writing
from cxr_fastai.inference._unpickler import Unpickler, check_network
from cxr_fastai.inference.config import ModelConfig
from cxr_fastai.inference.selftest import Canary

if TYPE_CHECKING:
    from fastai.learner import Learner

LAST_BATCH = 'dl', 'xb', 'yb', 'pred', 'loss', 'loss_grad'
"""What a learner keeps of the images that it saw last."""


def save_learner(learn: Learner, path: Path, config: ModelConfig) -> str:
    """Export `learn` to `path` for stock `load_learner`, atomically, with plain pickle and without a folder's name;
    trust it, and return its SHA-256. What it predicts of the canary images goes with it.

    (fastai's `export` writes in place, embeds bytecode and paths, and leaves a gutted Learner when it fails.)
    """
    import torch

    from cxr_fastai.inference.engines import TorchEngine

    canary = Canary.of(TorchEngine(copy.deepcopy(learn.model).cpu()), config.size)  # engines change mode and layout
    learn.config = {**asdict(config), 'canary': canary.as_dict()}
    buffer = BytesIO()  # torch would tell of a full disk by a RuntimeError
    with _emptied(learn):
        torch.save(learn, buffer, pickle_module=pickle)
    with atomic(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())
    digest = hashlib.sha256(buffer.getbuffer()).hexdigest()
    try:
        trust(digest, 'exported here')
    except CXRError as error:  # what took hours to train is whole all the same
        warnings.warn(
            f'{path} is not in the store of trust, so this program will not open it: {error}', CXRWarning, stacklevel=2
        )
    return digest


def load_learner(path: Path) -> Learner:
    """The `Learner` in the file `path`, on the CPU. Raises `UntrustedError` where its SHA-256 is not trusted, and then
    opens nothing of it; `CXRError` where it is no learner of this package, names what no learner needs, or does not
    predict of the canary images what it should."""
    data = path.read_bytes()
    check_trusted(hashlib.sha256(data).hexdigest(), path)
    archive = _plain_archive(data, path)
    from fastai.learner import load_learner as load

    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        # A broken pickle raises whatever its bytes ask for.
        try:
            learn = load(archive, pickle_module=SimpleNamespace(Unpickler=Unpickler, __name__='pickle'))
            facts = getattr(learn, 'config', None)
            if isinstance(facts, dict):
                check_network(learn.model)
        except Exception as error:
            raise CXRError(f'{path}: not an exported learner ({_cause(error)}).') from error
    if not isinstance(facts, dict):
        raise CXRError(
            f'{path}: an exported {type(learn).__name__} without image size and threshold, so not made by '
            'cxr-fastai: `cxr-fastai export` makes one.'
        )
    if 'canary' not in facts:
        raise CXRError(f'{path}: without canary images: export it again.')
    from cxr_fastai.inference.engines import TorchEngine

    Canary.from_dict(facts['canary'], path).check(TorchEngine(learn.model), path)
    return learn


def _plain_archive(data: bytes, path: Path) -> BytesIO:
    """The files in `data` in a zip that can be read in one way only. Raises `CXRError` unless `data` is what
    `torch.save` writes today: a zip of one pickle and plain storages."""
    made = BytesIO()
    try:
        if not data.startswith(b'PK\x03\x04'):
            raise zipfile.BadZipFile('not a zip of torch')
        with zipfile.ZipFile(BytesIO(data)) as archive, zipfile.ZipFile(made, 'w') as plain:
            _check_names(archive)
            for name in archive.namelist():
                content = archive.read(name)
                if name.endswith('.pkl'):
                    _check_end(content)
                plain.writestr(zipfile.ZipInfo(name), content)
    except Exception as error:  # what a broken zip raises is up to its bytes
        raise CXRError(f'{path}: not an exported learner ({_cause(error)}).') from None
    made.seek(0)
    return made


def _check_names(archive: zipfile.ZipFile) -> None:
    names = archive.namelist()
    pickles = [name for name in names if name.endswith('.pkl')]
    if (
        len(pickles) != 1
        or not pickles[0].endswith('/data.pkl')
        or len(set(names)) != len(names)
        or any('/code/' in name for name in names)
    ):
        raise CXRError(f'it has {len(pickles)} pickles, or code')
    if any(entry.compress_type for entry in archive.infolist()):
        raise CXRError('it is compressed')


def _check_end(content: bytes) -> None:
    *_, (_, _, end) = pickletools.genops(content)
    if end != len(content) - 1:
        raise CXRError('something follows its pickle')


@contextmanager
def _emptied(learn: Learner) -> Iterator[None]:
    """`learn` without images, results, optimiser and paths; it gets them back, also after an exception."""
    kept = {name: learn.__dict__[name] for name in ('dls', 'opt', 'path', *LAST_BATCH) if name in learn.__dict__}
    from fastcore.foundation import L

    folder = learn.dls.path
    steps = [step for images_or_labels in learn.dls.train_ds.tls for step in images_or_labels.tfms]
    openers = [(step, step.skip) for step in steps if hasattr(step, 'skip')]
    try:
        learn.dls.path = learn.path = Path('.')
        learn.dls, learn.opt = learn.dls.new_empty(), None
        for name in LAST_BATCH:
            learn.__dict__.pop(name, None)
        for metric in learn.metrics:
            metric.reset()  # they hold the last scores and labels
        for dl in learn.dls.loaders:
            for images_or_labels in dl.dataset.tls:
                images_or_labels.splits = L([[], []])
        for step, _ in openers:
            step.skip = False  # prediction owes an answer for every image
        yield
    finally:
        for name, value in kept.items():
            setattr(learn, name, value)
        learn.dls.path = folder
        for step, skip in openers:
            step.skip = skip


def _cause(error: BaseException) -> str:
    """The error's first line; fastai hides a missing package behind another."""
    if isinstance(error.__context__, ModuleNotFoundError):
        return f'it needs the package {error.__context__.name}'
    return first_line(error)


HEX = re.compile(r'[0-9a-f]{64}')


class UntrustedError(CXRError):
    """A model file that could run code, and that nobody has vouched for."""

    exit_code = 4


def trust_store() -> Path:
    """The file with the user's trusted hashes: CXR_TRUST, else `cxr_fastai/trust.json` in the user's settings."""
    settings = os.environ.get('XDG_CONFIG_HOME') or '~/.config'
    try:
        return Path(os.environ.get('CXR_TRUST') or Path(settings, 'cxr_fastai', 'trust.json')).expanduser()
    except RuntimeError:
        raise UsageError('no home folder: name a file for the trusted hashes by CXR_TRUST.') from None


def trusted() -> dict[str, dict[str, str]]:
    """SHA-256 -> when and why it was trusted. Raises `CXRError` for a store that cannot be read."""
    path = trust_store()
    if not path.exists():
        return {}
    try:
        known = json.loads(path.read_text(encoding='utf-8'))
        if isinstance(known, dict) and all(map(HEX.fullmatch, known)):
            return known
    except (ValueError, OSError):
        pass
    raise CXRError(f'{path}: not a store of trusted hashes: mend or delete it; then nothing is trusted.')


def trust(sha256: str, why: str) -> None:
    """Add a hash to the store. Raises `UsageError` for what is no SHA-256."""
    _write(trusted() | {check_hash(sha256): {'why': why, 'since': date.today().isoformat()}})


def vouch(path: Path, sha256: str) -> str:
    """Trust the file `path`, whose hash its maker told; returns it. Raises `UsageError` where the file has another."""
    try:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise UsageError(f'{path}: cannot be read ({error.strerror}).') from None
    if found != check_hash(sha256):
        raise UsageError(
            f'{path}: its SHA-256 is {found}, not what you were told: it is another file, so it was not trusted.'
        )
    trust(found, f'vouched for: {path.name}')
    return found


def distrust(sha256: str) -> None:
    """Take a hash out of the store. Raises `UsageError` where it is not in it."""
    known = trusted()
    if check_hash(sha256) not in known:
        raise UsageError(f'{sha256}: not among the trusted hashes.')
    _write({name: facts for name, facts in known.items() if name != sha256.lower()})


def check_hash(sha256: str) -> str:
    """`sha256` in small letters. Raises `UsageError` where it is none."""
    if not HEX.fullmatch(sha256.lower()):
        raise UsageError(f'{sha256}: not a SHA-256 (64 hexadecimal digits).')
    return sha256.lower()


def check_trusted(sha256: str, path: Path) -> None:
    """Raise `UntrustedError` unless the bytes of `path`, whose hash this is, are trusted."""
    if sha256 not in trusted():
        raise UntrustedError(
            f'{path} is a pickle, which can run code while it opens, and nobody has vouched for it: '
            f'nothing of it was opened. Compare its SHA-256 {sha256} with what its maker tells you by '
            f'another way, then `cxr-fastai trust {path} --sha256 {sha256}`; or ask for a bundle '
            'without pickle.'
        )


def _write(known: dict[str, dict[str, str]]) -> None:
    path = trust_store()
    with writing(path, 'CXR_TRUST'):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, known)
    path.chmod(0o600)
