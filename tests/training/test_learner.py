"""The Learner trains like the plain PyTorch loop of the specification, step for step."""

import dataclasses
import platform

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from sklearn.metrics import roc_auc_score
from torch import nn
from torch.utils.data import TensorDataset
from train_throughput import plain_baseline, plain_resnet50

from cxr_fastai.models.architectures import make_recipe
from cxr_fastai.training.hardware import reuse_memory
from cxr_fastai.training.learner import recipe_learner, roc_auc, sensitivity, specificity
from cxr_fastai.training.recipes import start_phase

STEPS, FEW = 20, 2
PLAIN = {'baseline': plain_baseline, 'resnet50': plain_resnet50}


def batches(n: int = STEPS, size: int = 32) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(
        torch.randn(4 * n, 3, size, size, generator=generator), torch.randint(0, 2, (4 * n,), generator=generator)
    )


def learner(arch: str, n: int = STEPS, size: int = 32, **fields):
    """A Learner on `n` fixed batches of 4, without augmentation."""
    recipe = dataclasses.replace(make_recipe(arch, weights='none'), **fields)
    dls = DataLoaders(*[DataLoader(batches(n, size), bs=4) for _ in range(2)], device=torch.device('cpu'))
    return recipe_learner(dls, recipe), recipe


class EachStep(Callback):
    """Seed the dropout of each step, and record the loss of each step."""

    def __init__(self):
        self.losses = []

    def before_batch(self):
        torch.manual_seed(self.iter)

    def after_batch(self):
        if self.training:
            self.losses.append(self.loss.item())


