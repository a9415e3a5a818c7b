"""Images that arrive in a watched folder get a row and a report each, once, also after a crash or a restart."""

import csv
import errno
import multiprocessing
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from clocks import Clock
from dicomstudies import BrokenFor, radiograph
from highdicom.sr import ComprehensiveSR
from imagefiles import GREY, encoded, smooth
from pydicom import dcmread

from cxr_fastai.core.errors import OutputError, UsageError
from cxr_fastai.data.watching import FolderWatch, Journal
from cxr_fastai.inference.config import ModelConfig
from cxr_fastai.inference.predictor import Predictor
from cxr_fastai.inference.tables import CsvTable
from cxr_fastai.publishing import watched_folder
from cxr_fastai.publishing.dicom_output import DicomFolder
from cxr_fastai.publishing.watched_folder import Outputs, WatchedBatch, watch_folder


class Interrupted(Exception):
    """Somebody has pressed Ctrl-C."""


def brightness(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """An engine whose probability is the mean grey level."""
    return images.mean((1, 2)) / 255, np.zeros((len(images), 1))


PREDICTOR = Predictor(brightness, ModelConfig('brightness', 64, 0.4))


@pytest.fixture
def folder(tmp_path) -> Path:
    folder = tmp_path / 'in'
    folder.mkdir()
    return folder


@pytest.fixture
def outputs(tmp_path) -> Outputs:
    return Outputs(tmp_path / 'p.csv', tmp_path / 'reports')


def watch(folder: Path, outputs: Outputs, **options) -> list[WatchedBatch]:
    """What is done with the images that are in the folder now."""
    time = Clock(error=Interrupted)
    batches: list[WatchedBatch] = []
    with pytest.raises(Interrupted):
        for batch in watch_folder(PREDICTOR, 'ab', folder, outputs, clock=time, sleep=time.sleep, **options):
            batches.append(batch)
    return batches


def arrive(folder: Path, *numbers: int) -> None:
    for number in numbers:
        (folder / f'{number}.dcm').write_bytes(radiograph(number))


def table(outputs: Outputs) -> list[str]:
    """The names in the table."""
    with open(outputs.table, newline='') as file:
        return [Path(row['path']).name for row in csv.DictReader(file)]


def test_each_image_gets_a_row_and_a_report_in_its_study(folder, outputs):
    arrive(folder, 1, 2)
    (batch,) = watch(folder, outputs)
    assert [row['status'] for row in batch.predictions.rows] == ['ok', 'ok']
    assert table(outputs) == ['1.dcm', '2.dcm']
    reports = [dcmread(path) for path in outputs.dicom.iterdir()]
    assert {(report.Modality, report.StudyInstanceUID) for report in reports} == {('SR', '1.2.4.1'), ('SR', '1.2.4.2')}
    assert outputs.journal.name == 'reports.journal.jsonl' and outputs.journal.parent == outputs.dicom.parent


def test_a_restart_handles_only_what_is_new(folder, outputs):
    arrive(folder, 1)
    watch(folder, outputs)
    arrive(folder, 2)
    (batch,) = watch(folder, outputs)
    assert [Path(row['path']).name for row in batch.predictions.rows] == ['2.dcm']
    assert table(outputs) == ['1.dcm', '2.dcm']
    assert watch(folder, outputs) == []


def test_an_unusable_file_gets_a_row_and_does_not_stop_the_others(folder, outputs):
    arrive(folder, 2)
    (folder / '1.dcm').write_bytes(b'no DICOM')
    (folder / '3.png').write_bytes(encoded(GREY))
    (batch,) = watch(folder, outputs)
    assert [row['status'] for row in batch.predictions.rows] == ['error', 'ok', 'ok']
    assert (batch.dicom.reports, batch.dicom.others) == (1, 1)
    assert watch(folder, outputs) == []


STEPS = {
    'reports': (DicomFolder, 'write_reports'),
    'journal': (Journal, 'add'),
    'table': (CsvTable, 'append_bytes'),
    'table on disk': (watched_folder, 'sync'),
}


@pytest.mark.parametrize('moment', ['before', 'after'])
@pytest.mark.parametrize('step', STEPS)
def test_after_a_crash_every_content_has_one_row(folder, outputs, monkeypatch, step, moment):
    """The process dies before or after a step of the second batch, which has a new image and an overwritten one."""
    arrive(folder, 1, 2)
    watch(folder, outputs)
    (folder / '1.dcm').write_bytes(radiograph(1, smooth(96, 80, 10)))
    arrive(folder, 3)
    owner, name = STEPS[step]
    run = getattr(owner, name)

    def die(*args) -> None:
        if moment == 'after':
            run(*args)
        raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, die)
        watch(folder, outputs)
    watch(folder, outputs)
    watch(folder, outputs)
    assert table(outputs) == ['1.dcm', '2.dcm', '1.dcm', '3.dcm']
    assert len(set(outputs.table.read_text().splitlines())) == 1 + 4
    assert len(list(outputs.dicom.iterdir())) == 3


