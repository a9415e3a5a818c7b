"""Structured Reports state the result, what computed it and of which image; they are valid and read by highdicom."""

from dataclasses import replace
from io import BytesIO
from pathlib import Path

import pytest
from dicomstudies import needs_validator, radiograph, violations
from highdicom.sr import ComprehensiveSR, SourceImageForMeasurementGroup, srread
from imagefiles import PATIENT
from pydicom import dcmread
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code

from cxr_fastai import __version__
from cxr_fastai.core.errors import ImageError
from cxr_fastai.inference.bundle import Bundle
from cxr_fastai.inference.config import identify_network
from cxr_fastai.inference.predictor import Predictor
from cxr_fastai.publishing.dicom_reports import (
    INTENDED_USE,
    PNEUMONIA,
    Algorithm,
    identify_model,
    make_report,
)
from cxr_fastai.publishing.dicom_source import read_source

ALGORITHM = Algorithm('resnet50', 'ab' * 32, 0.57, 'sensitivity:0.95')
ROW = {
    'path': 'image.dcm',
    'status': 'ok',
    'p_pneumonia': 0.9741234567,
    'prediction': 'PNEUMONIA',
    'threshold': 0.57,
    'code': None,
    'message': None,
}
NORMAL = ROW | {'p_pneumonia': 0.1, 'prediction': 'NORMAL'}
REJECTED = ROW | {
    'status': 'rejected',
    'p_pneumonia': None,
    'prediction': None,
    'code': 'E_BLANK',
    'message': 'E_BLANK: the image is blank',
}
ROWS = {'positive': ROW, 'negative': NORMAL, 'rejected': REJECTED}


def read_back(report: ComprehensiveSR, folder: Path) -> ComprehensiveSR:
    """The report as highdicom reads it from its file."""
    report.save_as(folder / 'report.dcm', enforce_file_format=True)
    return srread(folder / 'report.dcm')


def the_group(report: ComprehensiveSR):
    (group,) = report.content.get_image_measurement_groups()
    return group


def texts(report: ComprehensiveSR, name: Code) -> list[str]:
    """The texts of the items of the measurement group with a concept name."""
    return [item.value for item in the_group(report)[0].ContentSequence if item.name == name]


def evaluations(report: ComprehensiveSR) -> dict[Code, Code]:
    pairs = [(entry.name, entry.value) for entry in the_group(report).get_qualitative_evaluations()]
    return {name: value for name, value in pairs if name != codes.DCM.AlgorithmFamily}


def numbers(report: ComprehensiveSR) -> dict[Code, float]:
    return {entry.name: entry.value for entry in the_group(report).get_measurements()}


def test_a_positive_report_has_finding_probability_and_threshold(tmp_path):
    report = read_back(make_report(read_source(radiograph()), ROW, ALGORITHM), tmp_path)
    assert the_group(report).finding_type == Code(*PNEUMONIA)
    assert numbers(report) == {codes.DCM.Probability: 0.974123, codes.DCM.ThresholdValue: 0.57}
    assert evaluations(report)[Code(*PNEUMONIA)] == codes.SCT.Present
    assert 'Classified as PNEUMONIA' in texts(report, codes.DCM.Comment)[0]


def test_a_negative_report_has_no_finding(tmp_path):
    report = read_back(make_report(read_source(radiograph()), NORMAL, ALGORITHM), tmp_path)
    assert the_group(report).finding_type is None
    assert numbers(report)[codes.DCM.Probability] == 0.1
    assert evaluations(report)[Code(*PNEUMONIA)] == codes.SCT.Absent


def test_the_report_of_an_image_without_a_probability_has_the_reason_and_no_result(tmp_path):
    report = read_back(make_report(read_source(radiograph()), REJECTED, ALGORITHM), tmp_path)
    assert the_group(report).finding_type is None and numbers(report) == {}
    summary = codes.DCM.NoAlgorithmsSucceededWithoutFindings
    assert evaluations(report) == {codes.DCM.CADProcessingAndFindingsSummary: summary}
    assert texts(report, codes.DCM.Comment)[0] == 'No prediction: E_BLANK: the image is blank'


@pytest.mark.parametrize('kind', ROWS)
def test_every_report_names_the_algorithm_the_image_and_the_intended_use(tmp_path, kind):
    report = read_back(make_report(read_source(radiograph()), ROWS[kind], ALGORITHM), tmp_path)
    assert texts(report, codes.DCM.AlgorithmName) == ['cxr_fastai resnet50']
    assert texts(report, codes.DCM.AlgorithmVersion) == [__version__]
    parameters = texts(report, codes.DCM.AlgorithmParameters)
    assert parameters == [f'model SHA-256 {"ab" * 32}', 'threshold 0.57, chosen by the rule sensitivity:0.95']
    (image,) = the_group(report).source_images
    assert isinstance(image, SourceImageForMeasurementGroup)
    assert image.referenced_sop_instance_uid == '1.2.3.1'
    assert INTENDED_USE in texts(report, codes.DCM.Comment)
    (observer,) = report.content.get_observer_contexts(observer_type=codes.DCM.Device)
    attributes = observer.observer_identifying_attributes
    assert (attributes.manufacturer_name, attributes.serial_number) == ('cxr_fastai', 'ab' * 32)
    assert report.get_evidence() == [('1.2.4.1', '1.2.5.1', '1.2.3.1', '1.2.840.10008.5.1.4.1.1.1.1')]


