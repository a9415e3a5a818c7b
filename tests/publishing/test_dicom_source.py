"""Of a DICOM image, what its report needs is read whatever is missing or wrong, and errors quote nothing of it."""

import pytest
from dicomstudies import radiograph
from imagefiles import PATIENT, without

from cxr_fastai.core.errors import ImageError
from cxr_fastai.publishing.dicom_source import ALWAYS_PRESENT, read_source
from cxr_fastai.publishing.dicom_source import PATIENT as PATIENT_MODULE

NAMES = {
    'ISO_IR 100': 'Müller^Jörg',
    'ISO_IR 192': 'Ødegård^Łukasz',
    'GB18030': '王^小东',
    'ISO_IR 144': 'Люкceмбypг',
    ('', 'ISO 2022 IR 87'): 'Yamada^Tarou=山田^太郎=やまだ^たろう',
}


def refusal(data: bytes) -> ImageError:
    with pytest.raises(ImageError) as caught:
        read_source(data)
    return caught.value


def test_the_identity_of_patient_study_and_image_is_read():
    source = read_source(radiograph(3))
    elements = source.elements
    assert (source.uid, elements.StudyInstanceUID, elements.SeriesInstanceUID) == ('1.2.3.3', '1.2.4.3', '1.2.5.3')
    assert (elements.PatientName, elements.PatientID, elements.PatientSex) == (PATIENT, 'ID-3', 'F')
    assert (elements.StudyDate, elements.AccessionNumber, elements.StudyDescription) == ('20260102', 'A-1', 'Thorax')
    assert source.omitted == ()


@pytest.mark.parametrize('character_set', NAMES, ids=str)
def test_text_of_any_character_set_becomes_utf_8(character_set):
    name = NAMES[character_set]
    declared = list(character_set) if isinstance(character_set, tuple) else character_set
    source = read_source(radiograph(SpecificCharacterSet=declared, PatientName=name))
    assert source.elements.PatientName == name
    assert source.elements.SpecificCharacterSet == 'ISO_IR 192'


@pytest.mark.parametrize('declared', [b'ISO_IR 999', b'ISO_IR 192', b'nonsense\\\\', b'          '])
def test_bytes_that_do_not_fit_the_character_set_are_no_failure(declared):
    data = radiograph(SpecificCharacterSet='ISO_IR 100').replace(b'ISO_IR 100', declared)
    source = read_source(data.replace(PATIENT.encode(), b'D\xf6e^Jane'))
    assert str(source.elements.PatientName) in ('Döe^Jane', 'D\ufffde^Jane')


@pytest.mark.parametrize('name', ['PatientID', 'PatientName', 'StudyDate', 'StudyID', 'AccessionNumber', 'PatientSex'])
def test_a_missing_element_that_may_be_empty_is_empty(name):
    elements = read_source(without(name, radiograph())).elements
    assert name in ALWAYS_PRESENT and not elements[name].value


@pytest.mark.parametrize(
    ('name', 'value'),
    [
        ('PatientSex', 'female'),
        ('PatientBirthDate', '1960-02-29'),
        ('PatientAge', '70'),
        ('StudyTime', '3:04'),
        ('StudyDate', '20250101-20260102'),
        ('StudyTime', '0304-0506'),
        ('StudyID', 'x' * 17),
        ('PatientID', 'a\\b'),
        ('AccessionNumber', 'A\x1b[2J'),
        ('PatientIdentityRemoved', 'perhaps'),
    ],
)
def test_an_element_with_an_impossible_value_is_left_out_and_named(name, value):
    source = read_source(radiograph(**{name: value}))
    assert source.omitted == (name,)
    assert not source.elements.get(name)


@pytest.mark.parametrize('name', ['StudyInstanceUID', 'SeriesInstanceUID'])
def test_an_image_that_cannot_be_referred_to_is_refused_with_the_name_of_the_element(name):
    missing = refusal(without(name, radiograph()))
    assert missing.code == 'E_DICOM_REFERENCE' and str(missing).startswith(f'{name} is missing')
    invalid = refusal(radiograph(**{name: f'{PATIENT}.1'}))
    assert invalid.code == 'E_DICOM_REFERENCE' and str(invalid).startswith(f'{name} is not a valid identifier')
    assert PATIENT not in str(invalid)


@pytest.mark.parametrize('name', ['SOPClassUID', 'SOPInstanceUID'])
def test_the_header_of_the_file_stands_in_for_the_class_and_the_instance(name):
    data = radiograph()
    assert read_source(without(name, data)).elements[name] == read_source(data).elements[name]


def test_what_is_not_an_image_is_refused():
    assert refusal(without('Rows', radiograph())).code == 'E_DICOM_NOPIXEL'
    assert refusal(radiograph(ManufacturerModelName='cxr_fastai')).code == 'E_DICOM_NOPIXEL'


@pytest.mark.parametrize('data', [b'', b'no DICOM', b'\0' * 128 + b'DICM', b'\0' * 128 + b'DICM' + b'\xff' * 500])
def test_what_is_not_dicom_is_refused(data):
    assert refusal(data).code == 'E_DICOM_CORRUPT'


def test_cut_files_are_read_or_refused_but_never_a_bug():
    data = radiograph()
    for length in range(0, 1000, 7):
        try:
            read_source(data[:length])
        except ImageError as error:
            assert PATIENT not in str(error)


def test_a_removed_identity_stays_declared():
    elements = read_source(radiograph(PatientIdentityRemoved='YES')).elements
    assert elements.PatientIdentityRemoved == 'YES' and elements.DeidentificationMethod


def test_the_patient_module_has_no_sequences():
    from pydicom.datadict import dictionary_VR

    assert 'SQ' not in map(dictionary_VR, PATIENT_MODULE)
