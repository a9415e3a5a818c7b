"""Any film file becomes one uint8 grey array: the one reading function that training and prediction share."""
from __future__ import annotations

import os
import stat
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from cxr_fastai.core import FilmError

FORMATS = ('JPEG', 'PNG')
"""What is decoded, recognised by content and not by the name."""
SUFFIXES = ('.jpeg', '.jpg', '.png')
"""What is looked for in folders; a fixed list, since the system's table of types differs from host to host."""
MODES = ('L', 'RGB', '1', 'P', 'LA', 'RGBA')
"""Pillow's modes of 8 bits a channel. Deeper films would turn white or black on conversion, so they are refused."""
MAX_PIXELS = 40_000_000
BILINEAR = Image.Resampling.BILINEAR


def read_film(path: str | Path) -> np.ndarray:
    """Decode the film `path` to grey: uint8 (h, w). Raises `FilmError` for everything that is not such a film."""
    data = _read_bytes(path)
    try:
        with Image.open(BytesIO(data), formats=FORMATS) as image:
            if image.width*image.height > MAX_PIXELS:
                raise _refusal(path, 'E_TOO_LARGE', f'{image.width}x{image.height} is over {MAX_PIXELS:,} pixels')
            if image.mode not in MODES:
                raise _refusal(path, 'E_BITDEPTH', f'pixels of mode {image.mode}: convert it to 8 bits a channel')
            return np.asarray(image.convert('L'))
    except FilmError: raise
    except UnidentifiedImageError:
        raise _refusal(path, 'E_FORMAT', f'not {" or ".join(FORMATS)}') from None
    except Image.DecompressionBombError:
        raise _refusal(path, 'E_TOO_LARGE', f'over {MAX_PIXELS:,} pixels') from None
    # Pillow's decoders let SyntaxError, ValueError and others out, and a batch must survive each of them.
    except Exception as error: raise _refusal(path, 'E_TRUNCATED', f'truncated or damaged: {error}') from error


def resize_film(film: np.ndarray, size: int) -> np.ndarray:
    """Squish `film` uint8 (h, w) to (size, size), bilinear with antialiasing, as torchvision's `Resize` on Pillow."""
    if film.shape == (size, size): return film
    return np.asarray(Image.fromarray(film).resize((size, size), BILINEAR))


def load_film(path: str | Path, size: int) -> np.ndarray:
    """Read and resize the film `path`: uint8 (size, size). Raises `FilmError`."""
    return resize_film(read_film(path), size)


def _read_bytes(path: str | Path) -> bytes:
    try:
        # Asked before opening: opening a pipe would wait for ever.
        if not stat.S_ISREG(os.stat(path).st_mode): raise _refusal(path, 'E_NOT_REGULAR', 'not a regular file')
        data = Path(path).read_bytes()
    except OSError as error: raise _refusal(path, 'E_IO', error.strerror or str(error)) from error
    if not data: raise _refusal(path, 'E_EMPTY', 'the file is empty')
    return data


def _refusal(path: str | Path, code: str, why: str) -> FilmError:
    return FilmError(f'{path}: {code}: {why}'.replace('\n', ' '), code)
