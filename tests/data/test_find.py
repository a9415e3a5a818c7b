"""Images are found in folders and among command-line arguments."""

from pathlib import Path

import pytest

from cxr_fastai.core.errors import CXRWarning
from cxr_fastai.data.find import find_images, list_images, shown_path


@pytest.fixture
def folder(tmp_path) -> Path:
    for name in ('a.png', 'b é.png', 'c.png'):
        (tmp_path / name).write_bytes(b'image')
    return tmp_path


def create_files(root: Path, names: list[str]) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b'image')


def test_links_that_leave_the_folder_or_form_a_cycle_are_not_followed(tmp_path):
    create_files(tmp_path, ['in/a.png', 'out/b.png'])
    (tmp_path / 'in/loop').symlink_to(tmp_path / 'in')
    (tmp_path / 'in/b.png').symlink_to(tmp_path / 'out/b.png')
    (tmp_path / 'in/out').symlink_to(tmp_path / 'out')
    images, ignored = find_images(tmp_path / 'in')
    assert [image.name for image in images] == ['a.png']
    assert ignored == {'link': 3}


def test_links_within_the_folder_are_followed(tmp_path):
    create_files(tmp_path, ['store/a.png'])
    (tmp_path / 'train').symlink_to(tmp_path / 'store')
    images, ignored = find_images(tmp_path)
    assert images == [tmp_path / 'store/a.png', tmp_path / 'train/a.png']
    assert not ignored


def test_links_between_two_folders_end(tmp_path):
    create_files(tmp_path, ['a/1.png', 'b/2.png'])
    (tmp_path / 'a/other').symlink_to(tmp_path / 'b')
    (tmp_path / 'b/other').symlink_to(tmp_path / 'a')
    images, ignored = find_images(tmp_path)
    assert [image.relative_to(tmp_path).as_posix() for image in images] == [
        'a/1.png',
        'a/other/2.png',
        'b/2.png',
        'b/other/1.png',
    ]
    assert ignored == {'link': 2}


@pytest.mark.parametrize('start', [b'\xff\xd8\xff\xe0', b'\x89PNG\r\n\x1a\n', b'II*\0', bytes(128) + b'DICM'])
@pytest.mark.parametrize('name', ['image', 'image.IMA', 'image.jfif'])
def test_images_with_an_unknown_suffix_are_found_by_their_content(tmp_path, name, start):
    (tmp_path / name).write_bytes(start)
    assert find_images(tmp_path) == ([tmp_path / name], {})


def test_files_that_are_left_out_are_counted_in_a_warning(tmp_path):
    create_files(tmp_path, ['a.png', 'notes.txt', 'b.webp'])
    with pytest.warns(CXRWarning, match='files left out: 2 not an image'):
        assert list_images(tmp_path) == [tmp_path / 'a.png']


def test_image_suffixes_do_not_depend_on_the_operating_system(tmp_path, monkeypatch):
    import mimetypes

    monkeypatch.setattr(mimetypes, 'types_map', {})
    names = ['a.JPG', 'b.jpeg', 'c.Png', 'd.tif', 'e.tiff', 'f.dcm', 'g.dicom', 'h.gif', 'i.webp', 'j']
    create_files(tmp_path, names)
    assert [image.name[0] for image in find_images(tmp_path)[0]] == list('abcdefg')


def test_folders_files_and_csv_files_can_be_mixed(folder):
    (folder / 'images.csv').write_text('path\na.png\nc.png\n')
    images = list_images([folder / 'a.png', folder, folder / 'images.csv'])
    assert [image.name for image in images] == ['a.png', 'a.png', 'b é.png', 'c.png', 'a.png', 'c.png']


@pytest.mark.parametrize(
    ('path', 'shown', 'hidden'),
    [
        ('train/NORMAL/Doe^Jane.dcm', 'train/NORMAL/Doe^Jane.dcm', 'image-7.dcm'),
        ('JANE DOE/1.PNG', 'JANE DOE/1.PNG', 'image-7.PNG'),
        ('/home/smith/train/NORMAL/1.png', 'train/NORMAL/1.png', 'image-7.png'),
        ('../smith/train/NORMAL/1.png', 'train/NORMAL/1.png', 'image-7.png'),
        ('1.Smith', '1.Smith', 'image-7'),
    ],
)
def test_a_hidden_path_shows_a_number_only(path, shown, hidden):
    assert shown_path(path, 7) == shown
    assert shown_path(path, 7, hide_names=True) == hidden
