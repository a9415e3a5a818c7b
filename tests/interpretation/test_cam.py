"""Maps of every network agree with their definitions and with the package grad-cam, and leave the network unchanged."""

import numpy as np
import pytest
import torch
from torch import nn

from cxr_fastai.core.errors import UsageError
from cxr_fastai.interpretation.cam import (
    BODY,
    METHODS,
    activation_maps,
    enlarge,
    explanation_mode,
    find_layer,
    name_layer,
    record_activations,
    scale,
)
from cxr_fastai.models.architectures import build_model

torch.manual_seed(0)
IMAGES = torch.randn(3, 3, 64, 64)


def network(arch: str) -> nn.Sequential:
    """Return a network with BatchNorm statistics from images, so that its maps are not constant."""
    torch.manual_seed(1)
    model = build_model(arch)
    model.train()
    with torch.no_grad():
        for _ in range(3):
            model[0](torch.randn(8, 3, 64, 64))
    return model.eval()


SLOW_RESNET = pytest.param('resnet50', marks=pytest.mark.slow)
ARCHS = ['baseline', 'efficientnet_lite0', SLOW_RESNET]
ARCHS_WITH_LINEAR_HEAD = ['efficientnet_lite0', SLOW_RESNET]


@pytest.fixture(scope='module', params=ARCHS)
def model(request) -> nn.Sequential:
    return network(request.param)


@pytest.mark.parametrize(
    ('method', 'layer', 'target'),
    [('gradcam', None, 1), ('gradcam', BODY, 0), ('gradcam++', None, 0), ('gradcam++', BODY, 1)],
)
def test_maps_equal_those_of_the_package_grad_cam(model, method, layer, target):
    pytorch_grad_cam = pytest.importorskip('pytorch_grad_cam', reason='needs pip install grad-cam')
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    theirs = {'gradcam': pytorch_grad_cam.GradCAM, 'gradcam++': pytorch_grad_cam.GradCAMPlusPlus}[method]
    with theirs(model=model, target_layers=[find_layer(model, layer)]) as cam:
        expected = cam(IMAGES, targets=[ClassifierOutputTarget(target)] * len(IMAGES))
    ours = enlarge(scale(activation_maps(model, IMAGES, target, method, layer)), 64).numpy()
    lowest = ours.min(axis=(1, 2), keepdims=True)
    assert np.abs((ours - lowest) / (ours.max(axis=(1, 2), keepdims=True) - lowest + 1e-7) - expected).max() < 1e-4


@pytest.mark.parametrize('arch', ARCHS_WITH_LINEAR_HEAD)
def test_grad_cam_equals_cam_for_average_pooling_and_one_linear_layer(arch):
    model = network(arch)
    exact = activation_maps(model, IMAGES, 1, 'cam')
    gradcam = activation_maps(model, IMAGES, 1, 'gradcam')
    area = exact.shape[-1] * exact.shape[-2]
    assert (gradcam * area - exact).abs().max() <= 1e-5 * exact.abs().max() and exact.max() > 0


@pytest.mark.parametrize('arch', ARCHS_WITH_LINEAR_HEAD)
def test_the_mean_of_cam_plus_the_bias_is_the_logit(arch):
    model = network(arch)
    linear = model[1][-1]
    with torch.no_grad():
        signed_map = (model[0](IMAGES) * linear.weight[1][None, :, None, None]).sum(dim=1)
        assert torch.allclose(signed_map.mean(dim=(1, 2)) + linear.bias[1], model(IMAGES)[:, 1], atol=1e-4)
    assert torch.allclose(activation_maps(model, IMAGES, 1, 'cam'), signed_map.relu(), atol=1e-5)


def test_maps_do_not_depend_on_the_batch_and_are_reproducible(model):
    whole = activation_maps(model, IMAGES, 1)
    assert torch.equal(whole, activation_maps(model, IMAGES, 1))
    alone = torch.cat([activation_maps(model, image[None], 1) for image in IMAGES])
    assert torch.allclose(scale(whole), scale(alone), atol=1e-5)


@pytest.mark.parametrize('layer', ['0.0', '0.2.0', '0.3.1', '0.3.2'])
def test_every_layer_gives_maps_even_before_a_layer_that_works_in_place(layer):
    model = network('baseline')
    maps = activation_maps(model, IMAGES, 1, layer=layer)
    assert maps.shape[-1] in (8, 16, 32) and (maps >= 0).all() and torch.isfinite(maps).all()


