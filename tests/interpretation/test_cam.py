"""Maps are what their definitions and the package grad-cam say, of every network, and leave it as it was."""

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
    explaining,
    find_layer,
    name_layer,
    scale,
    watching,
)
from cxr_fastai.models.architectures import build_model

torch.manual_seed(0)
IMAGES = torch.randn(3, 3, 64, 64)


def network(arch: str) -> nn.Sequential:
    """A network whose BatchNorm has seen images, so that its maps are not flat."""
    torch.manual_seed(1)
    model = build_model(arch)
    model.train()
    with torch.no_grad():
        for _ in range(3):
            model[0](torch.randn(8, 3, 64, 64))
    return model.eval()


ARCHS = ['baseline', 'resnet50', 'efficientnet_lite0']


@pytest.fixture(scope='module', params=ARCHS)
def model(request) -> nn.Sequential:
    return network(request.param)


@pytest.mark.parametrize(
    ('method', 'layer', 'target'),
    [('gradcam', None, 1), ('gradcam', BODY, 0), ('gradcam++', None, 0), ('gradcam++', BODY, 1)],
)
def test_maps_are_those_of_the_package_grad_cam(model, method, layer, target):
    pytorch_grad_cam = pytest.importorskip('pytorch_grad_cam')
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    theirs = {'gradcam': pytorch_grad_cam.GradCAM, 'gradcam++': pytorch_grad_cam.GradCAMPlusPlus}[method]
    with theirs(model=model, target_layers=[find_layer(model, layer)]) as cam:
        wanted = cam(IMAGES, targets=[ClassifierOutputTarget(target)] * len(IMAGES))
    ours = enlarge(scale(activation_maps(model, IMAGES, target, method, layer)), 64).numpy()
    lowest = ours.min(axis=(1, 2), keepdims=True)
    assert np.abs((ours - lowest) / (ours.max(axis=(1, 2), keepdims=True) - lowest + 1e-7) - wanted).max() < 1e-4


def test_grad_cam_is_cam_where_the_head_is_average_pooling_and_one_layer():
    for arch in ('resnet50', 'efficientnet_lite0'):
        model = network(arch)
        exact, by_gradient = (activation_maps(model, IMAGES, 1, method) for method in ('cam', 'gradcam'))
        area = exact.shape[-1] * exact.shape[-2]
        assert (by_gradient * area - exact).abs().max() <= 1e-5 * exact.abs().max() and exact.max() > 0


def test_the_sum_of_cam_is_the_logit_but_for_the_bias():
    model = network('resnet50')
    with torch.no_grad():
        raw = (model[0](IMAGES) * model[1][-1].weight[1][None, :, None, None]).sum(dim=1)
        assert torch.allclose(raw.mean(dim=(1, 2)) + model[1][-1].bias[1], model(IMAGES)[:, 1], atol=1e-4)
    assert torch.allclose(activation_maps(model, IMAGES, 1, 'cam'), raw.relu(), atol=1e-5)


def test_a_batch_gives_what_each_image_gives_alone_and_the_same_again(model):
    whole = activation_maps(model, IMAGES, 1)
    assert torch.equal(whole, activation_maps(model, IMAGES, 1))
    alone = torch.cat([activation_maps(model, image[None], 1) for image in IMAGES])
    assert torch.allclose(scale(whole), scale(alone), atol=1e-5)


@pytest.mark.parametrize('layer', ['0.0', '0.2.0', '0.3.1', '0.3.2'])
def test_any_layer_gives_maps_also_before_one_that_works_in_place(layer):
    model = network('baseline')
    maps = activation_maps(model, IMAGES, 1, layer=layer)
    assert maps.shape[-1] in (8, 16, 32) and (maps >= 0).all() and torch.isfinite(maps).all()


def test_occlusion_covers_every_place_and_tells_no_rounding():
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


def test_cam_refuses_a_head_without_pooling():
    model = nn.Sequential(nn.Identity(), nn.Sequential(nn.Flatten(), nn.Linear(12, 2)))
    with pytest.raises(UsageError, match='average pooling'):
        activation_maps(model, torch.rand(1, 3, 2, 2), 1, 'cam')
    with pytest.raises(UsageError, match='--method occlusion looks at no layer'):
        activation_maps(network('baseline'), IMAGES, 1, 'occlusion', '0.2')


def test_occlusion_finds_what_the_score_hangs_on():
    class Corner(nn.Module):
        def forward(self, x):
            return x[:, :1, :16, :16].mean(dim=(1, 2, 3))[:, None] * torch.tensor([0.0, 8.0])

    model = nn.Sequential(nn.Identity(), Corner())
    images = torch.zeros(1, 3, 64, 64)
    images[..., :16, :16] = 1
    heat = activation_maps(model, images, 1, 'occlusion')[0]
    assert heat[:16, :16].sum() / heat.sum() > 0.8 and heat[32:, 32:].max() == 0


@pytest.mark.parametrize('method', METHODS)
def test_mode_gradients_and_hooks_are_as_before_also_after_an_exception(method):
    model = network('efficientnet_lite0').train()
    model[1][-1].weight.requires_grad_(False)
    small = IMAGES[:1, :, ::2, ::2]
    model[1][-1].bias.grad = torch.ones(2)
    modes, wants = [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]

    def as_before():
        assert [m.training for m in model.modules()] == modes and [p.requires_grad for p in model.parameters()] == wants
        assert torch.equal(model[1][-1].bias.grad, torch.ones(2)) and not any(m._forward_hooks for m in model.modules())
        assert all(p.grad is None for p in model[0].parameters())

    activation_maps(model, small, 1, method)
    as_before()
    with pytest.raises(IndexError):
        activation_maps(model, small, 7, method)
    as_before()
    with pytest.raises(ZeroDivisionError), explaining(model), watching(model[0]):
        raise ZeroDivisionError
    as_before()


def test_it_works_where_gradients_are_off(model):
    with torch.inference_mode(False), torch.no_grad():
        assert activation_maps(model, IMAGES, 1).max() > 0


def test_a_map_without_evidence_stays_empty():
    maps = scale(torch.stack([torch.zeros(4, 4), torch.eye(4) * 3]))
    assert not maps[0].any() and maps[1].max() == 1 and torch.isfinite(maps).all()


@pytest.mark.parametrize(('arch', 'layer'), [('baseline', '0.3.2'), ('resnet50', '0'), ('efficientnet_lite0', '0')])
def test_maps_are_of_the_last_layer_before_any_pooling_except_for_the_exact_cam(arch, layer):
    model = build_model(arch)
    assert name_layer(model, find_layer(model)) == layer and find_layer(model, method='cam') is model[0]


def test_what_gives_no_map_is_refused():
    model = network('baseline')
    with pytest.raises(UsageError, match='average pooling and one Linear'):
        activation_maps(model, IMAGES, 1, 'cam')
    with pytest.raises(UsageError, match='--method x: choose gradcam'):
        activation_maps(model, IMAGES, 1, 'x')
    with pytest.raises(UsageError, match='--layer 9.9: no such layer: choose one such as'):
        find_layer(model, '9.9')
    with pytest.raises(UsageError, match='gives no maps'):
        activation_maps(model, IMAGES, 1, layer='1.1')
