"""`DicomFolder`, which writes the DICOM reports and captures of predictions into a folder (extra `dicom`)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cxr_fastai.core.environment import require_package
from cxr_fastai.core.errors import ImageError, UsageError
from cxr_fastai.core.files import StrPath, atomic, check_writable, writing
from cxr_fastai.images.decode import read_bytes
from cxr_fastai.images.dicom import is_dicom
from cxr_fastai.inference.predictor import Row
from cxr_fastai.inference.tables import Predictions, with_numbers
from cxr_fastai.publishing.dicom_reports import Algorithm, encode_dicom, make_report
from cxr_fastai.publishing.dicom_source import NOT_DICOM, DicomSource, read_source

if TYPE_CHECKING:
    from pydicom import Dataset

    from cxr_fastai.interpretation.explainer import ExplanationResult
    from cxr_fastai.interpretation.overlays import Explanation

OPTION = '--dicom-out'
REPEATED = 'E_DICOM_REPEATED'
"""The code of an image that has the SOP Instance UID of another one."""


class DicomFolder:
    """Writes a Structured Report for each DICOM image into `folder`, and a Secondary Capture for each map.

    Files are named by their SOP Instance UID: `sr_UID.dcm` and `sc_UID.dcm`. Those of the same image and model have the
    same name and replace each other. `reports` and `captures` count what was written. `unreported` has the path in the
    row, and the reason, of each image without a report, and `uncaptured` of each map that could not be written as a
    capture. `problems` are these reasons, except for those that the row gives, each with the path of the image.
    `omissions` maps the names of elements that were not copied to the images that have impossible values there.
    """

    def __init__(self, folder: StrPath, algorithm: Algorithm) -> None:
        self.folder = Path(folder)
        self.algorithm = algorithm
        self.reports = 0
        self.captures = 0
        self.unreported: list[tuple[str, ImageError]] = []
        self.uncaptured: list[tuple[str, ImageError]] = []
        self.problems: list[ImageError] = []
        self.omissions: dict[tuple[str, ...], list[Path]] = {}
        self._reported: dict[Path, tuple[DicomSource, Row]] = {}
        self._paths: dict[str, Path] = {}

    @property
    def others(self) -> int:
        """The number of images that are not DICOM."""
        return sum(error.code == NOT_DICOM for _, error in self.unreported)

    def write_reports(self, images: Sequence[StrPath], rows: Iterable[Row]) -> None:
        """Write the report of each of the `images`, to which the prediction `rows` belong. Raises `OutputError`.

        Nothing is written for a file that is not DICOM, or cannot be read as such. An image without a probability gets
        a report of the reason.
        """
        with writing(self.folder, OPTION):
            self.folder.mkdir(parents=True, exist_ok=True)
        for file, row in zip(images, rows, strict=True):
            image = Path(file)
            try:
                data = read_bytes(file)
                if not is_dicom(data, image.suffix.lower()):
                    raise ImageError('not a DICOM file', NOT_DICOM)
                self._report(image, read_source(data), with_numbers(row))
            except ImageError as error:
                reason = error.with_path(image)
                self.unreported.append((row['path'], reason))
                if error.code not in (NOT_DICOM, row['code']):
                    self.problems.append(reason)

    def write_captures(
        self, images: Sequence[StrPath], explanations: Iterable[ExplanationResult]
    ) -> Iterator[ExplanationResult]:
        """Write the capture of each of the `explanations` of `images`, and yield them.

        `explanations` are those of `explain_predictions`. One without a figure gets the path of the capture. Only
        images that `write_reports` has reported get a capture. Why one cannot be made is in `uncaptured` and
        `problems`. Raises `OutputError`.
        """
        for image, (path, explanation) in zip(map(Path, images), explanations, strict=True):
            capture = None
            if image in self._reported and not isinstance(explanation, ImageError):
                capture = self._capture(image, explanation)
            yield path or capture, explanation

    def explain(
        self, predictions: Predictions, images: Sequence[StrPath], figures: StrPath | None = None
    ) -> Iterator[ExplanationResult]:
        """Explain the `predictions` of `images`, write their captures, and yield what `write_captures` yields.

        The figures are also saved to the folder `figures`, if there is one.
        """
        from cxr_fastai.interpretation.explainer import explain_predictions

        explanations = explain_predictions(predictions, images, None if figures is None else Path(figures))
        return self.write_captures([images[position] for position in predictions.scored], explanations)

    def _report(self, image: Path, source: DicomSource, row: Row) -> None:
        first = self._paths.setdefault(source.uid, image)
        if first != image:
            raise ImageError(f'has the same SOPInstanceUID as {first}, so only that one is reported', REPEATED)
        self._write('sr', make_report(source, row, self.algorithm))
        self.reports += 1
        self._reported[image] = source, row
        if source.omitted:
            self.omissions.setdefault(source.omitted, []).append(image)

    def _capture(self, image: Path, explanation: Explanation) -> Path | None:
        from cxr_fastai.interpretation.overlays import blend
        from cxr_fastai.publishing.dicom_captures import make_capture

        source, row = self._reported[image]
        try:
            path = self._write('sc', make_capture(source, blend(explanation), row, self.algorithm))
        except ImageError as error:
            reason = error.with_path(image)
            self.uncaptured.append((row['path'], reason))
            self.problems.append(reason)
            return None
        self.captures += 1
        return path

    def _write(self, kind: str, dataset: Dataset) -> Path:
        path = self.folder / f'{kind}_{dataset.SOPInstanceUID}.dcm'
        data = encode_dicom(dataset)
        with atomic(path, OPTION) as temporary:
            temporary.write_bytes(data)
        return path


def check_dicom_folder(folder: Path) -> None:
    """Raise `UsageError` if `folder` is a file or highdicom is missing, and `OutputError` if it cannot be written."""
    require_package('highdicom', OPTION, 'dicom')
    if folder.exists() and not folder.is_dir():
        raise UsageError(f'{OPTION} {folder}: not a folder. Name a folder for the DICOM files.')
    check_writable(folder, OPTION)
