"""Arrays as images: only grey levels in uint8 are read; for others the error says how to convert them.

A network answers for any numbers. An array in 0 to 1, or of 16 bits, would get a probability that means nothing.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cxr_fastai.core.errors import ImageError

WHITE = 255
AS_PILLOW = 'Pass PIL.Image.fromarray(image), which is converted to grey like a file'
"""How to convert an array with several channels."""


def grey_pixels(array: np.ndarray) -> np.ndarray:
    """Return the grey pixels uint8 (h, w) of a uint8 array (h, w), (h, w, 1), or (h, w, 3) with three equal channels.

    Raises `ImageError` E_ARRAY for other types and shapes, and E_BLANK if no value is above 1.
    """
    if isinstance(array, np.ma.MaskedArray):
        raise _array_error(array, 'masked arrays are not read', 'Convert it by image.filled(0)')
    if array.dtype != np.uint8:
        raise _array_error(array, 'only uint8 is read', _type_hint(array))
    pixels = _grey_channel(array)
    if pixels.size and pixels.max() <= 1:
        raise ImageError(
            f'{describe_array(array)}: the image is blank, because white is {WHITE}. An image in 0 to 1 must be '
            f'multiplied by {WHITE} before it is converted to uint8.',
            'E_BLANK',
        )
    return np.ascontiguousarray(pixels)


def _grey_channel(array: np.ndarray) -> np.ndarray:
    """Return the grey channel (h, w) of a uint8 array."""
    if array.ndim == 2:
        return array
    if array.ndim == 3 and array.shape[2] == 1:
        return array[:, :, 0]
    if array.ndim == 3 and array.shape[2] == 3:
        if (array == array[:, :, :1]).all():
            return array[:, :, 0]
        raise _array_error(array, 'the three channels differ, so the image is in colour', AS_PILLOW)
    raise _array_error(array, 'not an image (h, w)', _shape_hint(array))


def _array_error(array: np.ndarray, reason: str, hint: str) -> ImageError:
    return ImageError(f'{describe_array(array)}: {reason}. {hint}.', 'E_ARRAY')


def describe_array(array: Any) -> str:
    """Return the type and shape of an array or a tensor, for an error message."""
    shape = tuple(array.shape)
    if isinstance(array, np.ndarray):
        return f'{array.dtype} array {shape}'
    return f'{type(array).__name__} of {array.dtype} {shape}'


def _type_hint(array: np.ndarray) -> str:
    """Return how to convert `array`, which is not uint8, to uint8."""
    if array.dtype.kind == 'b':
        return f"Convert it by {WHITE} * image.astype('uint8')"
    if array.dtype.kind not in 'fiu' or not array.size:
        return f'Convert it to grey levels from 0 to {WHITE} in uint8'
    low, high = _value_range(array)
    values = f'Its values are {low:.5g} to {high:.5g}'
    if array.dtype.kind == 'f' and 0 <= low <= high <= 1:
        return f"{values}: convert it by ({WHITE} * image).round().astype('uint8')"
    if 0 <= low <= high <= WHITE:
        return f"{values}: convert it by image.round().astype('uint8')"
    if array.dtype.kind == 'f':
        return f'{values}: undo its normalization, or scale a window of it to 0 to {WHITE}'
    return f'{values}: scale a window of it to 0 to {WHITE}, or pass its PNG or DICOM file, which is windowed'


def _value_range(array: np.ndarray) -> tuple[float, float]:
    """Return the smallest and the largest finite value; NaN if there is none."""
    finite = array[np.isfinite(array)]
    if not finite.size:
        return np.nan, np.nan
    return float(finite.min()), float(finite.max())


def _shape_hint(array: np.ndarray) -> str:
    """Return how to make an image (h, w) of the uint8 `array`."""
    if array.ndim < 2:
        return 'Pass an array with rows and columns'
    if array.ndim > 3:
        return 'Pass the images of a batch one at a time'
    if array.shape[2] in (2, 4):
        return AS_PILLOW
    if array.shape[0] == 1:
        return 'Pass image[0]'
    if array.shape[0] == 3:
        return 'Pass image.transpose(1, 2, 0) if the channels are first, or 3 images one at a time'
    return f'If these are {array.shape[0]} images, pass them one at a time'


def check_grey(image: Any) -> None:
    """Raise `ImageError` E_ARRAY unless `image` is a uint8 array (h, w)."""
    if not (isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 2):
        raise ImageError(
            f'{_describe(image)}: not the grey pixels uint8 (h, w) of an image. `grey_array` converts images to them.',
            'E_ARRAY',
        )


def check_squares(images: Any, size: int) -> None:
    """Raise `ImageError` E_ARRAY unless `images` are what a network of this `size` sees: uint8 (n, size, size)."""
    is_uint8 = isinstance(images, np.ndarray) and images.dtype == np.uint8
    if not (is_uint8 and images.ndim == 3 and images.shape[1:] == (size, size)):
        raise ImageError(
            f'{_describe(images)}: the network needs a uint8 array (n, {size}, {size}). `Preprocessing.load` makes '
            f'{size} x {size} pixels of any image.',
            'E_ARRAY',
        )


def _describe(thing: Any) -> str:
    is_array = hasattr(thing, 'dtype') and hasattr(thing, 'shape')
    return describe_array(thing) if is_array else type(thing).__name__
