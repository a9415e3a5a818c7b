"""A DICOM file's bytes become grey pixels, the way a radiologist's display shows them (extra `dicom`: pydicom).

Only the technical tags of `TAGS` are parsed; names, dates and identifiers are never looked at.
"""
from __future__ import annotations

from importlib.util import find_spec
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np

from cxr_fastai.core import Film, FilmError
from cxr_fastai.windows import Transfer, all_levels, look_up, spread, transferred_grey

if TYPE_CHECKING:
    from pydicom import Dataset

MODALITIES = ('CR', 'DX')
"""Computed and digital radiography. Others, such as CT, US or a scanned film (RG), are no films of this kind."""
TAGS = ['Modality', 'PhotometricInterpretation', 'SamplesPerPixel', 'PlanarConfiguration', 'Rows', 'Columns',
        'NumberOfFrames', 'BitsAllocated', 'BitsStored', 'HighBit', 'PixelRepresentation', 'PixelPaddingValue',
        'RescaleSlope', 'RescaleIntercept', 'ModalityLUTSequence', 'VOILUTSequence', 'VOILUTFunction', 'WindowCenter',
        'WindowWidth', 'PresentationLUTShape', 'ViewPosition', 'BurnedInAnnotation', 'PixelData']
SUFFIXES = ('.dcm', '.dicom')
JPEG_EXTENDED = '1.2.840.10008.1.2.4.51'
DEFLATED = '1.2.840.10008.1.2.1.99'
PACKAGES = {'1.2.840.10008.1.2.4.80': 'pyjpegls', '1.2.840.10008.1.2.4.81': 'pyjpegls',
            '1.2.840.10008.1.2.4.201': 'pylibjpeg-openjpeg', '1.2.840.10008.1.2.4.202': 'pylibjpeg-openjpeg',
            '1.2.840.10008.1.2.4.203': 'pylibjpeg-openjpeg'}
"""What decodes a transfer syntax that pydicom with Pillow does not; elsewhere GDCM, which reads JPEG lossless too."""
SLACK = 65_536
"""Bytes that compressed pixels may take beyond twice the raw ones; more is no picture but a trap for decoders."""
BEYOND = 1e12
"""A value outside every window."""


def is_dicom(data: bytes, suffix: str = '') -> bool:
    """Whether `data` says it is DICOM, or is without the preamble what a file called `suffix` should be."""
    return data[128:132] == b'DICM' or suffix in SUFFIXES or data[:4] in (b'\2\0\0\0', b'\x08\0\5\0')


def read_dicom(data: bytes, max_pixels: int, modalities: tuple[str, ...] = MODALITIES) -> Film:
    """Decode a DICOM file of at most `max_pixels` whose modality is one of `modalities`.

    Modality rescaling or LUT, then the file's VOI LUT or its first window, else percentiles; MONOCHROME1 is inverted.
    Raises `FilmError` with a code E_DICOM_*, E_MULTIFRAME, E_TOO_LARGE or E_BLANK.
    """
    if not find_spec('pydicom'):
        raise FilmError('reading DICOM needs pydicom: pip install "cxr_fastai[dicom]"', 'E_DICOM_SYNTAX')
    from pydicom.config import disable_value_validation
    try:
        # Its warnings about a damaged file quote whatever stands there, a name among others.
        with disable_value_validation():
            film = _parse(data)
            _check(film, max_pixels, modalities)
            return _grey(film, _decode(film))
    except FilmError: raise
    # pydicom lets AttributeError, ValueError, struct.error and others out.
    except Exception as error:
        said = (str(error).splitlines() or [''])[0]
        raise FilmError(f'damaged ({type(error).__name__}: {said:.80})', 'E_DICOM_CORRUPT') from error


def _parse(data: bytes) -> Dataset:
    from pydicom import dcmread
    from pydicom.filereader import read_dataset
    if data[128:132] != b'DICM': raise FilmError('no DICM preamble', 'E_DICOM_CORRUPT')
    meta = read_dataset(BytesIO(data[132:]), False, True, stop_when=lambda tag, *_: tag.group > 2)
    syntax = meta.get('TransferSyntaxUID')
    if not syntax: raise FilmError('it names no transfer syntax', 'E_DICOM_CORRUPT')
    # Inflating has no limit in pydicom, and radiography does not use it.
    if syntax == DEFLATED: raise FilmError(f'transfer syntax {DEFLATED} (deflated) is refused', 'E_DICOM_SYNTAX')
    return dcmread(BytesIO(data), specific_tags=TAGS)


