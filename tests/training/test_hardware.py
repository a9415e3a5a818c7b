"""Precision and compiling: in training alone, chosen by device, exact after a stop."""

import dataclasses
import signal

import numpy as np
import pytest
import torch
from torch import nn

from cxr_fastai.cli import main
from cxr_fastai.core.errors import CXRWarning, Stopped, UsageError
from cxr_fastai.core.recipe import Phase
from cxr_fastai.data.find import list_images
from cxr_fastai.inference.predictor import Predictor
from cxr_fastai.models.architectures import ARCHS, FROM_SCRATCH, Arch, make_recipe
from cxr_fastai.training import checkpoint, training
from cxr_fastai.training import hardware as devices
from cxr_fastai.training.hardware import check_compile, choose_compile, choose_precision
from cxr_fastai.training.learner import roc_auc
from cxr_fastai.training.training import train

CPU = torch.device('cpu')


def tiny() -> nn.Sequential:
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 4, 3, stride=4), nn.BatchNorm2d(4), nn.ReLU()),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(4, 2)),
    )


@pytest.fixture
def small(monkeypatch):
    """A recipe for a network that compiles in seconds, with a smaller last batch."""
    phases = {'reference': (('frozen', 1 / 2, 1e-3, True), ('fine-tune', 1 / 2, 1e-3, False))}
    monkeypatch.setitem(ARCHS, 'tiny', Arch(tiny, FROM_SCRATCH | phases, compile_repaid={'cpu': 1000}))
    return make_recipe('tiny', epochs=4, size=48, batch_size=6, limit=8, seed=5, ema=0.5)


def weights(run) -> dict[str, torch.Tensor]:
    return torch.load(run / 'state.pt', weights_only=True)['model']


def interrupted(monkeypatch, recipe, images, out, epochs, **options):
    """Train, stop by a signal within the epoch after so many, and go on."""
    save, saved = checkpoint.save_state, []

    def save_and_signal(run, state):
        save(run, state)
        saved.append(1)
        if len(saved) == epochs + 1:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, 'save_state', save_and_signal)
        with pytest.raises(Stopped):
            train(recipe, images, out, **options)
    return train(recipe, images, out, resume=True, **options)


@pytest.mark.parametrize(
    ('cuda', 'bf16', 'chosen'), [(False, False, 'fp32'), (True, True, 'bf16'), (True, False, 'fp16')]
)
def test_auto_chooses_the_precision_that_the_device_has(monkeypatch, cuda, bf16, chosen):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: cuda)
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda including_emulation: bf16)
    assert (choose_precision('auto'), choose_precision('fp16')) == (chosen, 'fp16')


@pytest.mark.parametrize('precision', ['bf16', 'fp16'])
def test_mixed_precision_trains_otherwise_and_validates_as_a_predictor_does(images, tmp_path, small, precision):
    mixed = dataclasses.replace(small, precision=precision)
    plain, run = train(small, images, tmp_path / 'a'), train(mixed, images, tmp_path / 'b')
    a, b = plain.history.train_loss, run.history.train_loss
    assert a.tolist() != b.tolist() and a.tolist() == pytest.approx(b.tolist(), abs=0.02)
    valid = run.items[run.items.split == 'valid']
    scores = [
        row['p_pneumonia']
        for row in Predictor.load(run.path).predict(list_images([images / path for path in valid.path]))
    ]
    best = run.noted('end')['best']
    positive = (valid.label == 'PNEUMONIA').to_numpy(int)
    assert best['roc_auc'] == pytest.approx(roc_auc(positive, np.array(scores)))
    right = torch.tensor([p if label == 'PNEUMONIA' else 1 - p for p, label in zip(scores, valid.label, strict=True)])
    assert best['valid_loss'] == pytest.approx(-right.log().mean().item(), abs=1e-6)
    assert {value.dtype for value in weights(run).values()} == {torch.float32, torch.int64}


@pytest.mark.parametrize('precision', ['bf16', 'fp16'])
def test_mixed_precision_goes_on_bit_by_bit(images, tmp_path, small, monkeypatch, precision):
    mixed = dataclasses.replace(small, precision=precision)
    whole = train(mixed, images, tmp_path / 'a')
    again = interrupted(monkeypatch, mixed, images, tmp_path / 'b', 3)
    assert whole.history.drop(columns='seconds').equals(again.history.drop(columns='seconds'))
    assert all(torch.equal(value, weights(again)[key]) for key, value in weights(whole).items())
    scale = torch.load(again / 'state.pt', weights_only=True)['precision']
    assert ('scale' in scale) is (precision == 'fp16')


