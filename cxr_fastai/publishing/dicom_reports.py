"""DICOM Structured Reports of predictions: measurement reports of the template TID 1500, by highdicom (extra `dicom`).

https://dicom.nema.org/medical/dicom/current/output/chtml/part16/sect_TID_1500.html
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cxr_fastai import __version__
from cxr_fastai.core.errors import CXRError, ImageError
from cxr_fastai.core.files import SOFTWARE, StrPath
from cxr_fastai.core.recipe import POSITIVE, VOCAB
from cxr_fastai.inference.bundle import Bundle, is_bundle
from cxr_fastai.inference.config import identify_network, sha256
from cxr_fastai.inference.predictor import Predictor, Row
from cxr_fastai.publishing.dicom_source import DicomSource

if TYPE_CHECKING:
    from highdicom.sr import (
        AlgorithmIdentification,
        ComprehensiveSR,
        MeasurementsAndQualitativeEvaluations,
        ObservationContext,
    )
    from pydicom import Dataset
    from pydicom.sr.coding import Code

PNEUMONIA = ('233604007', 'SCT', 'Pneumonia')
CHEST_XRAY = ('399208008', 'SCT', 'Plain chest X-ray')
"""Code value, coding scheme and meaning."""
INTENDED_USE = 'Research use only. Not for diagnosis.'
REPORT_SERIES = 9001
CAPTURE_SERIES = 9002
"""Series numbers, beyond those that modalities give."""
DECIMALS = 6
"""Decimals of probabilities; more are noise, and a number has room for 16 characters."""
MAX_TEXT = 1024
"""Largest number of characters of a comment."""


@dataclass(frozen=True)
class Algorithm:
    """The model behind a report. `sha256` identifies it: that of a bundle's manifest, or of a network's file.

    `threshold` is on the scale of the reported probabilities, `options` are what else changes them, in words.
    """

    arch: str
    sha256: str
    threshold: float
    threshold_rule: str
    options: tuple[str, ...] = ()

    @classmethod
    def of(cls, predictor: Predictor, identity: str) -> Algorithm:
        """Return the description of a `predictor` of the model with the SHA-256 `identity` (see `identify_model`)."""
        options = {
            'calibrated by the temperature of the model': predictor.calibrated,
            'mean of the image and its mirror image': predictor.tta,
            'without input gate': predictor.gate is None,
            'computed in bfloat16': getattr(predictor.engine, 'precision', 'fp32') == 'bf16',
        }
        return cls(
            arch=predictor.config.arch,
            sha256=identity,
            threshold=predictor.threshold,
            threshold_rule=predictor.config.threshold_rule,
            options=tuple(text for text, is_used in options.items() if is_used),
        )

    @property
    def parameters(self) -> list[str]:
        """What the results depend on, as texts."""
        threshold = f'threshold {self.threshold:.{DECIMALS}g}, chosen by the rule {self.threshold_rule}'
        return [f'model SHA-256 {self.sha256}', threshold, *self.options]

    def make_uid(self, *parts: str) -> str:
        """Return the identifier that belongs to this algorithm and `parts`: always the same one for the same."""
        from pydicom.uid import generate_uid

        sources = [SOFTWARE, __version__, self.arch, *self.parameters, *parts]
        return str(generate_uid(entropy_srcs=['\n'.join(sources)]))


def identify_model(model: StrPath) -> str:
    """Return the SHA-256 of the manifest of a bundle, or of the network of a run or of a `.pkl` file."""
    model = Path(model)
    if is_bundle(model):
        return Bundle.open(model).identity
    return identify_network(model) if model.is_dir() else sha256(model)


def make_report(source: DicomSource, row: Row, algorithm: Algorithm) -> ComprehensiveSR:
    """Return the report of the prediction `row` of the image `source`, in the same study and a new series.

    The report of an image without a probability has the reason, and neither a finding nor numbers. The identifiers
    follow from the SOP Instance UID of the image, the `algorithm`, and the code of the row. Raises `ImageError`
    E_DICOM_REFERENCE if the image has a SOP class of which highdicom knows nothing, and E_DICOM_CORRUPT if it refuses
    an element.
    """
    from highdicom.sr import ComprehensiveSR, MeasurementReport
    from pydicom.sr.coding import Code

    outcome = row['code'] or 'ok'
    with highdicom_errors():
        return ComprehensiveSR(
            evidence=[source.elements],
            content=MeasurementReport(
                observation_context=_observer(algorithm),
                procedure_reported=Code(*CHEST_XRAY),
                imaging_measurements=[_group(source, row, algorithm)],
            )[0],
            series_instance_uid=algorithm.make_uid(source.uid, 'series of the report', outcome),
            series_number=REPORT_SERIES,
            sop_instance_uid=algorithm.make_uid(source.uid, 'report', outcome),
            instance_number=1,
            is_complete=True,
            **equipment(algorithm, 'report'),
        )


def equipment(algorithm: Algorithm, kind: str) -> dict[str, Any]:
    """Return the arguments of highdicom that describe this package as the device that made a file of some `kind`."""
    return {
        'manufacturer': SOFTWARE,
        'manufacturer_model_name': SOFTWARE,
        'software_versions': __version__,
        'device_serial_number': algorithm.sha256,
        'series_description': f'Pneumonia {kind} (research use only)',
    }


@contextmanager
def highdicom_errors() -> Iterator[None]:
    """Raise `ImageError` where highdicom or pydicom fail on an image, by whatever exception; hide their warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of names without a caret, which they quote
        try:
            yield
        except KeyError:  # a SOP class that is private, retired or damaged
            raise ImageError(
                'SOPClassUID is none of the image classes of DICOM, so the image is not reported. Export it again from '
                'its archive.',
                'E_DICOM_REFERENCE',
            ) from None
        except CXRError:
            raise
        except Exception as error:  # an odd header must not end the reports of other images
            raise ImageError(
                # Without the text of the error, which can contain the value of an element, such as a name.
                f'an element cannot be copied into a report ({type(error).__name__}). Export the image again from its '
                'archive.',
                'E_DICOM_CORRUPT',
            ) from error


