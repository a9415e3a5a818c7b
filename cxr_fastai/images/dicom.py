"""A DICOM file's bytes become grey pixels, the way a radiologist's display shows them (extra `dicom`: pydicom).

Only the technical tags of `TAGS` are parsed; names, dates and identifiers are never looked at.
"""

from __future__ import annotations

import math
import re
from collections.abc import Container, Iterator, Sequence
from contextlib import suppress
from importlib.util import find_spec
from io import BytesIO
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from cxr_fastai.core.errors import ImageError
from cxr_fastai.images.limits import DecodedImage, check_pixels, check_scans
from cxr_fastai.images.windowing import count_levels, look_up, percentile_table, spread, weighted_percentiles

if TYPE_CHECKING:
    from pydicom import Dataset

MODALITIES = ('CR', 'DX')
"""Computed and digital radiography. Others, such as CT, US or a scanned image (RG), are no images of this kind."""
TAGS = [
    'Modality',
    'PhotometricInterpretation',
    'SamplesPerPixel',
    'PlanarConfiguration',
    'Rows',
    'Columns',
    'NumberOfFrames',
    'BitsAllocated',
    'BitsStored',
    'HighBit',
    'PixelRepresentation',
    'PixelPaddingValue',
    'PixelPaddingRangeLimit',
    'RescaleSlope',
    'RescaleIntercept',
    'ModalityLUTSequence',
    'VOILUTSequence',
    'VOILUTFunction',
    'WindowCenter',
    'WindowWidth',
    'BurnedInAnnotation',
    'PixelData',
]
PICTURES = (b'\xff\xd8\xff', b'\x89PNG', b'II*\0', b'MM\0*')
"""How JPEG, PNG and TIFF files begin."""
SUFFIXES = ('.dcm', '.dicom')
JPEG_EXTENDED = '1.2.840.10008.1.2.4.51'
BY_PILLOW = ('1.2.840.10008.1.2.4.50', JPEG_EXTENDED, '1.2.840.10008.1.2.4.90', '1.2.840.10008.1.2.4.91')
"""JPEG and JPEG 2000."""
DEFLATED = '1.2.840.10008.1.2.1.99'
PACKAGES = {
    '1.2.840.10008.1.2.4.80': 'pyjpegls',
    '1.2.840.10008.1.2.4.81': 'pyjpegls',
    '1.2.840.10008.1.2.4.201': 'pylibjpeg-openjpeg',
    '1.2.840.10008.1.2.4.202': 'pylibjpeg-openjpeg',
    '1.2.840.10008.1.2.4.203': 'pylibjpeg-openjpeg',
}
"""What decodes a transfer syntax that pydicom with Pillow does not; elsewhere GDCM, which reads JPEG lossless too."""
SLACK = 65_536
"""Bytes that compressed pixels may take beyond twice the raw ones; more is no picture but a trap for decoders."""
BEYOND = 1e12
"""A value outside every window."""
VISIBLE = 32
"""Levels between the 1st and the 99th percentile that a declared window has to leave."""
KINDS = re.compile('MONOCHROME[12]|RGB|YBR_[A-Z0-9_]+')
"""Photometric interpretations of a radiograph, stored in colour or not."""
PARSING = Lock()
"""pydicom's validation is a switch of the whole process, and images are read in threads."""


def is_dicom(data: bytes, suffix: str = '') -> bool:
    """Whether `data` says it is DICOM, or lacks only the preamble, or is no picture and called so by its `suffix`."""
    named = suffix in SUFFIXES and not data.startswith(PICTURES)
    return data[128:132] == b'DICM' or data[:4] in (b'\2\0\0\0', b'\x08\0\5\0') or named


def read_dicom(data: bytes, modalities: Container[str] = MODALITIES) -> DecodedImage:
    """Decode a DICOM file whose modality is one of `modalities`.

    Modality rescaling or LUT, then what the file declares that shows something (VOI LUT, windows), else percentiles;
    MONOCHROME1 is inverted, padding is black. Raises `ImageError` with a code E_DICOM_*, E_MULTIFRAME, E_BITDEPTH,
    E_TOO_LARGE, E_TIMEOUT or E_BLANK; no text of the file is in its message.
    """
    if not find_spec('pydicom'):
        raise ImageError('reading DICOM needs pydicom: pip install "cxr_fastai[dicom]"', 'E_DICOM_SYNTAX')
    try:
        image = _parse(data)
        _check(image, modalities)
        return _grey(image, _decode(image))
    except ImageError:
        raise
    # pydicom lets AttributeError, ValueError, struct.error and others out; what they say may quote the file.
    except Exception as error:
        raise ImageError(f'damaged ({type(error).__name__})', 'E_DICOM_CORRUPT') from error


