"""A folder or a CSV file of images becomes the items table."""

from pathlib import Path

import pytest

from cxr_fastai.core.errors import CXRError, UsageError
from cxr_fastai.data.auditing import audit
from cxr_fastai.data.items import ITEM_COLUMNS, data_root, describe_items, image_root, parse_name, read_items
from cxr_fastai.data.loaders import CXRDataLoaders
from cxr_fastai.data.splits import count_images

FILES = [
    'train/NORMAL/IM-0001-0001.jpeg',
    'train/PNEUMONIA/person1_virus_2.jpeg',
    'train/PNEUMONIA/person1_bacteria_3.jpeg',
    'val/NORMAL/NORMAL2-IM-0007-0001.jpeg',
    'test/PNEUMONIA/person9_bacteria_1.png',
]
OTHER_CLASSES = [
    'train/normal /a.png',
    'train/Normal/b.png',
    'train/PNEUMONIA_BACTERIA/c.png',
    'train/COVID/d.png',
]


def create_files(root: Path, names: list[str]) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b'image')
    return root


def test_the_kaggle_layout_is_read(tmp_path):
    items = read_items(create_files(tmp_path, FILES))
    assert list(items) == ITEM_COLUMNS
    assert sorted(items.path) == sorted(FILES)
    assert items.set_index('path').split['val/NORMAL/NORMAL2-IM-0007-0001.jpeg'] == 'valid'
    assert set(items.patient) == {'IM-0001', 'virus-1', 'bacteria-1', 'NORMAL2-IM-0007', 'bacteria-9'}
    assert set(items.kind) == {'normal', 'virus', 'bacteria'}


@pytest.mark.parametrize(
    ('name', 'label', 'kind', 'patient'),
    [
        ('person12_bacteria_34.jpeg', 'PNEUMONIA', 'bacteria', 'bacteria-12'),
        ('person12_virus_34.jpeg', 'PNEUMONIA', 'virus', 'virus-12'),
        ('IM-0115-0001.jpeg', 'NORMAL', 'normal', 'IM-0115'),
        ('NORMAL2-IM-0499-0001-0002.jpeg', 'NORMAL', 'normal', 'NORMAL2-IM-0499'),
        ('a/scan.v2.jpeg', 'PNEUMONIA', 'unknown', 'unknown:a/scan.v2'),
    ],
)
def test_a_file_name_gives_kind_and_patient(name, label, kind, patient):
    assert parse_name(name, label) == (kind, patient)


def test_other_files_of_the_kaggle_zip_are_ignored_and_counted(tmp_path):
    create_files(tmp_path, [f'chest_xray/{name}' for name in FILES])
    create_files(tmp_path, [f'chest_xray/chest_xray/{name}' for name in FILES])
    other_files = [
        'chest_xray/__MACOSX/train/NORMAL/._IM-0001-0001.jpeg',
        'chest_xray/train/.DS_Store',
        'chest_xray/train/NORMAL/._IM-0001-0001.jpeg',
        'chest_xray/readme.txt',
        'chest_xray/stray.png',
    ]
    create_files(tmp_path, other_files)
    items = read_items(tmp_path)
    assert sorted(items.path) == sorted(f'chest_xray/{name}' for name in FILES)
    assert items.attrs['ignored'] == {
        'nested chest_xray': 5,
        '__MACOSX': 1,
        '._*': 1,
        '.DS_Store': 1,
        'not an image': 1,
        'outside the class folders': 1,
    }
    assert 'train: 1 NORMAL and 2 PNEUMONIA' in describe_items(items)
    assert '1 .DS_Store' in describe_items(items)


def test_a_nested_folder_without_a_copy_above_is_read(tmp_path):
    create_files(tmp_path, [f'chest_xray/chest_xray/{name}' for name in FILES])
    assert len(read_items(tmp_path)) == len(FILES)


def test_images_next_to_the_splits_are_not_a_class(tmp_path):
    items = read_items(create_files(tmp_path, [*FILES, 'docs/x.png', 'masks/train/PNEUMONIA/person1_virus_2.png']))
    assert len(items) == len(FILES)
    assert items.attrs['ignored'] == {'outside the class folders': 1, 'masks': 1}


def test_class_folders_alone_are_for_training(tmp_path):
    items = read_items(create_files(tmp_path, ['NORMAL/a.png', 'PNEUMONIA/b.png']))
    assert list(items.split) == ['train', 'train']
    assert list(items.label) == ['NORMAL', 'PNEUMONIA']