def encode_dicom(dataset: Dataset) -> bytes:
    """Return the DICOM file of a report or a capture. Raises `ImageError` E_DICOM_CORRUPT if it cannot be written."""
    buffer = BytesIO()
    with highdicom_errors():
        dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def describe(row: Row) -> str:
    """Return the result of a prediction in words: the class with its probability and threshold, or the reason."""
    if row['p_pneumonia'] is None:
        return f'No prediction: {row["code"]}: {_reason(row)}'
    relation = 'at or above' if row['prediction'] == VOCAB[POSITIVE] else 'below'
    return (
        f'Classified as {row["prediction"]}: the probability of pneumonia {row["p_pneumonia"]:.3f} is {relation} the '
        f'threshold {row["threshold"]:.3g}.'
    )


def _reason(row: Row) -> str:
    return str(row['message'] or '').removeprefix(f'{row["code"]}: ')


def _group(source: DicomSource, row: Row, algorithm: Algorithm) -> MeasurementsAndQualitativeEvaluations:
    """Return the measurement group TID 1501 of one image."""
    from highdicom.sr import (
        MeasurementsAndQualitativeEvaluations,
        QualitativeEvaluation,
        RelationshipTypeValues,
        SourceImageForMeasurementGroup,
        TextContentItem,
        TrackingIdentifier,
    )
    from pydicom.sr.codedict import codes
    from pydicom.sr.coding import Code

    is_positive = row['prediction'] == VOCAB[POSITIVE]
    has_result = row['p_pneumonia'] is not None
    evaluations = [QualitativeEvaluation(codes.DCM.CADProcessingAndFindingsSummary, _summary(has_result, is_positive))]
    if has_result:
        presence = codes.SCT.Present if is_positive else codes.SCT.Absent
        evaluations.append(QualitativeEvaluation(Code(*PNEUMONIA), presence))
    group = MeasurementsAndQualitativeEvaluations(
        tracking_identifier=TrackingIdentifier(algorithm.make_uid(source.uid, 'tracking'), 'pneumonia'),
        finding_type=Code(*PNEUMONIA) if is_positive else None,
        algorithm_id=_identification(algorithm),
        measurements=_measurements(row) if has_result else None,
        qualitative_evaluations=evaluations,
        source_images=[SourceImageForMeasurementGroup(source.elements.SOPClassUID, source.uid)],
    )
    for text in (describe(row), INTENDED_USE):
        comment = TextContentItem(codes.DCM.Comment, text[:MAX_TEXT], RelationshipTypeValues.CONTAINS)
        group[0].ContentSequence.append(comment)
    return group


def _summary(has_result: bool, is_positive: bool) -> Code:
    from pydicom.sr.codedict import codes

    if not has_result:
        return codes.DCM.NoAlgorithmsSucceededWithoutFindings
    if is_positive:
        return codes.DCM.AllAlgorithmsSucceededWithFindings
    return codes.DCM.AllAlgorithmsSucceededWithoutFindings


def _measurements(row: Row) -> list[Any]:
    from highdicom.sr import Measurement
    from pydicom.sr.codedict import codes

    numbers = {codes.DCM.Probability: row['p_pneumonia'], codes.DCM.ThresholdValue: row['threshold']}
    return [Measurement(name, round(value, DECIMALS), codes.UCUM.NoUnits) for name, value in numbers.items()]


def _identification(algorithm: Algorithm) -> AlgorithmIdentification:
    from highdicom.sr import AlgorithmIdentification
    from pydicom.sr.codedict import codes

    return AlgorithmIdentification(
        name=f'{SOFTWARE} {algorithm.arch}',
        version=__version__,
        parameters=algorithm.parameters,
        family=codes.DCM.ArtificialIntelligence,
        manufacturer=SOFTWARE,
    )


def _observer(algorithm: Algorithm) -> ObservationContext:
    from highdicom.sr import DeviceObserverIdentifyingAttributes, ObservationContext, ObserverContext
    from pydicom.sr.codedict import codes

    device = DeviceObserverIdentifyingAttributes(
        uid=algorithm.make_uid('device'),
        name=SOFTWARE,
        manufacturer_name=SOFTWARE,
        model_name=f'{algorithm.arch}, version {__version__}',
        serial_number=algorithm.sha256,
    )
    return ObservationContext(observer_device_context=ObserverContext(codes.DCM.Device, device))
