"""`predict --dicom-out` and `--watch`: what they write and print, and which options they refuse."""

import re
import shutil
from functools import partial
from pathlib import Path

import pytest
from clocks import Clock
from dicomstudies import needs_validator, save_radiographs, violations
from imagefiles import without
from pydicom import dcmread

from cxr_fastai.cli import main
from cxr_fastai.publishing import watched_folder


@pytest.fixture(scope='module')
def studies(images, tmp_path_factory) -> Path:
    """A folder of three radiographs; not to be changed by a test."""
    folder = tmp_path_factory.mktemp('studies')
    save_radiographs(sorted((images / 'test').rglob('*.jpeg'))[:3], folder)
    return folder


@needs_validator
def test_reports_and_maps_of_a_folder_are_valid_and_in_the_studies_of_the_images(bundle, studies, tmp_path, capsys):
    out = tmp_path / 'reports'
    argv = ['predict', bundle, studies, '--no-gate', '--explain', '--dicom-out', out, '--out', tmp_path / 'p.csv']
    assert main([str(word) for word in argv]) == 0
    reports, maps = sorted(out.glob('sr_*.dcm')), sorted(out.glob('sc_*.dcm'))
    assert len(reports) == 3 and 1 <= len(maps) <= 3
    for paths in (reports, maps):
        assert {dcmread(path).StudyInstanceUID for path in paths} <= {'1.2.4.1', '1.2.4.2', '1.2.4.3'}
    assert [error for path in (*reports, *maps) for error in violations(path)] == []
    assert len(list((tmp_path / 'p_maps').glob('*.png'))) == 3
    assert f'DICOM in {out}: 3 reports, {len(maps)} maps; not DICOM: 0 images' in capsys.readouterr().out


def test_maps_need_no_table_if_they_go_into_dicom_files(bundle, studies, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = ['predict', bundle, studies / '1.dcm', '--no-gate', '--explain', '--dicom-out', 'reports']
    assert main([str(word) for word in argv]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ['reports']


def test_an_image_without_a_study_is_an_error_and_other_files_are_counted(bundle, images, studies, tmp_path, capsys):
    (tmp_path / 'a.dcm').write_bytes(without('StudyInstanceUID', (studies / '1.dcm').read_bytes()))
    jpeg = next((images / 'test/NORMAL').iterdir())
    argv = ['predict', bundle, tmp_path / 'a.dcm', jpeg, '--no-gate', '--dicom-out', tmp_path / 'out']
    assert main([str(word) for word in argv]) == 3
    printed = capsys.readouterr()
    assert re.search('error: .*a.dcm: E_DICOM_REFERENCE: StudyInstanceUID is missing', printed.err)
    assert '0 reports, 0 maps; not DICOM: 1 image\n' in printed.out


@pytest.mark.parametrize(
    ('words', 'message'),
    [
        ([], 'predict needs images'),
        (['a.dcm', '--interval', '2'], '--interval 2 needs --watch'),
        (['a.dcm', '--watch', '.'], 'both name images'),
        (['--watch', '.'], 'needs --dicom-out DIR or --out'),
        (['--watch', '.', '--out', 'p.json'], 'CSV files only'),
        (['--watch', '.', '--out', 'p.csv', '--resume'], 'Omit --resume'),
        (['--watch', '.', '--out', 'p.csv', '--json'], '--json prints one document'),
        (['--watch', '.', '--dicom-out', 'reports'], 'in the watched folder'),
        (['--watch', 'gone', '--out', 'p.csv'], 'no such folder'),
    ],
)
def test_options_that_do_not_fit_together_are_usage_errors(fails, run, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    fails(['predict', run.path, *words], 2, message)
    assert list(tmp_path.iterdir()) == []


def test_a_watched_folder_is_handled_until_ctrl_c_and_continued(bundle, studies, tmp_path, monkeypatch, capsys):
    folder = Path(shutil.copytree(studies, tmp_path / 'in'))
    out = tmp_path / 'reports'
    table = tmp_path / 'p.csv'
    watch = watched_folder.watch_folder
    argv = ['predict', bundle, '--watch', folder, '--no-gate', '--dicom-out', out, '--out', table]
    for images in (3, 4):
        time = Clock(error=KeyboardInterrupt)
        monkeypatch.setattr(watched_folder, 'watch_folder', partial(watch, clock=time, sleep=time.sleep))
        assert main([str(word) for word in argv]) == 130
        printed = capsys.readouterr()
        assert 'stopped by SIGINT' in printed.err and f'watching {folder}' in printed.out
        assert len(table.read_text().splitlines()) == 1 + images
        (folder / '4.dcm').write_bytes((studies / '1.dcm').read_bytes().replace(b'1.2.3.1', b'1.2.3.4'))
    assert len(list(out.iterdir())) == 4