def test_a_csv_file_gives_splits_and_patients(tmp_path):
    create_files(tmp_path, ['a/x.png', 'b/y.png'])
    csv_file = tmp_path / 'images.csv'
    csv_file.write_text('path,label,split,patient\na/x.png,NORMAL,train,p1\nb/y.png,PNEUMONIA,val,p2\n')
    items = read_items(csv_file)
    assert items[['path', 'label', 'split', 'patient']].values.tolist() == [
        ['a/x.png', 'NORMAL', 'train', 'p1'],
        ['b/y.png', 'PNEUMONIA', 'valid', 'p2'],
    ]
    assert image_root(csv_file) == tmp_path


def test_a_third_class_is_named_in_the_error(tmp_path):
    with pytest.raises(UsageError, match='COVID.*expected NORMAL and PNEUMONIA'):
        read_items(create_files(tmp_path, [*FILES, 'train/COVID/c.png']))


def test_a_folder_without_images_gives_the_expected_layout(tmp_path):
    with pytest.raises(CXRError, match=r'no images found in class folders. Arrange the folders as train\|val\|test'):
        read_items(tmp_path)


def test_limit_keeps_the_first_images_of_each_class_and_split(images):
    all_items, limited = read_items(images), read_items(images, limit=3)
    assert (count_images(limited) == 3).all(axis=None)
    assert set(limited.path) <= set(all_items.path)


def test_the_data_folder_is_the_option_or_the_environment_variable_or_the_default(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CXRError, match='data/chest_xray: no such folder.*cxr-fastai data demo'):
        data_root()
    (tmp_path / 'data/chest_xray').mkdir(parents=True)
    assert data_root() == Path('data/chest_xray')
    monkeypatch.setenv('CXR_DATA', str(tmp_path))
    assert data_root() == tmp_path
    assert data_root(tmp_path / 'data') == tmp_path / 'data'


def test_a_missing_folder_is_named_with_the_layout_in_python_as_by_the_command(tmp_path):
    gone = tmp_path / 'gone'
    with pytest.raises(CXRError, match=r'gone: no such folder of images.*\(train\|val\|test / NORMAL') as command:
        data_root(gone)
    for read in (CXRDataLoaders.from_folder, read_items, audit):
        with pytest.raises(CXRError) as error:
            read(gone)
        assert str(error.value) == str(command.value)
    for options in ({}, {'label_col': 'class'}):
        with pytest.raises(CXRError, match=r'gone.csv: no such file'):
            CXRDataLoaders.from_csv(tmp_path, 'gone.csv', **options)


def test_other_class_names_are_refused_with_the_file_that_maps_them(tmp_path):
    names = "found the classes 'COVID', 'Normal', 'PNEUMONIA_BACTERIA', 'normal '"
    with pytest.raises(UsageError, match=f'{names}.*classes.json.*null leaves a class out'):
        read_items(create_files(tmp_path, OTHER_CLASSES))


def test_other_class_names_can_be_mapped(tmp_path):
    create_files(tmp_path, OTHER_CLASSES)
    (tmp_path / 'classes.json').write_text(
        '{"normal ": "NORMAL", "Normal": "NORMAL", "PNEUMONIA_BACTERIA": "PNEUMONIA", "COVID": null}'
    )
    items = read_items(tmp_path)
    assert items.set_index('path').label.to_dict() == {
        OTHER_CLASSES[0]: 'NORMAL',
        OTHER_CLASSES[1]: 'NORMAL',
        OTHER_CLASSES[2]: 'PNEUMONIA',
    }
    assert items.attrs['ignored'] == {'class COVID': 1, 'not an image': 1}


@pytest.mark.parametrize('text', ['{', '[]', '{"Normal": "HEALTHY"}', '{"Normal": []}', '[' * 200_000])
def test_an_invalid_mapping_of_classes_is_refused(tmp_path, text):
    create_files(tmp_path, OTHER_CLASSES)
    (tmp_path / 'classes.json').write_text(text)
    with pytest.raises(UsageError, match='classes.json: (damaged|expected an object)'):
        read_items(tmp_path)


@pytest.mark.real
def test_the_real_data_set_has_the_published_counts(real_images):
    items = read_items(real_images)
    assert count_images(items).loc['train'].to_list() == [1341, 3875]
    train = items[items.split == 'train']
    images_by_patient = train[train.label == 'PNEUMONIA'].groupby('patient').size()
    several = images_by_patient[images_by_patient > 1]
    assert len(images_by_patient) == 2443
    assert (len(several), several.sum(), several.max()) == (573, 2005, 30)
    assert train[train.label == 'NORMAL'].patient.nunique() == 1211


