"""The commands `export`, `push-to-hub`, `predict` and `trust`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

import typer

from cxr_fastai.cli import options as opt
from cxr_fastai.cli import radiology
from cxr_fastai.cli import sharing_options as share
from cxr_fastai.cli.console import move_messages_to_stderr
from cxr_fastai.cli.documents import prediction_document, print_json
from cxr_fastai.cli.explain import check_weights
from cxr_fastai.cli.failures import EXAMPLES, Failure, print_failures
from cxr_fastai.cli.output import out, predictions_table, print_error, print_hub_model, print_line
from cxr_fastai.core.environment import Launch, is_main_process, paused_collector
from cxr_fastai.core.errors import UsageError
from cxr_fastai.core.files import check_new
from cxr_fastai.core.progress import counted
from cxr_fastai.core.run import Run

if TYPE_CHECKING:
    from cxr_fastai.inference.predictor import Predictor
    from cxr_fastai.inference.tables import Predictions

ROWS_SHOWN = 20


def export(
    run: opt.RunFolder,
    bundle: share.NewBundle = None,
    half: share.Half = False,
    as_zip: share.AsZip = False,
    space: share.NewSpace = None,
) -> None:
    """Export an evaluated run as a bundle: weights, threshold, model card and input gate, safe to share.

    The bundle is verified in a new process before it replaces an older one.

    Example: cxr-fastai export runs/resnet50 --out pneumonia-bundle
    """
    source = Run.open(run)
    if space:
        check_new(space)
    from cxr_fastai.inference.bundle import Bundle
    from cxr_fastai.publishing.exporting import export

    exported = Bundle.open(export(source, bundle, as_zip, half))
    files = ', '.join(exported.manifest)
    print_line(f'{exported.path}: {files}. Next: cxr-fastai predict {quote(str(exported.path))} IMAGE...')
    if space:
        from cxr_fastai.publishing.hub import write_space

        folder = write_space(exported, space)
        print_line(f'{folder}: a Hugging Face Space. Run `python app.py` there to try it, and `git push` to share it.')


def push_to_hub(
    bundle: share.BundlePath, repo: share.Repo, private: share.Private = False, with_pickle: share.WithPickle = False
) -> None:
    """Upload a bundle to the Hugging Face Hub, with its model card.

    Example: cxr-fastai push-to-hub bundle me/pneumonia
    """
    from cxr_fastai.publishing.hub import push

    print_line(push(bundle, repo, private, with_pickle))


def predict(
    model: opt.Model,
    images: opt.PredictImages = None,
    table: opt.NewTable = None,
    resume: opt.ResumeTable = False,
    batch_size: opt.BatchSize = 32,
    calibrated: opt.Calibrated = False,
    threshold: opt.Cut = None,
    tta: opt.Views = None,
    maps: opt.Maps = False,
    html: opt.NewPage = None,
    no_gate: opt.NoGate = False,
    engine: opt.EngineKind = 'auto',
    modality: opt.Modality = '',
    workers: opt.Threads = None,
    device: opt.Device = 'auto',
    precision: opt.Precision = 'fp32',
    as_json: opt.AsJson = False,
    dicom_out: radiology.DicomOut = None,
    watch: radiology.Watch = None,
    interval: radiology.Interval = None,
) -> None:
    """Predict the probability of pneumonia for each image. An image that cannot be used gets a row with the reason.

    The fields of --json: model, threshold, threshold_rule, calibrated, tta, images, positives, failures, table, maps,
    page, dicom, rows.

    Example: cxr-fastai predict bundle image.jpeg more_images/ --out predictions.csv
    """
    if as_json:
        move_messages_to_stderr()
    radiology.check_sources(images, watch, interval, resume, html, as_json)
    from cxr_fastai.inference.onnx_start import start_onnx

    if maps:
        check_weights(model, '--explain')
    engine = 'torch' if maps else engine
    start_onnx(model, engine, device, precision)
    with paused_collector():
        from cxr_fastai.data.find import list_images
        from cxr_fastai.inference.tables import predict_to_table

    settings: dict[str, Any] = {
        'calibrated': calibrated,
        'threshold': threshold,
        'tta': tta,
        'use_gate': not no_gate,
        'engine': engine,
        'device': device,
        'precision': precision,
        'modality': modality,
    }
    if watch:
        radiology.watch_images(model, watch, table, dicom_out, maps, interval, batch_size, workers, **settings)
        return
    outputs = _Outputs(model, table, html, dicom_out, maps)
    outputs.check()
    paths = list_images(images or []) if Launch.from_environment().rank == 0 else []
    predictions = predict_to_table(
        model, paths, table, resume=resume, batch_size=batch_size, workers=workers, **settings
    )
    if not is_main_process():
        return
    is_complete = outputs.write(predictions, paths, as_json)
    if predictions.failures or not is_complete:
        raise typer.Exit(3)


@dataclass(frozen=True)
class _Outputs:
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
        """Write everything but the table, print the results, and return whether every DICOM image has its report."""
        n_unreported = radiology.write_pictures(predictions, images, self.model, self.dicom, self.maps, self.map_folder)
        print_hub_model(self.model)
        if self.html:
            from cxr_fastai.inference.pretrained import name_model
            from cxr_fastai.publishing.prediction_page import save_prediction_page

            save_prediction_page(predictions, images, self.html, name_model(self.model), self.maps)
        if as_json:
            document = prediction_document(predictions, self.model, self.table, self.map_folder, self.html, self.dicom)
            print_json(document)
        else:
            out.print(predictions_table(predictions.rows, ROWS_SHOWN))
        _print_summary(predictions, self.table, as_json)
        if self.html:
            print_line(f'{self.html}: page with pictures')
        return not n_unreported


def _print_summary(predictions: Predictions, table: Path | None, as_json: bool) -> None:
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
    if table:
        summary += f'; rows in {table}'
    elif len(failures) > EXAMPLES and not as_json:
        summary += '; --out writes all reasons to a table'
    print_line(summary)


def _describe_threshold(predictor: Predictor) -> str:
    """Return the threshold of `predictor` and where it is from."""
    rule = predictor.config.threshold_rule
    text = f'An image is classified as PNEUMONIA at a probability of {predictor.threshold:.3g} or more'
    views = ' Each probability is the mean over the image and its mirror image (--tta).' if predictor.tta else ''
    if rule.startswith('fixed:'):
        evaluation = f' (`{predictor.run.evaluation()}` chooses one)' if predictor.run else ''
        return f'{text}: a fixed threshold, not chosen on validation images{evaluation}.{views}'
    images = 'soft images' if rule.endswith('@shift') else 'validation images'
    manner = ' with the same test-time views' if predictor.config.tta else ''
    return f'{text}: chosen on {images}{manner} by the rule {rule}.{views}'


def trust(what: share.TrustWhat, sha256: share.Hash = None) -> None:
    """Trust a pickled model file, so that it can be opened: compare its SHA-256 with the one that its author published.

    Bundles need no trust.

    Example: cxr-fastai trust learner.pkl --sha256 HEX
    """
    from cxr_fastai.inference.pickles import distrust, trust_file, trust_store, trusted

    match what:
        case ['list'] if not sha256:
            hashes = trusted()
            if not hashes:
                print_line(f'{trust_store()}: no trusted hashes')
            for digest, entry in sorted(hashes.items(), key=lambda item: item[1]['since']):
                print_line(f'{digest}  {entry["since"]}  {entry["why"]}')
        case ['remove', digest] if not sha256:
            distrust(digest)
        case [file] if sha256:
            print_line(f'{file}: trusted ({trust_file(Path(file), sha256)})')
        case _:
            raise UsageError('trust takes `FILE --sha256 HEX`, `list`, or `remove HEX`.')
