"""`to_onnx` converts a network to an ONNX file that takes grey images and needs neither torch nor preprocessing."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor, nn

from cxr_fastai.core.errors import CXRError, first_line
from cxr_fastai.core.recipe import POSITIVE
from cxr_fastai.models.inputs import MEAN, STD, normalize, pool

OPSET = 17
INPUT_NAME = 'images'
OUTPUT_NAMES = ['p_pneumonia', 'p_calibrated', 'features']


class GreyImageModel(nn.Module):
    """A network that takes grey uint8 images (n, 1, s, s).

    It returns the probability of pneumonia (n,), the same at `temperature`, and the mean features of the body (n, c).
    If possible, the normalisation is folded into the first convolution; see `fold_normalisation`.
    """

    def __init__(self, model: nn.Module, temperature: float | None) -> None:
        super().__init__()
        model = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
        self.is_folded = fold_normalisation(model)
        self.body, self.head = model.children()
        self.temperature = temperature or 1.0

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return probabilities, probabilities at the temperature, and features."""
        images = images.float() / 255
        maps = self.body(self._inputs(images))
        logits = self.head(maps).double()
        p = logits.softmax(dim=1)[:, POSITIVE]
        p_calibrated = (logits / self.temperature).softmax(dim=1)[:, POSITIVE]
        return p, p_calibrated, pool(maps)

    def _inputs(self, images: Tensor) -> Tensor:
        if not self.is_folded:
            return normalize(images)
        return torch.cat([images, torch.ones_like(images)], dim=1)


def fold_normalisation(model: nn.Module) -> bool:
    """Change the first convolution of `model` so that it takes two channels: the image from 0 to 1, and ones.

    This replaces the normalisation and the three equal channels. The channel of ones carries the means; a bias could
    not, because at the border the convolution pads the *normalised* image with zeros. Returns False, and changes
    nothing, unless the first layer with weights is a convolution of three channels and the only such one. Networks with
    parallel branches, such as RepVGG, have several.
    """
    first = next((layer for layer in model.modules() if list(layer.parameters(recurse=False))), None)
    convolutions = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d) and layer.in_channels == 3]
    if not isinstance(first, nn.Conv2d) or convolutions != [first]:
        return False
    if (first.groups, first.padding_mode) != (1, 'zeros'):
        return False
    weight = first.weight.detach()
    image_weight = (weight / STD).sum(dim=1, keepdim=True)
    ones_weight = -(weight * MEAN / STD).sum(dim=1, keepdim=True)
    first.weight = nn.Parameter(torch.cat([image_weight, ones_weight], dim=1))
    first.in_channels = 2
    return True


def to_onnx(model: nn.Module, size: int, temperature: float | None = None) -> bytes:
    """Return `model` as the bytes of an ONNX file for any number of images of `size` pixels.

    Its input is `images`, grey uint8 (n, 1, size, size). Its outputs are `p_pneumonia`, `p_calibrated` and `features`,
    as `GreyImageModel` returns them. Raises `CXRError` for a network that the exporter of torch cannot express.
    """
    images = np.random.default_rng(0).integers(0, 256, (2, 1, size, size), dtype=np.uint8)
    with TemporaryDirectory() as folder, warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter('ignore')
        path = Path(folder) / 'model.onnx'
        try:
            torch.onnx.export(
                GreyImageModel(model, temperature).eval(),
                (torch.from_numpy(images),),
                path,
                input_names=[INPUT_NAME],
                output_names=OUTPUT_NAMES,
                dynamic_axes={name: {0: 'n'} for name in (INPUT_NAME, *OUTPUT_NAMES)},
                opset_version=OPSET,
                dynamo=False,  # the new exporter would need the package onnxscript
            )
        except torch.onnx.OnnxExporterError as error:
            raise CXRError(f'torch cannot express this network as ONNX ({first_line(error, 200)}).') from None
        return path.read_bytes()
