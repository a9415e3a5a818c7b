"""Exported learners: saving them, and the store of the hashes of those that the user trusts.

A pickle can run code while fastai or torch reads it. This package reads it without executing it (see `learner_files`),
and only if its SHA-256 is trusted, so that a file whose origin is unknown is noticed before it is used anywhere.
"""

from __future__ import annotations

import copy
import hashlib
import os
import pickle
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import date
from io import BytesIO
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from cxr_fastai.core.errors import CXRError, CXRWarning, UsageError
from cxr_fastai.core.files import StrPath, atomic, write_json, writing
from cxr_fastai.core.folders import final_name
from cxr_fastai.core.foreign import open_regular, read_json
from cxr_fastai.core.schemas import Fields, Table, Text
from cxr_fastai.inference.config import SCHEMA, ModelConfig
from cxr_fastai.inference.engines import TorchEngine
from cxr_fastai.inference.selftest import SelfTest

if TYPE_CHECKING:
    from fastai.learner import Learner

LAST_BATCH = ('dl', 'xb', 'yb', 'pred', 'loss', 'loss_grad')
"""Attributes of a learner that refer to its last batch of images."""
KEPT_CALLBACKS = ('TrainEvalCallback', 'Recorder', 'CastToTensor', 'ProgressCallback', 'BnFreeze')
"""Callbacks of fastai that an exported learner keeps."""
KEPT_TRANSFORMS = ('ToTensor', 'IntToFloatTensor', 'NormalizeImage')
"""Transforms of validation images that `load_learner` restores, beside the opening of an image."""
LOCK_SECONDS = 10
"""Longest time that a change of the store waits for the change of another process."""
SHA256 = re.compile(r'[0-9a-f]{64}')
MAX_STORE = 2**22
"""Largest store of trusted hashes that is read, in bytes."""
MAX_REASON = 300
"""Largest number of characters of the reason why a hash is trusted."""
PRINTABLE = r'[^\x00-\x1f\x7f-\x9f\ud800-\udfff]*'
"""A text without control characters, which could change what a terminal shows."""
STORE = Table(Fields({'since': Text(40, PRINTABLE), 'why': Text(MAX_REASON, PRINTABLE)}), SHA256.pattern)
"""What a store of trusted hashes contains."""


class UntrustedError(CXRError):
    """A pickled model file is not trusted, so it was not read."""

    exit_code = 4


# Saving.


def save_learner(learn: Learner, path: StrPath, config: ModelConfig) -> str:
    """Export `learn` to `path`, add its SHA-256 to the trusted hashes, and return it.

    `load_learner` of fastai can read the file. It contains `config` and a self-test, but no path, no image name and no
    result of the training images. Unlike `Learner.export` this writes atomically, with plain pickle, and leaves `learn`
    unchanged if it fails. Raises `OutputError` if the file cannot be written.
    """
    path = Path(path)
    import torch

    # A copy, because the engine changes the mode and the memory layout of its network.
    engine = TorchEngine(copy.deepcopy(learn.model).cpu())
    selftest = SelfTest.create(engine, config.size)
    facts = {'selftest': selftest.as_dict(), 'transforms': _own_transforms(learn)}
    learn.config = {'schema': SCHEMA, **asdict(config), **facts}
    buffer = BytesIO()  # if torch wrote the file, a full disk would be a RuntimeError
    with _without_data(learn):
        torch.save(learn, buffer, pickle_module=pickle)
    with atomic(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())
    digest = hashlib.sha256(buffer.getbuffer()).hexdigest()
    try:
        trust(digest, f'exported here: {final_name(path.parent)}/{path.name}')
    except CXRError as error:  # the learner, which may have taken hours to train, is saved anyway
        warnings.warn(
            f'{path} could not be added to the trusted hashes, so this program will not open it: {error}',
            CXRWarning,
            stacklevel=2,
        )
    return digest


def _own_transforms(learn: Learner) -> list[str]:
    """Return the names of the transforms, beyond those of this package, that change validation images."""
    from fastai.vision.augment import RandTransform

    loader = learn.dls.valid
    transforms = [*loader.after_item.fs, *loader.after_batch.fs]
    changing = [item for item in transforms if item.split_idx != 0 and not isinstance(item, RandTransform)]
    return [type(item).__name__ for item in changing if type(item).__name__ not in KEPT_TRANSFORMS]


@contextmanager
def _without_data(learn: Learner) -> Iterator[None]:
    """Remove data, results, optimizer, paths and added callbacks from `learn` within the block; restore them after."""
    from fastcore.foundation import L

    data_path = learn.dls.path
    names = ('dls', 'opt', 'path', 'model_dir', 'logger', *LAST_BATCH)
    saved = {name: vars(learn)[name] for name in names if name in vars(learn)}
    added_callbacks = [callback for callback in learn.cbs if not _is_standard(callback)]
    skipping = _transforms_that_skip(learn)
    learn.remove_cbs(added_callbacks)
    try:
        learn.dls.path = learn.path = Path('.')
        learn.model_dir = 'models'
        learn.dls = learn.dls.new_empty()
        learn.opt = None
        learn.logger = print  # after a fit with `CSVLogger` it is a method of a callback
        for callback in learn.cbs:
            vars(callback).pop('old_logger', None)
        for name in LAST_BATCH:
            vars(learn).pop(name, None)
        for metric in learn.metrics:
            metric.reset()  # it contains the last predictions and labels
        for dl in learn.dls.loaders:
            for pipeline in dl.dataset.tls:
                pipeline.splits = L([[], []])
        for transform in skipping:
            transform.skip = False  # training may skip unreadable images, but prediction reports each of them
        yield
    finally:
        learn.add_cbs(added_callbacks)
        for name, value in saved.items():
            setattr(learn, name, value)
        learn.dls.path = data_path
        for transform in skipping:
            transform.skip = True


