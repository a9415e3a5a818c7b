"""An audit finds every problem that was added to a set of images, and nothing else."""

import json
import re
import shutil
from pathlib import Path

import pandas as pd
import pytest
from imagefiles import PATIENT, dicom
from PIL import Image

from cxr_fastai.cli import main
from cxr_fastai.data import auditing
from cxr_fastai.data.auditing import Audit, audit, save_audit
from cxr_fastai.data.image_stats import TRAITS
from cxr_fastai.data.probes import SHORTCUT_AUC
from cxr_fastai.images.synthetic import make_demo

IMAGES = 640
"""Enough for a validation split that needs no warning."""


@pytest.fixture(scope='session')
def clean(once) -> Path:
    """Synthetic images without problems; not to be changed by a test."""
    return once('clean', lambda folder: make_demo(folder, images=IMAGES, size=64, seed=0))


@pytest.fixture
def images(clean, tmp_path) -> Path:
    """A copy of the images without problems."""
    return Path(shutil.copytree(clean, tmp_path / 'images'))


@pytest.fixture
def few(clean, tmp_path) -> Path:
    """The first ten images of each folder: fast, but with a validation split that is too small."""

    def all_but_ten(_: str, names: list[str]) -> list[str]:
        return sorted(name for name in names if name.endswith('.jpeg'))[10:]

    return Path(shutil.copytree(clean, tmp_path / 'few', ignore=all_but_ten))


def finding_names(result: Audit) -> set[str]:
    return {finding.name for finding in result.findings}


def nth_image(folder: Path, n: int = 0) -> Path:
    return sorted(folder.iterdir())[n]


def save_jpeg(source: Path, target: Path, quality: int, size: tuple[int, int] | None = None) -> None:
    image = Image.open(source)
    if size:
        image = image.resize(size)
    image.save(target, quality=quality)


# Each function adds one problem and returns the name of the finding.


def leak_patient(images: Path) -> str:
    patient, kind, _ = nth_image(images / 'train/PNEUMONIA').stem.split('_')
    other = nth_image(images / 'train/PNEUMONIA', 30)
    other.rename(images / f'test/PNEUMONIA/{patient}_{kind}_99999.jpeg')
    return 'patients in two splits'


def copy_with_other_quality(images: Path) -> str:
    save_jpeg(nth_image(images / 'train/NORMAL'), images / 'train/NORMAL/IM-9001-0001.jpeg', quality=60)
    return 'duplicate pairs inside train'


def copy_to_another_split(images: Path) -> str:
    shutil.copy(nth_image(images / 'train/NORMAL', 3), images / 'test/NORMAL/IM-9002-0001.jpeg')
    return 'duplicate pairs across splits'


def copy_with_another_label(images: Path) -> str:
    save_jpeg(nth_image(images / 'train/NORMAL', 5), images / 'train/PNEUMONIA/person9003_virus_1.jpeg', quality=90)
    return 'duplicate pairs across classes'


def truncate_image(images: Path) -> str:
    image = nth_image(images / 'train/NORMAL', 8)
    image.write_bytes(image.read_bytes()[:900])
    return 'unusable images'


def copy_one_pixel_larger(images: Path) -> str:
    target = images / 'val/PNEUMONIA/person9004_virus_1.jpeg'
    save_jpeg(nth_image(images / 'val/PNEUMONIA'), target, quality=90, size=(65, 65))
    return 'duplicate pairs inside valid'


PROBLEMS = [
    leak_patient,
    copy_with_other_quality,
    copy_to_another_split,
    copy_with_another_label,
    truncate_image,
    copy_one_pixel_larger,
]


def test_images_without_problems_give_no_findings_and_exit_code_0(clean, tmp_path, capsys):
    assert main(['data', 'audit', str(clean), '--out', str(tmp_path)]) == 0
    assert 'no problems found' in capsys.readouterr().out
    written = json.loads((tmp_path / 'audit.json').read_text())
    assert written['findings'] == []
    assert written['images'] == IMAGES
    assert max(row['auc'] for row in written['probes']) < SHORTCUT_AUC


@pytest.mark.slow
@pytest.mark.parametrize('add_problem', PROBLEMS)
def test_each_problem_alone_gives_its_finding_alone(images, add_problem):
    expected = add_problem(images)
    assert finding_names(audit(images)) == {expected}