def _parse(data: bytes) -> Dataset:
    """The elements `TAGS` that are not empty."""
    from pydicom import dcmread
    from pydicom.config import disable_value_validation
    from pydicom.filereader import read_dataset

    if data[128:132] != b'DICM':
        raise ImageError('no DICM preamble', 'E_DICOM_CORRUPT')
    # Its warnings about a damaged file would quote whatever stands there, a name among others.
    with PARSING, disable_value_validation():
        meta = read_dataset(BytesIO(data[132:]), False, True, stop_when=lambda tag, *_: tag.group > 2)
        syntax = meta.get('TransferSyntaxUID')
        if not syntax:
            raise ImageError('it names no transfer syntax', 'E_DICOM_CORRUPT')
        # Inflating has no limit in pydicom, and radiography does not use it.
        if syntax == DEFLATED:
            raise ImageError(f'transfer syntax {DEFLATED} (deflated) is refused', 'E_DICOM_SYNTAX')
        image = dcmread(BytesIO(data), specific_tags=TAGS)
        for element in image:  # which also converts, and validates, each
            if element.value is None or element.value == '':
                del image[element.tag]
    return image


def _check(image: Dataset, modalities: Container[str]) -> None:
    """Raise `ImageError` for what is no single radiograph with pixels of a size that can be decoded."""
    modality = str(image.get('Modality', 'none'))
    if modality not in modalities:
        shown = modality if re.fullmatch('[A-Z]{2,4}|none', modality) else 'of no known name'
        raise ImageError(f'modality {shown}: only CR and DX are images', 'E_DICOM_MODALITY')
    if 'PixelData' not in image:
        raise ImageError('it has no pixel data', 'E_DICOM_NOPIXEL')
    if not KINDS.fullmatch(str(image.get('PhotometricInterpretation', ''))):
        raise ImageError('its photometric interpretation is not that of a radiograph', 'E_DICOM_MODALITY')
    if (frames := int(image.get('NumberOfFrames') or 1)) > 1:
        raise ImageError(f'{frames} frames', 'E_MULTIFRAME')
    check_pixels(image.Columns, image.Rows)
    if image.get('HighBit', image.BitsStored - 1) != image.BitsStored - 1:
        raise ImageError(f'{image.BitsStored} bits that end at bit {image.HighBit} are not read', 'E_BITDEPTH')
    raw = image.Rows * image.Columns * image.SamplesPerPixel * image.BitsAllocated // 8
    if len(image.PixelData) > 2 * raw + SLACK:
        raise ImageError(f'{len(image.PixelData):,} bytes for {raw:,} bytes of pixels', 'E_DICOM_CORRUPT')


def _decode(image: Dataset) -> np.ndarray:
    """The stored pixels (h, w), or (h, w, 3) in RGB."""
    from pydicom.pixels import get_decoder

    syntax = image.file_meta.TransferSyntaxUID
    try:
        readable = get_decoder(syntax).is_available
    except NotImplementedError:
        readable = False
    if not readable or (syntax == JPEG_EXTENDED and image.BitsStored > 8):  # Pillow's JPEG has 8 bits
        package = PACKAGES.get(str(syntax), 'python-gdcm')
        shown = f'{syntax} ({syntax.name})' if re.fullmatch('[0-9.]+', syntax) else 'of no known name'
        raise ImageError(f'transfer syntax {shown} needs the package {package}', 'E_DICOM_SYNTAX')
    if syntax in BY_PILLOW:
        _check_frame(image)
    return image.pixel_array


def _check_frame(image: Dataset) -> None:
    """Raise `ImageError` where the compressed picture is not of the size that the file says, or has too many scans."""
    from pydicom.encaps import get_frame

    frame = get_frame(image.PixelData, 0, number_of_frames=1)
    with Image.open(BytesIO(frame), formats=('JPEG', 'JPEG2000')) as picture:
        size, form = picture.size, picture.format
    if size != (image.Columns, image.Rows):
        raise ImageError('its picture is not of the size it says', 'E_DICOM_CORRUPT')
    if form == 'JPEG':
        check_scans(frame, *size)