@pytest.mark.parametrize(
    ('splits', 'classes'),
    [
        (('Train', 'Val', 'Test'), ('NORMAL', 'PNEUMONIA')),
        (('TRAIN', 'VALID', 'TEST'), ('normal', 'pneumonia')),
        (('training', 'validation', 'testing'), ('Normal', 'Pneumonia')),
        (('train', 'Validation', 'Testing '), ('NORMAL', 'Pneumonia ')),
    ],
)
def test_spellings_of_splits_and_classes_are_known(tmp_path, splits, classes):
    create_files(tmp_path, [f'{split}/{label}/{i}.png' for i, split in enumerate(splits) for label in classes])
    items = read_items(tmp_path)
    assert set(items.label) == {'NORMAL', 'PNEUMONIA'}
    assert list(items.groupby('split').size()[['train', 'valid', 'test']]) == [2, 2, 2]


def test_class_folders_alone_are_known_in_lower_case(tmp_path):
    items = read_items(create_files(tmp_path, ['normal/a.png', 'Pneumonia/b.png']))
    assert list(items.label) == ['PNEUMONIA', 'NORMAL']


def test_spellings_in_a_csv_file_are_known(tmp_path):
    create_files(tmp_path, ['a.png', 'b.png', 'c.png'])
    (tmp_path / 'i.csv').write_text(
        'path,label,split\na.png,normal,Training\nb.png,Pneumonia,VALIDATION\nc.png,Normal,TEST\n'
    )
    items = read_items(tmp_path / 'i.csv')
    assert list(items.label) == ['NORMAL', 'PNEUMONIA', 'NORMAL']
    assert list(items.split) == ['train', 'valid', 'test']


@pytest.mark.parametrize('layout', ['{split}/PNEUMONIA/{kind}', 'PNEUMONIA/{kind}'])
@pytest.mark.parametrize('kind', ['BACTERIA', 'virus', 'Bacterial Pneumonia', 'viral_pneumonia'])
def test_folders_below_pneumonia_give_the_kind(tmp_path, layout, kind):
    place = layout.format(split='train', kind=kind)
    expected = 'bacteria' if kind.lower().startswith('bac') else 'virus'
    items = read_items(create_files(tmp_path, [f'{place}/scan7.png']))
    assert list(items.kind) == [expected]
    assert list(items.label) == ['PNEUMONIA']
    assert list(items.patient) == [f'unknown:{place}/scan7']


def test_the_kind_in_the_file_name_comes_before_that_of_the_folder():
    assert parse_name('train/PNEUMONIA/VIRUS/person3_bacteria_4.jpeg', 'PNEUMONIA').kind == 'bacteria'
    assert parse_name('train/PNEUMONIA_VIRUS/scan.jpeg', 'PNEUMONIA').kind == 'virus'
    assert parse_name('train/virus and bacteria/scan.jpeg', 'PNEUMONIA').kind == 'unknown'
    assert parse_name('train/NORMAL/VIRUS/scan.jpeg', 'NORMAL').kind == 'normal'


@pytest.mark.parametrize(
    ('folders', 'message'),
    [
        (['val', 'validation'], "the folders 'val' and 'validation' both stand for the split valid"),
        (['Train', 'train'], "the folders 'Train' and 'train' both stand for the split train"),
        (['test', 'testing', 'TEST'], "the folders 'TEST' and 'test' and 'testing' both stand for the split test"),
    ],
)
def test_two_folders_of_one_split_are_refused(tmp_path, folders, message):
    create_files(tmp_path, [*FILES, *(f'{folder}/NORMAL/x.png' for folder in folders)])
    with pytest.raises(UsageError, match=message):
        read_items(tmp_path)


def test_two_folders_of_one_class_are_refused_unless_they_are_mapped(tmp_path):
    create_files(tmp_path, ['train/NORMAL/a.png', 'train/normal/b.png', 'train/PNEUMONIA/c.png'])
    with pytest.raises(UsageError, match="the folders 'NORMAL' and 'normal' both stand for the class NORMAL"):
        read_items(tmp_path)
    (tmp_path / 'classes.json').write_text('{"normal": "NORMAL"}')
    assert list(read_items(tmp_path).label) == ['NORMAL', 'PNEUMONIA', 'NORMAL']


def test_an_empty_folder_of_another_spelling_and_another_spelling_in_another_split_are_accepted(tmp_path):
    create_files(tmp_path, [*FILES, 'test/Normal/x.png'])
    (tmp_path / 'validation').mkdir()
    assert len(read_items(tmp_path)) == len(FILES) + 1


def test_a_folder_without_images_in_class_folders_says_what_was_left_out(tmp_path):
    create_files(tmp_path, ['archive/train/NORMAL/a.png', 'b.txt'])
    with pytest.raises(CXRError, match='Left out: 1 not an image, 1 outside the class folders'):
        read_items(tmp_path)
