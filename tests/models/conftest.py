"""An untrained ResNet50 of torchvision, shared by the tests of this folder."""

from pathlib import Path

import pytest
import torch
import torchvision


@pytest.fixture(scope='session')
def torchvision_state() -> dict:
    torch.manual_seed(5)
    return torchvision.models.resnet50(weights=None).state_dict()


@pytest.fixture(scope='session')
def torchvision_file(torchvision_state, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp('weights') / 'resnet50.pth'
    torch.save(torchvision_state, path)
    return path
