"""The transforms of the data pipeline.

Every kind of image is opened, in every call of fastai that takes images. Augmentation changes training images only,
each by parameters of its own.
"""

import math
import os
import warnings
from collections import deque
from pathlib import Path

import numpy as np
import pytest
import torch
from fastai.data.load import SkipItemException
from fastai.learner import Learner, load_learner
from fastai.torch_core import TensorImageBW
from fastai.vision.core import PILImage, PILImageBW
from imagefiles import DEEP, GREY, dicom, encoded, smooth
from PIL import Image

from cxr_fastai.core.errors import CXRWarning, ImageError
from cxr_fastai.data.loaders import augmentations
from cxr_fastai.data.transforms import (
    AugmentImages,
    DegradeImages,
    OpenImage,
)
from cxr_fastai.images.decode import grey_array, read_image
from cxr_fastai.images.preprocessing import Preprocessing
from cxr_fastai.models.architectures import make_recipe


@pytest.fixture(scope='module')
def learn(run) -> Learner:
    """The learner of `run`, loaded by fastai."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # fastai warns of every pickle
        learn = load_learner(run / 'learner.pkl')
    learn.remove_cbs([callback for callback in learn.cbs if callback.name == 'progress'])
    return learn


class PathObject:
    """A path of another library."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __fspath__(self) -> str:
        return str(self.path)


KINDS = {
    'str': str,
    'Path': Path,
    'path object': PathObject,
    'bytes': Path.read_bytes,
    'PIL image': Image.open,
    'PIL image in RGB': lambda path: Image.open(path).convert('RGB'),
    'PILImage': PILImage.create,
    'PILImageBW': PILImageBW.create,
    'array': read_image,
    'array (h, w, 1)': lambda path: read_image(path)[..., None],
    'array (h, w, 3)': lambda path: np.stack([read_image(path)] * 3, axis=2),
}


def probability(learn: Learner, image: object) -> float:
    return float(learn.predict(image)[2][1])


@pytest.mark.parametrize('kind', KINDS)
def test_every_kind_of_image_has_the_same_probability_in_every_call(learn, images, kind):
    paths = sorted(images.glob('test/*/*.jpeg'))[::4]
    assert len(paths) >= 3
    inputs = [KINDS[kind](path) for path in paths]
    expected = [probability(learn, path) for path in paths]
    assert [probability(learn, image) for image in inputs] == expected
    test_dl = learn.dls.test_dl(inputs, bs=1)
    assert learn.get_preds(dl=test_dl)[0][:, 1].tolist() == expected
    mixed = learn.dls.test_dl([inputs[0], paths[1], grey_array(paths[2].read_bytes())], bs=1)
    assert learn.get_preds(dl=mixed)[0][:, 1].tolist() == expected[:3]


@pytest.mark.parametrize(
    'data',
    [dicom(), encoded(DEEP), encoded(np.float32(DEEP), 'TIFF'), encoded(Image.fromarray(GREY).convert('P'))],
    ids=['DICOM', '16-bit PNG', 'float TIFF', 'palette'],
)
def test_unusual_files_have_the_same_probability_as_their_bytes_and_their_pixels(learn, tmp_path, data):
    (tmp_path / 'image').write_bytes(data)
    expected = probability(learn, tmp_path / 'image')
    assert probability(learn, data) == probability(learn, read_image(tmp_path / 'image')) == expected
    if not data.startswith(bytes(128)):
        assert probability(learn, Image.open(tmp_path / 'image')) == expected


def test_the_orientation_of_a_pil_image_is_applied(learn, tmp_path):
    exif = Image.Exif()
    exif[0x112] = 6
    (tmp_path / 'a.jpeg').write_bytes(encoded(GREY, 'JPEG', exif=exif, quality=95))
    assert probability(learn, Image.open(tmp_path / 'a.jpeg')) == probability(learn, tmp_path / 'a.jpeg')
    assert probability(learn, PILImageBW.create(tmp_path / 'a.jpeg')) == probability(learn, tmp_path / 'a.jpeg')


def test_a_large_jpeg_differs_little_from_its_pil_image(learn, tmp_path):
    (tmp_path / 'a.jpeg').write_bytes(encoded(smooth(900, 1200), 'JPEG', quality=95))
    of_file, of_image = (
        OpenImage(Preprocessing(64))(source).float()
        for source in (tmp_path / 'a.jpeg', Image.open(tmp_path / 'a.jpeg'))
    )
    assert 0 < (of_file - of_image).abs().mean() < 0.5, 'only the file is decoded at a smaller scale'
    difference = probability(learn, tmp_path / 'a.jpeg') - probability(learn, Image.open(tmp_path / 'a.jpeg'))
    assert abs(difference) < 0.005


def test_an_item_of_a_dataset_can_be_predicted(learn, images):
    paths = sorted(images.glob('test/*/*.jpeg'))[:2]
    test_dl = learn.dls.test_dl(paths, bs=1)
    for path, (item,) in zip(paths, test_dl.dataset, strict=True):
        assert probability(learn, item) == probability(learn, path)


