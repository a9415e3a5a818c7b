"""An audit finds every fault that was planted in a set of images, and nothing else."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from imagefiles import PATIENT, dicom
from PIL import Image

from cxr_fastai.cli import main
from cxr_fastai.data.auditing import audit, probe_label, probe_shift, save_audit
from cxr_fastai.data.find import safe_path
from cxr_fastai.data.image_stats import TRAITS, find_alike, measure_images
from cxr_fastai.images.synthetic import make_demo


@pytest.fixture(scope='module')
def clean(tmp_path_factory) -> Path:
    """Synthetic images in which nothing is wrong: enough validation images, no leak, no copy, no shortcut."""
    folder = tmp_path_factory.mktemp('clean') / 'images'
    make_demo(folder, images=640, size=64, seed=0)
    return folder


@pytest.fixture
def images(clean, tmp_path) -> Path:
    return Path(shutil.copytree(clean, tmp_path / 'images'))


@pytest.fixture
def few(clean, tmp_path) -> Path:
    """The first ten images of each folder: quick, and too few to validate on."""
    return Path(
        shutil.copytree(
            clean,
            tmp_path / 'few',
            ignore=lambda _, names: sorted(name for name in names if name.endswith('.jpeg'))[10:],
        )
    )


def names(found) -> set[str]:
    return {finding.name for finding in found.findings}


def first(folder: Path, i: int = 0) -> Path:
    return sorted(folder.iterdir())[i]


def as_jpeg(source: Path, target: Path, quality: int, size: tuple[int, int] | None = None) -> Path:
    image = Image.open(source)
    (image.resize(size) if size else image).save(target, quality=quality)
    return target


def leaked_patient(images: Path) -> set[str]:
    image = first(images / 'train/PNEUMONIA')
    patient, kind, _ = image.stem.split('_')
    shutil.copy(first(images / 'train/PNEUMONIA', 30), images / f'test/PNEUMONIA/{patient}_{kind}_99999.jpeg')
    first(images / 'train/PNEUMONIA', 30).unlink()
    return {'patients in two splits'}


def copy_of_other_quality(images: Path) -> set[str]:
    as_jpeg(first(images / 'train/NORMAL'), images / 'train/NORMAL/IM-9001-0001.jpeg', quality=60)
    return {'duplicate pairs inside train'}


def exact_copy_in_another_split(images: Path) -> set[str]:
    shutil.copy(first(images / 'train/NORMAL', 3), images / 'test/NORMAL/IM-9002-0001.jpeg')
    return {'duplicate pairs across splits'}


def copy_with_the_other_label(images: Path) -> set[str]:
    as_jpeg(first(images / 'train/NORMAL', 5), images / 'train/PNEUMONIA/person9003_virus_1.jpeg', quality=90)
    return {'duplicate pairs across classes'}


def truncated_image(images: Path) -> set[str]:
    bad = first(images / 'train/NORMAL', 8)
    bad.write_bytes(bad.read_bytes()[:900])
    return {'images that cannot be used'}


def copy_one_pixel_larger(images: Path) -> set[str]:
    as_jpeg(first(images / 'val/PNEUMONIA'), images / 'val/PNEUMONIA/person9004_virus_1.jpeg', 90, size=(65, 65))
    return {'duplicate pairs inside valid'}


def name_of_a_patient(images: Path) -> set[str]:
    first(images / 'train/NORMAL', 11).rename(images / 'train/NORMAL/Smith_Jane_20010203.jpeg')
    return {'file names that may name patients'}


PLANTS = [
    leaked_patient,
    copy_of_other_quality,
    exact_copy_in_another_split,
    copy_with_the_other_label,
    truncated_image,
    copy_one_pixel_larger,
    name_of_a_patient,
]


def test_nothing_is_found_where_nothing_is_wrong(clean):
    found = audit(clean)
    assert not found.findings and found.images == 640 and found.probes.auc.max() < 0.7


ALONE = (leaked_patient, exact_copy_in_another_split, truncated_image)
"""The others are found alone in the longer run, and together in each."""


@pytest.mark.parametrize(
    'plant',
    [pytest.param(plant, marks=() if plant in ALONE else pytest.mark.slow, id=plant.__name__) for plant in PLANTS],
)
def test_each_plant_is_found_and_nothing_else(images, plant):
    planted = plant(images)
    assert names(audit(images)) == planted


def test_all_plants_together_are_found_once_each(images):
    planted = set().union(*(plant(images) for plant in PLANTS))
    found = audit(images)
    assert names(found) == planted
    assert {finding.count for finding in found.findings} == {1}
    levels = {finding.name: finding.level for finding in found.findings}
    assert {name for name, level in levels.items() if level == 'error'} == {
        'patients in two splits',
        'duplicate pairs across splits',
        'duplicate pairs across classes',
        'images that cannot be used',
    }
    assert [finding.level for finding in found.findings] == sorted(levels.values())


def test_a_shortcut_is_named(images):
    for image in (images / 'train/NORMAL').iterdir():
        as_jpeg(image, image, quality=90, size=(80, 70))
    (told,) = [finding for finding in audit(images).findings if finding.name == 'shortcuts to the label']
    assert re.search(r'width 1.000', told.advice) and 'height 1.000' in told.advice and told.level == 'warning'


def test_a_shift_between_splits_is_named(images):
    for image in (images / 'test/NORMAL').iterdir():
        as_jpeg(image, image, quality=90, size=(80, 64))
    assert names(audit(images)) == {'shift between train and test, NORMAL'}


def test_small_validation_is_told_with_its_interval(images):
    for image in sorted((images / 'val/NORMAL').iterdir())[8:]:
        image.unlink()
    (finding,) = audit(images).findings
    assert finding.name == 'validation too small to select on' and 'from 0.' in finding.advice


def test_images_listed_twice_are_found(clean):
    rows = [(path.relative_to(clean.parent).as_posix(), path.parts[-2], 'train') for path in clean.rglob('*.jpeg')]
    table = pd.DataFrame(rows, columns=['path', 'label', 'split'])
    extra = pd.concat([table.head(2), table.tail(1).assign(split='test')])
    pd.concat([table, extra]).to_csv(clean.parent / 'twice.csv', index=False)
    found = {finding.name: finding for finding in audit(clean.parent / 'twice.csv').findings}
    assert found['images listed twice'].count == 2 and found['images listed in two splits'].count == 1
    assert not any(name.startswith('duplicate pairs') for name in found)


@pytest.mark.parametrize(
    'path',
    [
        'train/NORMAL/IM-0115-0001.jpeg',
        'chest_xray/val/PNEUMONIA/person12_bacteria_34.jpeg',
        '00012345_003.png',
        'train/NORMAL/NORMAL2-IM-0301-0001-0002.jpeg',
        'train/NORMAL/medmnist-train-00001.png',
        'cxr_PA.dcm',
        '3fa9c1d27b.png',
        '0a1b2c3d-0a1b-0a1b.dcm',
        'x-ray 12.png',
    ],
)
def test_names_that_name_nobody_are_shown(path):
    assert safe_path(path, 7) == path


@pytest.mark.parametrize(
    ('path', 'shown'),
    [
        ('train/NORMAL/Doe^Jane.dcm', 'train/NORMAL/image-7.dcm'),
        ('image/jane_doe.png', 'image/image-7.png'),
        ('Müller, Anna.jpeg', 'image-7.jpeg'),
        ('Smith19701231.png', 'image-7.png'),
        ('JANE DOE/1.png', 'image-7.png'),
        ('Smith.jpeg', 'image-7.jpeg'),
        ('patient_Smith.png', 'image-7.png'),
        ('Smith J.png', 'image-7.png'),
        ('O Li.png', 'image-7.png'),
        ('李明.png', 'image-7.png'),
        ('李.png', 'image-7.png'),
        ('1.Smith', 'image-7'),
        ('Smith.Jane/1.png', 'image-7.png'),
    ],
)
def test_names_that_may_name_a_patient_are_not(path, shown):
    assert safe_path(path, 7) == shown


def test_a_patients_name_in_a_csv_or_a_folder_is_not_shown(clean, tmp_path):
    folder = tmp_path / 'Doe_Jane'
    shutil.copytree(clean / 'test', folder / 'test')
    rows = [
        (path.relative_to(folder).as_posix(), path.parts[-2], f'p{i}', 'train')
        for i, path in enumerate(sorted(folder.rglob('*.jpeg')))
    ]
    table = pd.DataFrame(rows, columns=['path', 'label', 'patient', 'split'])
    table.loc[:1, ['patient', 'split']] = [['Smith, J.', 'test'], ['Smith, J.', 'train']]
    table.to_csv(folder / 'images.csv', index=False)
    for source in (folder / 'images.csv', folder):
        save_audit(audit(source), tmp_path / 'audit')
        for told in (tmp_path / 'audit').iterdir():
            assert not re.search('smith|doe_|jane', told.read_text(), re.IGNORECASE)
    assert 'patient-1' in {image[0] for finding in audit(folder / 'images.csv').findings for image in finding.images}


def test_no_patient_is_named_anywhere(few, tmp_path, capsys):
    for split in ('train', 'test'):
        (few / split / 'NORMAL/Smith_Jane.dcm').write_bytes(dicom(BurnedInAnnotation='YES'))
    shutil.copy(few / 'train/NORMAL/Smith_Jane.dcm', few / 'train/NORMAL/Smith_John.dcm')
    (few / 'train/NORMAL/Smith_Anna.jpeg').write_bytes(b'')
    assert main(['data', 'audit', str(few), '--out', str(tmp_path / 'audit')]) == 1
    shown = capsys.readouterr()
    for text in (shown.out, shown.err, *(path.read_text() for path in (tmp_path / 'audit').iterdir())):
        assert not re.search('smith|' + re.escape(PATIENT), text, re.IGNORECASE)
    page = (tmp_path / 'audit/audit.html').read_text()
    assert 'not shown: its picture' in page and 'images with burned-in text: 3' in page


def test_the_files_are_one_page_and_one_object(images, tmp_path):
    copy_with_the_other_label(images), leaked_patient(images)
    save_audit(audit(images), tmp_path / 'audit')
    told = json.loads((tmp_path / 'audit/audit.json').read_text())
    assert told['images'] == 641 and {finding['level'] for finding in told['findings']} == {'error'}
    assert told['facts']['formats'] == {'JPEG': 641} and {row['trait'] for row in told['probes']} <= set(TRAITS)
    page = (tmp_path / 'audit/audit.html').read_text()
    assert page.count('<img src="data:image/jpeg;base64,') == 2 and "default-src 'none'" in page
    assert not re.search(r'<script|https?://|src="(?!data:)', page)


def test_names_cannot_become_markup(few, tmp_path):
    evil = few / 'train/NORMAL/"><script>x<!--[red].jpeg'
    shutil.copy(first(few / 'test/NORMAL'), evil)
    assert main(['data', 'audit', str(few), '--out', str(tmp_path / 'audit')]) == 1
    assert '<script' not in (tmp_path / 'audit/audit.html').read_text()


def test_the_exit_code_tells_errors_from_warnings(clean, few, tmp_path, capsys):
    out = ['--out', str(tmp_path / 'audit')]
    assert main(['data', 'audit', str(clean), *out]) == 0
    assert 'nothing was found to be wrong' in capsys.readouterr().out
    copy_of_other_quality(few)
    assert main(['data', 'audit', str(few), *out]) == 0
    exact_copy_in_another_split(few)
    assert main(['data', 'audit', str(few), *out]) == 1
    assert main(['data', 'audit', str(few), '--out', '/sys/cxr']) == 6


def test_alike_is_pearsons_correlation_whatever_the_blocks(monkeypatch):
    rng = np.random.default_rng(0)
    thumbnails = rng.integers(0, 256, (300, 8, 8), dtype=np.uint8)
    thumbnails[200:] = np.clip(thumbnails[:100] + rng.integers(0, 40, (100, 8, 8)), 0, 255)
    thumbnails[7] = 9  # blank: like nothing
    expected = np.triu(np.corrcoef(thumbnails.reshape(300, -1) + 1e-9 * rng.random((300, 64))), 1) >= 0.9
    wanted = {(i, j) for i, j in np.argwhere(expected).tolist() if 7 not in (i, j)}
    for block in (2048, 64, 77):
        monkeypatch.setattr('cxr_fastai.data.image_stats.BLOCK', block)
        assert {(i, j) for i, j, _ in find_alike(thumbnails, 0.9)} == wanted and len(wanted) > 50


def test_more_pairs_than_can_be_listed_are_an_error(few, monkeypatch):
    monkeypatch.setattr('cxr_fastai.data.image_stats.MOST_PAIRS', 3)
    monkeypatch.setattr('cxr_fastai.data.auditing.MOST_PAIRS', 3)
    for i in range(3):
        as_jpeg(first(few / 'train/NORMAL'), few / f'train/NORMAL/IM-900{i}-0001.jpeg', quality=80)
    found = {finding.name: finding for finding in audit(few).findings}
    assert found['too many duplicate pairs to list'].level == 'error'


def test_a_set_of_nothing_but_bad_images_is_audited(tmp_path):
    (tmp_path / 'train/NORMAL').mkdir(parents=True)
    for name in 'ab':
        (tmp_path / f'train/NORMAL/{name}.jpeg').write_bytes(b'x')
    assert names(audit(tmp_path)) == {'images that cannot be used', 'not trainable as it is'}


def test_probes_need_enough_images_and_patients():
    table = pd.DataFrame({trait: np.arange(60.0) for trait in TRAITS}).assign(
        split='train', label=['NORMAL', 'PNEUMONIA'] * 30, patient='one'
    )
    assert probe_label(table).empty and probe_shift(table).empty


def test_a_probe_judges_patients_it_has_not_seen():
    # Every patient has a width of their own: it tells nothing about another patient.
    rng = np.random.default_rng(0)
    patient = np.repeat(np.arange(80), 5)
    width = np.repeat(rng.random(80), 5)
    label = np.where(np.repeat(rng.random(80) < 0.5, 5), 'PNEUMONIA', 'NORMAL')
    table = pd.DataFrame({trait: 1.0 for trait in TRAITS}, index=range(400)).assign(
        width=width, split='train', label=label, patient=patient.astype(str)
    )
    (row,) = probe_label(table).itertuples()
    assert row.trait == 'width' and row.auc < 0.65


def test_traits_are_those_of_the_file_and_its_look(tmp_path):
    ramp = np.tile(np.arange(0, 256, 2, dtype=np.uint8), (128, 1))
    Image.fromarray(ramp).save(tmp_path / 'a.png')
    Image.fromarray(ramp).convert('RGB').save(tmp_path / 'b.png')
    table, thumbnails = measure_images(['a.png', 'b.png', 'none.png'], tmp_path)
    assert thumbnails.shape == (3, 32, 32) and table.code.fillna('').to_list() == ['', '', 'E_IO']
    assert table.digest[0] == table.digest[1] and table.colour[:2].to_list() == [0, 1]
    assert table['vertical sharpness'][0] == 0 and table['horizontal sharpness'][0] == pytest.approx(
        254 / 223, rel=0.01
    )
    assert table['bytes per pixel'][0] == (tmp_path / 'a.png').stat().st_size / 128**2


@pytest.mark.real
@pytest.mark.slow
def test_the_real_set_has_28_copies_inside_train_and_nothing_across(real_images):
    found = audit(real_images)
    assert {finding.name: finding.count for finding in found.findings if 'pairs' in finding.name} == {
        'duplicate pairs inside train': 28
    }
    assert names(found) == {
        'duplicate pairs inside train',
        'validation too small to select on',
        'shortcuts to the label',
    }
    sharpness = found.probes.query('trait == "vertical sharpness"').auc.iloc[0]
    assert sharpness == pytest.approx(0.92, abs=0.01)
    counts = found.counts.groupby(['split', 'label', 'kind']).images.sum().to_dict()
    assert counts == {
        ('train', 'NORMAL', 'normal'): 1341,
        ('train', 'PNEUMONIA', 'bacteria'): 2530,
        ('train', 'PNEUMONIA', 'virus'): 1345,
        ('valid', 'NORMAL', 'normal'): 8,
        ('valid', 'PNEUMONIA', 'bacteria'): 8,
    }


@pytest.mark.real
def test_on_the_originals_size_and_compression_give_the_label_away(real_images):
    originals = real_images.parent / 'chest_xray_originals'
    if not originals.is_dir():
        pytest.skip('no originals beside the real images')
    told = audit(originals).probes.set_index('trait').auc
    assert told['bytes per pixel'] > 0.99 and told['height'] > 0.88 and told['aspect'] > 0.84
