"""What a file is that was named as a model, judged by its contents, and what the user should name instead."""

from __future__ import annotations

import re
from pathlib import Path

from cxr_fastai.core.errors import UsageError

PICKLE_SUFFIXES = ('.pkl', '.pth', '.pt', '.pickle')
"""File names under which exported learners are shared. Other files are pickles only if they start like one."""
STATE = 'state.pt'
"""The file of a run folder from which a training is resumed."""
NAME_FOLDER = 'Name the run folder or the bundle that contains it: {folder}.'
NAME_MODEL = (
    'Name a run folder of `cxr-fastai train`, a bundle of `cxr-fastai export`, or a .pkl file; images come after the '
    'model.'
)
KINDS = (
    (rb'\xff\xd8\xff|\x89PNG|GIF8|II\*\0|MM\0\*|BM|.{128}DICM', 'an image', 'Name the model first, then the images.'),
    (rb'\s*[{\[]\s*["{\[\]}]', 'a JSON file', NAME_FOLDER),
    (rb'.{6}\0\0\{', 'a file of weights (safetensors)', NAME_FOLDER),
    (rb'\x08[\x01-\x20][\x12\x1a\x22\x2a\x32\x3a]', 'an ONNX file', NAME_FOLDER),
    (rb'(?!\x80|PK\x03\x04)', 'not a model file', NAME_MODEL),
)
"""How a file starts -> what it is, and what to do instead. The last line is any file that is not a pickle."""


def check_pickle(data: bytes, path: Path) -> None:
    """Raise `UsageError`, which says what the file `path` is, if its bytes `data` cannot be an exported learner.

    This is no test of trust: a file that passes may be anything.
    """
    if path.name == STATE and (path.parent / 'recipe.json').exists():
        raise UsageError(f'{path}: the state of a training, not a model. Name the run folder: {path.parent}.')
    for start, kind, advice in KINDS:
        is_unknown = advice == NAME_MODEL
        if is_unknown and path.suffix.lower() in PICKLE_SUFFIXES:
            return
        if re.match(start, data, re.DOTALL):
            raise UsageError(f'{path}: {kind}. {advice.format(folder=path.parent)}')
