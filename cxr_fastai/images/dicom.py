"""Decoding of DICOM files to grey pixels, as a radiologist's display shows them (extra `dicom`: pydicom).

Only the technical tags of `dicom_elements.TAGS` are parsed. Names, dates and identifiers are never read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from cxr_fastai.core.environment import require_package
from cxr_fastai.core.errors import ImageError, UsageError
from cxr_fastai.images.dicom_elements import read_elements
from cxr_fastai.images.dicom_header import PROCESSING_CLASS, check_modality, complete_elements, read_numbers
from cxr_fastai.images.dicom_pixels import decode_pixels
from cxr_fastai.images.limits import MAX_PIXELS, MAX_WINDOWS, DecodedImage
from cxr_fastai.images.windowing import count_levels, look_up, percentile_table, scale_to_grey, weighted_percentiles

if TYPE_CHECKING:
    from pydicom import Dataset

SUFFIXES = ('.dcm', '.dicom')
PICTURE_MAGIC = (b'\xff\xd8\xff', b'\x89PNG', b'II*\0', b'MM\0*')
"""First bytes of JPEG, PNG and TIFF files."""
DATASET_MAGIC = (b'\2\0\0\0', b'\x08\0\5\0')
"""First bytes of DICOM files that lack the preamble."""

FAR_VALUE = 1e12
"""A value outside every window."""
MIN_VISIBLE_LEVELS = 32
"""Minimum distance of the 1st and the 99th percentile, in grey levels, if a declared window is used."""
SPACINGS = ('PixelSpacing', 'ImagerPixelSpacing', 'NominalScannedPixelSpacing', 'PixelAspectRatio')
"""Elements that contain the height and the width of a pixel, or their ratio. The first that does is used."""
MIN_STRETCH = 1.01
"""Ratio of the sides of a pixel from which an image is resampled."""
MAX_STRETCH = 4
"""Ratio of the sides of a pixel from which the element is taken to be wrong."""


def is_dicom(data: bytes, suffix: str = '') -> bool:
    """Return True if `data` is a DICOM file, also without preamble, or has a DICOM `suffix` and is no other picture."""
    if data[128:132] == b'DICM' or data[:4] in DATASET_MAGIC:
        return True
    return suffix in SUFFIXES and not data.startswith(PICTURE_MAGIC)


def read_dicom(data: bytes, modalities: Sequence[str] = ()) -> DecodedImage:
    """Decode a DICOM file of a radiograph, or of one of the other `modalities`.

    The stored values pass the modality LUT or rescaling, then the first VOI LUT or window of the file that shows
    something, or else the window between percentiles. MONOCHROME1 and the presentation LUT shape INVERSE are inverted,
    padding becomes black, and pixels that are not square are resampled. Elements that are missing or unreadable are
    replaced by sensible values where there are any, with notes. Raises `ImageError` with a code E_DICOM_*,
    E_MULTIFRAME, E_BITDEPTH, E_TOO_LARGE, E_TIMEOUT or E_BLANK; its message quotes no text of the file.
    """
    try:
        require_package('pydicom', 'reading DICOM', 'dicom')
    except UsageError as error:
        raise ImageError(str(error), 'E_DICOM_SYNTAX') from None
    try:
        image, unreadable = _parse(data)
        notes = check_modality(image, modalities) + complete_elements(image)
        if unreadable:
            notes.append(f'not readable, so ignored: {", ".join(unreadable)}')
        return _to_grey(image, decode_pixels(image), notes)
    except ImageError:
        raise
    # pydicom raises AttributeError, ValueError, struct.error and others, with messages that may quote the file.
    except Exception as error:
        raise ImageError(f'damaged ({type(error).__name__})', 'E_DICOM_CORRUPT') from error


def _parse(data: bytes) -> tuple[Dataset, list[str]]:
    try:
        return read_elements(data)
    except ImageError:
        raise
    except Exception as error:
        raise ImageError('damaged: its elements cannot be read', 'E_DICOM_CORRUPT') from error


def _to_grey(image: Dataset, stored: np.ndarray, notes: list[str]) -> DecodedImage:
    """Return the image of the `stored` pixels; `notes` are those of its elements."""
    if image.SamplesPerPixel > 1:
        grey, more_notes = _grey_from_colour(stored)
    else:
        grey, more_notes = _grey_from_levels(image, stored)
    grey, stretch_notes = _make_pixels_square(image, grey)
    burned_in = str(image.get('BurnedInAnnotation')).upper() == 'YES'
    if burned_in:
        more_notes.append('BurnedInAnnotation is YES: text in the picture may identify the patient')
    return DecodedImage(
        pixels=grey,
        format='DICOM',
        mode=str(image.PhotometricInterpretation),
        bits=int(image.BitsStored),
        width=image.Columns,
        height=image.Rows,
        notes=(*more_notes, *stretch_notes, *_note_intent(image), *notes),
        burned_in=burned_in,
    )


def _note_intent(image: Dataset) -> list[str]:
    """Return a note if the file contains what a detector measured, before the processing for display."""
    intent = str(image.get('PresentationIntentType', '')).strip(' \0').upper()
    if intent == 'FOR PROCESSING' or (not intent and image.get('SOPClassUID') == PROCESSING_CLASS):
        return ['FOR PROCESSING: the contrast is not that of the image that a radiologist reads']
    return []


def _make_pixels_square(image: Dataset, grey: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Return `grey`, uint8 (h, w), resampled to square pixels, and a note of it (PS3.3, C.7.6.3.1.7 and 10.7.1.3).

    The side of the image with the longer pixels is enlarged, or the other one reduced if it would be too large.
    """
    name, down, across = _read_sides(image)
    stretch = max(down, across) / min(down, across)
    if not stretch < MAX_STRETCH:
        return grey, [f'{name} is implausible and was ignored']
    if stretch < MIN_STRETCH:
        return grey, []
    height, width = grey.shape
    is_too_large = height * width * stretch > MAX_PIXELS
    if (down > across) != is_too_large:
        height = round(height * down / across)
    else:
        width = round(width * across / down)
    square = Image.fromarray(grey).resize((width, height), Image.Resampling.BILINEAR)
    note = f'resampled to square pixels; in the file they are {down / across:.3g} times as high as wide ({name})'
    return np.asarray(square), [note]


