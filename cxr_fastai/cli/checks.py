"""The commands `checks`, which says what this machine has and what the program will use, and `benchmark`."""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cxr_fastai.cli import options as opt
from cxr_fastai.cli.console import move_messages_to_stderr
from cxr_fastai.cli.documents import print_json
from cxr_fastai.cli.output import print_columns, print_hub_model, print_line
from cxr_fastai.core.errors import CXRError
from cxr_fastai.core.hardware import available_cores, available_memory, bf16_instructions, processor

SHOWN_PACKAGES = ('torch', 'torchvision', 'fastai', 'onnxruntime', 'pydicom', 'timm')
HIDDEN_EXTRAS = ('dev', 'docs', 'test')
"""Extras for people who work on this package."""
REQUIREMENT = re.compile(r'([\w.-]+).*;\s*extra\s*==\s*["\']([\w-]+)["\']')
"""A line of the requirements that belongs to an extra: the package, and the extra."""
MISSING = 'not installed'


def checks(as_json: opt.AsJson = False) -> None:
    """Say what this machine has and what the program will use: packages, device, cores, memory, extras, folders.

    Example: cxr-fastai checks
    """
    if as_json:
        move_messages_to_stderr()
    facts = describe_machine()
    if as_json:
        print_json(facts)
        return
    width = max(map(len, facts)) + 2
    for name, value in facts.items():
        print_line(f'{name:{width}}{_show(value)}')


def benchmark(
    model: opt.Model, images: opt.SomeImages = None, modality: opt.Modality = '', as_json: opt.AsJson = False
) -> None:
    """Measure how many images per second a model computes, by engine, device, precision and batch size, and how much
    its probabilities change compared with torch in fp32. Images are decoded before.

    Example: cxr-fastai benchmark bundle images/
    """
    if as_json:
        move_messages_to_stderr()
    from cxr_fastai.data.find import list_images
    from cxr_fastai.inference.benchmarking import benchmark

    rows = benchmark(model, list_images(images) if images else [], modality=modality)
    print_hub_model(model)
    if as_json:
        print_json(rows)
        return
    header = ('engine', 'device', 'precision', 'batch', 'images/s', 'ms per batch', 'largest change of p')
    print_columns(header, [_format_row(row) for row in rows])


def _format_row(row: dict[str, Any]) -> list[str]:
    numbers = [f'{row["images_per_second"]:.1f}', f'{row["milliseconds"]:.1f}', f'{row["largest_change"]:.1g}']
    return [row['engine'], row['device'], row['precision'], str(row['batch_size']), *numbers]


def _show(value: Any) -> str:
    if isinstance(value, dict):
        return ', '.join(f'{name} {_show(entry)}' for name, entry in value.items()) or 'none'
    if isinstance(value, list):
        return ', '.join(map(str, value)) or 'none'
    return str(value)


def describe_machine() -> dict[str, Any]:
    """Return the facts by name: texts, and tables and lists of texts. Nothing in them names a user but the folders."""
    extras = find_extras()
    missing = [name for name, packages in extras.items() if not all(map(_version, packages))]
    facts = {
        'cxr_fastai': _version('cxr_fastai') or 'not installed as a package',
        'Python': f'{platform.python_version()} ({sys.executable})',
        'system': f'{platform.system()} {platform.release()}, {platform.machine()}',
        'processor': processor(),
        'bfloat16': bf16_instructions() or 'no instructions for it',
        'cores': f'{available_cores()} are used of {os.cpu_count()}',
        'memory': _memory(),
        'packages': {name: _version(name) or MISSING for name in SHOWN_PACKAGES},
        'device': _try(_device),
        'precision': _try(_precision),
        'ONNX Runtime': _try(_providers),
        'extras': [name for name in extras if name not in missing],
        'missing extras': missing,
        'cache': _try(_cache),
        'trusted hashes': _try(_trust),
        'images': _try(_images),
    }
    if missing:
        facts['to install'] = f'pip install "cxr_fastai[{",".join(missing)}]"'
    return facts


def _try(find: Callable[[], Any]) -> Any:
    """Return what `find` returns, or in words why it fails: a check must not fail itself."""
    try:
        return find()
    except CXRError as error:
        return str(error)
    except Exception as error:  # a broken package raises errors of any type when it is imported
        return f'broken: {type(error).__name__}: {error}'.splitlines()[0]


def find_extras() -> dict[str, list[str]]:
    """Return the extras of this package with the packages that each of them installs."""
    from importlib import metadata

    try:
        requirements = metadata.requires('cxr_fastai') or []
    except metadata.PackageNotFoundError:
        return {}
    extras: dict[str, list[str]] = {}
    for match in filter(None, map(REQUIREMENT.match, requirements)):
        package, extra = match.groups()
        if extra not in HIDDEN_EXTRAS:
            extras.setdefault(extra, []).append(package)
    return extras


def _version(package: str) -> str:
    """Return the version of an installed `package`; empty if there is none."""
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ''


def _memory() -> str:
    memory = available_memory()
    return 'unknown' if memory is None else f'{memory / 2**30:.1f} GiB'


def _device() -> str:
    from cxr_fastai.models.devices import choose_device, describe_device

    device = choose_device('auto')
    return f'{device} ({describe_device(device)})'


def _precision() -> str:
    from cxr_fastai.models.devices import choose_device
    from cxr_fastai.training.precision import lower_precision

    candidate = lower_precision(choose_device())
    training = f'{candidate} in training if a trial shows that it is faster' if candidate else 'fp32 in training'
    return f'{training}, fp32 in prediction'


def _providers() -> Any:
    if not _version('onnxruntime') and not _version('onnxruntime-gpu'):
        return 'not installed, so bundles are run by torch'
    import onnxruntime

    return [name.removesuffix('ExecutionProvider') for name in onnxruntime.get_available_providers()]


def _cache() -> str:
    from cxr_fastai.images.cache import cache_folder
    from cxr_fastai.images.preprocessing import Preprocessing

    folder = cache_folder(Path('images'), Preprocessing(224)).parents[1]
    return f'{folder} ({"exists" if folder.is_dir() else "not made yet"})'


def _trust() -> str:
    from cxr_fastai.inference.pickles import trust_store, trusted

    return f'{len(trusted())} in {trust_store()}'


def _images() -> str:
    from cxr_fastai.data.items import data_root

    try:
        return f'{data_root()} is used without --data'
    except CXRError:
        return 'none found: name a folder with --data DIR or CXR_DATA'
