"""What `predict` writes and prints of its predictions besides the table: maps, the page, DICOM files, the summary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from cxr_fastai.cli import radiology
from cxr_fastai.cli.documents import prediction_document, print_json
from cxr_fastai.cli.explain import print_explanation
from cxr_fastai.cli.failures import EXAMPLES, Failure, print_failures
from cxr_fastai.cli.output import out, predictions_table, print_error, print_hub_model, print_line
from cxr_fastai.core.errors import ImageError, UsageError
from cxr_fastai.core.files import check_new
from cxr_fastai.core.progress import counted, progress

if TYPE_CHECKING:
    from cxr_fastai.inference.predictor import Predictor
    from cxr_fastai.inference.tables import Predictions
    from cxr_fastai.publishing.dicom_output import DicomFolder

ROWS_SHOWN = 20


@dataclass(frozen=True)
class PredictionOutputs:
    """Where the predictions of `model` go besides the terminal: the options --out, --html and --dicom-out.

    With `maps`, each of them also gets what influenced the scores.
    """

    model: Path
    table: Path | None
    html: Path | None
    dicom: Path | None
    maps: bool

    @property
    def map_folder(self) -> Path | None:
        """The folder next to the table that gets the maps."""
        return self.table.with_name(f'{self.table.stem}_maps') if self.table and self.maps else None

    def check(self) -> None:
        """Raise `UsageError` or `OutputError` if something cannot be written, before images are predicted."""
        if self.maps and not (self.table or self.html or self.dicom):
            raise UsageError(
                '--explain needs --out, --html or --dicom-out: the maps are saved next to the table, on the page, or '
                'as DICOM.'
            )
        if self.map_folder:
            check_new(self.map_folder)
        if self.html:
            from cxr_fastai.publishing.prediction_page import check_page

            check_page(self.html)
        if self.dicom:
            radiology.check_folder(self.dicom)

    def write(self, predictions: Predictions, images: Sequence[Path], as_json: bool) -> bool:
        """Write everything but the table and print the results.

        Returns whether every DICOM image has its report, and with `maps` every image with a probability its map, in
        DICOM files too. Without a table and DICOM files, only the images that the page shows get maps.
        """
        dicom = radiology.write_reports(predictions, images, self.model, self.dicom) if self.dicom else None
        maps = self._write_maps(predictions, images, dicom) if self.maps else _Maps()
        if dicom:
            radiology.print_dicom(dicom)
        print_hub_model(self.model)
        if self.html:
            from cxr_fastai.inference.pretrained import name_model
            from cxr_fastai.publishing.prediction_page import save_prediction_page

            save_prediction_page(predictions, images, self.html, name_model(self.model), drawn=maps.drawn)
        if as_json:
            files = {'table': self.table, 'maps': self.map_folder, 'page': self.html, 'dicom': self.dicom}
            unreported = dicom.unreported if dicom else None
            failed_maps = [*maps.failed, *(dicom.uncaptured if dicom else ())] if self.maps else None
            print_json(prediction_document(predictions, self.model, files, unreported, failed_maps))
        else:
            out.print(predictions_table(predictions.rows, ROWS_SHOWN))
        self._print_summary(predictions, len(maps.failed), as_json)
        return not (maps.failed or (dicom and dicom.problems))

    def _write_maps(self, predictions: Predictions, images: Sequence[Path], dicom: DicomFolder | None) -> _Maps:
        """Compute each map once, write it where it was asked for, and draw it for the page."""
        from cxr_fastai.interpretation.explainer import explain_predictions
        from cxr_fastai.publishing.prediction_page import shown_positions
        from cxr_fastai.publishing.thumbnails import draw_map

        positions = predictions.scored
        on_page = shown_positions(predictions) if self.html else []
        if dicom:
            explained = dicom.explain(predictions, images, self.map_folder)
        elif self.map_folder:
            explained = explain_predictions(predictions, images, self.map_folder)
        else:
            positions = on_page
            explained = progress(explain_predictions(predictions, images, None, positions), len(positions), 'map')
        maps = _Maps()
        drawn = set(on_page)
        for position, (path, explanation) in zip(positions, explained, strict=True):
            print_explanation(path, explanation)
            if isinstance(explanation, ImageError):
                maps.failed.append((predictions.rows[position]['path'], explanation))
            if position in drawn:
                maps.drawn[position] = draw_map(explanation)
        return maps

    def _print_summary(self, predictions: Predictions, n_failed_maps: int, as_json: bool) -> None:
        from cxr_fastai.inference.gate import OUT_OF_DISTRIBUTION

        failures = predictions.failures
        print_failures(Failure(row['status'], row['path'], row['code'], row['message']) for row in failures)
        if any(row['code'] == OUT_OF_DISTRIBUTION for row in failures):
            print_error('With --no-gate the images that the input gate rejected get a probability too.')
        print_line(_describe_threshold(predictions.predictor))
        images = counted(len(predictions.rows))
        n_rejected = sum(row['status'] == 'rejected' for row in failures)
        summary = f'{images}, {predictions.positives} classified as PNEUMONIA, '
        summary += f'{n_rejected} rejected, {len(failures) - n_rejected} failed'
        if n_failed_maps:
            summary += f', {counted(n_failed_maps, "image")} without a map'
        if self.table:
            summary += f'; rows in {self.table}'
        elif len(failures) > EXAMPLES and not as_json:
            summary += '; --out writes all reasons to a table'
        print_line(summary)
        if self.html:
            print_line(f'{self.html}: page with pictures')


@dataclass(frozen=True)
class _Maps:
    """The maps of a prediction."""

    failed: list[tuple[str, ImageError]] = field(default_factory=list)
    """The path in the row, and the reason, of each map that could not be made."""
    drawn: dict[int, bytes | None] = field(default_factory=dict)
    """Position of the row -> the map for the page, see `thumbnails.draw_map`."""


def _describe_threshold(predictor: Predictor) -> str:
    """Return the threshold of `predictor` and where it is from."""
    rule = predictor.config.threshold_rule
    text = f'An image is classified as PNEUMONIA at a probability of {predictor.threshold:.3g} or more'
    views = ' Each probability is the mean over the image and its mirror image (--tta).' if predictor.tta else ''
    if rule.startswith('fixed:'):
        from cxr_fastai.inference.decision import DEFAULT_RULE, describe_evaluation

        source = predictor.source
        evaluation = describe_evaluation(source, f'--threshold {DEFAULT_RULE}') if source else ''
        advice = f' To choose one on them, {evaluation}.' if evaluation else ''
        return f'{text}: a fixed threshold, not chosen on validation images.{advice}{views}'
    images = 'soft images' if rule.endswith('@shift') else 'validation images'
    manner = ' with the same test-time views' if predictor.config.tta else ''
    return f'{text}: chosen on {images}{manner} by the rule {rule}.{views}'
