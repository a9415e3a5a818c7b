"""The identity of a DICOM image that its report repeats: patient, study, series and instance (extra `dicom`).

This is the only module that reads names, dates and identifiers of a DICOM file. They go nowhere but into the files of
`dicom_reports` and `dicom_captures`; messages name elements, never their values.
"""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cxr_fastai.core.environment import require_package
from cxr_fastai.core.errors import ImageError
from cxr_fastai.core.files import SOFTWARE
from cxr_fastai.images.dicom_elements import read_stored_values

if TYPE_CHECKING:
    from pydicom import Dataset

REFERENCE = ('SOPClassUID', 'SOPInstanceUID', 'StudyInstanceUID', 'SeriesInstanceUID')
"""Elements without which a report can neither refer to its image nor join its study."""
HEADER = {'SOPClassUID': 'MediaStorageSOPClassUID', 'SOPInstanceUID': 'MediaStorageSOPInstanceUID'}
"""Elements of the file header that have the same value."""
PATIENT = (
    'PatientName',
    'PatientID',
    'IssuerOfPatientID',
    'PatientBirthDate',
    'PatientBirthTime',
    'PatientSex',
    'OtherPatientNames',
    'EthnicGroup',
    'PatientComments',
    'PatientIdentityRemoved',
    'DeidentificationMethod',
)
"""The elements of the Patient module that are copied: all that are neither sequences nor about animals."""
STUDY = (
    'StudyDate',
    'StudyTime',
    'ReferringPhysicianName',
    'StudyID',
    'AccessionNumber',
    'StudyDescription',
    'PatientAge',
    'PatientSize',
    'PatientWeight',
)
"""The elements of the modules General Study and Patient Study that are copied."""
ALWAYS_PRESENT = (
    'PatientName',
    'PatientID',
    'PatientBirthDate',
    'PatientSex',
    'StudyDate',
    'StudyTime',
    'ReferringPhysicianName',
    'StudyID',
    'AccessionNumber',
)
"""Elements that DICOM wants in every file. They may be empty (type 2)."""
CHOICES = {'PatientSex': ('M', 'F', 'O'), 'PatientIdentityRemoved': ('YES', 'NO')}
"""Elements with few permitted values."""
OTHERS = ('SpecificCharacterSet', 'Rows', 'PatientOrientation', 'ManufacturerModelName', 'LossyImageCompression')
"""Elements that are read, but not copied into a report."""
DELIMITERS = {'PN': b'^='}
"""Characters after which text of a value representation starts again in the first character set (PS3.5, 6.1.2.5.3)."""
LONG_TEXTS = ('LT', 'ST')
"""Value representations that permit line breaks."""
DATES = ('DA', 'TM')
"""Value representations of a date or a time of the day."""
UTF_8 = 'ISO_IR 192'
"""The character set of all reports, whatever that of the image."""
NOT_DICOM = 'E_NOT_DICOM'
"""The code of an image that is not a DICOM file, and therefore gets no report."""


@dataclass(frozen=True)
class DicomSource:
    """A DICOM image that a report can refer to.

    `elements` has its identity in UTF-8: `REFERENCE`, and those of `PATIENT` and `STUDY` that are valid. `omitted`
    names the elements whose value is not permitted, so that it was not copied. `orientation` is `PatientOrientation`,
    two texts, or none. `is_lossy` is True if the pixels were compressed with losses.
    """

    elements: Dataset
    omitted: tuple[str, ...] = ()
    orientation: tuple[str, ...] = ()
    is_lossy: bool = False

    @property
    def uid(self) -> str:
        """The SOP Instance UID of the image."""
        return str(self.elements.SOPInstanceUID)