REFUSED = {
    'float32 in 0 to 1': (np.float32(GREY / 255), 'E_ARRAY', r'convert it by \(255 \* image\).round\(\)'),
    'float64 in 0 to 255': (GREY.astype(float), 'E_ARRAY', r'convert it by image.round\(\)'),
    'uint16': (DEEP, 'E_ARRAY', 'scale a window of it'),
    'int16': (np.int16(DEEP), 'E_ARRAY', 'scale a window of it'),
    'bool': (GREY > 100, 'E_ARRAY', 'only uint8 is read'),
    '3 h w': (np.stack([GREY] * 3), 'E_ARRAY', r'Pass image.transpose\(1, 2, 0\)'),
    'n h w': (np.stack([GREY] * 5), 'E_ARRAY', 'one at a time'),
    'colour': (np.dstack([GREY, GREY[::-1], GREY]), 'E_ARRAY', 'in colour'),
    'RGBA': (np.dstack([GREY] * 4), 'E_ARRAY', 'PIL.Image.fromarray'),
    'empty': (np.zeros((0, 0), np.uint8), 'E_TOO_SMALL', 'a side is under'),
    'a number': (np.array(3, np.uint8), 'E_ARRAY', 'not an image'),
    'objects': (GREY.astype(object), 'E_ARRAY', 'only uint8 is read'),
    'blank': (np.zeros((96, 80), np.uint8), 'E_BLANK', 'blank'),
    'small': (GREY[:40, :40], 'E_TOO_SMALL', 'a side is under'),
    'a tensor': (torch.from_numpy(GREY.copy()), 'E_ARRAY', 'only NumPy arrays are read'),
    'a tensor of the network': (TensorImageBW(torch.rand(1, 64, 64)), 'E_ARRAY', 'only NumPy arrays are read'),
    'a blank PIL image': (Image.new('L', (96, 80)), 'E_BLANK', 'blank'),
    'a damaged file': (encoded(GREY)[:900], 'E_TRUNCATED', 'truncated'),
    'a list': (['a.jpeg'], 'E_TYPE', 'list: not an image'),
    'two images': ((GREY, GREY), 'E_TYPE', 'tuple: not an image'),
    'an image and a label': (('a.jpeg', 'NORMAL'), 'E_TYPE', 'tuple: not an image'),
    'None': (None, 'E_TYPE', 'NoneType: not an image'),
    'a number of Python': (3.5, 'E_TYPE', 'float: not an image'),
}


@pytest.mark.parametrize('kind', REFUSED)
def test_wrong_inputs_are_refused_in_one_line_in_every_call(learn, kind):
    image, code, reason = REFUSED[kind]
    for call in (learn.predict, lambda image: learn.get_preds(dl=learn.dls.test_dl([image, GREY]))):
        with pytest.raises(ImageError, match=reason) as caught:
            call(image)
        assert caught.value.code == code and '\n' not in str(caught.value)
    with pytest.raises(ImageError, match=reason):
        learn.get_preds(dl=learn.dls.test_dl([GREY, image], num_workers=0))


def test_only_files_are_skipped(tmp_path):
    open_image = OpenImage(Preprocessing(64), skip=True)
    with pytest.raises(ImageError, match='E_ARRAY'):
        open_image(GREY / 255)
    with pytest.warns(CXRWarning, match='missing.png: E_IO: .*: skipped'), pytest.raises(SkipItemException):
        open_image(tmp_path / 'missing.png')


def test_an_opened_image_shares_no_memory_with_its_array():
    array = GREY[:64, :64].copy()
    opened = OpenImage(Preprocessing(64))(array)
    assert opened.shape == (1, 64, 64) and np.array_equal(opened[0].numpy(), array)
    array[:] = 0
    assert opened.any()


def test_entries_of_a_folder_are_opened(images):
    with os.scandir(images / 'test' / 'NORMAL') as entries:
        entry = min((entry for entry in entries if entry.name.endswith('.jpeg')), key=lambda entry: entry.name)
    assert torch.equal(OpenImage(Preprocessing(64))(entry), OpenImage(Preprocessing(64))(entry.path))


def test_parameters_have_the_ranges_of_the_specification():
    torch.manual_seed(0)
    p = AugmentImages().draw(2000, 200, 100)
    for name, low, high in [('angle', -10, 10), ('brightness', 0.8, 1.2), ('contrast', 0.8, 1.2)]:
        tolerance = (high - low) / 100
        assert low <= p[name].min() < low + tolerance
        assert high - tolerance < p[name].max() <= high
    assert (p['shift'] == p['shift'].round()).all()
    assert p['shift'].amin(0).tolist() == [-10, -20]
    assert p['shift'].amax(0).tolist() == [10, 20]
    assert 0.45 < p['flip'].float().mean() < 0.55
    assert 0.45 < p['brighter_first'].float().mean() < 0.55


