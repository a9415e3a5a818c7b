"""Decoding of DICOM files to grey pixels, as a radiologist's display shows them (extra `dicom`: pydicom).

Only the technical tags of `dicom_elements.TAGS` are parsed. Names, dates and identifiers are never read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Container, Iterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from cxr_fastai.core.environment import require_package
from cxr_fastai.core.errors import ImageError, UsageError
from cxr_fastai.images.dicom_elements import read_elements
from cxr_fastai.images.dicom_frames import RLE, check_frame, unpack_rle
from cxr_fastai.images.limits import MAX_WINDOWS, DecodedImage, check_pixels
from cxr_fastai.images.windowing import count_levels, look_up, percentile_table, scale_to_grey, weighted_percentiles

if TYPE_CHECKING:
    from pydicom import Dataset

MODALITIES = ('CR', 'DX')
"""Computed and digital radiography. Other modalities, such as CT, US or digitised radiographs (RG), are rejected."""
PHOTOMETRIC_INTERPRETATIONS = re.compile('MONOCHROME[12]|RGB|YBR_[A-Z0-9_]+')
"""Photometric interpretations of a radiograph, which may be stored in colour."""
SUFFIXES = ('.dcm', '.dicom')
PICTURE_MAGIC = (b'\xff\xd8\xff', b'\x89PNG', b'II*\0', b'MM\0*')
"""First bytes of JPEG, PNG and TIFF files."""
DATASET_MAGIC = (b'\2\0\0\0', b'\x08\0\5\0')
"""First bytes of DICOM files that lack the preamble."""

JPEG_EXTENDED = '1.2.840.10008.1.2.4.51'
PACKAGES = {
    '1.2.840.10008.1.2.4.80': 'pyjpegls',
    '1.2.840.10008.1.2.4.81': 'pyjpegls',
    '1.2.840.10008.1.2.4.201': 'pylibjpeg-openjpeg',
    '1.2.840.10008.1.2.4.202': 'pylibjpeg-openjpeg',
    '1.2.840.10008.1.2.4.203': 'pylibjpeg-openjpeg',
}
"""Transfer syntax to the package that decodes it, if pydicom and Pillow do not."""
OTHER_PACKAGE = 'python-gdcm'
"""The package that decodes the remaining syntaxes, such as lossless JPEG."""

AS_STORED: Any = {'as_rgb': False}
"""Option of pydicom's decoders: YBR stays. Conversion to RGB takes a gigabyte for 40 megapixels."""
SLACK = 65_536
"""Bytes of compressed pixels beyond twice the raw size that are accepted; more is an attack on the decoder."""
FAR_VALUE = 1e12
"""A value outside every window."""
MIN_VISIBLE_LEVELS = 32
"""Minimum distance of the 1st and the 99th percentile, in grey levels, if a declared window is used."""


def is_dicom(data: bytes, suffix: str = '') -> bool:
    """Return True if `data` is a DICOM file, also without preamble, or has a DICOM `suffix` and is no other picture."""
    if data[128:132] == b'DICM' or data[:4] in DATASET_MAGIC:
        return True
    return suffix in SUFFIXES and not data.startswith(PICTURE_MAGIC)


def read_dicom(data: bytes, modalities: Container[str] = MODALITIES) -> DecodedImage:
    """Decode a DICOM file of one of the `modalities`.

    The stored values pass the modality LUT or rescaling, then the first VOI LUT or window of the file that shows
    something, or else the window between percentiles. MONOCHROME1 is inverted, padding becomes black. Raises
    `ImageError` with a code E_DICOM_*, E_MULTIFRAME, E_BITDEPTH, E_TOO_LARGE, E_TIMEOUT or E_BLANK; its message quotes
    no text of the file.
    """
    try:
        require_package('pydicom', 'reading DICOM', 'dicom')
    except UsageError as error:
        raise ImageError(str(error), 'E_DICOM_SYNTAX') from None
    try:
        image = read_elements(data)
        _check(image, modalities)
        return _to_grey(image, _decode(image))
    except ImageError:
        raise
    # pydicom raises AttributeError, ValueError, struct.error and others, with messages that may quote the file.
    except Exception as error:
        raise ImageError(f'damaged ({type(error).__name__})', 'E_DICOM_CORRUPT') from error


