"""The self-test: stored predictions of reference images."""

import numpy as np
import pytest
import torch

from cxr_fastai.core.errors import CXRError
from cxr_fastai.inference.engines import TorchEngine
from cxr_fastai.inference.selftest import ParityError, SelfTest, draw_images
from cxr_fastai.models.architectures import build_model


@pytest.fixture
def engine() -> TorchEngine:
    torch.manual_seed(0)
    return TorchEngine(build_model('baseline'))


@pytest.fixture
def selftest(engine) -> SelfTest:
    return SelfTest.create(engine, 64)


def test_a_network_passes_its_own_self_test(selftest, engine, tmp_path):
    selftest.check(engine, tmp_path)


def test_the_reference_images_are_always_the_same(selftest):
    assert selftest.images.shape == (8, 64, 64)
    assert np.array_equal(draw_images(64), selftest.images)


def test_other_weights_fail_the_self_test(selftest, engine, tmp_path):
    with torch.no_grad():
        engine.model[1][-1].bias[1] += 3
    with pytest.raises(ParityError, match='a probability differs by'):
        selftest.check(engine, tmp_path)


def test_nan_fails_the_self_test(selftest, tmp_path):
    def broken(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.full(len(images), np.nan), np.zeros((len(images), 1))

    with pytest.raises(ParityError, match='differs by nan'):
        selftest.check(broken, tmp_path)


def test_probabilities_may_differ_by_rounding(tmp_path):
    stored = SelfTest(np.zeros((2, 4, 4), np.uint8), np.array([0.2, 0.5]))
    stored.check(lambda images: (stored.p + 5e-5, np.zeros((2, 1))), tmp_path)


def test_an_engine_that_raises_fails_the_self_test(selftest, tmp_path):
    def broken(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        raise RuntimeError('out of memory\nat line 5')

    with pytest.raises(ParityError, match=r'cannot predict its reference images \(out of memory\)'):
        selftest.check(broken, tmp_path)


def test_a_self_test_is_the_same_after_it_was_stored(selftest, tmp_path):
    stored = SelfTest.from_dict(selftest.as_dict(), tmp_path)
    assert np.array_equal(stored.images, selftest.images) and np.array_equal(stored.p, selftest.p)


def test_damaged_reference_images_are_an_error(tmp_path):
    with pytest.raises(CXRError, match='reference images of its self-test are damaged'):
        SelfTest.from_dict({'images': b''}, tmp_path)
