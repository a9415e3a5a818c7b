"""Exported learners: saving, loading, and the store of the hashes that the user trusts.

A pickle can run code while it is read. So a learner is read only if its SHA-256 is trusted, and then with an unpickler
that accepts only what a learner consists of.
"""

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
from typing import TYPE_CHECKING, Any

from cxr_fastai.core.errors import CXRError, CXRWarning, UsageError, first_line
from cxr_fastai.core.files import atomic, write_json, writing
from cxr_fastai.inference._unpickler import LearnerUnpickler, check_network, is_allowed
from cxr_fastai.inference.config import SCHEMA, ModelConfig, check_schema
from cxr_fastai.inference.engines import TorchEngine
from cxr_fastai.inference.selftest import SelfTest

if TYPE_CHECKING:
    from fastai.learner import Learner

LAST_BATCH = ('dl', 'xb', 'yb', 'pred', 'loss', 'loss_grad')
"""Attributes of a learner that refer to its last batch of images."""
SHA256 = re.compile(r'[0-9a-f]{64}')


class UntrustedError(CXRError):
    """A pickled model file is not trusted, so it was not read."""

    exit_code = 4


# Saving and loading.


def save_learner(learn: Learner, path: Path, config: ModelConfig) -> str:
    """Export `learn` to `path`, add its SHA-256 to the trusted hashes, and return it.

    `load_learner` of fastai can read the file. It contains `config` and a self-test, but no path, no image name and no
    result of the training images. Unlike `Learner.export` this writes atomically, with plain pickle, and leaves `learn`
    unchanged if it fails. Raises `OutputError` if the file cannot be written.
    """
    import torch

    # A copy, because the engine changes the mode and the memory layout of its network.
    engine = TorchEngine(copy.deepcopy(learn.model).cpu())
    selftest = SelfTest.create(engine, config.size)
    learn.config = {'schema': SCHEMA, **asdict(config), 'selftest': selftest.as_dict()}
    buffer = BytesIO()  # if torch wrote the file, a full disk would be a RuntimeError
    with _without_data(learn):
        torch.save(learn, buffer, pickle_module=pickle)
    with atomic(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())
    digest = hashlib.sha256(buffer.getbuffer()).hexdigest()
    try:
        trust(digest, 'exported here')
    except CXRError as error:  # the learner, which may have taken hours to train, is saved anyway
        warnings.warn(
            f'{path} could not be added to the trusted hashes, so this program will not open it: {error}',
            CXRWarning,
            stacklevel=2,
        )
    return digest


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
    """Return whether `load_learner` accepts `callback`. Others, such as `CSVLogger`, are about the training."""
    return is_allowed(type(callback).__module__, type(callback).__qualname__)


def _transforms_that_skip(learn: Learner) -> list[Any]:
    transforms = [transform for pipeline in learn.dls.train_ds.tls for transform in pipeline.tfms]
    return [transform for transform in transforms if getattr(transform, 'skip', False)]


def load_learner(path: str | Path) -> Learner:
    """Return the `Learner` in the file `path`, on the CPU.

    Raises `UntrustedError` if the SHA-256 of the file is not trusted; nothing of it is read then. Raises `CXRError` if
    it is not a learner of this package or names a global that no learner needs, and `ParityError` if it fails its
    self-test.
    """
    path = Path(path)
    data = path.read_bytes()
    check_trusted(hashlib.sha256(data).hexdigest(), path)
    archive = _check_archive(data, path)
    learn = _unpickle(archive, path)
    facts = learn.config
    check_schema(facts.get('schema', 1), path)
    if 'selftest' not in facts:
        raise CXRError(f'{path}: has no self-test. Export it again.')
    SelfTest.from_dict(facts['selftest'], path).check(TorchEngine(learn.model), path)
    return learn


def _check_archive(data: bytes, path: Path) -> BytesIO:
    """Return a new zip file with the contents of `data`, which every program reads in the same way.

    Raises `CXRError` unless `data` is a file of `torch.save`: a zip of one pickle and uncompressed tensors.
    """
    rewritten = BytesIO()
    try:
        if not data.startswith(b'PK\x03\x04'):
            raise zipfile.BadZipFile('not a zip file of torch')
        with zipfile.ZipFile(BytesIO(data)) as archive, zipfile.ZipFile(rewritten, 'w') as plain:
            _check_entries(archive)
            for name in archive.namelist():
                content = archive.read(name)
                if name.endswith('.pkl'):
                    _check_end(content)
                plain.writestr(zipfile.ZipInfo(name), content)
    except Exception as error:  # a damaged zip file can raise any exception
        raise CXRError(f'{path}: not an exported learner ({_cause(error)}).') from None
    rewritten.seek(0)
    return rewritten


