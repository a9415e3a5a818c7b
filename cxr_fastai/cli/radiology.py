"""The options of `predict` that connect it to a radiology archive, `--dicom-out` and `--watch`, and what they do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from cxr_fastai.cli.failures import Failure, print_failures
from cxr_fastai.cli.output import print_error, print_hub_model, print_line
from cxr_fastai.core.environment import Launch
from cxr_fastai.core.errors import UsageError
from cxr_fastai.core.progress import counted

if TYPE_CHECKING:
    from cxr_fastai.inference.tables import Predictions
    from cxr_fastai.publishing.dicom_output import DicomFolder

INTERVAL = 5.0
"""Default of `--interval`, in seconds."""

DicomOut = Annotated[
    Path | None,
    Option(
        '--dicom-out',
        metavar='DIR',
        show_default=False,
        help='Also write a DICOM report of each DICOM image to this folder, and with --explain its map.',
    ),
]
Watch = Annotated[
    Path | None,
    Option(
        '--watch',
        metavar='DIR',
        show_default=False,
        help='Predict the images that arrive in this folder, each once, until Ctrl-C, instead of named images.',
    ),
]
Interval = Annotated[
    float | None,
    Option(
        '--interval',
        metavar='SECONDS',
        min=0.1,
        max=86_400,
        show_default=f'{INTERVAL:g}',
        help='Look at the watched folder at this interval; files that did not change meanwhile are complete.',
    ),
]


def check_sources(
    images: Sequence[Path] | None,
    watch: Path | None,
    interval: float | None,
    resume: bool,
    html: Path | None,
    as_json: bool,
) -> None:
    """Raise `UsageError` unless either images or a folder to watch are given, with options that fit."""
    if watch is None:
        if not images:
            raise UsageError('predict needs images. Name files or folders, or --watch DIR.')
        if interval is not None:
            raise UsageError(f'--interval {interval:g} needs --watch DIR, the folder to look at.')
        return
    if images:
        raise UsageError(f'{images[0]} and --watch {watch}: both name images. Give only one of them.')
    if resume:
        raise UsageError('--resume: --watch continues by itself, after its journal. Omit --resume.')
    if html:
        raise UsageError(f'--html {html}: the page is written at the end, and --watch has no end. Omit --html.')
    if as_json:
        raise UsageError('--json prints one document at the end, and --watch has no end. Use --out FILE.csv.')
    if Launch.from_environment().processes > 1:
        raise UsageError('--watch runs in one process. Start it without `accelerate launch` or `torchrun`.')


def watch_images(
    model: Path,
    folder: Path,
    table: Path | None,
    dicom_out: Path | None,
    maps: bool,
    interval: float | None,
    batch_size: int,
    workers: int | None,
    **options: Any,
) -> None:
    """Predict the images that arrive in `folder`, and print a line for each; `options` are those of `load_predictor`.

    Ends only by an exception, such as `KeyboardInterrupt`.
    """
    from cxr_fastai.inference.predictor import load_predictor
    from cxr_fastai.publishing.dicom_reports import identify_model
    from cxr_fastai.publishing.watched_folder import Outputs, watch_folder

    outputs = Outputs(table, dicom_out, maps)
    outputs.check(folder)  # before the model is loaded
    seconds = INTERVAL if interval is None else interval
    predictor = load_predictor(model, **options)
    print_hub_model(model)
    batches = watch_folder(predictor, identify_model(model), folder, outputs, seconds, batch_size, workers)
    for batch in batches:
        _print_rows(batch.predictions)
        if batch.dicom:
            print_dicom(batch.dicom)


def _print_rows(predictions: Predictions) -> None:
    for row in predictions.rows:
        if row['status'] == 'ok':
            print_line(f'{row["path"]}: {row["prediction"]} ({row["p_pneumonia"]:.3f})')
    failures = predictions.failures
    print_failures(Failure(row['status'], row['path'], row['code'], row['message']) for row in failures)


def check_folder(folder: Path) -> None:
    """Raise `UsageError` or `OutputError` if no DICOM files can be written to `folder`."""
    from cxr_fastai.publishing.dicom_output import check_dicom_folder

    check_dicom_folder(folder)


def write_reports(predictions: Predictions, images: Sequence[Path], model: Path, folder: Path) -> DicomFolder:
    """Write the DICOM reports of `images` to `folder`."""
    from cxr_fastai.publishing.dicom_output import DicomFolder
    from cxr_fastai.publishing.dicom_reports import Algorithm, identify_model

    dicom = DicomFolder(folder, Algorithm.of(predictions.predictor, identify_model(model)))
    dicom.write_reports(images, predictions.rows)
    return dicom


def print_dicom(dicom: DicomFolder) -> None:
    """Print what was written to `dicom`, and why an image has no report."""
    print_failures(Failure.from_error(error) for error in dicom.problems)
    for names, images in dicom.omissions.items():
        more = f' and {len(images) - 1} more' if len(images) > 1 else ''
        print_error(
            f'warning: {images[0]}{more}: not copied into the report, because DICOM does not permit their values: '
            f'{", ".join(names)}'
        )
    if dicom.others and not dicom.reports and not dicom.problems:
        print_error('warning: none of the images is a DICOM file, so no report was written')
    print_line(
        f'DICOM in {dicom.folder}: {counted(dicom.reports, "report")}, {counted(dicom.captures, "map")}; '
        f'not DICOM: {counted(dicom.others)}'
    )