def _read_sides(image: Dataset) -> tuple[str, float, float]:
    """Return the height and the width of a pixel, in any unit, and the element that has them; 1 and 1 without one."""
    for name in SPACINGS:
        sides = read_numbers(image.get(name))[:2]
        if len(sides) == 2 and min(sides) > 0:
            return name, sides[0], sides[1]
    return '', 1.0, 1.0


def _grey_from_colour(stored: np.ndarray) -> tuple[np.ndarray, list[str]]:
    if stored.dtype != np.uint8:
        raise ImageError(f'colour of {8 * stored.itemsize} bits', 'E_BITDEPTH')
    grey = stored if stored.ndim == 2 else np.asarray(Image.fromarray(stored).convert('L'))
    return grey, ['converted from colour to grey']


def _grey_from_levels(image: Dataset, stored: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Return grey uint8 (h, w) after rescaling, window, inversion and padding, and notes of them."""
    levels, counts = count_levels(stored)
    padding = _is_padding(image, levels)
    values, notes = _rescale(image, levels)
    table, note = _apply_window(image, values, np.where(padding, 0, counts))
    if note:
        notes.append(note)
    inversion = _find_inversion(image)
    if inversion:
        table = 255 - table
        notes.append(f'inverted ({inversion})')
    return look_up(stored, np.where(padding, np.uint8(0), table)), notes


def _find_inversion(image: Dataset) -> str:
    """Return the element by which low levels are white, or nothing.

    With MONOCHROME1 the lowest level is white (PS3.3, C.7.6.3.1.2). The presentation LUT shape of such an image must be
    INVERSE (C.7.6.1), which says the same again and does not undo it; IDENTITY contradicts it and is ignored. A shape
    INVERSE of an image in MONOCHROME2 inverts it (C.11.6.1.2).
    """
    if image.PhotometricInterpretation == 'MONOCHROME1':
        return 'MONOCHROME1'
    shape = str(image.get('PresentationLUTShape', '')).strip(' \0').upper()
    return 'PresentationLUTShape INVERSE' if shape == 'INVERSE' else ''


def _is_padding(image: Dataset, levels: np.ndarray) -> np.ndarray:
    """Return which of the stored `levels` are padding: boolean (n,)."""
    limits = [
        number
        for name in ('PixelPaddingValue', 'PixelPaddingRangeLimit')
        for number in read_numbers(image.get(name))[:1]
        if math.isfinite(number)
    ]
    if not limits:
        return np.zeros(len(levels), bool)
    return (levels >= min(limits)) & (levels <= max(limits))


def _rescale(image: Dataset, levels: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Apply the modality LUT or rescaling to the stored `levels`; unusable ones are ignored, with a note."""
    from pydicom.pixels import apply_modality_lut

    notes = _complete_rescaling(image)
    with suppress(Exception):
        for item in image.get('ModalityLUTSequence', ()):
            item.LUTDescriptor[2] = 16 if item.LUTDescriptor[2] > 8 else 8  # pydicom accepts only 8 and 16 bits
        values = np.asarray(apply_modality_lut(levels, image), float)
        if np.isfinite(values).all() and (np.ptp(values) > 0 or len(levels) == 1):
            return values, notes
    return levels.astype(float), [*notes, 'the modality rescaling of the file is unusable and was ignored']


def _complete_rescaling(image: Dataset) -> list[str]:
    """Add the slope 1 or the intercept 0 if only the other one can be read; return a note of it."""
    names = {'RescaleSlope': 1.0, 'RescaleIntercept': 0.0}
    values = {name: read_numbers(image.get(name))[:1] for name in names}
    readable = {name: value[0] for name, value in values.items() if value and math.isfinite(value[0])}
    for name in names:
        image.pop(name, None)
    if not readable:
        return []
    notes = []
    for name, default in names.items():
        image.add_new(name, 'FD', readable.get(name, default))
        if name not in readable:
            notes.append(f'{name} is missing, so assumed to be {default:g}')
    return notes


def _apply_window(image: Dataset, values: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, str]:
    """Return the grey level of each of the `values`, uint8 (n,), and a note.

    The first window of the file that shows something is used. Without one, images of up to 8 bits keep their levels,
    and deeper images get the window between percentiles. Each value occurs `counts` times.
    """
    for note, table in _declared_windows(image, values):
        low, high = weighted_percentiles(table, counts, (1, 99))
        if high - low >= MIN_VISIBLE_LEVELS:
            return table, note
    if image.BitsStored > 8:
        return percentile_table(values, counts)
    span = 1 << image.BitsStored
    first = -(span // 2) if image.PixelRepresentation else 0
    limits, _ = _rescale(image, np.array([first, first + span - 1]))
    return scale_to_grey(values, limits.min(), limits.max()), ''


def _declared_windows(image: Dataset, values: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the usable VOI LUT and windows of the file: a note, and the grey level of each value, uint8 (n,)."""
    from pydicom.pixels import apply_voi, apply_windowing

    with suppress(Exception):
        depth = image.VOILUTSequence[0].LUTDescriptor[2]
        yield 'VOI LUT of the file', scale_to_grey(apply_voi(values.astype(int), image), 0, (1 << depth) - 1)
    for centre, width in _read_windows(image):
        with suppress(Exception), np.errstate(all='ignore'):
            image.WindowCenter, image.WindowWidth = centre, width
            # Two values far outside show the range that pydicom maps the window to.
            grey = apply_windowing(np.append(values, [-FAR_VALUE, FAR_VALUE]), image)
            table = scale_to_grey(grey[:-2], *grey[-2:])
            yield f'window of the file: centre {centre:g}, width {width:g}', table


def _read_windows(image: Dataset) -> list[tuple[float, float]]:
    """Return the centres and widths of the first windows of the file; those with a part that is no number are left out.

    A single width belongs to all centres.
    """
    centres = read_numbers(image.get('WindowCenter'))
    widths = read_numbers(image.get('WindowWidth'))
    if len(widths) == 1:
        widths *= len(centres)
    pairs = zip(centres[:MAX_WINDOWS], widths, strict=False)
    return [pair for pair in pairs if all(map(math.isfinite, pair))]
