"""Where patients are unknown, every page and table says so, and none claims that no patient is in two splits."""

import shutil
from io import StringIO
from pathlib import Path

import pandas as pd
import pytest
from rich.console import Console
from runfiles import seal_results

from cxr_fastai.cli.output import metrics_tables
from cxr_fastai.core.errors import CXRWarning
from cxr_fastai.core.run import Run
from cxr_fastai.data.auditing import audit, render
from cxr_fastai.data.items import describe_items, read_items
from cxr_fastai.data.splits import (
    count_patients,
    describe_patients,
    leaking_patients,
    unknown_patients,
    unknown_patients_warning,
)
from cxr_fastai.evaluation.evaluation import evaluate
from cxr_fastai.publishing import reporting
from cxr_fastai.publishing.model_card import describe_run, render_card

CLAIM = 'No patient has images in two splits'


@pytest.fixture(scope='module')
def unnamed(images, tmp_path_factory) -> Path:
    """The images under names such as `scan-7.jpeg`, which tell nothing about the patients."""
    root = tmp_path_factory.mktemp('unnamed')
    for number, item in enumerate(read_items(images).itertuples()):
        split = 'val' if item.split == 'valid' else item.split
        folder = root / split / item.label
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(images / item.path, folder / f'scan-{number}.jpeg')
    return root


def copy_run(run: Run, items: pd.DataFrame, folder: Path) -> Run:
    """Return a copy of `run` that says that it was trained on `items`."""
    shutil.copytree(run.path, folder)
    items.to_csv(folder / 'items.csv', index=False)
    return Run.open(folder)


@pytest.fixture(scope='module')
def unknown(run, unnamed, tmp_path_factory) -> Run:
    """An evaluated run on images of unknown patients."""
    copy = copy_run(run, read_items(unnamed), tmp_path_factory.mktemp('unknown') / 'run')
    evaluate(copy, unnamed)
    return copy


@pytest.fixture
def page(unknown, monkeypatch) -> str:
    """The report of this run without plots, which take long."""
    monkeypatch.setattr(reporting, 'draw', lambda *_: {})
    return reporting.render(unknown, 'test')


def test_names_without_a_patient_give_unknown_patients(unnamed):
    items = read_items(unnamed)
    assert unknown_patients(items).all() and count_patients(items) == 'unknown'
    assert f'patient unknown: {len(items)} of {len(items)} images' in describe_items(items)


def test_names_of_the_public_data_set_give_known_patients(images):
    items = read_items(images)
    assert not unknown_patients(items).any() and unknown_patients_warning(items) is None
    assert 'unknown' not in describe_items(items)


def write_csv(folder: Path, patients: list[str]) -> Path:
    """A CSV file of one image per cell in `patients`; the names of the images tell no patient."""
    lines = ['path,label,split,patient']
    for number, patient in enumerate(patients):
        (folder / f'{number}.png').write_bytes(b'x')
        lines.append(f'{number}.png,{"NORMAL" if number % 2 else "PNEUMONIA"},train,{patient}')
    path = folder / 'list.csv'
    path.write_text('\n'.join(lines))
    return path


def test_a_patient_column_with_a_different_value_for_each_image_is_known(tmp_path):
    items = read_items(write_csv(tmp_path, ['0', '1', '2']))
    assert count_patients(items) == 3 and not unknown_patients(items).any()


@pytest.mark.parametrize('cell', ['', '?', '-', 'N/A', 'Unknown', 'unknown:scan'])
def test_a_placeholder_is_not_one_patient_with_many_images(tmp_path, cell):
    items = read_items(write_csv(tmp_path, ['a', cell, 'b', cell]))
    assert unknown_patients(items).sum() == 2 and count_patients(items) == 2


def test_unknown_patients_stay_unknown_in_a_table_that_was_written_and_read(unknown, tmp_path):
    assert count_patients(unknown.items) == 'unknown'
    table = tmp_path / 'items.csv'
    items = read_items(write_csv(tmp_path, ['', 'NA']))
    items.to_csv(table, index=False)
    assert count_patients(read_items(table)) == 1 and unknown_patients(read_items(table)).sum() == 1


@pytest.mark.parametrize(
    ('patients', 'n_unknown', 'text'),
    [
        (12, 0, '12 patients'),
        (1, 1, '1 patient and 1 image of unknown patients'),
        (1200, 1500, '1,200 patients and 1,500 images of unknown patients'),
        ('unknown', 40, 'unknown patients'),
    ],
)
def test_patients_are_described_in_words(patients, n_unknown, text):
    assert describe_patients(patients, n_unknown) == text


def test_a_split_by_patients_warns_that_images_are_drawn_one_by_one(unnamed):
    with pytest.warns(CXRWarning, match='--valid patients: the patient of all images is unknown') as caught:
        read_items(unnamed, valid='patients')
    assert len(caught) == 1 and '\n' not in str(caught[0].message)


def test_the_audit_has_a_finding_and_no_number_of_patients(unnamed):
    result = audit(unnamed)
    (finding,) = [finding for finding in result.findings if finding.name == 'images of unknown patients']
    assert finding.count == result.images and 'may have images in two splits' in finding.advice
    assert result.facts['patients'] == 'unknown'
    assert f'{result.images} images of unknown patients' in render(result)


def test_the_metrics_say_that_patients_are_unknown(unknown):
    metrics = unknown.metrics['test']
    assert (metrics['patients'], metrics['unknown_patients']) == ('unknown', metrics['n'])
    console = Console(file=StringIO(), width=100)
    console.print(metrics_tables(metrics))
    output = ' '.join(console.file.getvalue().split())
    assert 'images of unknown patients' in output and 'The patient of all images is unknown' in output


def test_the_report_does_not_claim_that_no_patient_is_in_two_splits(page, unknown):
    assert CLAIM not in page and 'It is unknown whether a patient has images in two splits' in page
    assert f'{unknown.metrics["test"]["n"]} images of unknown patients' in page
    assert 'The intervals assume that each of these images is of another patient' in page


def test_the_checklist_leaves_the_partitions_to_a_human(page):
    row = page[page.index('Partitions, and the level') :].partition('</tr>')[0]
    assert 'needs a human' in row


def test_the_model_card_says_that_patients_are_unknown(unknown):
    card = render_card(unknown, 'test')
    assert describe_run(unknown)['Trained on'].endswith('images of unknown patients')
    assert '**Unknown patients:**' in card and 'images of unknown patients;' in card
    assert '| test | NORMAL | normal | 5 | unknown |' in card


def test_one_unknown_patient_is_enough_to_refuse_the_claim(evaluated, tmp_path, monkeypatch):
    monkeypatch.setattr(reporting, 'draw', lambda *_: {})
    assert CLAIM in reporting.render(evaluated, 'test')
    items = evaluated.items
    items.loc[0, 'patient'] = 'unknown:x'
    mixed = copy_run(evaluated, items, tmp_path / 'run')
    seal_results(mixed.path)
    page = reporting.render(mixed, 'test')
    assert CLAIM not in page and f'the patient of 1 of {len(items)} images is unknown' in page


def test_known_patients_in_two_splits_are_reported_even_if_others_are_unknown(images):
    items = read_items(images)
    items.loc[items.index[:3], 'patient'] = ['unknown:a', 'p', 'p']
    items.loc[items.index[1:3], 'split'] = ['train', 'test']
    assert leaking_patients(items).to_dict() == {'p': ['test', 'train']}
