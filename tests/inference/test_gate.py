"""What is no chest image gets no probability, however sure the network is."""

import numpy as np
import pytest
from PIL import Image

from cxr_fastai.core.errors import CXRError
from cxr_fastai.data.find import list_images
from cxr_fastai.inference.bundle import Bundle
from cxr_fastai.inference.gate import OUT_OF_DISTRIBUTION, Gate, Space, thumbnails, unit
from cxr_fastai.inference.predictor import Predictor, prediction_table

RNG = np.random.default_rng(0)


def pictures() -> dict[str, np.ndarray]:
    """Pictures that scikit-image ships, grey."""
    from skimage import data

    found = {
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
    return {name: np.asarray(Image.fromarray(picture).convert('L')) for name, picture in found.items()}


def others(images: np.ndarray) -> dict[str, np.ndarray]:
    """What is made of images, and is none: each (n, s, s)."""
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
    from cxr_fastai.images.preprocessing import Preprocessing

    return np.stack([Preprocessing(64).load(path) for path in list_images([images / 'test'])])


def far(gated: tuple[Predictor, Gate], images: np.ndarray) -> np.ndarray:
    predictor, gate = gated
    return gate.measure(predictor.engine(np.ascontiguousarray(images))[1], images) > 1


def test_images_that_were_held_out_pass(gated, seen):
    assert far(gated, seen).mean() <= 0.25  # of 12 images, 36 are known


def test_what_is_no_image_is_turned_away(gated, seen):
    shown = {name: far(gated, images).mean() for name, images in others(seen).items()}
    squares = np.stack([np.asarray(Image.fromarray(picture).resize((64, 64))) for picture in pictures().values()])
    shown['pictures'] = far(gated, squares).mean()
    assert all(share >= 0.95 for share in shown.values()), shown


def test_a_picture_gets_a_row_without_probability(gated, images, tmp_path):
    Image.fromarray(pictures()['cat']).save(tmp_path / 'cat.png')
    paths = [*list_images([images / 'test'])[:2], tmp_path / 'cat.png']
    table = prediction_table(gated[0].predict(paths))
    assert table.status[2] == 'rejected' and table.code[2] == OUT_OF_DISTRIBUTION and np.isnan(table.p_pneumonia[2])
    assert table.prediction.isna()[2] and 'would mean nothing' in table.message[2]


def test_without_the_gate_every_picture_gets_a_probability(bundle, tmp_path):
    Image.fromarray(pictures()['cat']).save(tmp_path / 'cat.png')
    (row,) = Predictor.load(bundle, gate=False).predict([tmp_path / 'cat.png'])
    assert row['status'] == 'ok' and 0 <= row['p_pneumonia'] <= 1


def test_a_gate_is_the_same_after_it_was_saved(gated, seen, bundle, tmp_path):
    predictor, gate = gated
    again = Gate.from_tensors(gate.as_tensors(), tmp_path)
    features = predictor.engine(seen)[1]
    assert (again.measure(features, seen) == gate.measure(features, seen)).all()
    with pytest.raises(CXRError, match='no gate .*is missing'):
        Gate.from_tensors({}, tmp_path)
    assert Bundle.open(bundle).tensors('gate.safetensors').keys() == gate.as_tensors().keys()


def test_what_cannot_be_measured_is_turned_away(gated):
    assert gated[0].tell(0.9, np.nan)['code'] == OUT_OF_DISTRIBUTION
    broken = gated[1].as_tensors() | {'limits': np.array([1, np.nan, 1], np.float32)}
    with pytest.raises(CXRError, match='its limits are no numbers'):
        Gate.from_tensors(broken, 'b')


def test_distances_are_those_of_mahalanobis_where_every_direction_is_told_apart():
    vectors = RNG.normal(size=(400, 5)) @ RNG.normal(size=(5, 5))
    space = Space.fit(vectors, components=4)
    covariance = np.cov(vectors.T, bias=True)
    off = vectors[:20] - vectors.mean(axis=0)
    wanted = np.sqrt((off @ np.linalg.inv(covariance) * off).sum(axis=1))
    assert space.distance(vectors[:20]) == pytest.approx(wanted, rel=0.02)


def test_a_gate_turns_away_about_two_in_a_hundred_of_validation():
    images, features = RNG.integers(0, 256, (600, 32, 32), dtype=np.uint8), RNG.normal(size=(600, 16)) + 3
    gate = Gate.fit((features[:300], images[:300]), (features[300:], images[300:]))
    assert 0.01 <= (gate.measure(features[300:], images[300:]) > 1).mean() <= 0.021


@pytest.mark.parametrize('side', [16, 37, 224])
def test_thumbnails_do_not_mind_size_or_contrast(side):
    image = np.asarray(Image.fromarray(RNG.integers(0, 256, (8, 8), dtype=np.uint8)).resize((side, side)))[None]
    thumb = thumbnails(image)
    assert thumb.shape == (1, 256) and thumb.mean() == pytest.approx(0, abs=1e-9) and thumb.std() == pytest.approx(1)
    assert thumbnails(image // 2) == pytest.approx(thumb, abs=0.05)
    assert np.linalg.norm(unit(RNG.normal(size=(3, 4))), axis=1) == pytest.approx(1)
