"""`predict --dicom-out` and `--watch`: what they write and print, and which options they refuse."""

import json
import re
import shutil
from functools import partial
from pathlib import Path

import pytest
from clocks import Clock
from dicomstudies import BrokenFor, needs_validator, radiograph, save_radiographs, violations
from highdicom.sr import ComprehensiveSR
from imagefiles import PATIENT, without
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


def test_json_lists_the_images_without_a_report(bundle, images, studies, tmp_path, capsys):
    (tmp_path / 'a.dcm').write_bytes(without('StudyInstanceUID', (studies / '1.dcm').read_bytes()))
    jpeg = next((images / 'test/NORMAL').iterdir())
    paths = [studies / '1.dcm', tmp_path / 'a.dcm', jpeg, tmp_path / 'gone.dcm']
    argv = ['predict', bundle, *paths, '--no-gate', '--json', '--dicom-out', tmp_path / 'out']
    assert main([str(word) for word in argv]) == 3
    document = json.loads(capsys.readouterr().out)
    unreported = {entry['path']: entry['code'] for entry in document['unreported']}
    assert unreported == dict(zip(map(str, paths[1:]), ['E_DICOM_REFERENCE', 'E_NOT_DICOM', 'E_IO'], strict=True))
    assert document['unreported'][0]['message'].startswith('E_DICOM_REFERENCE: StudyInstanceUID is missing')
    assert document['failed_maps'] is None
    assert main(['predict', str(bundle), str(jpeg), '--no-gate', '--json']) == 0
    assert json.loads(capsys.readouterr().out)['unreported'] is None


@pytest.mark.parametrize('option', ['--out', '--html', '--dicom-out'])
def test_each_image_without_its_map_is_counted_and_the_command_ends_with_3(bundle, studies, tmp_path, capsys, option):
    burned_in = tmp_path / 'text.dcm'
    burned_in.write_bytes(radiograph(9, dcmread(studies / '2.dcm').pixel_array, BurnedInAnnotation='YES'))
    images = (studies / '1.dcm', burned_in, burned_in)
    argv = [str(word) for word in ('predict', bundle, *images, '--no-gate', '--explain', option)]
    name = {'--out': '{}.csv', '--html': '{}.html', '--dicom-out': '{}'}[option]
    assert main([*argv, str(tmp_path / name.format('a'))]) == 3
    printed = capsys.readouterr()
    assert ', 2 images without a map' in printed.out
    assert printed.err.count(f'{burned_in}: E_BURNED_IN') == 2
    assert main([*argv, str(tmp_path / name.format('b')), '--json']) == 3
    failed = json.loads(capsys.readouterr().out)['failed_maps']
    assert [(entry['path'], entry['code']) for entry in failed] == [(str(burned_in), 'E_BURNED_IN')] * 2


def test_the_page_alone_has_maps_of_the_images_that_it_shows_only(bundle, studies, tmp_path, monkeypatch, capsys):
    from cxr_fastai.publishing import prediction_page

    monkeypatch.setattr(prediction_page, 'MAX_SHOWN', 2)
    argv = ['predict', bundle, studies, '--no-gate', '--explain', '--html']
    outputs = {'a.html': [], 'b.html': ['--out', tmp_path / 'p.csv']}
    for name, options in outputs.items():
        assert main([str(word) for word in (*argv, tmp_path / name, *options, '--json')]) == 0
        assert json.loads(capsys.readouterr().out)['failed_maps'] == []
    assert len(list((tmp_path / 'p_maps').iterdir())) == 3
    assert (tmp_path / 'a.html').read_text() == (tmp_path / 'b.html').read_text()