@pytest.mark.parametrize('file', ['table', 'journal'])
def test_after_a_crash_in_the_middle_of_writing_every_image_has_one_row(folder, outputs, file):
    """A prefix of what the second batch adds to a file is on the disk, of any length."""
    arrive(folder, 1)
    watch(folder, outputs)
    paths = (outputs.table, outputs.journal)
    before = [path.read_bytes() for path in paths]
    arrive(folder, 2, 3)
    watch(folder, outputs)
    after = [path.read_bytes() for path in paths]
    path = getattr(outputs, file)
    start, end = (len(contents[paths.index(path)]) for contents in (before, after))
    for size in (*range(start, end, 101), end - 1, end):
        outputs.table.write_bytes(after[0] if file == 'table' else before[0])
        outputs.journal.write_bytes(after[1])
        os.truncate(path, size)
        watch(folder, outputs)
        watch(folder, outputs)
        assert table(outputs) == ['1.dcm', '2.dcm', '3.dcm'], size


@pytest.mark.slow
def test_after_a_kill_every_image_has_one_row(folder, outputs):
    """Four processes in turn are killed, each after another step of a batch."""
    for number, step in enumerate(STEPS, 1):
        arrive(folder, number)
        process = multiprocessing.get_context('spawn').Process(target=watch_until_killed, args=(folder, outputs, step))
        process.start()
        process.join(120)
        assert process.exitcode == -signal.SIGKILL
    watch(folder, outputs)
    assert sorted(table(outputs)) == ['1.dcm', '2.dcm', '3.dcm', '4.dcm']


def watch_until_killed(folder: Path, outputs: Outputs, step: str) -> None:
    owner, name = STEPS[step]
    run = getattr(owner, name)

    def die(*args) -> None:
        run(*args)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(owner, name, die)
    watch(folder, outputs)


def test_an_image_that_is_overwritten_while_it_is_read_has_a_row_of_its_new_content_only(folder, outputs, monkeypatch):
    arrive(folder, 1)
    new = radiograph(1, smooth(96, 80, 10))
    read = FolderWatch.read

    def overwrite_and_read(self: FolderWatch, file):
        if (folder / '1.dcm').read_bytes() != new:
            (folder / '1.dcm').write_bytes(new)
        return read(self, file)

    monkeypatch.setattr(FolderWatch, 'read', overwrite_and_read)
    assert watch(folder, outputs) == []
    (batch,) = watch(folder, outputs)
    assert len(batch.predictions.rows) == len(table(outputs)) == 1
    assert watch(folder, outputs) == []


def test_an_image_that_becomes_a_link_to_the_outside_is_neither_predicted_nor_reported(
    folder, outputs, tmp_path, monkeypatch
):
    arrive(folder, 1, 2)
    outside = tmp_path / 'outside.dcm'
    outside.write_bytes(radiograph(9))
    read = FolderWatch.read

    def link_and_read(self: FolderWatch, file):
        if file.path.name == '1.dcm' and not file.path.is_symlink():
            file.path.unlink()
            file.path.symlink_to(outside)
        return read(self, file)

    monkeypatch.setattr(FolderWatch, 'read', link_and_read)
    watch(folder, outputs)
    assert table(outputs) == ['2.dcm']
    assert [dcmread(path).StudyInstanceUID for path in outputs.dicom.iterdir()] == ['1.2.4.2']