def test_each_image_of_a_batch_has_its_own_parameters():
    images = TensorImageBW(torch.rand(1, 1, 32, 32).repeat(6, 1, 1, 1))
    augmented = AugmentImages()(images, split_idx=0)
    assert len({image.numpy().tobytes() for image in augmented}) == 6
    assert torch.equal(AugmentImages()(images, split_idx=1), images), 'validation images are not changed'


def test_a_process_that_shares_a_batch_gets_its_part_of_the_same_images():
    images = TensorImageBW(torch.rand(5, 1, 32, 32))
    torch.manual_seed(0)
    expected = AugmentImages()(images, split_idx=0)
    transform = AugmentImages()
    transform.parts = deque([(5, slice(2, 4))])
    torch.manual_seed(0)
    assert torch.equal(transform(images[2:4], split_idx=0), expected[2:4])


def test_crops_are_inside_the_image_with_the_requested_areas_and_aspects():
    torch.manual_seed(0)
    p = AugmentImages(translate=0, crop=0.25, crop_aspect=4 / 3).draw(4000, 100, 100)
    (w, h), (dx, dy) = p['scale'].unbind(1), p['shift'].unbind(1)
    assert (w / 2 + dx.abs() / 100 <= 0.5 + 1e-6).all()
    assert (h / 2 + dy.abs() / 100 <= 0.5 + 1e-6).all()
    assert 0.25 - 1e-6 <= (w * h).min() < 0.26
    assert (w * h).max() > 0.97
    assert 3 / 4 - 1e-3 <= (w / h).min() < 0.77
    assert 1.30 < (w / h).max() <= 4 / 3 + 1e-3
    assert p['shift'].amin() < -20
    assert p['shift'].amax() > 20


def test_without_crops_the_parameters_are_those_of_the_specification():
    torch.manual_seed(3)
    default = AugmentImages().draw(5, 64, 64)
    torch.manual_seed(3)
    without_crops = AugmentImages(crop=1.0, crop_aspect=1.0).draw(5, 64, 64)
    assert all(torch.equal(default[name], without_crops[name]) for name in default)
    assert (default['scale'] == 1).all()


def test_gamma_raises_grey_levels_to_an_exponent_between_its_limits():
    augment = AugmentImages(flip=0, degrees=0, translate=0, brightness=0, contrast=0, gamma=0.5)
    x = TensorImageBW(torch.full((400, 1, 4, 4), 0.25))
    exponents = augment(x, split_idx=0).as_subclass(torch.Tensor)[:, 0, 0, 0].log() / math.log(0.25)
    assert 1 / 1.5 - 1e-4 <= exponents.min() < 0.75 and 1.4 < exponents.max() <= 1.5 + 1e-4
    assert abs(exponents.log().mean()) < 0.05


@pytest.mark.parametrize(('share', 'side'), [(0.5, 64), (0.7, 96), (0.99, 128), (1.0, 128), (0.01, 64)])
def test_smaller_images_have_sides_that_the_networks_can_halve(share, side):
    augment = AugmentImages(flip=0, degrees=0, translate=0, brightness=0, contrast=0)
    augment.share = share
    assert augment(TensorImageBW(torch.rand(2, 1, 128, 128)), split_idx=0).shape == (2, 1, side, side)


def test_degradation_changes_each_training_image_and_no_other():
    degrade = DegradeImages(resolution=0.3, blur=0.02, jpeg=20)
    images = TensorImageBW(torch.rand(1, 1, 32, 32).repeat(4, 1, 1, 1))
    assert torch.equal(degrade(images, split_idx=1), images)
    degraded = degrade(images, split_idx=0)
    assert degraded.shape == images.shape
    assert len({image.numpy().tobytes() for image in degraded}) == 4


@pytest.mark.parametrize(
    ('fields', 'names'),
    [
        ({}, ['AugmentImages']),
        ({'blur': 0.01}, ['AugmentImages', 'DegradeImages']),
        ({'jpeg': 30, 'erase': 0.5}, ['AugmentImages', 'DegradeImages', 'RandomErasing']),
    ],
)
def test_a_recipe_has_the_transforms_that_it_needs(fields, names):
    assert [type(step).__name__ for step in augmentations(make_recipe('baseline', **fields))] == names


def test_every_field_of_a_recipe_reaches_its_transform():
    fields = {
        'flip': 0.3,
        'degrees': 7.0,
        'translate': 0.05,
        'brightness': 0.1,
        'contrast': 0.15,
        'crop': 0.5,
        'crop_aspect': 1.5,
        'interpolation': 'bilinear',
        'resolution': 0.6,
        'blur': 0.02,
        'jpeg': 33,
    }
    steps = augmentations(make_recipe('baseline', **fields))
    for name, value in fields.items():
        assert any(getattr(step, name, None) == value for step in steps), name
