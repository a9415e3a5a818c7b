"""Which files below a folder may be films."""
from __future__ import annotations

import os
from collections import Counter
from pathlib import Path, PurePath

from cxr_fastai.images.decode import SUFFIXES


def find_films(folder: Path) -> tuple[list[Path], Counter]:
    """Films below `folder`, sorted, and a count of what was ignored, by reason. Links are not followed, to folders or
    to films: they may lead in circles or out of the folder. (A CSV may list them.)"""
    films, ignored = [], Counter()
    for base, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            path = Path(base, name)
            reason = junk(path.relative_to(folder)) or ('link' if path.is_symlink() else None)
            if reason: ignored[reason] += 1
            else: films.append(path)
    return films, ignored


def junk(path: PurePath) -> str | None:
    """Why the file `path` is no film, by its name; None where it may be one."""
    if '__MACOSX' in path.parts: return '__MACOSX'
    if path.name.startswith('._'): return '._*'
    if path.name == '.DS_Store': return '.DS_Store'
    return None if path.suffix.lower() in SUFFIXES else 'not a film'