def _check_entries(archive: zipfile.ZipFile) -> None:
    names = archive.namelist()
    pickles = [name for name in names if name.endswith('.pkl')]
    if len(pickles) != 1:
        raise CXRError(f'it has {len(pickles)} pickles instead of one')
    if not pickles[0].endswith('/data.pkl'):
        raise CXRError(f'its pickle is named {pickles[0]!r:.80}')
    if len(set(names)) != len(names):
        raise CXRError('it has two files of the same name')
    if any('/code/' in name for name in names):
        raise CXRError('it has code')
    if any(entry.compress_type for entry in archive.infolist()):
        raise CXRError('it is compressed')


def _check_end(content: bytes) -> None:
    instructions = list(pickletools.genops(content))
    _, _, position = instructions[-1]
    if position != len(content) - 1:
        raise CXRError('it has bytes after its pickle')


def _unpickle(archive: BytesIO, path: Path) -> Learner:
    """Return the learner in `archive`, read by `LearnerUnpickler`. Raises `CXRError` if it is not of this package."""
    from fastai.learner import load_learner as load

    pickle_module = SimpleNamespace(Unpickler=LearnerUnpickler, __name__='pickle')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        try:
            learn = load(archive, pickle_module=pickle_module)
            has_config = isinstance(getattr(learn, 'config', None), dict)
            if has_config:
                check_network(learn.model)
        except Exception as error:  # a damaged pickle can raise any exception
            raise CXRError(f'{path}: not an exported learner ({_cause(error)}).') from error
    if not has_config:
        raise CXRError(
            f'{path}: an exported {type(learn).__name__} without image size and threshold, so cxr-fastai did not make '
            'it. `cxr-fastai export` makes one.'
        )
    return learn


def _cause(error: BaseException) -> str:
    """Return the first line of an error. fastai raises another error where a package is missing."""
    if isinstance(error.__context__, ModuleNotFoundError):
        return f'it needs the package {error.__context__.name}'
    return first_line(error)


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
    if not path.exists():
        return {}
    try:
        hashes = json.loads(path.read_text(encoding='utf-8'))
    except (ValueError, OSError):
        hashes = None
    if not isinstance(hashes, dict) or not all(SHA256.fullmatch(digest) for digest in hashes):
        raise CXRError(f'{path}: not a store of trusted hashes. Fix or delete it; without it nothing is trusted.')
    return hashes


def trust(sha256: str, why: str) -> None:
    """Add the hash `sha256` to the trusted hashes. Raises `UsageError` if it is not a SHA-256."""
    entry = {'why': why, 'since': date.today().isoformat()}
    _write_store(trusted() | {check_hash(sha256): entry})


def trust_file(path: Path, sha256: str) -> str:
    """Trust the file `path` and return its hash, if that is the hash `sha256` that its author published.

    Raises `UsageError` if the file has another hash.
    """
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise UsageError(f'{path}: cannot be read ({error.strerror}).') from None
    if digest != check_hash(sha256):
        raise UsageError(f'{path}: not trusted, because its SHA-256 is {digest}. It is not the file that you expect.')
    trust(digest, f'hash confirmed: {path.name}')
    return digest


def distrust(sha256: str) -> None:
    """Remove the hash `sha256` from the trusted hashes. Raises `UsageError` if it is not one of them."""
    hashes = trusted()
    digest = check_hash(sha256)
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
            f'{path}: not opened, because it is an untrusted pickle, which can run code while it is read. Compare its '
            f'SHA-256 {sha256} with the one that its author published elsewhere, then run '
            f'`cxr-fastai trust {path} --sha256 {sha256}`. Or ask the author for a bundle, which needs no trust.'
        )


def _write_store(hashes: dict[str, dict[str, str]]) -> None:
    path = trust_store()
    with writing(path, 'CXR_TRUST'):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, hashes)
    path.chmod(0o600)
