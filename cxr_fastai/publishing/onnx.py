"""A network becomes an ONNX file that takes images as they are."""

from __future__ import annotations

import copy
import warnings
from io import BytesIO

import numpy as np
import torch
from torch import Tensor, nn

from cxr_fastai.core.recipe import POSITIVE
from cxr_fastai.models.inputs import MEAN, STD, normalize, pool

OPSET = 17


class Deployed(nn.Module):
    """Takes grey uint8 images (n, 1, s, s); gives the probability of pneumonia (n,), the same at `temperature`, and the
    body's mean features (n, c).

    Normalisation and the three equal channels are folded into the first convolution, which then has two channels: the
    image from 0 to 1, and ones, which carry the means. (A bias could not: at the border the convolution pads with zeros
    of the *normalised* image.) A network without such a convolution is given three channels.
    """

    def __init__(self, model: nn.Sequential, temperature: float | None):
        super().__init__()
        model = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
        self.folded = fold(model)
        self.body, self.head, self.temperature = *model, temperature or 1.0

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Probabilities, probabilities at the temperature, features."""
        images = images.float() / 255
        maps = self.body(torch.cat([images, torch.ones_like(images)], dim=1) if self.folded else normalize(images))
        logits = self.head(maps).double()
        return (logits.softmax(dim=1)[:, POSITIVE], (logits / self.temperature).softmax(dim=1)[:, POSITIVE], pool(maps))


def fold(model: nn.Module) -> bool:
    """Give the first convolution of `model` the two channels of `Deployed`; False where there is none over three."""
    first = next((layer for layer in model.modules() if isinstance(layer, nn.Conv2d)), None)
    if first is None or (first.in_channels, first.groups, first.padding_mode) != (3, 1, 'zeros'):
        return False
    weight = first.weight.detach()
    image, ones = (weight / STD).sum(dim=1, keepdim=True), -(weight * MEAN / STD).sum(dim=1, keepdim=True)
    first.weight, first.in_channels = nn.Parameter(torch.cat([image, ones], dim=1)), 2
    return True


def to_onnx(model: nn.Sequential, size: int, temperature: float | None = None) -> bytes:
    """`model` as an ONNX file: input `images`, outputs `p_pneumonia`, `p_calibrated` and `features`, of any number of
    images of `size` px."""
    example = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 1, size, size), dtype=np.uint8))
    names = ['p_pneumonia', 'p_calibrated', 'features']
    buffer = BytesIO()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter('ignore')
        # The other exporter needs onnxscript, which no user of the file does.
        torch.onnx.export(
            Deployed(model, temperature).eval(),
            (example,),
            buffer,
            input_names=['images'],
            output_names=names,
            dynamic_axes={name: {0: 'n'} for name in ('images', *names)},
            opset_version=OPSET,
            dynamo=False,
        )
    return buffer.getvalue()
