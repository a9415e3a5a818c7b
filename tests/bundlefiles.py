"""Bundles and exported learners for tests: reading, changing and sealing their files."""

import hashlib
import json
import pickle
import pickletools
import warnings
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load

from cxr_fastai.inference.bundle import MANIFEST
from cxr_fastai.inference.tensors import tensor_bytes


def seal(folder: Path) -> None:
    """Write the hashes of the present files into the manifest of the bundle `folder`."""
    manifest = json.loads((folder / MANIFEST).read_text())
    names = {path.name for path in folder.iterdir() if path.is_file()} - {MANIFEST}
    manifest['files'] = {
        name: {
            'sha256': hashlib.sha256((folder / name).read_bytes()).hexdigest(),
            'size': (folder / name).stat().st_size,
        }
        for name in sorted(names)
    }
    (folder / MANIFEST).write_text(json.dumps(manifest))


def change_json(folder: Path, name: str, **fields: Any) -> None:
    """Change fields of a JSON file of a bundle."""
    facts = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(facts | fields))


def change_tensors(folder: Path, name: str, **changes: np.ndarray | None) -> None:
    """Replace arrays of a safetensors file of a bundle; None removes one."""
    tensors = load((folder / name).read_bytes()) | changes
    (folder / name).write_bytes(tensor_bytes({key: value for key, value in tensors.items() if value is not None}))


def make_learner_pickle(thing: object, **options: Any) -> bytes:
    """The bytes of the file that `torch.save` with plain pickle writes."""
    buffer = BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        torch.save(thing, buffer, pickle_module=pickle, **options)
    return buffer.getvalue()


def change_pickle(
    data: bytes,
    change: Callable[[bytes], bytes],
    extra_files: dict[str, bytes] | None = None,
    compression: int = zipfile.ZIP_STORED,
) -> bytes:
    """The file `data` of `torch.save` with `change` applied to its data.pkl, and with `extra_files`."""
    buffer = BytesIO()
    with (
        zipfile.ZipFile(BytesIO(data)) as old,
        zipfile.ZipFile(buffer, 'w', compression) as new,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter('ignore')  # about a second file of the same name
        for name in old.namelist():
            content = old.read(name)
            new.writestr(name, change(content) if name.endswith('/data.pkl') else content)
        for name, content in (extra_files or {}).items():
            new.writestr(name, content)
    return buffer.getvalue()


def old_learner_pickle(data: bytes) -> bytes:
    """The learner `data` with a module name of the versions before 0.1.0, where all modules were in one folder."""
    return change_pickle(data, lambda old: old.replace(b'cxr_fastai.data.loaders\n', b'cxr_fastai.loaders\n'))


def named_globals(data: bytes) -> list[str]:
    """The globals that the pickle in the file `data` of `torch.save` names, as `module name`, sorted."""
    with zipfile.ZipFile(BytesIO(data)) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith('/data.pkl'))
        content = archive.read(name)
    return sorted({argument for opcode, argument, _ in pickletools.genops(content) if opcode.name == 'GLOBAL'})


def flipped(data: bytes, position: int) -> bytes:
    """`data` with one bit of the byte at `position` flipped."""
    return data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]