def test_occlusion_covers_every_pixel_and_ignores_rounding_errors():
    class Sure(nn.Module):
        def __init__(self, by: float):
            super().__init__()
            self.by = by

        def forward(self, x):
            return torch.stack([x.mean(dim=(1, 2, 3)) * self.by, x.mean(dim=(1, 2, 3)) * 0 + 16], dim=1)

    images = torch.rand(1, 3, 50, 50)
    assert not activation_maps(nn.Sequential(nn.Identity(), Sure(1e-3)), images, 1, 'occlusion').any()

    class Edge(nn.Module):
        def forward(self, x):
            return x[:, :1, :, -2:].mean(dim=(1, 2, 3))[:, None] * torch.tensor([0.0, 8.0])

    images = torch.zeros(1, 3, 50, 50)
    images[..., -2:] = 1
    assert activation_maps(nn.Sequential(nn.Identity(), Edge()), images, 1, 'occlusion')[0, :, -1].min() > 0


def test_cam_rejects_a_head_without_pooling_and_occlusion_a_layer():
    model = nn.Sequential(nn.Identity(), nn.Sequential(nn.Flatten(), nn.Linear(12, 2)))
    with pytest.raises(UsageError, match='average pooling'):
        activation_maps(model, torch.rand(1, 3, 2, 2), 1, 'cam')
    with pytest.raises(UsageError, match='--method occlusion does not use a layer'):
        activation_maps(network('baseline'), IMAGES, 1, 'occlusion', '0.2')


def test_occlusion_locates_the_region_that_determines_the_score():
    class Corner(nn.Module):
        def forward(self, x):
            return x[:, :1, :16, :16].mean(dim=(1, 2, 3))[:, None] * torch.tensor([0.0, 8.0])

    model = nn.Sequential(nn.Identity(), Corner())
    images = torch.zeros(1, 3, 64, 64)
    images[..., :16, :16] = 1
    heat = activation_maps(model, images, 1, 'occlusion')[0]
    assert heat[:16, :16].sum() / heat.sum() > 0.8 and heat[32:, 32:].max() == 0


@pytest.mark.parametrize('method', METHODS)
def test_mode_gradients_and_hooks_are_restored_even_after_an_exception(method):
    arch = 'efficientnet_lite0' if method == 'cam' else 'baseline'  # cam needs a linear head; occlusion is slow
    model = network(arch).train()
    model[1][-1].weight.requires_grad_(False)
    small = IMAGES[:1, :, ::2, ::2]
    model[1][-1].bias.grad = torch.ones(2)
    modes = [module.training for module in model.modules()]
    requires_grad = [weight.requires_grad for weight in model.parameters()]

    def check_restored():
        assert [module.training for module in model.modules()] == modes
        assert [weight.requires_grad for weight in model.parameters()] == requires_grad
        assert torch.equal(model[1][-1].bias.grad, torch.ones(2))
        assert not any(module._forward_hooks for module in model.modules())
        assert all(weight.grad is None for weight in model[0].parameters())

    activation_maps(model, small, 1, method)
    check_restored()
    with pytest.raises(IndexError):
        activation_maps(model, small, 7, method)
    check_restored()
    with pytest.raises(ZeroDivisionError), explanation_mode(model), record_activations(model[0]):
        raise ZeroDivisionError
    check_restored()


def test_maps_work_inside_no_grad(model):
    with torch.inference_mode(False), torch.no_grad():
        assert activation_maps(model, IMAGES, 1).max() > 0


def test_scaling_keeps_a_map_without_evidence_empty():
    maps = scale(torch.stack([torch.zeros(4, 4), torch.eye(4) * 3]))
    assert not maps[0].any() and maps[1].max() == 1 and torch.isfinite(maps).all()


@pytest.mark.parametrize(('arch', 'layer'), [('baseline', '0.3.2'), ('resnet50', '0'), ('efficientnet_lite0', '0')])
def test_the_default_layer_is_the_last_before_pooling_except_for_cam(arch, layer):
    model = build_model(arch)
    assert name_layer(model, find_layer(model)) == layer and find_layer(model, method='cam') is model[0]


def test_unsuitable_methods_and_layers_are_rejected():
    model = network('baseline')
    with pytest.raises(UsageError, match='average pooling and one Linear'):
        activation_maps(model, IMAGES, 1, 'cam')
    with pytest.raises(UsageError, match='--method x: choose gradcam'):
        activation_maps(model, IMAGES, 1, 'x')
    with pytest.raises(UsageError, match='--layer 9.9: no such layer. Choose one, for example'):
        find_layer(model, '9.9')
    with pytest.raises(UsageError, match=r'is not \(n, c, h, w\)'):
        activation_maps(model, IMAGES, 1, layer='1.1')