def _grey(image: Dataset, stored: np.ndarray) -> DecodedImage:
    kind, burned = str(image.PhotometricInterpretation), str(image.get('BurnedInAnnotation')).upper() == 'YES'
    grey, notes = _from_colour(stored) if stored.ndim == 3 else _from_levels(image, stored)
    if burned:
        notes.append('BurnedInAnnotation is YES: text in the picture may name the patient')
    return DecodedImage(grey, 'DICOM', kind, int(image.BitsStored), image.Columns, image.Rows, tuple(notes), burned)


def _from_colour(stored: np.ndarray) -> tuple[np.ndarray, list[str]]:
    if stored.dtype != np.uint8:
        raise ImageError(f'colour of {8 * stored.itemsize} bits', 'E_BITDEPTH')
    return np.asarray(Image.fromarray(stored).convert('L')), ['colour to grey']


def _from_levels(image: Dataset, stored: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Grey (h, w) through the file's own rescaling and window, upright in brightness, with black padding."""
    levels, counts = count_levels(stored)
    padding = _is_padding(image, levels)
    meant, notes = _rescale(image, levels)
    table, note = _window(image, meant, np.where(padding, 0, counts))
    if note:
        notes.append(note)
    if image.PhotometricInterpretation == 'MONOCHROME1':
        table = 255 - table
        notes.append('MONOCHROME1 inverted')
    return look_up(stored, np.where(padding, np.uint8(0), table)), notes


def _is_padding(image: Dataset, levels: np.ndarray) -> np.ndarray:
    """Which of the stored `levels` mean that there is no pixel."""
    ends = [_numbers(image.get(name)) for name in ('PixelPaddingValue', 'PixelPaddingRangeLimit')]
    ends = [end[0] for end in ends if end] or [math.inf]
    return (levels >= min(ends)) & (levels <= max(ends))


def _rescale(image: Dataset, levels: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """What the stored `levels` mean, as floats; as they are, with a note, where the file's rescaling does not work."""
    from pydicom.pixels import apply_modality_lut

    with suppress(Exception):
        for item in image.get('ModalityLUTSequence', ()):
            item.LUTDescriptor[2] = 16 if item.LUTDescriptor[2] > 8 else 8  # pydicom takes no depth between
        meant = np.asarray(apply_modality_lut(levels, image), float)
        if np.isfinite(meant).all() and (np.ptp(meant) > 0 or len(levels) == 1):
            return meant, []
    return levels.astype(float), ['its modality rescaling cannot be used']


def _window(image: Dataset, meant: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, str]:
    """The grey level (uint8) of each of the values `meant`, by what the file declares and leaves something to see; else
    as they are up to 8 bits, and by percentiles above. `counts` tells how often each occurs."""
    for note, table in _declared(image, meant):
        low, high = weighted_percentiles(table, counts, (1, 99))
        if high - low >= VISIBLE:
            return table, note
    if image.BitsStored > 8:
        return percentile_table(meant, counts)
    signed, span = bool(image.PixelRepresentation), 1 << image.BitsStored
    ends, _ = _rescale(image, np.array([0, span - 1]) - signed * span // 2)
    return spread(meant, ends.min(), ends.max()), ''


def _declared(image: Dataset, meant: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """What of the file's VOI LUT and windows can be used, each as a note and the grey level (uint8) of each value."""
    from pydicom.pixels import apply_voi, apply_windowing

    with suppress(Exception):
        depth = image.VOILUTSequence[0].LUTDescriptor[2]
        yield "the file's VOI LUT", spread(apply_voi(meant.astype(int), image), 0, (1 << depth) - 1)
    centres, widths = (_numbers(image.get(name)) for name in ('WindowCenter', 'WindowWidth'))
    for i, (centre, width) in enumerate(zip(centres, widths, strict=False)):
        with suppress(Exception), np.errstate(all='ignore'):
            # Two values far outside show what range pydicom maps the window to.
            grey = apply_windowing(np.append(meant, [-BEYOND, BEYOND]), image, i)
            yield f"the file's window, centre {centre:g}, width {width:g}", spread(grey[:-2], *grey[-2:])


def _numbers(value: Any) -> list[float]:
    """One or several numbers, or none, as a list."""
    if value is None:
        return []
    return [float(number) for number in (value if isinstance(value, Sequence) else [value])]