def _is_standard(callback: Any) -> bool:
    """Return whether a learner without data needs `callback`. Others, such as `CSVLogger`, are about the training."""
    kind = type(callback)
    return kind.__module__.startswith('fastai.') and kind.__name__ in KEPT_CALLBACKS


def _transforms_that_skip(learn: Learner) -> list[Any]:
    transforms = [transform for pipeline in learn.dls.train_ds.tls for transform in pipeline.tfms]
    return [transform for transform in transforms if getattr(transform, 'skip', False)]


# The trusted hashes.


def trust_store() -> Path:
    """Return the file of the trusted hashes: CXR_TRUST, else `cxr_fastai/trust.json` in the user's settings folder."""
    settings = os.environ.get('XDG_CONFIG_HOME') or '~/.config'
    store = os.environ.get('CXR_TRUST') or Path(settings, 'cxr_fastai', 'trust.json')
    try:
        return Path(store).expanduser()
    except RuntimeError:
        raise UsageError(f'{store}: there is no home folder. Set CXR_TRUST to a file for the trusted hashes.') from None


def trusted() -> dict[str, dict[str, str]]:
    """Return the trusted hashes: SHA-256 -> `since` (date) and `why`. Raises `CXRError` if the store is damaged."""
    path = trust_store()
    if not os.path.exists(path):  # also if it is in the home folder of another user
        return {}
    fix = 'Fix or delete it; without it nothing is trusted.'
    hashes: dict[str, dict[str, str]] = read_json(path, MAX_STORE, fix)
    if not STORE.accepts(hashes):
        raise CXRError(f'{path}: not a store of trusted hashes, which is {STORE.words}. {fix}')
    return hashes


def trust(sha256: str, why: str) -> None:
    """Add the hash `sha256` to the trusted hashes. Raises `UsageError` if it is not a SHA-256."""
    printable = ''.join(character if character.isprintable() else '?' for character in why)
    entry = {'why': printable[:MAX_REASON], 'since': date.today().isoformat()}
    digest = check_hash(sha256)
    with _locked_store():
        _write_store(trusted() | {digest: entry})


def check_store() -> None:
    """Raise `CXRError` if no hash can be added to the trusted hashes, because the store is damaged or not writable."""
    trusted()
    with _locked_store():
        pass


def trust_file(path: StrPath, sha256: str) -> str:
    """Trust the file `path` and return its hash, if that is the hash `sha256` that its author published.

    Raises `UsageError` if the file has another hash.
    """
    path = Path(path)
    with open_regular(path) as file:
        digest = hashlib.file_digest(file, 'sha256').hexdigest()
    if digest != check_hash(sha256):
        raise UsageError(f'{path}: not trusted, because its SHA-256 is {digest}. It is not the file that you expect.')
    trust(digest, f'hash confirmed: {path.name}')
    return digest


def distrust(sha256: str) -> None:
    """Remove the hash `sha256` from the trusted hashes. Raises `UsageError` if it is not one of them."""
    digest = check_hash(sha256)
    with _locked_store():
        hashes = trusted()
        if digest not in hashes:
            raise UsageError(f'{sha256}: not a trusted hash. `cxr-fastai trust list` shows them.')
        del hashes[digest]
        _write_store(hashes)


def check_hash(sha256: str) -> str:
    """Return `sha256` in lower case. Raises `UsageError` if it is not a SHA-256."""
    digest = sha256.lower()
    if not SHA256.fullmatch(digest):
        raise UsageError(f'{sha256}: not a SHA-256, which has 64 hexadecimal digits.')
    return digest


def check_trusted(sha256: str, path: Path) -> None:
    """Raise `UntrustedError` unless the hash `sha256`, which is that of the file `path`, is trusted."""
    if sha256 not in trusted():
        raise UntrustedError(
            f'{path}: not opened, because it is an untrusted pickle, which can run code while it is read. Its SHA-256 '
            f'is {sha256}. Run `cxr-fastai trust {quote(str(path))} --sha256 HEX`, where HEX is the hash that its '
            'author published elsewhere, or this one if you have just made the file yourself. Or ask the author for a '
            'bundle, which needs no trust.'
        )


@contextmanager
def _locked_store() -> Iterator[None]:
    """Keep other processes from changing the store in this block: two exports at once would lose a hash."""
    from filelock import FileLock

    path = trust_store()
    with writing(path, 'CXR_TRUST'):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path.with_name(f'.{path.name}.lock'), timeout=LOCK_SECONDS)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _write_store(hashes: dict[str, dict[str, str]]) -> None:
    path = trust_store()
    write_json(path, hashes)
    path.chmod(0o600)
