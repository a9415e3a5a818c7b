"""Checks of the technical elements of a DICOM image, and sensible values for those that are missing or unreadable."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cxr_fastai.core.errors import ImageError, UsageError
from cxr_fastai.images.limits import check_pixels

if TYPE_CHECKING:
    from pydicom import Dataset

MODALITIES = ('CR', 'DX', 'DR')
"""Modalities of radiographs: computed and digital radiography; DR is the code of some vendors for the latter.

Others, such as CT, US or digitised radiographs (RG), are rejected unless the user accepts them.
"""
MODALITY_LIST = '([A-Z]{2,16}(,[A-Z]{2,16}){0,15})?'
"""Pattern of a list of modalities."""
PROCESSING_CLASS = '1.2.840.10008.5.1.4.1.1.1.1.1'
SOP_CLASSES = {
    '1.2.840.10008.5.1.4.1.1.1': 'CR',
    '1.2.840.10008.5.1.4.1.1.1.1': 'DX',
    PROCESSING_CLASS: 'DX',
    '1.2.840.10008.5.1.4.1.1.1.2': 'MG',
    '1.2.840.10008.5.1.4.1.1.1.2.1': 'MG',
    '1.2.840.10008.5.1.4.1.1.1.3': 'IO',
    '1.2.840.10008.5.1.4.1.1.1.3.1': 'IO',
    '1.2.840.10008.5.1.4.1.1.2': 'CT',
    '1.2.840.10008.5.1.4.1.1.2.1': 'CT',
    '1.2.840.10008.5.1.4.1.1.3.1': 'US',
    '1.2.840.10008.5.1.4.1.1.4': 'MR',
    '1.2.840.10008.5.1.4.1.1.4.1': 'MR',
    '1.2.840.10008.5.1.4.1.1.6.1': 'US',
    '1.2.840.10008.5.1.4.1.1.12.1': 'XA',
    '1.2.840.10008.5.1.4.1.1.12.2': 'RF',
    '1.2.840.10008.5.1.4.1.1.20': 'NM',
    '1.2.840.10008.5.1.4.1.1.128': 'PT',
    '1.2.840.10008.5.1.4.1.1.481.1': 'RTIMAGE',
}
"""SOP class to the modality of its images. Other classes, such as secondary capture, have images of any modality."""
PHOTOMETRIC_INTERPRETATIONS = re.compile('MONOCHROME[12]|RGB|YBR_[A-Z0-9_]{1,12}')
"""Photometric interpretations of a radiograph, which may be stored in colour."""
JPEG_BASELINE = '1.2.840.10008.1.2.4.50'
NATIVE = ('1.2.840.10008.1.2', '1.2.840.10008.1.2.1', '1.2.840.10008.1.2.2')
"""Transfer syntaxes of pixels that are not compressed."""
ALLOCATED_BITS = (1, 8, 16, 32, 64)
TAG_NUMBERS = {'Rows': '(0028,0010)', 'Columns': '(0028,0011)', 'BitsAllocated': '(0028,0100)'}
"""The elements without which pixels cannot be read, apart from the pixels."""
SLACK = 65_536
"""Bytes of compressed pixels beyond twice the raw size that are accepted; more is an attack on the decoder."""


def parse_modalities(text: str) -> tuple[str, ...]:
    """Return the codes of modalities in a text such as `RG` or `CT,MR`; none for an empty one.

    Raises `UsageError` for anything else.
    """
    if re.fullmatch(MODALITY_LIST, text):
        return tuple(text.split(',')) if text else ()
    raise UsageError(
        f'--modality {text!r:.80}: not DICOM modalities. Give their codes, separated by commas, such as RG or CT,MR.'
    )


def check_modality(image: Dataset, accepted: Sequence[str] = ()) -> list[str]:
    """Raise `ImageError` E_DICOM_MODALITY unless `image` is a radiograph or of an `accepted` modality; return notes.

    Without the element Modality the SOP class decides. An image of which neither says anything is accepted, with a
    note.
    """
    modality = str(image.get('Modality', '')).strip(' \0').upper()
    notes = []
    if not modality:
        sop_class = str(image.get('SOPClassUID') or image.file_meta.get('MediaStorageSOPClassUID', '')).strip(' \0')
        modality = SOP_CLASSES.get(sop_class, '')
        notes.append(
            f'Modality is missing: {modality} according to the SOP class'
            if modality
            else 'Modality is missing, and the SOP class does not say that the image is a radiograph'
        )
    if modality and modality not in (*MODALITIES, *accepted):
        # Only a well-formed modality is quoted, because the field may contain anything.
        is_code = re.fullmatch('[A-Z]{2,4}|RTIMAGE', modality)
        shown = modality if is_code else '(not a valid code)'
        advice = f'. --modality {modality} accepts it too' if is_code and 'PixelData' in image else ''
        names = ', '.join(sorted({*MODALITIES, *accepted}))
        raise ImageError(f'modality {shown}: only {names} are accepted{advice}', 'E_DICOM_MODALITY')
    return notes


def complete_elements(image: Dataset) -> list[str]:
    """Check the elements that describe the pixels of `image` and add those that are missing; return notes.

    Raises `ImageError` with the name of the element if it is needed and missing or impossible.
    """
    if 'PixelData' not in image:
        raise ImageError('no pixel data: the element PixelData is missing or empty', 'E_DICOM_NOPIXEL')
    _check_frames(image)
    rows, columns, allocated = (_required(image, name) for name in TAG_NUMBERS)
    check_pixels(columns, rows)
    if allocated not in ALLOCATED_BITS:
        raise ImageError(f'BitsAllocated {allocated}: not one of {ALLOCATED_BITS}', 'E_DICOM_CORRUPT')
    assumed = _complete_samples(image)
    if image.file_meta.TransferSyntaxUID == JPEG_BASELINE and allocated > 8:
        # Such a picture has 8 bits; where a codestream and the elements disagree, it prevails (PS3.5, 8.2.4).
        assumed |= {'BitsAllocated': 8, 'BitsStored': 8, 'HighBit': 7}
    else:
        assumed |= _complete_bits(image, allocated)
    for name, value in assumed.items():
        setattr(image, name, value)
    _check_length(image)
    if not assumed:
        return []
    return ['missing or contradictory in the file, so assumed: ' + ', '.join(f'{n} {v}' for n, v in assumed.items())]


def _check_frames(image: Dataset) -> None:
    """Raise `ImageError` E_MULTIFRAME for several frames. A number that cannot be read counts as one."""
    frames = read_integer(image, 'NumberOfFrames') or 1
    if frames > 1:
        raise ImageError(f'{frames} frames', 'E_MULTIFRAME')
    if 'NumberOfFrames' in image:
        del image.NumberOfFrames


def _required(image: Dataset, name: str) -> int:
    value = read_integer(image, name)
    if value is None or value < 1:
        problem = 'is missing or not a number' if value is None else f'is {value}'
        raise ImageError(f'the element {name} {TAG_NUMBERS[name]} {problem}', 'E_DICOM_CORRUPT')
    setattr(image, name, value)
    return value


def read_integer(image: Dataset, name: str) -> int | None:
    """Return the first number of the element `name`, or None if it is missing or not a whole number."""
    numbers = read_numbers(image.get(name))
    if not numbers or not numbers[0].is_integer():
        return None
    return int(numbers[0])


def read_numbers(value: Any) -> list[float]:
    """Return one number, several or none as a list, with NaN for each value that is not a number."""
    if value is None or isinstance(value, bytes):
        return []
    values = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    return [_as_float(number) for number in values]


def _as_float(value: Any) -> float:
    try:
        return float(value)
    except (ValueError, TypeError, OverflowError):
        return math.nan


def _complete_samples(image: Dataset) -> dict[str, Any]:
    """Return the missing elements about colour and sign; normalise the photometric interpretation."""
    assumed: dict[str, Any] = {}
    photometric = re.sub(r'[\s\0]', '', str(image.get('PhotometricInterpretation', ''))).upper()
    samples = read_integer(image, 'SamplesPerPixel')
    if samples is None:
        samples = _guess_samples(image, photometric)
        assumed['SamplesPerPixel'] = samples
    if samples not in (1, 3):
        raise ImageError(f'SamplesPerPixel {samples}: 1 or 3 are needed', 'E_DICOM_CORRUPT')
    if photometric and not PHOTOMETRIC_INTERPRETATIONS.fullmatch(photometric):
        # Only a standard value is quoted, because the field may contain anything.
        shown = 'PALETTE COLOR' if photometric == 'PALETTECOLOR' else '(not quoted)'
        raise ImageError(f'PhotometricInterpretation {shown}: not that of a radiograph', 'E_DICOM_MODALITY')
    image.PhotometricInterpretation = photometric
    if samples == 1 and not photometric.startswith('MONOCHROME'):
        assumed['PhotometricInterpretation'] = 'MONOCHROME2'
    elif not photometric:
        is_jpeg = image.file_meta.TransferSyntaxUID == JPEG_BASELINE
        assumed['PhotometricInterpretation'] = 'YBR_FULL_422' if is_jpeg else 'RGB'
    if samples > 1 and read_integer(image, 'PlanarConfiguration') not in (0, 1):
        assumed['PlanarConfiguration'] = 0
    if read_integer(image, 'PixelRepresentation') not in (0, 1):
        assumed['PixelRepresentation'] = 0
    return assumed


def _guess_samples(image: Dataset, photometric: str) -> int:
    """Return the samples per pixel by the photometric interpretation, or else by the number of bytes."""
    if photometric:
        return 1 if photometric.startswith('MONOCHROME') else 3
    is_native = image.file_meta.TransferSyntaxUID in NATIVE
    grey_bytes = image.Rows * image.Columns * image.BitsAllocated // 8
    return 3 if is_native and len(image.PixelData) >= 3 * grey_bytes else 1


def _complete_bits(image: Dataset, allocated: int) -> dict[str, Any]:
    """Return BitsStored and HighBit if they are missing or impossible.

    Raises `ImageError` E_BITDEPTH if the stored bits do not end at the lowest one.
    """
    assumed = {}
    stored = read_integer(image, 'BitsStored')
    high_bit = read_integer(image, 'HighBit')
    if stored is None or not 1 <= stored <= allocated:
        stored = allocated if high_bit is None or not 0 <= high_bit < allocated else high_bit + 1
        assumed['BitsStored'] = stored
    if high_bit is None or not 0 <= high_bit < allocated:
        high_bit = stored - 1
        assumed['HighBit'] = high_bit
    if high_bit != stored - 1:
        raise ImageError(f'{stored} bits that end at bit {high_bit} are not supported', 'E_BITDEPTH')
    return assumed


def _check_length(image: Dataset) -> None:
    """Raise `ImageError` E_DICOM_CORRUPT if there are too few pixels, or too many bytes of compressed ones."""
    raw_bytes = image.Rows * image.Columns * image.SamplesPerPixel * image.BitsAllocated // 8
    length = len(image.PixelData)
    if length > 2 * raw_bytes + SLACK:
        raise ImageError(f'{length:,} bytes for {raw_bytes:,} bytes of pixels', 'E_DICOM_CORRUPT')
    if image.PhotometricInterpretation == 'YBR_FULL_422':
        raw_bytes = raw_bytes // 3 * 2  # two pixels share their colour
    if image.file_meta.TransferSyntaxUID in NATIVE and length < raw_bytes:
        raise ImageError(
            f'PixelData has {length:,} bytes, but {image.Columns}x{image.Rows} pixels need {raw_bytes:,}: the file is '
            'truncated, or Rows, Columns or BitsAllocated is wrong',
            'E_DICOM_CORRUPT',
        )
