"""Parsing of the technical elements of DICOM files, within limits that are checked before any value is converted."""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Callable, Sequence
from io import BytesIO
from threading import Lock
from typing import TYPE_CHECKING, Any

from cxr_fastai.core.errors import ImageError
from cxr_fastai.images.limits import MAX_PIXELS

if TYPE_CHECKING:
    from pydicom import Dataset

TAGS = [
    'SOPClassUID',
    'Modality',
    'PresentationIntentType',
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
    'PresentationLUTShape',
    'PixelSpacing',
    'ImagerPixelSpacing',
    'NominalScannedPixelSpacing',
    'PixelAspectRatio',
    'BurnedInAnnotation',
    'PixelData',
]
"""The only elements that are parsed for the pixels."""
TEXT_NUMBERS = (
    'NumberOfFrames',
    'RescaleSlope',
    'RescaleIntercept',
    'WindowCenter',
    'WindowWidth',
    'PixelSpacing',
    'ImagerPixelSpacing',
    'NominalScannedPixelSpacing',
    'PixelAspectRatio',
)
"""Elements whose numbers are stored as text, which many programs write in ways that DICOM does not permit."""
BINARY_NUMBERS = ('US', 'SS', 'UL', 'SL', 'FL', 'FD')
"""Value representations of numbers that are not text."""
DEFLATED = '1.2.840.10008.1.2.1.99'
PLAIN = '1.2.840.10008.1.2.1'
"""Transfer syntax of a deflated file that was unpacked."""
SPECIFIC_CHARACTER_SET = 0x00080005
PIXEL_DATA = 0x7FE00010
PIXEL_VRS = (None, 'OB', 'OW', 'UN')
"""Value representations of pixel data. Others would make an object of each pixel."""
SEQUENCES = (0x00283000, 0x00283010)
"""The tags of the sequences among `TAGS`: ModalityLUTSequence and VOILUTSequence."""
UNDEFINED_LENGTH = 0xFFFFFFFF

MAX_VALUE_BYTES = 4096
"""Maximum length of an element that is neither a sequence nor pixel data; usual are one or two numbers."""
MAX_SEQUENCE_BYTES = 300_000
"""Maximum length of a sequence; its largest usual element is a table of 65,536 numbers of 16 bits."""
MAX_ENTRY_BYTES = {'LUTDescriptor': 64, 'LUTData': 2 * 65_536}
"""Maximum length of the elements of a LUT."""
MAX_INFLATED = 4 * MAX_PIXELS
"""Maximum number of bytes of the elements of a deflated file."""
MAX_READS = 40_000
"""Maximum number of reads from a file. Each element and each item of a sequence needs at least one."""
PARSING = Lock()
"""pydicom switches its validation for the whole process, but images are read in threads."""


class _CountedFile(BytesIO):
    """A file in memory that can be read `MAX_READS` times."""

    reads = 0

    def read(self, size: int | None = -1, /) -> bytes:
        self.reads += 1
        if self.reads > MAX_READS:
            raise ImageError(f'too many elements: they need more than {MAX_READS:,} reads', 'E_DICOM_CORRUPT')
        return super().read(size)


def read_elements(data: bytes) -> tuple[Dataset, list[str]]:
    """Return the elements `TAGS` of a DICOM file that are not empty, and the names of those that cannot be read.

    Sequences keep their first item. The elements `TEXT_NUMBERS` become lists of floats, with NaN for each part that is
    not a number. Raises `ImageError` E_DICOM_CORRUPT or E_DICOM_SYNTAX, and what pydicom raises for a damaged file.
    """
    from pydicom.config import disable_value_validation

    # Validation is off because its warnings quote the values of a damaged file, which may be a name.
    with PARSING, disable_value_validation():
        image = _read_partial(data, TAGS, _check_element)
        return image, _convert_elements(image)


def read_stored_values(data: bytes, names: Sequence[str]) -> dict[str, bytes]:
    """Return the values of the elements `names` of a DICOM file as they are stored, by name, without the pixels.

    Empty elements, sequences, and values of more than `MAX_VALUE_BYTES` are left out. Raises as `read_elements` does.
    """
    from pydicom.config import disable_value_validation
    from pydicom.multival import MultiValue

    values = {}
    with PARSING, disable_value_validation():
        elements = _read_partial(data, names, _is_behind_texts)
        for part in (elements.file_meta, elements):
            for name in names:
                value = part.get_item(name).value if name in part else None
                if isinstance(value, MultiValue):  # pydicom has converted the character sets
                    value = '\\'.join(map(str, value))
                if isinstance(value, str):
                    value = value.encode('latin-1', 'replace')
                if isinstance(value, bytes) and 0 < len(value) <= MAX_VALUE_BYTES:
                    values[name] = value
    return values


def _read_partial(data: bytes, names: Sequence[str], stop_when: Callable[[Any, str | None, int], bool]) -> Dataset:
    """Return the elements `names` of a DICOM file up to the first one for which `stop_when` is True."""
    from pydicom.filereader import read_dataset, read_partial
    from pydicom.tag import BaseTag, Tag

    if data[128:132] != b'DICM':
        raise ImageError('no DICM preamble', 'E_DICOM_CORRUPT')
    file = _CountedFile(data)
    file.seek(132)
    header = read_dataset(file, False, True, stop_when=_is_behind_header)
    if not header.get('TransferSyntaxUID'):
        raise ImageError('no transfer syntax', 'E_DICOM_CORRUPT')
    if header.TransferSyntaxUID == DEFLATED:
        file = _CountedFile(_inflate(data, file.tell()))
    file.seek(0)
    tags: list[BaseTag | int] = [Tag(name) for name in names]
    return read_partial(file, stop_when=stop_when, specific_tags=tags)