def test_all_problems_together_are_found_once_each_and_written(images, tmp_path):
    expected = {add_problem(images) for add_problem in PROBLEMS}
    result = audit(images)
    assert finding_names(result) == expected
    assert {finding.count for finding in result.findings} == {1}
    assert {finding.name for finding in result.findings if finding.level == 'error'} == {
        'patients in two splits',
        'duplicate pairs across splits',
        'duplicate pairs across classes',
        'unusable images',
    }
    levels = [finding.level for finding in result.findings]
    assert levels == sorted(levels), 'errors come first'
    save_audit(result, tmp_path / 'audit')
    written = json.loads((tmp_path / 'audit/audit.json').read_text())
    assert written['images'] == IMAGES + 4
    assert written['facts']['formats'] == {'JPEG': IMAGES + 3}
    assert {row['trait'] for row in written['probes']} <= set(TRAITS)
    page = (tmp_path / 'audit/audit.html').read_text()
    assert page.count('<img src="data:image/jpeg;base64,') == 8
    assert "default-src 'none'" in page
    assert not re.search(r'<script|https?://|src="(?!data:)', page)


def test_a_property_that_separates_the_classes_is_a_shortcut(images):
    for image in (images / 'train/NORMAL').iterdir():
        save_jpeg(image, image, quality=90, size=(80, 70))
    findings = {finding.name: finding for finding in audit(images).findings}
    shortcut = findings['shortcuts to the label']
    assert shortcut.level == 'warning'
    assert 'width 1.000' in shortcut.advice
    assert 'height 1.000' in shortcut.advice


def test_a_property_that_separates_two_splits_is_a_shift(images):
    for image in (images / 'test/NORMAL').iterdir():
        save_jpeg(image, image, quality=90, size=(80, 64))
    assert finding_names(audit(images)) == {'shift between train and test, NORMAL'}


def test_a_small_validation_split_is_reported_with_its_interval(few):
    findings = {finding.name: finding for finding in audit(few).findings}
    assert 'from 0.' in findings['validation too small to select an epoch'].advice


@pytest.mark.slow
def test_a_small_validation_split_alone_gives_its_finding_alone(images):
    for image in sorted((images / 'val/NORMAL').iterdir())[8:]:
        image.unlink()
    assert finding_names(audit(images)) == {'validation too small to select an epoch'}


def test_images_listed_twice_are_not_duplicates(few, tmp_path):
    rows = [(path.relative_to(tmp_path).as_posix(), path.parts[-2], 'train') for path in sorted(few.rglob('*.jpeg'))]
    table = pd.DataFrame(rows, columns=['path', 'label', 'split'])
    repeated = pd.concat([table.head(2), table.tail(1).assign(split='test')])
    pd.concat([table, repeated]).to_csv(tmp_path / 'twice.csv', index=False)
    findings = {finding.name: finding for finding in audit(tmp_path / 'twice.csv').findings}
    assert findings['images listed twice'].count == 2
    assert findings['images listed in two splits'].count == 1
    assert not any(name.startswith('duplicate pairs') for name in findings)


def test_hidden_names_of_images_patients_and_the_folder_appear_nowhere(clean, tmp_path):
    folder = tmp_path / 'Doe_Jane'
    shutil.copytree(clean / 'val', folder / 'val')
    shutil.copy(nth_image(folder / 'val/NORMAL'), folder / 'val/NORMAL/Smith_John.jpeg')
    rows = [
        (path.relative_to(folder).as_posix(), path.parts[-2], f'p{i}', 'train')
        for i, path in enumerate(sorted(folder.rglob('*.jpeg')))
    ]
    table = pd.DataFrame(rows, columns=['path', 'label', 'patient', 'split'])
    table.loc[:1, ['patient', 'split']] = [['Smith, J.', 'test'], ['Smith, J.', 'train']]
    table.to_csv(folder / 'images.csv', index=False)
    for source in (folder / 'images.csv', folder):
        result = audit(source, hide_names=True)
        assert result.pictures, 'there are pictures to show'
        save_audit(result, tmp_path / 'audit')
        for file in (tmp_path / 'audit').iterdir():
            assert not re.search('smith|doe_|jane|IM-', file.read_text(), re.IGNORECASE)
    groups = [group for finding in audit(folder / 'images.csv', hide_names=True).findings for group in finding.images]
    assert ('patient-1', 'test', 'train') in groups


def test_names_are_shown_unless_they_are_hidden(few, tmp_path):
    shutil.copy(nth_image(few / 'train/NORMAL'), few / 'train/NORMAL/Smith_Jane.jpeg')
    groups = [group for finding in audit(few).findings for group in finding.images]
    assert any('train/NORMAL/Smith_Jane.jpeg' in group for group in groups)
    options = ['--out', str(tmp_path / 'audit'), '--hide-names']
    assert main(['data', 'audit', str(few), *options]) == 0
    page = (tmp_path / 'audit/audit.html').read_text()
    assert 'Smith' not in page
    assert re.search(r'image-\d+\.jpeg', page)


