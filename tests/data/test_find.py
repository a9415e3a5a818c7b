"""Images are found in folders and among command-line arguments."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cxr_fastai.cli import main
from cxr_fastai.core.errors import CXRWarning, ImageError, UsageError
from cxr_fastai.core.figures import axes, save_figure
from cxr_fastai.data.find import LINK, find_images, list_images, shown_path
from cxr_fastai.evaluation.figures import save_picture
from cxr_fastai.images.decode import read_image
from cxr_fastai.images.formats import FIGURES, MASKS
from cxr_fastai.images.synthetic import make_demo


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
    assert ignored == {LINK: 3}


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
    assert ignored == {LINK: 2}


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


def test_a_link_that_is_named_is_followed(tmp_path):
    create_files(tmp_path, ['out/test/a.png', 'in/b.png'])
    (tmp_path / 'in/test').symlink_to(tmp_path / 'out/test')
    assert list_images(tmp_path / 'in/test') == [tmp_path / 'in/test/a.png']
    (tmp_path / 'in/b.png').unlink()
    with pytest.raises(UsageError, match='no images found, but 1 link out of.*if you name the link itself'):
        list_images(tmp_path / 'in')


@pytest.mark.parametrize(
    ('form', 'start'),
    [
        ('WebP', b'RIFF\x10\0\0\0WEBPVP8 '),
        ('BMP', b'BM\x10\x20\0\0\0\0\0\0'),
        ('GIF', b'GIF89a'),
        ('JPEG 2000', b'\0\0\0\x0cjP  \r\n\x87\n'),
        ('AVIF', b'\0\0\0\x1cftypavif'),
        ('HEIC', b'\0\0\0\x18ftypheic'),
        ('NIfTI', bytes(344) + b'n+1\0'),
        ('PDF', b'%PDF-1.7'),
        ('ZIP', b'PK\x03\x04'),
        ('spreadsheet', b'PK\x03\x04' + bytes(26) + b'[Content_Types].xml'),
    ],
)
def test_formats_that_are_not_read_are_named(tmp_path, form, start):
    (tmp_path / 'image.ima').write_bytes(start)
    (tmp_path / 'image.png').write_bytes(start)
    assert find_images(tmp_path) == ([tmp_path / 'image.png'], {f'in the format {form}': 1})
    if form != 'GIF':
        with pytest.raises(ImageError, match=f'E_FORMAT: the format {form} is not one of JPEG'):
            read_image(tmp_path / 'image.png')


def test_maps_masks_and_figures_of_this_package_are_not_images(tmp_path):
    make_demo(tmp_path, images=20, size=64)
    (tmp_path / 'p_maps').mkdir()
    save_figure(axes(1, 1)[0], tmp_path / 'p_maps/0001.png')
    save_picture(np.zeros((80, 80), np.uint8), tmp_path / 'run/figures/images/a.png')
    Image.new('L', (80, 80)).save(tmp_path / 'other.png')
    images, ignored = find_images(tmp_path)
    masks = len(list((tmp_path / 'masks').rglob('*.png')))
    assert ignored == {MASKS: masks, FIGURES: 2}
    assert len(images) == 21
    assert list_images(tmp_path / 'p_maps/0001.png') == [tmp_path / 'p_maps/0001.png']


@pytest.mark.parametrize(('file', 'kind'), [('recipe.json', 'a run folder'), ('manifest.json', 'a bundle')])
def test_a_model_in_place_of_images_is_named(tmp_path, file, kind, capsys):
    (tmp_path / file).write_text('{}')
    with pytest.raises(UsageError, match=f'{kind}, which contains no images. Name the model first, then the images'):
        list_images(tmp_path)
    assert main(['data', 'audit', str(tmp_path), '--out', str(tmp_path / 'audit')]) == 1
    assert f'{kind}, not a folder of images' in capsys.readouterr().err
