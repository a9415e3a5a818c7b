"""The commands `export`, `predict` and `trust`: model files out, probabilities, and whose pickles may be opened."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from cxr_fastai.cli import options as opt
from cxr_fastai.cli.output import out, print_error, print_line
from cxr_fastai.core.environment import is_main_process
from cxr_fastai.core.errors import UsageError, visible
from cxr_fastai.core.files import check_new
from cxr_fastai.core.recipe import POSITIVE, VOCAB
from cxr_fastai.core.run import Run

if TYPE_CHECKING:
    from cxr_fastai.inference.predictor import Predictor
    from cxr_fastai.inference.tables import CsvRows

SHOWN = 20
"""Rows that are printed."""


def export(
    run: opt.RunFolder,
    bundle: opt.NewBundle = None,
    as_zip: opt.AsZip = False,
    int8: opt.Int8 = False,
    space: opt.NewSpace = None,
) -> None:
    """Make a bundle of a run that was evaluated: weights, decision, card and input gate, safe to share and quick to
    predict with. It is predicted with in a fresh process before it takes its place.

    Example: cxr-fastai export runs/resnet50 --out pneumonia-bundle
    """
    known = Run.open(run)
    if space:
        check_new(space)
    from cxr_fastai.inference.bundle import Bundle
    from cxr_fastai.publishing.exporting import export

    made = Bundle.open(export(known, bundle, as_zip, int8))
    print_line(f'{made.path}: {", ".join(made.manifest)}. Next: cxr-fastai predict {made.path} IMAGE...')
    if space:
        from cxr_fastai.publishing.hub import write_space

        print_line(
            f'{write_space(made, space)}: a Space of Hugging Face: python app.py there tries it, git push shares it.'
        )


def push_to_hub(
    bundle: opt.BundlePath, repo: opt.Repo, private: opt.Private = False, with_pickle: opt.WithPickle = False
) -> None:
    """Upload a bundle to the Hugging Face Hub, with its model card.

    Example: cxr-fastai push-to-hub bundle me/pneumonia
    """
    from cxr_fastai.publishing.hub import push

    print_line(push(bundle, repo, private, with_pickle))


def predict(
    model: opt.Model,
    images: opt.PredictImages,
    table: opt.NewTable = None,
    resume: opt.ResumeTable = False,
    batch_size: opt.BatchSize = 32,
    calibrated: opt.Calibrated = False,
    threshold: opt.Cut = None,
    tta: opt.Mirrored = False,
    maps: opt.Maps = False,
    no_gate: opt.NoGate = False,
    engine: opt.EngineKind = 'auto',
    workers: opt.Threads = None,
) -> None:
    """Give each image the probability of pneumonia; an image that cannot be used gets a row with the reason.

    Example: cxr-fastai predict bundle image.jpeg more_images/ --out predictions.csv
    """
    from dataclasses import replace

    from cxr_fastai.data.find import list_images
    from cxr_fastai.inference.predictor import Predictor
    from cxr_fastai.inference.shards import gathered, shared, told

    with gathered():
        writer, done = _begin(table, resume, maps) if is_main_process() else (None, [])
        done, paths = told((done, list_images(images) if is_main_process() else []))
        if done and [row['path'] for row in done] != [_shown(path) for path in paths[: len(done)]]:
            raise UsageError(f'--resume: {table} is about other images: name those that it was begun with.')
        predictor = replace(Predictor.load(model, calibrated, 'torch' if maps else engine, not no_gate), tta=tta)
        if threshold is not None:
            predictor = predictor.at(threshold)
        if not (predictor.gate or no_gate):
            print_error(
                f'warning: {model} has no input gate, so any picture gets a probability: a bundle that `export` '
                'makes has one.'
            )
        if done and float(done[0]['threshold']) != predictor.threshold:
            raise UsageError(
                f'--resume: {table} has the threshold {float(done[0]["threshold"]):g}, now it would be '
                f'{predictor.threshold:g}: go on with the model and options that it was begun with.'
            )
        if maps:
            check_new(_folder(table))
        if writer and not done:
            writer.start()
        work = partial(predictor.predict, batch_size=batch_size, workers=workers)
        found = done + _write(shared(work, paths[len(done) :]), writer, batch_size)
    if not is_main_process():
        return
    if maps:
        _explain(predictor, found, paths, _folder(table))
    _say(found, table)


def trust(what: opt.TrustWhat, sha256: opt.Hash = None) -> None:
    """Say whose pickles may be opened: only those whose SHA-256 you had from their maker by another way. Bundles need
    no trust.

    Example: cxr-fastai trust learner.pkl --sha256 HEX
    """
    from cxr_fastai.inference import pickles as store

    match what:
        case ['list'] if not sha256:
            for known, facts in store.trusted().items():
                print_line(f'{known}  {facts["since"]}  {facts["why"]}')
        case ['remove', known] if not sha256:
            store.distrust(known)
        case [file] if sha256:
            print_line(f'{file}: trusted ({store.vouch(Path(file), sha256)})')
        case _:
            raise UsageError('give `FILE --sha256 HEX`, `list`, or `remove HEX`.')


def _begin(table: Path | None, resume: bool, maps: bool) -> tuple[CsvRows | None, list[dict[str, Any]]]:
    """What writes the table, and the rows that are in it already."""
    if table is None:
        if resume or maps:
            raise UsageError(f'--{"resume" if resume else "explain"} needs --out.')
        return None, []
    from cxr_fastai.inference.predictor import COLUMNS
    from cxr_fastai.inference.tables import open_rows

    if not table.parent.is_dir():
        raise UsageError(f'{table}: the folder {table.parent} does not exist.')
    writer = open_rows(table, COLUMNS)
    if not table.exists():
        return writer, []
    if not resume:
        raise UsageError(f'{table} exists already and was left alone: choose another --out, or give --resume.')
    try:
        return writer, writer.read()
    except (ValueError, KeyError, OSError, RecursionError) as error:
        raise UsageError(f'--resume: {table} is no table of predictions ({error}).') from None


def _write(rows: Iterator[dict[str, Any]], writer: CsvRows | None, batch_size: int) -> list[dict[str, Any]]:
    found = []
    try:
        while batch := list(islice(rows, batch_size)):
            batch = [row | {'path': _shown(row['path'])} for row in batch]
            if writer:
                writer.add(batch)
            found += batch
    finally:
        if writer:
            writer.close()
    return found


def _shown(path: Path | str) -> str:
    """A path as text that every encoding knows."""
    return str(path).encode('utf-8', 'backslashreplace').decode()


def _say(rows: list[dict[str, Any]], table: Path | None) -> None:
    from cxr_fastai.cli.output import predictions_table
    from cxr_fastai.inference.gate import OUT_OF_DISTRIBUTION

    bad = [row for row in rows if row['status'] != 'ok']
    out.print(predictions_table(rows, SHOWN))
    for row in bad:
        print_error(f'{row["status"]}: {row["path"]}: {row["message"]}')
    if any(row['code'] == OUT_OF_DISTRIBUTION for row in bad):
        print_error('--no-gate tells the probability of what the gate has turned away.')
    called = sum(row['prediction'] == VOCAB[POSITIVE] for row in rows)
    print_line(
        f'{len(rows)} images, {called} called PNEUMONIA, {len(bad)} failed' + (f'; rows in {table}' if table else '')
    )
    if bad:
        raise typer.Exit(3)


def _folder(table: Path) -> Path:
    return table.with_name(f'{table.stem}_maps')


def _explain(predictor: Predictor, rows: list[dict[str, Any]], paths: list[Path], folder: Path) -> None:
    """Draw a map of each image that has a probability, called by the number of its row."""
    from cxr_fastai.cli.explain import draw
    from cxr_fastai.data.find import short_path
    from cxr_fastai.interpretation.explainer import Explainer, Subject

    shown = [path for row, path in zip(rows, paths, strict=True) if row['status'] == 'ok']
    found = Explainer(predictor).explain([Subject(path, visible(short_path(str(path)))) for path in shown])
    draw((next(found) if row['status'] == 'ok' else None for row in rows), folder)