def test_images_with_burned_in_text_are_counted_and_not_shown(few, tmp_path, capsys):
    for split in ('train', 'test'):
        (few / split / 'NORMAL/a.dcm').write_bytes(dicom(BurnedInAnnotation='YES'))
    shutil.copy(few / 'train/NORMAL/a.dcm', few / 'train/NORMAL/b.dcm')
    (few / 'train/NORMAL/empty.jpeg').write_bytes(b'')
    assert main(['data', 'audit', str(few), '--out', str(tmp_path / 'audit')]) == 1
    printed = capsys.readouterr()
    files = [path.read_text() for path in (tmp_path / 'audit').iterdir()]
    assert not any(PATIENT in text for text in (printed.out, printed.err, *files))
    page = (tmp_path / 'audit/audit.html').read_text()
    assert 'not shown: unreadable, or with burned-in text' in page
    assert 'images with burned-in text: 3' in page


def test_file_names_cannot_become_markup(few, tmp_path):
    shutil.copy(nth_image(few / 'test/NORMAL'), few / 'train/NORMAL/"><script>x<!--[red].jpeg')
    assert main(['data', 'audit', str(few), '--out', str(tmp_path / 'audit')]) == 1
    page = (tmp_path / 'audit/audit.html').read_text()
    assert '<script' not in page
    assert '&lt;script&gt;x' in page


def test_errors_give_exit_code_1_and_warnings_0(few, tmp_path):
    argv = ['data', 'audit', str(few), '--out', str(tmp_path / 'audit')]
    copy_with_other_quality(few)
    assert main(argv) == 0
    copy_to_another_split(few)
    assert main(argv) == 1


def test_an_audit_that_cannot_be_written_gives_exit_code_6(few):
    if not Path('/sys').is_dir():
        pytest.skip('needs a file system that refuses new files, such as /sys; run it on Linux')
    assert main(['data', 'audit', str(few), '--out', '/sys/cxr']) == 6


def test_more_pairs_than_the_search_returns_are_an_error(few, monkeypatch):
    monkeypatch.setattr(auditing, 'MAX_PAIRS', 3)
    for i in range(3):
        save_jpeg(nth_image(few / 'train/NORMAL'), few / f'train/NORMAL/IM-900{i}-0001.jpeg', quality=80)
    findings = {finding.name: finding for finding in audit(few).findings}
    assert findings['too many duplicate pairs'].level == 'error'


def test_a_set_of_unreadable_images_is_audited(tmp_path):
    (tmp_path / 'train/NORMAL').mkdir(parents=True)
    for name in 'ab':
        (tmp_path / f'train/NORMAL/{name}.jpeg').write_bytes(b'x')
    expected = {'unusable images', 'not trainable with these splits', 'images of unknown patients'}
    assert finding_names(audit(tmp_path)) == expected


@pytest.mark.real
@pytest.mark.slow
def test_the_real_data_set_has_28_duplicates_inside_train_and_none_across_splits(real_images):
    result = audit(real_images)
    assert {finding.name: finding.count for finding in result.findings if 'pairs' in finding.name} == {
        'duplicate pairs inside train': 28
    }
    assert finding_names(result) == {
        'duplicate pairs inside train',
        'validation too small to select an epoch',
        'shortcuts to the label',
    }
    sharpness = result.probes.query('trait == "vertical sharpness"').auc.iloc[0]
    assert sharpness == pytest.approx(0.92, abs=0.01)
    counts = result.counts.groupby(['split', 'label', 'kind']).images.sum().to_dict()
    assert counts == {
        ('train', 'NORMAL', 'normal'): 1341,
        ('train', 'PNEUMONIA', 'bacteria'): 2530,
        ('train', 'PNEUMONIA', 'virus'): 1345,
        ('valid', 'NORMAL', 'normal'): 8,
        ('valid', 'PNEUMONIA', 'bacteria'): 8,
    }


@pytest.mark.real
def test_size_and_compression_of_the_original_files_are_shortcuts(real_images):
    originals = real_images.parent / 'chest_xray_originals'
    if not originals.is_dir():
        pytest.skip(f'needs the original files in {originals.name}, next to the folder that CXR_DATA names')
    aucs = audit(originals).probes.set_index('trait').auc
    assert aucs['bytes per pixel'] > 0.99
    assert aucs['height'] > 0.88
    assert aucs['aspect'] > 0.84


def test_files_that_are_left_out_are_a_finding(images, tmp_path):
    (images / 'train/NORMAL/notes.txt').write_text('notes')
    (images / 'train/NORMAL/link.png').symlink_to(tmp_path)
    findings = {finding.name: finding for finding in audit(images).findings}
    assert findings['files left out'].count == 2
