"""Lists of images are read as other programs write them; a CSV error is one line with its rows."""

import io
import sys
import unicodedata
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest

from cxr_fastai.cli import main
from cxr_fastai.core.errors import CXRError, ImageError, UsageError
from cxr_fastai.core.foreign import LFS_POINTER
from cxr_fastai.data.find import list_images
from cxr_fastai.data.items import ITEM_COLUMNS, data_root, read_items, read_table
from cxr_fastai.data.listings import KAGGLE_COMMAND, KAGGLE_FILE, read_listing, read_names
from cxr_fastai.data.sources import SOURCES
from cxr_fastai.images.decode import read_image

ROWS = 'path,label,split,patient\na.png,NORMAL,train,p1\nb é.png,PNEUMONIA,val,p2\nc.png,NORMAL,test,\n'
EXPECTED = [
    ['a.png', 'NORMAL', 'train', 'p1'],
    ['b é.png', 'PNEUMONIA', 'valid', 'p2'],
    ['c.png', 'NORMAL', 'test', 'unknown:c'],
]
CSV_FORMS = {
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


@pytest.fixture
def folder(tmp_path) -> Path:
    for name in ('a.png', 'b é.png', 'c.png'):
        (tmp_path / name).write_bytes(b'image')
    return tmp_path


def read_csv(folder: Path, text: str | bytes) -> pd.DataFrame:
    content = text.encode() if isinstance(text, str) else text
    (folder / 'images.csv').write_bytes(content)
    return read_items(folder / 'images.csv')


def test_a_dash_reads_paths_from_standard_input(monkeypatch):
    monkeypatch.setattr(sys, 'stdin', SimpleNamespace(buffer=io.BytesIO(b'a.png\r\n\nb.png\n')))
    assert list_images([Path('-')]) == [Path('a.png'), Path('b.png')]


@pytest.mark.parametrize('content', CSV_FORMS.values(), ids=CSV_FORMS)
def test_common_forms_of_csv_files_are_read(folder, content):
    items = read_csv(folder, content)
    assert list(items) == ITEM_COLUMNS
    assert items[['path', 'label', 'split', 'patient']].values.tolist() == EXPECTED


def test_other_columns_are_allowed(folder):
    assert len(read_csv(folder, 'age,path,label\n3,a.png,NORMAL\n4,c.png,PNEUMONIA\n')) == 2


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('path,label\na.png,\nc.png,NORMAL\n', 'no label in row 2'),
        ('path,label\n,NORMAL\n', 'no path in row 2'),
        ('path,label\na.png,COVID\nc.png,NORMAL\n', r"found the classes 'COVID', 'NORMAL' \(row 2\).*classes.json"),
        ('path,label\ngone.png,NORMAL\na.png,NORMAL\n', 'no such file in row 2. Paths are relative to'),
        ('path,label\na.png,NORMAL\nc.png,NORMAL\na.png,PNEUMONIA\n', 'same image has two labels in rows 2, 4'),
        ('path,label,label\na.png,NORMAL,NORMAL\n', 'header names the column label twice'),
        ('path,label,split\na.png,NORMAL,holdout\n', 'unknown split holdout in row 2'),
        ('path,label,split\na.png,NORMAL,\n', r'unknown split \(empty\) in row 2'),
        ('', 'not a CSV file .*the file is empty'),
        ('\1\2\n\1', 'has no column path or label'),
        ('\0\n', 'not a CSV|has no column'),
        ('path,label\n"a.png,NORMAL\n', 'not a CSV'),
        ('file,label\na.png,NORMAL\n', 'has no column path. The first row must name'),
        ('path,label\na.png,NORMAL\nc.png,NORMAL,x,y\n', 'more cells than the header in row 3'),
    ],
)
def test_errors_in_a_csv_file_are_one_line_with_the_rows(folder, text, message, capsys):
    with pytest.raises(UsageError, match=message):
        read_csv(folder, text)
    assert main(['data', 'prepare', '--csv', str(folder / 'images.csv')]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_an_error_lists_ten_rows_and_counts_all(folder):
    text = 'path,label\n' + ''.join(f'{i}.png,NORMAL\n' for i in range(1500))
    with pytest.raises(UsageError, match=r'in rows 2, 3, 4, 5, 6, 7, 8, 9, 10, 11 \(1,500 in total\)'):
        read_csv(folder, text)


def test_two_spellings_of_a_path_are_the_same_image(folder):
    with pytest.raises(UsageError, match='two labels in rows 2, 3'):
        read_csv(folder, 'path,label\na.png,NORMAL\n./x/../a.png,PNEUMONIA\n')


def test_labels_are_compared_after_the_mapping_of_classes(folder):
    (folder / 'classes.json').write_text('{"Normal": "NORMAL", "other": null}')
    assert len(read_csv(folder, 'path,label\na.png,NORMAL\na.png,Normal\nc.png,other\n')) == 1
    with pytest.raises(CXRError, match=r'no images to use \(1 listed\)'):
        read_csv(folder, 'path,label\nc.png,other\n')


def test_a_csv_file_without_usable_images_is_an_error(folder):
    with pytest.raises(CXRError, match=r'no images to use \(0 listed\)'):
        read_csv(folder, 'path,label\n')
    with pytest.raises(UsageError, match='no such file in row 2'):
        read_csv(folder, f'path,label\n{"x" * 300}.png,NORMAL\n')


def test_repeated_rows_count_once(folder):
    items = read_csv(folder, 'path,label\na.png,NORMAL\na.png,NORMAL\nc.png,PNEUMONIA\n')
    assert len(items) == 2
    assert items.attrs['ignored'] == {'listed twice': 1}


@pytest.mark.parametrize('n', [20_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_large_csv_files_are_read(tmp_path, n):
    with open(tmp_path / 'images.csv', 'w') as file:
        file.write('path,label\n')
        file.writelines(f'train/PNEUMONIA/person{i}_virus_{i}.jpeg,PNEUMONIA\n' for i in range(n))
    table = read_listing(tmp_path / 'images.csv')
    assert len(table) == n
    assert table.index[-1] == n + 1


def test_a_csv_file_can_replace_a_folder_in_every_command(images, run, tmp_path, capsys):
    items = read_items(images)
    csv_file = str(tmp_path / 'all.csv')
    (tmp_path / 'images').symlink_to(images)
    table = items.replace({'split': {'valid': 'val'}}).assign(path='images/' + items.path)
    table.to_csv(csv_file, index=False)
    new_run = str(tmp_path / 'run')
    training = ['--epochs', '1', '--size', '48', '--limit', '3', '--workers', '0']
    assert main(['train', '--csv', csv_file, '--out', new_run, *training]) == 0
    assert main(['evaluate', new_run, '--csv', csv_file, '--limit', '3']) == 0
    assert main(['data', 'audit', '--csv', csv_file, '--out', str(tmp_path / 'audit')]) == 0
    assert main(['predict', new_run, csv_file, '--out', str(tmp_path / 'p.csv')]) == 0
    assert len(pd.read_csv(tmp_path / 'p.csv')) == len(items)
    capsys.readouterr()
    assert main(['train', '--data', str(images), '--csv', csv_file]) == 2
    assert '--csv' in capsys.readouterr().err


@pytest.mark.parametrize(
    'data',
    [
        b'a.png\0b c.png\0',
        b'\xef\xbb\xbfa.png\r\nb c.png\r\n',
        'a.png\r\nb c.png\r\n'.encode('utf-16'),
        b'\n\na.png\nb c.png',
    ],
    ids=['find -print0', 'BOM', 'PowerShell', 'blank first lines'],
)
def test_lists_on_standard_input_are_read_as_other_programs_write_them(monkeypatch, data):
    monkeypatch.setattr(sys, 'stdin', SimpleNamespace(buffer=io.BytesIO(data)))
    assert list_images(['-']) == [Path('a.png'), Path('b c.png')]


@pytest.mark.parametrize(
    'text',
    [
        'path,label,,\na.png,NORMAL,,\n',
        'path,label\na.png,NORMAL,,,\n',
        'sep=;\r\npath;label\r\na.png;NORMAL\r\n',
        '"sep=,"\npath,label\na.png,NORMAL\n',
        'sep=\t\npath\tlabel\na.png\tNORMAL\n',
        '\n,,\npath,label\na.png,NORMAL\n',
        '# exported; by hand; on Monday\npath,label\na.png,NORMAL\n',
        '"path","label"\n"a.png","NORMAL"\n',
    ],
)
def test_tables_are_read_as_spreadsheet_programs_write_them(tmp_path, text):
    table = tmp_path / 'images.csv'
    table.write_bytes(text.encode())
    rows = read_listing(table)
    assert rows.to_dict('records') == [{'path': 'a.png', 'label': 'NORMAL'}]


@pytest.mark.parametrize('header', ['#;path;label', '"#";path;label', '#id;path;label', ';path;label'])
def test_a_column_of_row_numbers_is_no_comment(tmp_path, header):
    table = tmp_path / 'images.csv'
    table.write_text(f'{header}\n1;a.png;NORMAL\n')
    assert list(read_listing(table).path) == ['a.png']


@pytest.mark.parametrize('header', ['path,label,', 'path,label,,'])
def test_filled_cells_of_columns_without_a_name_are_accepted(tmp_path, header):
    table = tmp_path / 'images.csv'
    table.write_text(f'{header}\na.png,NORMAL,checked\n')
    assert read_listing(table).to_dict('records') == [{'path': 'a.png', 'label': 'NORMAL'}]


def test_rows_in_errors_are_counted_from_the_first_line_of_the_file(tmp_path):
    table = tmp_path / 'images.csv'
    table.write_text('# comment\n\npath,label\na.png,NORMAL\nb.png,\n')
    with pytest.raises(UsageError, match='no label in row 5'):
        read_listing(table)


def test_images_to_predict_need_no_labels(folder):
    (folder / 'images.csv').write_text('path\na.png\nc.png\n')
    assert list_images([folder / 'images.csv']) == [folder / 'a.png', folder / 'c.png']


NAMES = ['a.png', 'b é.png']


@pytest.mark.parametrize(
    'data',
    [
        b'"a.png"\r\n"b \xc3\xa9.png"\r\n',
        b"'a.png'\n  b \xc3\xa9.png  \n",
        b'# two images\n\na.png\n# the second\nb \xc3\xa9.png\n',
        b'a.png\0b \xc3\xa9.png\0',
        b'path,label\na.png,NORMAL\nb \xc3\xa9.png,PNEUMONIA\n',
        b'\xef\xbb\xbfsep=;\r\n"Path";"label"\r\n"a.png";NORMAL\r\nb \xc3\xa9.png;NORMAL\r\n',
        'a.png\r\nb é.png\r\n'.encode('utf-16-le'),
        'a.png\r\nb é.png\r\n'.encode('utf-16-be'),
        b'a.png\rb \xc3\xa9.png\r',
        b'a.png\nb \xe9.png\n',
        '.\\a.png\nb é.png\n'.encode(),
        '\r\nFullName\r\n--------\r\na.png   \r\nb é.png\r\n\r\n'.encode('utf-16'),
    ],
    ids=['quotes', 'single quotes, spaces', 'comments', 'NUL', 'table', 'sep=', 'UTF-16LE', 'UTF-16BE', 'CR']
    + ['Windows-1252', 'backslash', 'PowerShell'],
)
@pytest.mark.parametrize('place', ['standard input', 'file'])
def test_lists_are_read_in_every_common_form(folder, monkeypatch, data, place):
    monkeypatch.chdir(folder)
    if place == 'file':
        (folder / 'list.txt').write_bytes(data)
    monkeypatch.setattr(sys, 'stdin', SimpleNamespace(buffer=io.BytesIO(data)))
    images = list_images([folder / 'list.txt' if place == 'file' else '-'])
    assert [image.name for image in images] == NAMES
    assert all(image.is_file() for image in images)


@pytest.mark.parametrize('data', [b'', b'# nothing\n\n', b'sep=;\n', b'path\n'])
def test_an_empty_list_is_an_error(folder, monkeypatch, data):
    monkeypatch.setattr(sys, 'stdin', SimpleNamespace(buffer=io.BytesIO(data)))
    with pytest.raises(UsageError, match='standard input: the list of images is empty'):
        list_images('-')
    (folder / 'empty.txt').write_bytes(data)
    with pytest.raises(UsageError, match='empty.txt: the list of images is empty'):
        list_images(folder / 'empty.txt')


def test_a_table_with_tabs_is_a_list_of_images(folder):
    (folder / 'images.tsv').write_text('path\tlabel\na.png\tNORMAL\n')
    assert list_images(folder / 'images.tsv') == [folder / 'a.png']


def test_a_file_whose_name_looks_like_a_comment_is_listed(folder, monkeypatch):
    monkeypatch.chdir(folder)
    Path('#1.png').write_bytes(b'image')
    monkeypatch.setattr(sys, 'stdin', SimpleNamespace(buffer=io.BytesIO(b'#1.png\n# 2\na.png\n')))
    assert list_images('-') == [Path('#1.png'), Path('a.png')]


@pytest.mark.parametrize(
    'text',
    [
        'path,label\n# second half\na.png,NORMAL\n',
        'path,label\n#by hand, on Monday\n,,\na.png,NORMAL\n'.replace('#by', '# by'),
        'path|label\na.png|NORMAL\n',
        'sep=|\npath|label\na.png|NORMAL\n',
        '"path,label"\n"a.png,NORMAL"\n',
        '"path;label"\n\n"a.png;NORMAL"\n',
        ' path ; Label \n a.png ; NORMAL \n',
    ],
)
def test_comments_between_rows_and_other_separators_are_understood(tmp_path, text):
    (tmp_path / 'images.csv').write_text(text)
    assert read_listing(tmp_path / 'images.csv').to_dict('records') == [{'path': 'a.png', 'label': 'NORMAL'}]


def test_an_image_whose_name_begins_with_a_number_sign_is_no_comment(tmp_path):
    (tmp_path / 'images.csv').write_text('path,label\n#1.png,NORMAL\n')
    assert list(read_listing(tmp_path / 'images.csv').path) == ['#1.png']


def test_paths_of_windows_and_other_forms_of_letters_are_read_from_a_csv_file(folder, monkeypatch):
    (folder / 'train').mkdir()
    (folder / 'train/d.png').write_bytes(b'image')
    decomposed = unicodedata.normalize('NFD', 'b é.png')
    rows = ['path,label,age', 'train\\d.png,NORMAL,7', f'{decomposed},PNEUMONIA,8']
    (folder / 'images.csv').write_text('\n'.join(rows))
    items = read_items(folder / 'images.csv', columns=['age'])
    assert items.set_index('path').age.to_dict() == {'train/d.png': '7', 'b é.png': '8'}
    assert [image.is_file() for image in list_images(folder / 'images.csv')] == [True, True]
    table = pd.DataFrame({'path': ['train\\d.png', decomposed], 'label': ['NORMAL', 'PNEUMONIA']})
    assert set(read_table(table, folder).path) == {'train/d.png', 'b é.png'}


def test_an_absolute_path_of_windows_is_named(folder, capsys):
    (folder / 'images.csv').write_text('path,label\nC:\\data\\a.png,NORMAL\n')
    with pytest.raises(UsageError, match='no such file in row 2. C:.*is a path of Windows, but this computer'):
        read_items(folder / 'images.csv')
    with pytest.raises(CXRError, match='D:.*a path of Windows'):
        data_root('D:\\chest_xray')
    with pytest.raises(ImageError, match='E_IO: No such file or directory: a path of Windows'):
        read_image('C:\\data\\x.png')


@pytest.mark.parametrize('start', [b'PK\x03\x04' + bytes(26) + b'xl/workbook.xml', b'\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1'])
@pytest.mark.parametrize('name', ['list.xlsx', 'list.xls', 'list.csv'])
def test_a_spreadsheet_in_place_of_a_csv_file_is_named(tmp_path, name, start):
    (tmp_path / name).write_bytes(start + bytes(1000))
    for read in (list_images, read_items):
        with pytest.raises(UsageError, match='a spreadsheet, not a CSV file. Save it as CSV'):
            read(tmp_path / name)


def test_an_archive_in_place_of_images_is_named_with_the_command_that_reads_it(tmp_path, capsys):
    archive = tmp_path / 'chest-xray-pneumonia.zip'
    with zipfile.ZipFile(archive, 'w') as file:
        file.writestr('chest_xray/train/NORMAL/a.jpeg', b'image')
    for command in (['train', '--data'], ['data', 'audit'], ['data', 'prepare']):
        assert main([*command, str(archive)]) == 2
        assert 'an archive (ZIP), not a folder' in (error := capsys.readouterr().err)
        assert KAGGLE_COMMAND in error and KAGGLE_FILE in error


def test_the_file_that_the_download_of_kaggle_reads_is_named():
    source = SOURCES['kaggle']
    assert f'--source {source.name}' in KAGGLE_COMMAND
    assert Path(KAGGLE_FILE).name == source.file
    assert f'{KAGGLE_COMMAND.split()[3]}.download' == str(Path(KAGGLE_FILE).parent)


def test_an_image_or_a_pointer_of_git_lfs_in_place_of_a_csv_file_is_named(tmp_path):
    (tmp_path / 'a.csv').write_bytes(b'\xff\xd8\xff\xe0')
    with pytest.raises(UsageError, match='a.csv: a file in the format JPEG, not a CSV file'):
        read_items(tmp_path / 'a.csv')
    (tmp_path / 'a.csv').write_bytes(LFS_POINTER + b'.github.com/spec/v1\n')
    with pytest.raises(UsageError, match='a.csv: a pointer of Git LFS.*git lfs pull'):
        read_items(tmp_path / 'a.csv')


def test_a_missing_table_is_no_missing_folder(tmp_path):
    with pytest.raises(CXRError, match='gone.csv: no such file'):
        data_root(tmp_path / 'gone.csv')


def test_the_columns_of_a_table_without_paths_are_named(tmp_path):
    (tmp_path / 'a.csv').write_text('filename,label\na.png,NORMAL\n')
    with pytest.raises(UsageError, match="has no column path. The first row .* contains 'filename, label'"):
        read_items(tmp_path / 'a.csv')


@pytest.mark.parametrize('heading', ['"FullName"', '#TYPE Selected.System.IO.FileInfo\n"FullName"'])
def test_the_heading_of_convert_to_csv_is_no_image(heading, tmp_path):
    (tmp_path / 'a.png').touch()
    data = f'{heading}\n"a.png"\n'.encode()
    assert [name.strip('"') for name in read_names(data, tmp_path, 'list')] == ['a.png']