@torch.no_grad()
def set_batchnorm_statistics(model: nn.Module, x: torch.Tensor) -> None:
    """Give BatchNorm the statistics of `x`. Without any, the activations of the frozen body would explode."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    model.train()(x)
    for norm in norms:
        norm.momentum = 0.1


def plain_losses(
    plain: nn.Module, lr: float, frozen: bool, precision: torch.dtype, images: TensorDataset
) -> list[float]:
    """The losses of the training loop of the specification in plain PyTorch."""
    plain.train()
    if frozen:
        plain.eval()
        for name, parameter in plain.named_parameters():
            parameter.requires_grad_(name.startswith('fc.'))
    optimiser = torch.optim.Adam([p for p in plain.parameters() if p.requires_grad], lr=lr, weight_decay=1e-4)
    losses = []
    for step, (xb, yb) in enumerate(torch.utils.data.DataLoader(images, batch_size=4)):
        torch.manual_seed(step)
        loss = nn.functional.cross_entropy(plain(xb.to(precision)), yb)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses


def both_losses(
    arch: str, phase: int, precision: torch.dtype, size: int, n: int = STEPS
) -> tuple[list[float], list[float]]:
    """The losses of `n` steps of our Learner and of the plain loop, from the same weights on the same batches."""
    torch.manual_seed(7)
    plain, (learn, recipe) = PLAIN[arch]().to(precision), learner(arch, n, size)
    set_batchnorm_statistics(plain, batches(n, size)[:][0].to(precision))
    if precision is torch.float32:
        learn.model.to(memory_format=torch.contiguous_format)
    learn.model.to(precision)
    learn.model.load_state_dict(dict(zip(learn.model.state_dict(), plain.state_dict().values(), strict=True)))
    steps, chosen = EachStep(), recipe.phases[phase]
    for dl in learn.dls.loaders:
        dl.after_batch = lambda batch: (batch[0].to(precision), batch[1])
    if precision is torch.float64:  # fastai's loss and Recorder compute in 32 bits
        learn.loss_func = nn.CrossEntropyLoss()
        learn.remove_cbs([learn.recorder, learn.history])
    start_phase(learn, chosen)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, chosen.lr, cbs=steps)
    losses = plain_losses(plain, chosen.lr, chosen.frozen, precision, batches(n, size))
    assert len(steps.losses) == len(losses) == n and max(losses) - min(losses) > 0.01  # the network was trained
    return steps.losses, losses


@pytest.mark.parametrize(
    ('arch', 'phase', 'n'),
    [
        ('baseline', 0, STEPS),
        ('resnet50', 0, FEW),
        ('resnet50', 1, FEW),
        *(pytest.param('resnet50', phase, STEPS, marks=pytest.mark.slow) for phase in (0, 1)),
    ],
)
def test_each_step_has_the_loss_of_the_plain_loop(arch, phase, n):
    # Both have the same memory layout, because Adam amplifies differences of the last digit over twenty steps.
    losses, plain = both_losses(arch, phase, torch.float32, size=32, n=n)
    assert np.allclose(losses, plain, rtol=0, atol=1e-5)


@pytest.mark.parametrize('arch', PLAIN)
def test_the_memory_layout_does_not_change_the_output(arch):
    learn, _ = learner(arch, n=1)
    model, x = learn.model.eval(), batches(1)[:][0]
    assert model[0](x).is_contiguous(memory_format=torch.channels_last)
    ours = model(x)
    assert torch.allclose(ours, model.to(memory_format=torch.contiguous_format)(x), rtol=1e-4, atol=1e-5)


def changes(learn, recipe, phase: int) -> dict[str, int]:
    """The number of values that change in one step of `phase`, for each tensor of the state dict."""
    before = {key: value.clone() for key, value in learn.model.state_dict().items()}
    start_phase(learn, recipe.phases[phase])
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, recipe.phases[phase].lr)
    after = learn.model.state_dict()
    counts = {name: int((after[name] != before[name]).sum()) for name in before}
    return {name: count for name, count in counts.items() if count}


def test_the_frozen_phase_trains_4098_parameters_and_keeps_batchnorm_statistics():
    learn, recipe = learner('resnet50', n=1)
    assert changes(learn, recipe, 0) == {'1.2.weight': 4096, '1.2.bias': 2}


def test_the_second_phase_trains_all_parameters():
    learn, recipe = learner('resnet50', n=1)
    changes(learn, recipe, 0)
    changed = changes(learn, recipe, 1)
    assert {'0.conv1.weight', '0.bn1.running_mean', '0.layer4.2.bn3.running_var', '1.2.weight'} <= set(changed)
    assert all(parameter.requires_grad for parameter in learn.model.parameters())


def test_weight_decay_is_an_l2_penalty_of_the_optimiser():
    learn, recipe = learner('baseline', weight_decay=0.03)
    start_phase(learn, recipe.phases[0])
    with learn.no_bar(), learn.no_logging():
        learn.fit(0, 0.004)
    assert type(learn.opt.opt) is torch.optim.Adam
    assert {
        (group['lr'], group['weight_decay'], group['eps'], group['betas']) for group in learn.opt.opt.param_groups
    } == {(0.004, 0.03, 1e-8, (0.9, 0.999))}


def test_metrics_equal_scikit_learn_and_are_nan_for_one_class():
    targs, scores = np.array([0, 0, 1, 1, 1]), np.array([0.1, 0.6, 0.6, 0.8, 0.2])
    preds = (scores >= 0.5).astype(int)
    assert roc_auc(targs, scores) == roc_auc_score(targs, scores)
    assert (sensitivity(targs, preds), specificity(targs, preds)) == (2 / 3, 1 / 2)
    ones = np.ones(3, int)
    assert np.isnan([roc_auc(ones, scores[:3]), specificity(ones, ones)]).all() and sensitivity(ones, ones) == 1


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='only glibc has mallopt; run on Linux with glibc')
def test_freed_memory_is_reused_on_linux_with_glibc():
    assert reuse_memory()


@pytest.mark.parametrize(
    ('arch', 'phase', 'size'),
    [
        ('baseline', 0, 32),
        pytest.param('resnet50', 1, 32, marks=pytest.mark.slow),
        pytest.param('baseline', 0, 64, marks=pytest.mark.slow),
        *(pytest.param('resnet50', phase, 64, marks=pytest.mark.slow) for phase in (0, 1)),
    ],
)
def test_in_double_precision_the_channels_last_layout_has_the_loss_of_the_plain_loop(arch, phase, size):
    losses, plain = both_losses(arch, phase, torch.float64, size, n=STEPS if arch == 'baseline' else 3)
    assert np.allclose(losses, plain, rtol=0, atol=1e-5)