def test_an_unexpected_error_of_highdicom_costs_the_report_of_its_image_only(folder, outputs, monkeypatch):
    monkeypatch.setattr('highdicom.sr.ComprehensiveSR', BrokenFor(ComprehensiveSR, '1.2.3.2'))
    arrive(folder, 1, 2, 3)
    (batch,) = watch(folder, outputs)
    (problem,) = batch.dicom.problems
    assert str(problem).startswith(f'{folder / "2.dcm"}: E_DICOM_CORRUPT')
    assert table(outputs) == ['1.dcm', '2.dcm', '3.dcm'] and len(list(outputs.dicom.iterdir())) == 2


def test_a_table_that_was_taken_away_is_begun_again(folder, outputs):
    arrive(folder, 1)
    watch(folder, outputs)
    outputs.table.unlink()
    arrive(folder, 2)
    watch(folder, outputs)
    assert table(outputs) == ['2.dcm']
    arrive(folder, 3)
    watch(folder, outputs)
    assert table(outputs) == ['2.dcm', '3.dcm']


def test_rows_that_no_crash_has_left_are_kept(folder, outputs):
    """Somebody has put an older table, with rows that are in the journal, in the place of a new one."""
    arrive(folder, 1, 2)
    watch(folder, outputs)
    old = outputs.table.read_bytes()
    outputs.table.unlink()
    arrive(folder, 3)
    watch(folder, outputs)
    outputs.table.write_bytes(old)
    watch(folder, outputs)
    assert table(outputs) == ['1.dcm', '2.dcm']


def test_a_table_that_may_not_be_opened_is_an_output_error(folder, outputs, monkeypatch):
    arrive(folder, 1)
    watch(folder, outputs)

    def deny(*_) -> None:
        raise PermissionError(errno.EACCES, 'Permission denied')

    monkeypatch.setattr(watched_folder, 'open', deny, raising=False)
    with pytest.raises(OutputError, match=r'p\.csv: cannot be written \(Permission denied\)'):
        next(watch_folder(PREDICTOR, 'ab', folder, outputs))


def test_names_that_are_formulas_survive_a_restart(folder, outputs, monkeypatch):
    monkeypatch.chdir(folder)
    Path('=1.dcm').write_bytes(radiograph(1))
    watch(Path(), outputs)
    Path('=2.dcm').write_bytes(radiograph(2))
    watch(Path(), outputs)
    assert table(outputs) == ["'=1.dcm", "'=2.dcm"]


def test_another_model_threshold_or_modality_is_refused(folder, outputs):
    watch(folder, outputs)
    others = replace(PREDICTOR, config=replace(PREDICTOR.config, modality='RG'))
    for predictor, identity in ((PREDICTOR, 'cd'), (PREDICTOR.with_threshold(0.9), 'ab'), (others, 'ab')):
        with pytest.raises(UsageError, match='another model or with other options'):
            next(watch_folder(predictor, identity, folder, outputs))


@pytest.mark.parametrize(
    ('values', 'message'),
    [
        ({}, 'needs --dicom-out DIR or --out'),
        ({'table': Path('p.csv'), 'explain': True}, 'needs --dicom-out'),
        ({'table': Path('p.json')}, 'CSV files only'),
        ({'table': Path('p.parquet')}, 'CSV files only'),
    ],
)
def test_outputs_that_do_not_fit_together_are_usage_errors(values, message):
    with pytest.raises(UsageError, match=message):
        Outputs(**values)


def test_outputs_that_do_not_fit_the_folder_are_usage_errors(folder, tmp_path):
    old = tmp_path / 'old.csv'
    old.write_text('x\n')
    cases = {
        'in the watched folder': Outputs(dicom=folder / 'reports'),
        'there is no journal': Outputs(table=old),
        'does not exist. Create': Outputs(table=tmp_path / 'nowhere' / 'p.csv'),
        'not a folder': Outputs(dicom=old),
    }
    for message, outputs in cases.items():
        with pytest.raises(UsageError, match=message):
            outputs.check(folder)
    assert old.read_text() == 'x\n'