def read_source(data: bytes) -> DicomSource:
    """Return the identity of the DICOM image that the file `data` contains. Its pixels are not read.

    Raises `ImageError` E_DICOM_CORRUPT if the file cannot be read as DICOM, E_DICOM_NOPIXEL if it is no image or a
    result of this package, and E_DICOM_REFERENCE if it has no valid element of `REFERENCE`. Raises `UsageError` if
    highdicom is not installed.
    """
    require_package('highdicom', 'writing DICOM', 'dicom')
    texts = _read_texts(data)
    if 'Rows' not in texts:
        raise ImageError('not an image, so there is nothing to report', 'E_DICOM_NOPIXEL')
    if texts.get('ManufacturerModelName') == SOFTWARE:
        raise ImageError(f'a result of {SOFTWARE} itself, so there is nothing to report', 'E_DICOM_NOPIXEL')
    valid = {name: text for name, text in texts.items() if _is_valid(name, text)}
    for name in REFERENCE:
        if name not in valid:
            reason = 'not a valid identifier' if name in texts else 'missing'
            raise ImageError(
                f'{name} is {reason}, so a report cannot refer to the image. Export the image again from its archive.',
                'E_DICOM_REFERENCE',
            )
    return DicomSource(
        elements=_make_elements(valid),
        omitted=tuple(name for name in (*PATIENT, *STUDY) if name in texts and name not in valid),
        orientation=tuple(valid.get('PatientOrientation', '').split('\\')),
        is_lossy=valid.get('LossyImageCompression') == '01',
    )


def _read_texts(data: bytes) -> dict[str, str]:
    """Return the texts of all elements that are read; what is a number in the file is no text, but not empty."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # about unknown character sets; the default one is used instead
            return _decode(read_stored_values(data, (*REFERENCE, *HEADER.values(), *PATIENT, *STUDY, *OTHERS)))
    except ImageError:
        raise
    except Exception as error:  # pydicom raises many kinds, with messages that may quote the file
        raise ImageError('damaged: its elements cannot be read', 'E_DICOM_CORRUPT') from error


def _decode(stored: dict[str, bytes]) -> dict[str, str]:
    """Return the texts of the elements, without padding; those of the file header stand in for missing ones.

    Bytes that are not valid in the character set of the file become U+FFFD, which is shown as a question mark.
    """
    from pydicom.charset import convert_encodings, decode_bytes
    from pydicom.datadict import dictionary_VR

    texts = {}
    names = stored.get('SpecificCharacterSet', b'').decode('latin-1').split('\\')
    encodings = convert_encodings([name.strip(' \0') for name in names])
    for name, value in stored.items():
        delimiters = set(DELIMITERS.get(dictionary_VR(name), b'\t\n\f\r'))
        text = decode_bytes(value, encodings, delimiters).strip(' \0')
        if text:
            texts[name] = text
    for name, header in HEADER.items():
        if header in texts:
            texts.setdefault(name, texts[header])
    return texts


def _is_valid(name: str, text: str) -> bool:
    """Return True if DICOM permits `text` as the value of the element `name`."""
    from pydicom.config import RAISE
    from pydicom.datadict import dictionary_VM, dictionary_VR
    from pydicom.valuerep import validate_value

    vr = dictionary_VR(name)
    if '\\' in text and dictionary_VM(name) == '1':
        return False
    has_control_characters = re.search(r'[\x00-\x1f\x7f-\x9f]', text)
    if name in CHOICES:
        return text in CHOICES[name]
    if has_control_characters and vr not in LONG_TEXTS:
        return False
    if '-' in text and vr in DATES:  # a range, which pydicom accepts, but only a query may contain
        return False
    try:
        for part in text.split('\\'):
            validate_value(vr, part, RAISE)
    except ValueError:
        return False
    return True


def _make_elements(texts: dict[str, str]) -> Dataset:
    """Return the elements that a report takes over, with the empty ones that DICOM wants."""
    from pydicom import Dataset

    elements = Dataset()
    elements.SpecificCharacterSet = UTF_8
    for name in ALWAYS_PRESENT:
        setattr(elements, name, '')
    for name in (*REFERENCE, *PATIENT, *STUDY):
        if name in texts:
            setattr(elements, name, texts[name])
    if elements.get('PatientIdentityRemoved') == 'YES' and 'DeidentificationMethod' not in elements:
        elements.DeidentificationMethod = 'as stated in the image'
    return elements