def test_a_map_that_cannot_be_written_as_dicom_is_an_error_and_still_on_the_page(
    bundle, studies, tmp_path, monkeypatch, capsys
):
    from highdicom.sc import SCImage

    monkeypatch.setattr(SCImage, 'from_ref_dataset', BrokenFor(SCImage.from_ref_dataset, '1.2.3.2'))
    argv = ['predict', bundle, studies, '--no-gate', '--explain', '--dicom-out', tmp_path / 'out', '--html']
    options = (tmp_path / 'a.html', '--out', tmp_path / 'p.csv')
    assert main([str(word) for word in (*argv, *options)]) == 3
    printed = capsys.readouterr()
    assert printed.err.count(f'{studies / "2.dcm"}: E_DICOM_CORRUPT') == 1 and PATIENT not in printed.err
    assert '3 reports, 2 maps' in printed.out and 'without a map' not in printed.out
    assert str(tmp_path / 'p_maps' / '0002.png') in printed.out
    assert main([str(word) for word in (*argv, tmp_path / 'b.html', '--json')]) == 3
    (failed,) = json.loads(capsys.readouterr().out)['failed_maps']
    assert (failed['path'], failed['code']) == (str(studies / '2.dcm'), 'E_DICOM_CORRUPT')
    monkeypatch.undo()
    assert main([str(word) for word in (*argv, tmp_path / 'c.html')]) == 0
    pages = {(tmp_path / name).read_text() for name in ('a.html', 'b.html', 'c.html')}
    assert len(pages) == 1


def test_maps_for_the_table_and_the_page_are_computed_once(bundle, studies, tmp_path, monkeypatch):
    from cxr_fastai.interpretation.explainer import Explainer

    n_images = []
    maps = Explainer.maps

    def count(self: Explainer, squares):
        n_images.append(len(squares))
        return maps(self, squares)

    monkeypatch.setattr(Explainer, 'maps', count)
    argv = ['predict', bundle, studies, '--no-gate', '--explain', '--html']
    assert main([str(word) for word in (*argv, tmp_path / 'a.html')]) == 0
    outputs = (tmp_path / 'b.html', '--out', tmp_path / 'p.csv', '--dicom-out', tmp_path / 'reports')
    assert main([str(word) for word in (*argv, *outputs)]) == 0
    assert n_images == [3, 3]
    assert (tmp_path / 'a.html').read_text() == (tmp_path / 'b.html').read_text()


def test_an_unexpected_error_of_highdicom_costs_the_report_of_its_image_only(
    bundle, studies, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr('highdicom.sr.ComprehensiveSR', BrokenFor(ComprehensiveSR, '1.2.3.2'))
    argv = ['predict', bundle, studies, '--no-gate', '--dicom-out', tmp_path / 'out', '--out', tmp_path / 'p.csv']
    assert main([str(word) for word in argv]) == 3
    printed = capsys.readouterr()
    assert re.search(r'2.dcm: E_DICOM_CORRUPT: an element cannot be copied into a report \(RuntimeError\)', printed.err)
    assert '2 reports' in printed.out and PATIENT not in printed.out + printed.err
    assert len((tmp_path / 'p.csv').read_text().splitlines()) == 1 + 3


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


def test_a_watched_folder_gets_maps_and_names_the_images_without_one(bundle, studies, tmp_path, monkeypatch, capsys):
    folder = Path(shutil.copytree(studies, tmp_path / 'in'))
    text = radiograph(9, dcmread(studies / '2.dcm').pixel_array, BurnedInAnnotation='YES')
    (folder / 'text.dcm').write_bytes(text)
    time = Clock(error=KeyboardInterrupt)
    watch = partial(watched_folder.watch_folder, clock=time, sleep=time.sleep)
    monkeypatch.setattr(watched_folder, 'watch_folder', watch)
    argv = ['predict', bundle, '--watch', folder, '--no-gate', '--explain', '--dicom-out', tmp_path / 'reports']
    assert main([str(word) for word in argv]) == 130
    printed = capsys.readouterr()
    assert f'{folder / "text.dcm"}: E_BURNED_IN' in printed.err
    assert '4 reports, 3 maps; not DICOM: 0 images' in printed.out