def _check(film: Dataset, max_pixels: int, modalities: tuple[str, ...]) -> None:
    """Raise `FilmError` for what is no single radiograph with pixels of a size that can be decoded."""
    modality = film.get('Modality') or 'none'
    if modality not in modalities:
        raise FilmError(f'modality {modality}: only {" and ".join(modalities)} are films', 'E_DICOM_MODALITY')
    if (kind := film.get('PhotometricInterpretation', '')) == 'PALETTE COLOR':
        raise FilmError(f'{kind} is no radiograph', 'E_DICOM_MODALITY')
    if 'PixelData' not in film: raise FilmError('it has no pixel data', 'E_DICOM_NOPIXEL')
    if (frames := int(film.get('NumberOfFrames') or 1)) > 1: raise FilmError(f'{frames} frames', 'E_MULTIFRAME')
    if film.Rows*film.Columns > max_pixels:
        raise FilmError(f'{film.Columns}x{film.Rows} is over {max_pixels:,} pixels', 'E_TOO_LARGE')
    raw = film.Rows*film.Columns*film.SamplesPerPixel*film.BitsAllocated//8
    if len(film.PixelData) > 2*raw + SLACK:
        raise FilmError(f'{len(film.PixelData):,} bytes for {raw:,} bytes of pixels', 'E_DICOM_CORRUPT')


def _decode(film: Dataset) -> np.ndarray:
    """The stored pixels (h, w), or (h, w, 3) in RGB."""
    from pydicom.pixels import get_decoder
    syntax = film.file_meta.TransferSyntaxUID
    try: readable = get_decoder(syntax).is_available
    except NotImplementedError: readable = False
    if not readable or (syntax == JPEG_EXTENDED and film.BitsStored > 8):  # Pillow's JPEG has 8 bits
        package = PACKAGES.get(str(syntax), 'python-gdcm')
        raise FilmError(f'transfer syntax {syntax} ({syntax.name}) needs the package {package}', 'E_DICOM_SYNTAX')
    return film.pixel_array


def _grey(film: Dataset, stored: np.ndarray) -> Film:
    kind, burned = str(film.PhotometricInterpretation), str(film.get('BurnedInAnnotation')).upper() == 'YES'
    grey, note = _from_colour(stored) if stored.ndim == 3 else _window(film, stored)
    notes = {note: bool(note), 'MONOCHROME1 inverted': kind == 'MONOCHROME1',
             'BurnedInAnnotation is YES: text in the picture may name the patient': burned}
    return Film(255 - grey if kind == 'MONOCHROME1' else grey, 'DICOM', kind, int(film.BitsStored), film.Columns,
                film.Rows, tuple(text for text, holds in notes.items() if holds), burned)


def _from_colour(stored: np.ndarray) -> tuple[np.ndarray, str]:
    from PIL import Image
    if stored.dtype != np.uint8: raise FilmError(f'colour of {8*stored.itemsize} bits', 'E_BITDEPTH')
    return np.asarray(Image.fromarray(stored).convert('L')), 'colour to grey'


def _window(film: Dataset, stored: np.ndarray) -> tuple[np.ndarray, str]:
    """Grey (h, w) by the file's own VOI LUT or window where that leaves something to see; else as it is up to 8 bits,
    and by percentiles above."""
    from pydicom.pixels import apply_modality_lut
    meant = lambda levels: np.asarray(apply_modality_lut(levels, film), float)
    for note, table in _declared(film, stored, meant):
        grey = look_up(stored, table)
        if grey.std() >= 2: return grey, note
    if film.BitsStored <= 8:
        ends = meant(np.array([0, (1 << film.BitsStored) - 1]))
        return look_up(stored, spread(meant(all_levels(stored)), ends.min(), ends.max())), ''
    padding = film.get('PixelPaddingValue')
    return transferred_grey(stored, meant, padding if isinstance(padding, int) else None)


def _declared(film: Dataset, stored: np.ndarray, meant: Transfer) -> list[tuple[str, np.ndarray]]:
    """The VOI LUT and the first window that the file declares, each as a note and a table of grey levels (uint8)."""
    from pydicom.pixels import apply_voi, apply_windowing
    values, found = meant(all_levels(stored)), []
    if film.get('VOILUTSequence'):
        bits = film.VOILUTSequence[0].LUTDescriptor[2]
        found.append(("the file's VOI LUT", spread(apply_voi(values.astype(int), film), 0, (1 << bits) - 1)))
    centre, width = (_first(film.get(name)) for name in ('WindowCenter', 'WindowWidth'))
    if centre is not None and width is not None and width >= 1:
        # Two values far outside show what range pydicom maps the window to.
        with np.errstate(over='ignore'): windowed = apply_windowing(np.append(values, [-BEYOND, BEYOND]), film)
        table = spread(windowed[:-2], *windowed[-2:])
        found.append((f"the file's window, centre {centre:g}, width {width:g}", table))
    return found


def _first(value: Any) -> float | None:
    """The first of one or several numbers; None where there is none."""
    if value is None or value == '': return None
    return float(value[0] if hasattr(value, '__getitem__') else value)
