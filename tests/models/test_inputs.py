"""Normalisation of grey images."""

import numpy as np
import torch
import torchvision

from cxr_fastai.models.inputs import denormalize, normalize, pool, to_input


def test_normalisation_equals_torchvision_and_is_invertible():
    images = torch.rand(2, 1, 8, 8)
    theirs = torchvision.transforms.functional.normalize(
        images.expand(-1, 3, -1, -1), [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    )
    assert torch.allclose(normalize(images), theirs, atol=1e-6)
    assert torch.allclose(denormalize(normalize(images)), images.expand(-1, 3, -1, -1), atol=1e-6)


def test_read_only_arrays_become_normalised_input():
    images = np.arange(2 * 4 * 4, dtype=np.uint8).reshape(2, 4, 4)
    images.flags.writeable = False
    assert torch.equal(to_input(images), normalize(torch.tensor(images.copy())[:, None] / 255))


def test_pooling_averages_maps_and_flattens_vectors():
    maps = torch.rand(2, 3, 4, 5)
    assert torch.allclose(pool(maps), maps.mean((2, 3)))
    assert torch.equal(pool(maps[..., 0, 0]), maps[..., 0, 0])
