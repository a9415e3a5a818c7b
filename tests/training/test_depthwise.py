"""Depthwise convolutions in bf16 have the outputs of torch, and gradients that are at least as exact."""

from itertools import product

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cxr_fastai.data.loaders import CXRDataLoaders
from cxr_fastai.training.depthwise import DepthwiseGradients
from cxr_fastai.training.hardware import CompileSteps
from cxr_fastai.training.learner import cxr_learner

LAYERS = {
    f'{kernel}x{kernel}, stride {stride}, {per_channel} per channel{", bias" if bias else ""}': nn.Conv2d(
        8, 8 * per_channel, kernel, stride, kernel // 2, groups=8, bias=bias
    )
    for kernel, stride, per_channel, bias in product((3, 5), (1, 2), (1, 2), (False, True))
}
LAYERS['dilated, not square'] = nn.Conv2d(8, 8, (3, 5), (2, 1), (0, 3), (1, 2), groups=8)
IMAGES = torch.randn(4, 8, 20, 18, generator=torch.Generator().manual_seed(0))


def differentiate(layer: nn.Module, in_bf16: bool, mode: DepthwiseGradients | None = None) -> list[Tensor]:
    """Return the output of `layer` for `IMAGES`, and the gradients of the images and of the parameters, in fp32."""
    layer.zero_grad()
    images = IMAGES.clone().requires_grad_()
    with torch.autocast('cpu', torch.bfloat16, enabled=in_bf16):
        if mode is None:
            output = layer(images)
        else:
            with mode:
                output = layer(images)
    weights = torch.linspace(-1, 1, output.numel()).view_as(output)
    (output.float() * weights).sum().backward()
    return [output.detach(), images.grad, *(parameter.grad for parameter in layer.parameters())]


def error(value: Tensor, exact: Tensor) -> float:
    return float((value.float() - exact).norm() / exact.norm())


@pytest.mark.parametrize('layer', LAYERS.values(), ids=LAYERS)
def test_the_output_is_that_of_torch_and_the_gradients_are_as_exact(layer):
    exact = differentiate(layer, in_bf16=False)
    torchs = differentiate(layer, in_bf16=True)
    ours = differentiate(layer, True, DepthwiseGradients())
    assert torch.equal(ours[0], torchs[0]) and ours[0].dtype == torch.bfloat16
    for gradient, of_torch, expected in zip(ours[1:], torchs[1:], exact[1:], strict=True):
        assert gradient.dtype == torch.float32 and gradient.shape == expected.shape
        assert error(gradient, expected) <= 1.1 * error(of_torch, expected) + 1e-6


@pytest.mark.parametrize(
    ('layer', 'in_bf16'),
    [
        (nn.Conv2d(8, 6, 3), True),
        (nn.Conv2d(8, 8, 3, groups=4), True),
        (nn.Conv2d(8, 8, 3, padding='same', groups=8), True),
        (nn.Conv2d(8, 8, 3, groups=8), False),
    ],
    ids=['full', 'grouped', 'padding by name', 'fp32'],
)
def test_other_convolutions_are_those_of_torch(layer, in_bf16):
    for ours, expected in zip(
        differentiate(layer, in_bf16, DepthwiseGradients()), differentiate(layer, in_bf16), strict=True
    ):
        assert torch.equal(ours, expected)


def test_a_layer_can_be_checkpointed():
    layer = nn.Conv2d(8, 8, 3, groups=8)
    gradients = []
    for is_checkpointed in (False, True):
        layer.zero_grad()
        with torch.autocast('cpu', torch.bfloat16), DepthwiseGradients():
            output = checkpoint(layer, IMAGES, use_reentrant=False) if is_checkpointed else layer(IMAGES)
        output.float().sum().backward()
        gradients.append(layer.weight.grad.clone())
    assert torch.equal(*gradients)


def test_an_image_without_a_batch_is_that_of_torch():
    layer = nn.Conv2d(8, 8, 3, groups=8)
    with torch.autocast('cpu', torch.bfloat16):
        expected = layer(IMAGES[0])
        with DepthwiseGradients():
            assert torch.equal(layer(IMAGES[0]), expected)


def test_a_frozen_layer_gets_no_gradient():
    layer = nn.Conv2d(8, 8, 3, groups=8).requires_grad_(False)
    images = IMAGES.clone().requires_grad_()
    with torch.autocast('cpu', torch.bfloat16), DepthwiseGradients():
        layer(images).float().sum().backward()
    assert images.grad is not None and layer.weight.grad is None and layer.bias.grad is None


class Watched(nn.Module):
    """A depthwise layer that records how its gradients will be computed; it fails on request."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 3, 3, groups=3)
        self.backward_names: list[str] = []
        self.fails = False

    def forward(self, images: Tensor) -> Tensor:
        if self.fails:
            raise ArithmeticError('on request')
        output = self.layer(images)
        if output.grad_fn is not None:
            self.backward_names.append(type(output.grad_fn).__name__)
        return output


@pytest.fixture
def learner(images):
    """A learner in bf16 with a `Watched` layer, of batches of 8 of 10 images."""
    loaders = CXRDataLoaders.from_folder(images, 'official', limit=5, size=48, bs=8, num_workers=0, device='cpu')
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))
    return cxr_learner(loaders, nn.Sequential(Watched(), head)).to_bf16()


def backward_name() -> str:
    """How the gradients of a depthwise convolution in bf16 are computed now."""
    watched = Watched()
    with torch.autocast('cpu', torch.bfloat16):
        watched(torch.rand(1, 3, 8, 8))
    return watched.backward_names[0]


def test_training_steps_in_bf16_compute_these_gradients_in_fp32(learner):
    with learner.no_bar(), learner.no_logging():
        learner.fit(1, 1e-3)
    names = learner.network[0].backward_names
    assert len(names) == 2 and all('DepthwiseConvolution' in name for name in names)
    assert backward_name() == 'ConvolutionBackward0'


def test_a_step_that_fails_leaves_no_trace(learner):
    learner.network[0].fails = True
    with learner.no_bar(), learner.no_logging(), pytest.raises(ArithmeticError):
        learner.fit(1, 1e-3)
    assert backward_name() == 'ConvolutionBackward0'
    assert not torch.is_autocast_enabled('cpu')


def test_compiled_steps_are_those_of_the_compiler(learner, monkeypatch):
    monkeypatch.setattr(torch, 'compile', lambda network, **_: network)
    learner.add_cb(CompileSteps(48))
    with learner.no_bar(), learner.no_logging():
        learner.fit(1, 1e-3)
    assert set(learner.network[0].backward_names) == {'ConvolutionBackward0'}
