"""A CSV lists images as well as a folder does, or one line says what is wrong with it."""

from pathlib import Path

import pandas as pd
import pytest

from cxr_fastai.cli import main
from cxr_fastai.core.errors import CXRError, UsageError
from cxr_fastai.data.find import list_images, read_listing
from cxr_fastai.data.items import ITEM_COLUMNS, read_items

ROWS = 'path,label,split,patient\na.png,NORMAL,train,p1\nb é.png,PNEUMONIA,val,p2\nc.png,NORMAL,test,\n'


@pytest.fixture
def folder(tmp_path) -> Path:
    for name in ('a.png', 'b é.png', 'c.png'):
        (tmp_path / name).write_bytes(b'image')
    return tmp_path


def listed(folder: Path, text: str | bytes) -> pd.DataFrame:
    (folder / 'images.csv').write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_items(folder / 'images.csv')


EXPECTED = [
    ['a.png', 'NORMAL', 'train', 'p1'],
    ['b é.png', 'PNEUMONIA', 'valid', 'p2'],
    ['c.png', 'NORMAL', 'test', 'c'],
]
FORMS = {
    'UTF-8': ROWS.encode(),
    'BOM': ROWS.encode('utf-8-sig'),
    'UTF-16': ROWS.encode('utf-16'),
    'Windows-1252': ROWS.encode('cp1252'),
    'CRLF': ROWS.replace('\n', '\r\n').encode(),
    'semicolon': ROWS.replace(',', ';').encode(),
    'tab': ROWS.replace(',', '\t').encode(),
    'header': ROWS.replace('path,label', ' Path , LABEL').encode(),
    'quotes': ROWS.replace('a.png', '" a.png "').encode(),
    'empty rows': (ROWS + '\n,,,\n').encode(),
}


@pytest.mark.parametrize('data', FORMS.values(), ids=FORMS)
def test_the_usual_forms_of_a_csv_are_read(folder, data):
    items = listed(folder, data)
    assert items[['path', 'label', 'split', 'patient']].values.tolist() == EXPECTED and list(items) == ITEM_COLUMNS


def test_more_columns_do_no_harm(folder):
    assert len(listed(folder, 'age,path,label\n3,a.png,NORMAL\n4,c.png,PNEUMONIA\n')) == 2


@pytest.mark.parametrize(
    ('text', 'complaint'),
    [
        ('path,label\na.png,\nc.png,NORMAL\n', 'no label in row 2'),
        ('path,label\n,NORMAL\n', 'no path in row 2'),
        ('path,label\na.png,COVID\nc.png,NORMAL\n', r"found the classes 'COVID', 'NORMAL' \(row 2\).*classes.json"),
        ('path,label\ngone.png,NORMAL\na.png,NORMAL\n', 'no such file in row 2. Paths are relative to'),
        ('path,label\na.png,NORMAL\nc.png,NORMAL\na.png,PNEUMONIA\n', 'same image has two labels in rows 2, 4'),
        ('path,label,label\na.png,NORMAL,NORMAL\n', 'header names the column label twice'),
        ('path,label,split\na.png,NORMAL,holdout\n', 'unknown split holdout in row 2'),
        ('path,label,split\na.png,NORMAL,\n', r'unknown split \(empty\) in row 2'),
        ('', 'not a CSV'),
        ('\1\2\n\1', 'has no column path or label'),
        ('\0\n', 'not a CSV|has no column'),
        ('path,label\n"a.png,NORMAL\n', 'not a CSV'),
        ('file,label\na.png,NORMAL\n', 'has no column path. The first row must name'),
        ('path,label\na.png,NORMAL\nc.png,NORMAL,x,y\n', 'more cells than the header in row 3'),
    ],
)
def test_what_is_wrong_is_told_with_its_rows(folder, text, complaint, capsys):
    with pytest.raises(UsageError, match=complaint):
        listed(folder, text)
    assert main(['data', 'prepare', '--csv', str(folder / 'images.csv')]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_ten_rows_are_named_and_all_counted(folder):
    text = 'path,label\n' + ''.join(f'{i}.png,NORMAL\n' for i in range(1500))
    with pytest.raises(UsageError, match=r'in rows 2, 3, 4, 5, 6, 7, 8, 9, 10, 11 \(1,500 in total\)'):
        listed(folder, text)


def test_an_image_with_two_labels_cannot_hide_behind_its_spelling(folder):
    with pytest.raises(UsageError, match='two labels in rows 2, 3'):
        listed(folder, 'path,label\na.png,NORMAL\n./x/../a.png,PNEUMONIA\n')
    (folder / 'classes.json').write_text('{"Normal": "NORMAL", "other": null}')
    assert len(listed(folder, 'path,label\na.png,NORMAL\na.png,Normal\nc.png,other\n')) == 1
    with pytest.raises(CXRError, match=r'no images to use \(1 listed\)'):
        listed(folder, 'path,label\nc.png,other\n')


def test_no_row_and_no_image_is_refused(folder, tmp_path):
    with pytest.raises(CXRError, match=r'no images to use \(0 listed\)'):
        listed(folder, 'path,label\n')
    with pytest.raises(UsageError, match='no such file in row 2'):
        listed(folder, f'path,label\n{"x" * 300}.png,NORMAL\n')


def test_rows_that_repeat_another_count_once(folder):
    items = listed(folder, 'path,label\na.png,NORMAL\na.png,NORMAL\nc.png,PNEUMONIA\n')
    assert len(items) == 2 and items.attrs['ignored'] == {'listed twice': 1}


@pytest.mark.parametrize('n', [100_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_very_many_rows_are_read(tmp_path, n):
    with open(tmp_path / 'images.csv', 'w') as file:
        file.write('path,label\n')
        file.writelines(f'train/PNEUMONIA/person{i}_virus_{i}.jpeg,PNEUMONIA\n' for i in range(n))
    table = read_listing(tmp_path / 'images.csv')
    assert len(table) == n and table.index[-1] == n + 1


def test_a_csv_works_wherever_a_folder_does(images, run, tmp_path, capsys):
    items = read_items(images)
    listing = str(tmp_path / 'all.csv')
    (tmp_path / 'images').symlink_to(images)
    table = items.replace({'split': {'valid': 'val'}}).assign(path=lambda t: 'images/' + t.path)
    table.to_csv(listing, index=False)
    assert (
        main(
            [
                'train',
                '--csv',
                listing,
                '--out',
                str(tmp_path / 'run'),
                '--epochs',
                '1',
                '--size',
                '48',
                '--limit',
                '3',
                '--workers',
                '0',
            ]
        )
        == 0
    )
    assert main(['evaluate', str(tmp_path / 'run'), '--csv', listing, '--limit', '3']) == 0
    assert main(['data', 'audit', '--csv', listing, '--out', str(tmp_path / 'audit')]) == 0
    assert main(['predict', str(tmp_path / 'run'), listing, '--out', str(tmp_path / 'p.csv')]) == 0
    assert len(pd.read_csv(tmp_path / 'p.csv')) == len(items)
    assert main(['train', '--data', str(images), '--csv', listing]) == 2
    assert 'name one of them' in capsys.readouterr().err


def test_predicting_needs_no_labels(folder):
    (folder / 'images.csv').write_text('path\na.png\nc.png\n')
    assert list_images([folder / 'images.csv']) == [folder / 'a.png', folder / 'c.png']