@pytest.mark.parametrize('kind', ROWS)
def test_a_report_joins_the_study_of_its_image_in_a_new_series(kind):
    image = dcmread(BytesIO(radiograph()))
    report = make_report(read_source(radiograph()), ROWS[kind], ALGORITHM)
    for name in ('StudyInstanceUID', 'PatientID', 'PatientName', 'PatientBirthDate', 'StudyDate', 'AccessionNumber'):
        assert report[name].value == image[name].value, name
    assert report.SeriesInstanceUID != image.SeriesInstanceUID
    assert report.VerificationFlag == 'UNVERIFIED' and report.PreliminaryFlag == 'PRELIMINARY'


def test_identifiers_follow_from_image_and_model_alone():
    def uids(number: int = 1, algorithm: Algorithm = ALGORITHM, row=ROW) -> tuple[str, str]:
        report = make_report(read_source(radiograph(number)), row, algorithm)
        return report.SOPInstanceUID, report.SeriesInstanceUID

    assert uids() == uids()
    others = [
        uids(2),
        uids(algorithm=replace(ALGORITHM, sha256='cd' * 32)),
        uids(algorithm=replace(ALGORITHM, threshold=0.6)),
        uids(algorithm=replace(ALGORITHM, options=('without input gate',))),
        uids(row=REJECTED),
    ]
    assert len({*uids(), *(uid for pair in others for uid in pair)}) == 2 * (1 + len(others))


def test_the_identity_of_a_model_is_the_hash_of_its_manifest_or_of_its_network(bundle, evaluated):
    assert identify_model(bundle) == Bundle.open(bundle).identity
    assert identify_model(evaluated.path) == identify_network(evaluated.path)
    assert len(identify_model(evaluated / 'learner.pkl')) == 64


def test_options_that_change_probabilities_are_parameters(bundle):
    plain = Algorithm.of(Predictor.load(bundle), 'ab')
    changed = Algorithm.of(replace(Predictor.load(bundle, gate=False), tta=True).with_threshold(0.25), 'ab')
    assert plain.options == ()
    rounded = Algorithm.of(Predictor.load(bundle, engine='torch', precision='bf16'), 'ab')
    assert rounded.options == ('computed in bfloat16',)
    assert len(changed.options) == 2 and changed.threshold == 0.25 and changed.threshold_rule == 'fixed:0.25'


def test_an_image_of_an_unknown_class_is_refused_without_its_identity():
    source = read_source(radiograph(SOPClassUID='1.2.840.113619.4.26'))
    with pytest.raises(ImageError, match='SOPClassUID is none of the image classes') as caught:
        make_report(source, ROW, ALGORITHM)
    assert caught.value.code == 'E_DICOM_REFERENCE' and PATIENT not in str(caught.value)


def test_an_image_whose_elements_highdicom_refuses_is_an_image_error_without_its_identity(monkeypatch):
    def refuse(*_, **__):
        raise ValueError(f'{PATIENT} is no valid value')

    monkeypatch.setattr('highdicom.sr.ComprehensiveSR', refuse)
    with pytest.raises(ImageError, match='cannot be copied into a report') as caught:
        make_report(read_source(radiograph()), ROW, ALGORITHM)
    assert caught.value.code == 'E_DICOM_CORRUPT' and PATIENT not in str(caught.value)


ODD = {
    'usual': {},
    'computed radiography': {'SOPClassUID': '1.2.840.10008.5.1.4.1.1.1', 'Modality': 'CR'},
    'secondary capture': {'SOPClassUID': '1.2.840.10008.5.1.4.1.1.7'},
    'Chinese': {'SpecificCharacterSet': 'GB18030', 'PatientName': '王^小东'},
    'wrong values': {'PatientSex': 'male', 'StudyID': 'x' * 40, 'PatientAge': '7', 'PatientBirthDate': '60'},
    'anonymous': {'PatientIdentityRemoved': 'YES', 'PatientName': None},
    'long name': {'PatientName': 'x' * 65},
}


@needs_validator
@pytest.mark.parametrize('kind', ROWS)
@pytest.mark.parametrize('tags', ODD.values(), ids=ODD)
def test_reports_are_valid_dicom(tmp_path, kind, tags):
    read_back(make_report(read_source(radiograph(**tags)), ROWS[kind], ALGORITHM), tmp_path)
    assert violations(tmp_path / 'report.dcm') == []
