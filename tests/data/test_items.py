"""Files on disk become the items table, and patients never straddle train and valid."""

from pathlib import Path

import pandas as pd
import pytest

from cxr_fastai.core.errors import CXRError, UsageError
from cxr_fastai.data.items import (
    ITEM_COLUMNS,
    data_root,
    describe_items,
    find_images,
    image_root,
    parse_name,
    read_items,
)
from cxr_fastai.data.splits import (
    check_leakage,
    check_trainable,
    count_images,
    validation_warning,
    leaking_patients,
    split_patients,
)

TREE = [
    'train/NORMAL/IM-0001-0001.jpeg',
    'train/PNEUMONIA/person1_virus_2.jpeg',
    'train/PNEUMONIA/person1_bacteria_3.jpeg',
    'val/NORMAL/NORMAL2-IM-0007-0001.jpeg',
    'test/PNEUMONIA/person9_bacteria_1.png',
]
CLASSES = ('NORMAL', 'PNEUMONIA')


def plant(root: Path, names: list[str]) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b'image')
    return root


def table(patients_each: int = 20) -> pd.DataFrame:
    rows = [
        (f'{label}-{p}-{view}', label, 'train', f'{label}-{p}', 'normal')
        for label in CLASSES
        for p in range(patients_each)
        for view in range(1 + p % 3)
    ]
    return pd.DataFrame(rows, columns=ITEM_COLUMNS)


def test_the_kaggle_layout_is_read(tmp_path):
    items = read_items(plant(tmp_path, TREE))
    assert list(items) == ITEM_COLUMNS and sorted(items.path) == sorted(TREE)
    assert dict(zip(items.path, items.split, strict=True))['val/NORMAL/NORMAL2-IM-0007-0001.jpeg'] == 'valid'
    assert set(items.patient) == {'IM-0001', 'virus-1', 'bacteria-1', 'NORMAL2-IM-0007', 'bacteria-9'}
    assert set(items.kind) == {'normal', 'virus', 'bacteria'}


@pytest.mark.parametrize(
    ('name', 'label', 'kind', 'patient'),
    [
        ('person12_bacteria_34.jpeg', 'PNEUMONIA', 'bacteria', 'bacteria-12'),
        ('person12_virus_34.jpeg', 'PNEUMONIA', 'virus', 'virus-12'),
        ('IM-0115-0001.jpeg', 'NORMAL', 'normal', 'IM-0115'),
        ('NORMAL2-IM-0499-0001-0002.jpeg', 'NORMAL', 'normal', 'NORMAL2-IM-0499'),
        ('a/scan.v2.jpeg', 'PNEUMONIA', 'unknown', 'a/scan.v2'),
    ],
)
def test_names_tell_kind_and_patient(name, label, kind, patient):
    assert parse_name(name, label) == (kind, patient)


def test_what_the_kaggle_zip_leaves_behind_is_ignored_and_counted(tmp_path):
    plant(tmp_path, [f'chest_xray/{name}' for name in TREE])
    plant(tmp_path, [f'chest_xray/chest_xray/{name}' for name in TREE])
    plant(
        tmp_path,
        [
            'chest_xray/__MACOSX/train/NORMAL/._IM-0001-0001.jpeg',
            'chest_xray/train/.DS_Store',
            'chest_xray/train/NORMAL/._IM-0001-0001.jpeg',
            'chest_xray/readme.txt',
            'chest_xray/stray.png',
        ],
    )
    items = read_items(tmp_path)
    assert sorted(items.path) == sorted(f'chest_xray/{name}' for name in TREE)
    assert items.attrs['ignored'] == {
        'nested chest_xray': 5,
        '__MACOSX': 1,
        '._*': 1,
        '.DS_Store': 1,
        'not an image': 1,
        'outside the class folders': 1,
    }
    assert 'train: 1 NORMAL and 2 PNEUMONIA' in describe_items(items) and '1 .DS_Store' in describe_items(items)