def traced(forward, dynamic, options):
    """All that `torch.compile` does but for the machine's own code."""
    return COMPILE(forward, dynamic=dynamic, backend='eager')


COMPILE = torch.compile


@pytest.mark.parametrize('compiler', [traced, pytest.param(COMPILE, marks=pytest.mark.slow, id='compiled')])
def test_compiled_training_is_the_same_goes_on_bit_by_bit_and_leaves_a_plain_learner(
    images, tmp_path, small, monkeypatch, compiler
):
    monkeypatch.setattr(torch, 'compile', compiler)
    plain, whole = (train(small, images, tmp_path / way, compile=way) for way in ('off', 'on'))
    again = interrupted(monkeypatch, small, images, tmp_path / 'again', 3, compile='on')
    assert whole.noted('start')['compiled'] and not plain.noted('start')['compiled']
    assert whole.history.train_loss.tolist() == pytest.approx(plain.history.train_loss.tolist(), abs=1e-4)
    assert whole.history.drop(columns='seconds').equals(again.history.drop(columns='seconds'))
    assert all(torch.equal(value, weights(again)[key]) for key, value in weights(whole).items())
    assert list(weights(whole)) == list(weights(plain))
    assert 'forward' not in vars(Predictor.load(whole.path).model)


def test_only_whole_batches_of_whole_images_are_compiled(images, tmp_path, small, monkeypatch):
    seen = []

    def counted(forward, **_):
        def call(x):
            seen.append((*x.shape[::3], torch.is_grad_enabled()))
            return forward(x)

        return call

    monkeypatch.setattr(torch, 'compile', counted)
    longer = dataclasses.replace(small, start_size=0.7, phases=(Phase('train', 4, 1e-3),))
    train(longer, images, tmp_path / 'run', compile='on')
    assert seen and set(seen) == {(6, 48, True)}


def test_a_failing_compiler_is_told_once_and_training_goes_on(images, tmp_path, small, monkeypatch):
    def broken(forward, **_):
        def call(x):
            raise devices.TorchDynamoException('no such instruction\nand more')

        return call

    monkeypatch.setattr(torch, 'compile', broken)
    with pytest.warns(CXRWarning) as told:
        run = train(small, images, tmp_path / 'run', compile='on')
    assert sum('compiling failed (no such instruction)' in str(warning.message) for warning in told) == 1
    plain = train(small, images, tmp_path / 'plain', compile='off')
    assert run.history.drop(columns='seconds').equals(plain.history.drop(columns='seconds'))


def test_auto_compiles_where_that_repays(small, monkeypatch):
    monkeypatch.setattr(devices, '_missing_compiler', lambda device: None)
    enough = round(1000 * (224 / 48) ** 2 / 4) + 1
    auto = lambda images=enough, device=CPU, **fields: choose_compile(
        'auto', dataclasses.replace(small, **fields), images, device
    )
    assert auto() and not auto(enough - 2) and not auto(device=torch.device('cuda'))
    assert not auto(start_size=0.5) and not auto(precision='bf16')
    assert choose_compile('on', small, 1, CPU) and not choose_compile('off', small, enough, CPU)
    with pytest.raises(UsageError, match='--compile maybe: choose auto or on or off'):
        check_compile('maybe')


def test_without_a_compiler_nothing_is_compiled_and_one_line_says_so(small, monkeypatch):
    monkeypatch.setattr(devices.shutil, 'which', lambda name: None)
    with pytest.warns(CXRWarning, match='no C\\+\\+ compiler was found'):
        assert not choose_compile('on', small, 1, CPU)


def test_the_options_reach_training(images, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        training,
        'train',
        lambda recipe, data, out, **engine: seen.append((recipe.precision, engine)) or type('Made', (), {'path': out}),
    )
    for given in ([], ['--precision', 'bf16', '--compile', 'off', '--track', 'wandb']):
        assert main(['train', '--data', str(images), '--out', str(tmp_path / 'run'), *given]) == 0
    assert seen == [('fp32', {'compile': 'auto', 'track': None}), ('bf16', {'compile': 'off', 'track': 'wandb'})]