def _check(image: Dataset, modalities: Container[str]) -> None:
    """Raise `ImageError` if the file is not a single radiograph of an acceptable size."""
    modality = str(image.get('Modality', 'none'))
    if modality not in modalities:
        # Only a well-formed modality is quoted, because the field may contain anything.
        shown = modality if re.fullmatch('[A-Z]{2,4}|none', modality) else '(not a valid code)'
        raise ImageError(f'modality {shown}: only CR and DX are accepted', 'E_DICOM_MODALITY')
    if 'PixelData' not in image:
        raise ImageError('no pixel data', 'E_DICOM_NOPIXEL')
    if not PHOTOMETRIC_INTERPRETATIONS.fullmatch(str(image.get('PhotometricInterpretation', ''))):
        raise ImageError('the photometric interpretation is not that of a radiograph', 'E_DICOM_MODALITY')
    frames = int(image.get('NumberOfFrames') or 1)
    if frames > 1:
        raise ImageError(f'{frames} frames', 'E_MULTIFRAME')
    check_pixels(image.Columns, image.Rows)
    if image.get('HighBit', image.BitsStored - 1) != image.BitsStored - 1:
        raise ImageError(f'{image.BitsStored} bits that end at bit {image.HighBit} are not supported', 'E_BITDEPTH')
    raw_bytes = image.Rows * image.Columns * image.SamplesPerPixel * image.BitsAllocated // 8
    if len(image.PixelData) > 2 * raw_bytes + SLACK:
        raise ImageError(f'{len(image.PixelData):,} bytes for {raw_bytes:,} bytes of pixels', 'E_DICOM_CORRUPT')


def _decode(image: Dataset) -> np.ndarray:
    """Return the stored pixels (h, w), or (h, w, 3) in RGB, or the grey channel (h, w) of YBR."""
    from pydicom.pixels import get_decoder

    syntax = image.file_meta.TransferSyntaxUID
    try:
        supported = get_decoder(syntax).is_available
    except NotImplementedError:
        supported = False
    if syntax == JPEG_EXTENDED and image.BitsStored > 8:  # Pillow decodes JPEG with 8 bits only
        supported = False
    if not supported:
        package = PACKAGES.get(str(syntax), OTHER_PACKAGE)
        shown = f'{syntax} ({syntax.name})' if re.fullmatch('[0-9.]+', syntax) else '(not a valid identifier)'
        raise ImageError(f'transfer syntax {shown} needs the package {package}', 'E_DICOM_SYNTAX')
    if syntax == RLE:
        unpack_rle(image)
    elif syntax.is_encapsulated:
        check_frame(image)
    pixels, facts = get_decoder(image.file_meta.TransferSyntaxUID).as_array(image, **AS_STORED)
    if str(facts['photometric_interpretation']).startswith('YBR_FULL'):  # the first channel is grey already
        return np.ascontiguousarray(pixels[..., 0])
    return pixels


def _to_grey(image: Dataset, stored: np.ndarray) -> DecodedImage:
    if image.SamplesPerPixel > 1:
        grey, notes = _grey_from_colour(stored)
    else:
        grey, notes = _grey_from_levels(image, stored)
    burned_in = str(image.get('BurnedInAnnotation')).upper() == 'YES'
    if burned_in:
        notes.append('BurnedInAnnotation is YES: text in the picture may identify the patient')
    return DecodedImage(
        pixels=grey,
        format='DICOM',
        mode=str(image.PhotometricInterpretation),
        bits=int(image.BitsStored),
        width=image.Columns,
        height=image.Rows,
        notes=tuple(notes),
        burned_in=burned_in,
    )


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
    if image.PhotometricInterpretation == 'MONOCHROME1':
        table = 255 - table
        notes.append('inverted (MONOCHROME1)')
    return look_up(stored, np.where(padding, np.uint8(0), table)), notes


def _is_padding(image: Dataset, levels: np.ndarray) -> np.ndarray:
    """Return which of the stored `levels` are padding: boolean (n,)."""
    limits = _numbers(image.get('PixelPaddingValue'))[:1] + _numbers(image.get('PixelPaddingRangeLimit'))[:1]
    if not limits:
        limits = [math.inf]
    return (levels >= min(limits)) & (levels <= max(limits))


def _numbers(value: Any) -> list[float]:
    """Return one number, several or none as a list."""
    if value is None:
        return []
    numbers = value if isinstance(value, Sequence) else [value]
    return [float(number) for number in numbers]


def _rescale(image: Dataset, levels: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Apply the modality LUT or rescaling to the stored `levels`; unusable ones are ignored, with a note."""
    from pydicom.pixels import apply_modality_lut

    with suppress(Exception):
        for item in image.get('ModalityLUTSequence', ()):
            item.LUTDescriptor[2] = 16 if item.LUTDescriptor[2] > 8 else 8  # pydicom accepts only 8 and 16 bits
        values = np.asarray(apply_modality_lut(levels, image), float)
        if np.isfinite(values).all() and (np.ptp(values) > 0 or len(levels) == 1):
            return values, []
    return levels.astype(float), ['the modality rescaling of the file is unusable and was ignored']


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
    centres = _numbers(image.get('WindowCenter'))
    widths = _numbers(image.get('WindowWidth'))
    for index, (centre, width) in enumerate(zip(centres[:MAX_WINDOWS], widths, strict=False)):
        with suppress(Exception), np.errstate(all='ignore'):
            # Two values far outside show the range that pydicom maps the window to.
            grey = apply_windowing(np.append(values, [-FAR_VALUE, FAR_VALUE]), image, index)
            table = scale_to_grey(grey[:-2], *grey[-2:])
            yield f'window of the file: centre {centre:g}, width {width:g}', table