def _convert_elements(image: Dataset) -> list[str]:
    """Convert each element of `image`, remove the empty ones, and return the names of those that cannot be read."""
    from pydicom.datadict import keyword_for_tag

    unreadable = []
    is_sign_missing = 'PixelRepresentation' not in image or not image.get_item('PixelRepresentation').value
    if is_sign_missing:
        image.PixelRepresentation = 0  # decides how other elements are converted
    for tag in list(image.keys()):
        name = keyword_for_tag(tag)
        try:
            _convert_text_numbers(image, name)
            element = image[tag]
        except ImageError:
            raise
        except Exception:  # pydicom raises ValueError, struct.error and others; other elements may be sufficient
            del image[tag]
            if name in TAGS:
                unreadable.append(name)
            continue
        if element.value is None or element.value == '':
            del image[tag]
        elif element.VR == 'SQ':
            _check_items(element.value)
    if is_sign_missing and 'PixelRepresentation' in image:
        del image.PixelRepresentation
    return unreadable


def _convert_text_numbers(image: Dataset, name: str) -> None:
    """Replace the element `name` of `image` by the numbers of its text, if it is one of `TEXT_NUMBERS`.

    Raises `ValueError` if the text has no number.
    """
    if name not in TEXT_NUMBERS:
        return
    raw: Any = image.get_item(name)
    if not isinstance(raw.value, bytes) or raw.VR in BINARY_NUMBERS or not raw.value.strip(b' \0'):
        return
    numbers = parse_numbers(raw.value.decode('latin-1'))
    if all(math.isnan(number) for number in numbers):
        raise ValueError(name)
    image.add_new(raw.tag, 'FD', numbers)


def parse_numbers(text: str) -> list[float]:
    """Return the numbers of `text`, which are separated by backslashes, with NaN for each part that is not a number.

    DICOM permits only a decimal point. A decimal comma, brackets as in Python's lists, quotes and NUL are accepted too.
    A comma separates numbers within brackets, before a space, and if there are several of them.
    """
    is_list = '[' in text or '(' in text or text.count(',') > 1 or ', ' in text
    plain = re.sub('[][()\'"\\0]', ' ', text)
    parts = re.split(r'[\\,;]' if is_list else r'[\\;]', plain)
    return [_parse_number(part.replace(',', '.')) for part in parts]


def _parse_number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _is_behind_header(tag: int, vr: str | None, length: int) -> bool:
    """Return True if an element is behind the file header. Raises `ImageError` if it is long."""
    if tag >> 16 > 2:
        return True
    if length > MAX_VALUE_BYTES:
        raise ImageError(f'an element of {length:,} bytes in the file header', 'E_DICOM_CORRUPT')
    return False


def _inflate(data: bytes, start: int) -> bytes:
    """Return a deflated file, whose elements begin at `start`, as a plain one. pydicom would unpack without a limit.

    Raises `ImageError` E_TOO_LARGE beyond `MAX_INFLATED` bytes.
    """
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    elements = inflater.decompress(data[start:], MAX_INFLATED)
    if inflater.unconsumed_tail:
        raise ImageError(f'the deflated elements are over {MAX_INFLATED:,} bytes', 'E_TOO_LARGE')
    header = data[:start].replace(DEFLATED.encode(), PLAIN.encode().ljust(len(DEFLATED), b'\0'))
    return header + elements


def _is_behind_texts(tag: int, vr: str | None, length: int) -> bool:
    """Return True for the pixels, which all elements that are text precede."""
    return tag >= PIXEL_DATA


def _check_element(tag: int, vr: str | None, length: int) -> bool:
    """Raise `ImageError` if an element that will be converted is too long; return False, for reading on."""
    from pydicom.datadict import keyword_for_tag

    name = keyword_for_tag(tag)
    if name not in TAGS and tag != SPECIFIC_CHARACTER_SET:
        return False
    if tag == PIXEL_DATA:
        if vr not in PIXEL_VRS:
            raise ImageError('the pixel data are not bytes or words', 'E_DICOM_CORRUPT')
        return False
    limit = MAX_SEQUENCE_BYTES if tag in SEQUENCES else MAX_VALUE_BYTES
    is_open_sequence = length == UNDEFINED_LENGTH and tag in SEQUENCES
    if length > limit and not is_open_sequence:
        raise ImageError(f'{name} is longer than {limit:,} bytes', 'E_DICOM_CORRUPT')
    return False


def _check_items(items: list[Dataset]) -> None:
    """Remove all `items` of a sequence but the first. Raises `ImageError` if that has a long element."""
    del items[1:]
    for item in items:
        for name, limit in MAX_ENTRY_BYTES.items():
            length = len(getattr(item.get_item(name), 'value', None) or b'')
            if length > limit:
                raise ImageError(f'{name} of {length:,} bytes is longer than {limit:,}', 'E_DICOM_CORRUPT')
