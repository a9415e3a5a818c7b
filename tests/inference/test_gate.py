"""The input gate rejects images that are not chest X-rays, however sure the network is."""

import numpy as np
import pytest
from PIL import Image

from cxr_fastai.core.errors import CXRError
from cxr_fastai.data.find import list_images
from cxr_fastai.images.preprocessing import Preprocessing
from cxr_fastai.inference.bundle import Bundle
from cxr_fastai.inference.gate import OUT_OF_DISTRIBUTION, Gate, Space, thumbnails, unit
from cxr_fastai.inference.predictor import Predictor, prediction_table

RNG = np.random.default_rng(0)


def pictures() -> dict[str, np.ndarray]:
    """Grey photographs and textures of scikit-image, by name."""
    from skimage import data

    pictures = {
        name: np.asarray(getattr(data, name)())
        for name in (
            'astronaut',
            'camera',
            'cat',
            'coffee',
            'coins',
            'page',
            'text',
            'rocket',
            'clock',
            'brick',
            'grass',
            'moon',
        )
    }
    return {name: np.asarray(Image.fromarray(picture).convert('L')) for name, picture in pictures.items()}


def altered(images: np.ndarray) -> dict[str, np.ndarray]:
    """Images, uint8 (n, s, s), that are no longer chest X-rays, by kind of change."""
    side = images.shape[-1]
    return {
        'turned': np.rot90(images, 1, (1, 2)),
        'upside down': images[:, ::-1],
        'negative': 255 - images,
        'noise': RNG.integers(0, 256, images.shape, dtype=np.uint8),
        'ramp': np.tile(np.linspace(0, 255, side), (2, side, 1)).astype(np.uint8),
        'blank': np.full_like(images[:2], 128),
        'swapped halves': np.roll(images, side // 2, axis=2),
    }


@pytest.fixture(scope='module')
def gated(bundle) -> tuple[Predictor, Gate]:
    predictor = Predictor.load(bundle)
    return predictor, predictor.gate


@pytest.fixture(scope='module')
def seen(images) -> np.ndarray:
    return np.stack([Preprocessing(64).load(path) for path in list_images([images / 'test'])])


def rejected(gated: tuple[Predictor, Gate], images: np.ndarray) -> np.ndarray:
    predictor, gate = gated
    return gate.measure(predictor.engine(np.ascontiguousarray(images))[1], images) > 1


def test_held_out_images_are_accepted(gated, seen):
    assert rejected(gated, seen).mean() <= 0.25  # 12 images; the gate was fitted to 36


def test_other_images_are_rejected(gated, seen):
    shares = {name: rejected(gated, images).mean() for name, images in altered(seen).items()}
    squares = np.stack([np.asarray(Image.fromarray(picture).resize((64, 64))) for picture in pictures().values()])
    shares['pictures'] = rejected(gated, squares).mean()
    assert all(share >= 0.95 for share in shares.values()), shares


def test_a_rejected_image_gets_a_row_without_probability(gated, images, tmp_path):
    Image.fromarray(pictures()['cat']).save(tmp_path / 'cat.png')
    paths = [*list_images([images / 'test'])[:2], tmp_path / 'cat.png']
    table = prediction_table(gated[0].predict(paths))
    assert table.status[2] == 'rejected' and table.code[2] == OUT_OF_DISTRIBUTION and np.isnan(table.p_pneumonia[2])
    assert table.prediction.isna()[2] and 'would be meaningless' in table.message[2]


def test_without_the_gate_every_image_gets_a_probability(bundle, tmp_path):
    Image.fromarray(pictures()['cat']).save(tmp_path / 'cat.png')
    (row,) = Predictor.load(bundle, gate=False).predict([tmp_path / 'cat.png'])
    assert row['status'] == 'ok' and 0 <= row['p_pneumonia'] <= 1


def test_a_gate_is_the_same_after_it_was_stored(gated, seen, bundle, tmp_path):
    predictor, gate = gated
    again = Gate.from_tensors(gate.as_tensors(), tmp_path)
    features = predictor.engine(seen)[1]
    assert (again.measure(features, seen) == gate.measure(features, seen)).all()
    with pytest.raises(CXRError, match='not an input gate .*is missing'):
        Gate.from_tensors({}, tmp_path)
    assert Bundle.open(bundle).tensors('gate.safetensors').keys() == gate.as_tensors().keys()


def test_a_distance_of_nan_is_a_rejection(gated):
    assert gated[0].decide(0.9, np.nan)['code'] == OUT_OF_DISTRIBUTION
    broken = gated[1].as_tensors() | {'limits': np.array([1, np.nan, 1], np.float32)}
    with pytest.raises(CXRError, match='a limit is NaN or infinite'):
        Gate.from_tensors(broken, 'b')


def test_with_all_components_the_distance_is_that_of_mahalanobis():
    vectors = RNG.normal(size=(400, 5)) @ RNG.normal(size=(5, 5))
    space = Space.fit(vectors, components=4)
    covariance = np.cov(vectors.T, bias=True)
    offset = vectors[:20] - vectors.mean(axis=0)
    expected = np.sqrt((offset @ np.linalg.inv(covariance) * offset).sum(axis=1))
    assert space.distance(vectors[:20]) == pytest.approx(expected, rel=0.02)


def test_a_gate_rejects_about_2_percent_of_the_validation_images():
    images, features = RNG.integers(0, 256, (600, 32, 32), dtype=np.uint8), RNG.normal(size=(600, 16)) + 3
    gate = Gate.fit((features[:300], images[:300]), (features[300:], images[300:]))
    assert 0.01 <= (gate.measure(features[300:], images[300:]) > 1).mean() <= 0.021


@pytest.mark.parametrize('side', [16, 37, 224])
def test_thumbnails_do_not_depend_on_size_or_contrast(side):
    image = np.asarray(Image.fromarray(RNG.integers(0, 256, (8, 8), dtype=np.uint8)).resize((side, side)))[None]
    thumb = thumbnails(image)
    assert thumb.shape == (1, 256) and thumb.mean() == pytest.approx(0, abs=1e-9) and thumb.std() == pytest.approx(1)
    assert thumbnails(image // 2) == pytest.approx(thumb, abs=0.05)
    assert np.linalg.norm(unit(RNG.normal(size=(3, 4))), axis=1) == pytest.approx(1)