def test_a_nested_copy_alone_is_understood(tmp_path):
    plant(tmp_path, [f'chest_xray/chest_xray/{name}' for name in TREE])
    assert len(read_items(tmp_path)) == len(TREE)


def test_pictures_beside_the_splits_are_no_class(tmp_path):
    items = read_items(plant(tmp_path, [*TREE, 'docs/x.png', 'masks/train/PNEUMONIA/person1_virus_2.png']))
    assert len(items) == len(TREE) and items.attrs['ignored'] == {'outside the class folders': 1, 'masks': 1}


def test_class_folders_alone_are_for_training(tmp_path):
    items = read_items(plant(tmp_path, ['NORMAL/a.png', 'PNEUMONIA/b.png']))
    assert list(items.split) == ['train', 'train'] and list(items.label) == list(CLASSES)


def test_a_csv_names_images_splits_and_patients(tmp_path):
    plant(tmp_path, ['a/x.png', 'b/y.png'])
    (tmp_path / 'images.csv').write_text(
        'path,label,split,patient\na/x.png,NORMAL,train,p1\nb/y.png,PNEUMONIA,val,p2\n'
    )
    items = read_items(tmp_path / 'images.csv')
    assert items[['path', 'label', 'split', 'patient']].values.tolist() == [
        ['a/x.png', 'NORMAL', 'train', 'p1'],
        ['b/y.png', 'PNEUMONIA', 'valid', 'p2'],
    ]
    assert image_root(tmp_path / 'images.csv') == tmp_path


def test_a_third_class_is_named_in_the_refusal(tmp_path):
    with pytest.raises(UsageError, match='COVID.*expected NORMAL and PNEUMONIA'):
        read_items(plant(tmp_path, [*TREE, 'train/COVID/c.png']))


def test_a_folder_without_images_says_what_was_expected(tmp_path):
    with pytest.raises(CXRError, match='no images found. Expected folders train|val|test'):
        read_items(tmp_path)


def test_no_patient_is_in_train_and_valid():
    items = split_patients(table(), seed=3)
    by_split = items.groupby('split').patient.agg(set)
    assert not by_split['train'] & by_split['valid']


def test_a_tenth_of_each_class_validates():
    items = split_patients(table(patients_each=100), seed=0)
    counts = count_images(items)
    shares = counts.loc['valid'] / counts.loc[['train', 'valid']].sum()
    assert shares.between(0.07, 0.13).all()


def test_the_seed_alone_decides_the_split():
    assert split_patients(table(), 1).equals(split_patients(table(), 1))
    assert not split_patients(table(), 1).equals(split_patients(table(), 2))


def test_test_images_stay_test_images():
    items = table().assign(split=lambda t: t.split.where(t.index % 5 > 0, 'test'))
    assert (split_patients(items, 0).split == 'test').eq(items.split == 'test').all()


def test_limit_takes_the_first_of_each_class_and_split(images):
    whole, limited = read_items(images), read_items(images, limit=3)
    assert (count_images(limited) == 3).all(axis=None)
    assert set(limited.path) <= set(whole.path)


def test_training_needs_both_classes_and_a_validation_image():
    items = table()
    with pytest.raises(UsageError, match='valid holds no image.*--valid patients'):
        check_trainable(items)
    for n in (0, 1):
        few = pd.concat([items[items.label == 'NORMAL'], items[items.label == 'PNEUMONIA'].head(n)])
        with pytest.raises(UsageError, match=f'train holds 39 NORMAL and {n} PNEUMONIA. .* two images of each class'):
            check_trainable(few)


def test_sixteen_validation_images_are_doubted_with_their_interval():
    items = table().groupby('label').head(8).assign(split='valid')
    assert '8 of 8 correct, the true rate could be anywhere from 0.68 to 1' in validation_warning(items)
    assert validation_warning(table(100).assign(split='valid')) is None


def test_the_data_folder_is_the_option_then_the_environment_then_the_default(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CXRError, match='data/chest_xray: no such folder.*cxr-fastai data demo'):
        data_root()
    (tmp_path / 'data/chest_xray').mkdir(parents=True)
    assert data_root() == Path('data/chest_xray')
    monkeypatch.setenv('CXR_DATA', str(tmp_path))
    assert data_root() == tmp_path
    assert data_root(tmp_path / 'data') == tmp_path / 'data'


def test_links_are_not_followed_to_folders_or_images(tmp_path):
    plant(tmp_path / 'in', ['a.png'])
    plant(tmp_path / 'out', ['b.png'])
    (tmp_path / 'in' / 'loop').symlink_to(tmp_path / 'in')
    (tmp_path / 'in' / 'b.png').symlink_to(tmp_path / 'out' / 'b.png')
    images, ignored = find_images(tmp_path / 'in')
    assert [image.name for image in images] == ['a.png'] and ignored == {'link': 1}


def test_suffixes_do_not_come_from_the_systems_table(tmp_path, monkeypatch):
    import mimetypes

    monkeypatch.setattr(mimetypes, 'types_map', {})
    plant(tmp_path, ['a.JPG', 'b.jpeg', 'c.Png', 'd.tif', 'e.tiff', 'f.dcm', 'g.dicom', 'h.gif', 'i.webp', 'j'])
    assert [image.name[0] for image in find_images(tmp_path)[0]] == list('abcdefg')


OTHERS = ['train/normal /a.png', 'train/Normal/b.png', 'train/PNEUMONIA_BACTERIA/c.png', 'train/COVID/d.png']


def test_other_names_of_classes_are_refused_with_what_was_found_and_what_to_write(tmp_path):
    with pytest.raises(
        UsageError,
        match="found the classes 'COVID', 'Normal', 'PNEUMONIA_BACTERIA', 'normal '.*"
        'classes.json.*null leaves a class out',
    ):
        read_items(plant(tmp_path, OTHERS))


def test_other_names_of_classes_can_be_mapped(tmp_path):
    plant(tmp_path, OTHERS)
    (tmp_path / 'classes.json').write_text(
        '{"normal ": "NORMAL", "Normal": "NORMAL", "PNEUMONIA_BACTERIA": "PNEUMONIA", "COVID": null}'
    )
    items = read_items(tmp_path)
    assert dict(zip(items.path, items.label, strict=True)) == {
        OTHERS[0]: 'NORMAL',
        OTHERS[1]: 'NORMAL',
        OTHERS[2]: 'PNEUMONIA',
    }
    assert items.attrs['ignored'] == {'class COVID': 1, 'not an image': 1}


@pytest.mark.parametrize('text', ['{', '[]', '{"Normal": "HEALTHY"}', '{"Normal": []}', '[' * 200_000])
def test_a_mapping_that_is_none_is_refused(tmp_path, text):
    plant(tmp_path, OTHERS)
    (tmp_path / 'classes.json').write_text(text)
    with pytest.raises(UsageError, match='classes.json: (damaged|expected an object)'):
        read_items(tmp_path)


def test_a_patient_in_two_splits_is_refused(tmp_path):
    items = read_items(plant(tmp_path, [*TREE, 'test/PNEUMONIA/person1_virus_9.png']))
    assert leaking_patients(items).to_dict() == {'virus-1': ['test', 'train']}
    with pytest.raises(UsageError, match='patients with images in two splits: 1.*--allow-leakage'):
        check_leakage(items)
    check_leakage(items[items.split != 'test'])


@pytest.mark.real
def test_the_real_set_has_the_published_counts(real_images):
    items = read_items(real_images)
    train = items[items.split == 'train']
    images_of = train[train.label == 'PNEUMONIA'].groupby('patient').size()
    assert count_images(items).loc['train'].to_list() == [1341, 3875]
    assert (len(images_of), (images_of > 1).sum(), images_of[images_of > 1].sum(), images_of.max()) == (
        2443,
        573,
        2005,
        30,
    )
    assert train[train.label == 'NORMAL'].patient.nunique() == 1211
