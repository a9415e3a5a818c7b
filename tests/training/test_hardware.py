"""Mixed precision and compilation affect training steps only, and resume exactly."""

import dataclasses
import shutil
import signal

import numpy as np
import pytest
import torch
from torch import nn
from torch._dynamo.exc import TorchDynamoException

from cxr_fastai.cli import main
from cxr_fastai.core.errors import CXRWarning, Stopped, UsageError
from cxr_fastai.core.recipe import Phase
from cxr_fastai.core.run import Run
from cxr_fastai.data.find import list_images
from cxr_fastai.inference.predictor import Predictor
from cxr_fastai.models.architectures import ARCHS, FROM_SCRATCH, Arch, PhaseShare, make_recipe
from cxr_fastai.training import checkpoint, training
from cxr_fastai.training.hardware import can_compile, check_compile
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
    """A recipe for a network that compiles in seconds: two phases, and a smaller last batch."""
    phases = (PhaseShare('frozen', 1 / 2, 1e-3, True), PhaseShare('fine-tune', 1 / 2, 1e-3, False))
    monkeypatch.setitem(ARCHS, 'tiny', Arch(tiny, FROM_SCRATCH | {'reference': phases}))
    return make_recipe('tiny', epochs=4, size=48, batch_size=6, limit=5, seed=5, ema=0.5, workers=0)


def weights(run: Run) -> dict[str, torch.Tensor]:
    """The final weights, which are not those of the best epoch."""
    return torch.load(run / 'state.pt', weights_only=True)['model']


def history(run: Run):
    return run.history.drop(columns='seconds')


def train_with_stop(monkeypatch, recipe, images, out, epochs, **options) -> Run:
    """Train, stop by a signal in the epoch after so many `epochs`, and resume."""
    save_state = checkpoint.save_state
    saved = []

    def save_and_signal(run, state):
        save_state(run, state)
        saved.append(state['epochs'])
        if len(saved) == epochs + 1:  # the first state is that before the first epoch
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, 'save_state', save_and_signal)
        with pytest.raises(Stopped):
            train(recipe, images, out, **options)
    return train(recipe, images, out, resume=True, **options)


@pytest.mark.parametrize('precision', ['bf16', pytest.param('fp16', marks=pytest.mark.slow)])
def test_mixed_precision_changes_training_but_validates_like_a_predictor(images, tmp_path, small, precision):
    single = train(small, images, tmp_path / 'fp32')
    mixed = train(dataclasses.replace(small, precision=precision), images, tmp_path / precision)
    losses = single.history.train_loss.tolist(), mixed.history.train_loss.tolist()
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], abs=0.02)
    valid = mixed.items[mixed.items.split == 'valid']
    paths = list_images([images / path for path in valid.path])
    scores = np.array([row['p_pneumonia'] for row in Predictor.load(mixed.path).predict(paths)])
    positive = (valid.label == 'PNEUMONIA').to_numpy()
    best = mixed.last_event('end')['best']
    assert best['roc_auc'] == pytest.approx(roc_auc(positive.astype(int), scores))
    loss = -np.log(np.where(positive, scores, 1 - scores)).mean()
    assert best['valid_loss'] == pytest.approx(loss, abs=1e-6)
    assert {value.dtype for value in weights(mixed).values()} == {torch.float32, torch.int64}


@pytest.mark.parametrize('precision', ['fp16', pytest.param('bf16', marks=pytest.mark.slow)])
def test_mixed_precision_resumes_bit_for_bit(images, tmp_path, small, monkeypatch, precision):
    mixed = dataclasses.replace(small, precision=precision)
    uninterrupted = train(mixed, images, tmp_path / 'a')
    resumed = train_with_stop(monkeypatch, mixed, images, tmp_path / 'b', epochs=3)
    assert history(uninterrupted).equals(history(resumed))
    assert all(torch.equal(value, weights(resumed)[name]) for name, value in weights(uninterrupted).items())
    scaler = torch.load(resumed / 'state.pt', weights_only=True)['precision']
    assert ('scale' in scaler) is (precision == 'fp16')


TORCH_COMPILE = torch.compile


def trace_only(forward, dynamic, options):
    """`torch.compile` without the generation of machine code."""
    return TORCH_COMPILE(forward, dynamic=dynamic, backend='eager')


@pytest.mark.parametrize('compiler', [trace_only, pytest.param(TORCH_COMPILE, marks=pytest.mark.slow, id='compiled')])
def test_compiled_training_gives_the_same_losses_resumes_bit_for_bit_and_exports_a_plain_network(
    images, tmp_path, small, monkeypatch, compiler
):
    monkeypatch.setattr(torch, 'compile', compiler)
    plain = train(small, images, tmp_path / 'plain', compile='off')
    compiled = train(small, images, tmp_path / 'compiled', compile='on')
    resumed = train_with_stop(monkeypatch, small, images, tmp_path / 'resumed', epochs=3, compile='on')
    assert compiled.last_event('start')['compiled'] and not plain.last_event('start')['compiled']
    assert compiled.history.train_loss.tolist() == pytest.approx(plain.history.train_loss.tolist(), abs=1e-4)
    assert history(compiled).equals(history(resumed))
    assert all(torch.equal(value, weights(resumed)[name]) for name, value in weights(compiled).items())
    assert list(weights(compiled)) == list(weights(plain))
    assert 'forward' not in vars(Predictor.load(compiled.path).model)


def test_only_full_batches_of_full_size_are_compiled(images, tmp_path, small, monkeypatch):
    inputs = set()

    def record_inputs(forward, **_):
        def call(x):
            inputs.add((len(x), x.shape[-1], torch.is_grad_enabled()))
            return forward(x)

        return call

    monkeypatch.setattr(torch, 'compile', record_inputs)
    growing = dataclasses.replace(small, start_size=0.7, phases=(Phase('train', 4, 1e-3),))
    train(growing, images, tmp_path / 'run', compile='on')
    assert inputs == {(6, 48, True)}


def test_a_failing_compilation_warns_once_and_training_continues_without_it(images, tmp_path, small, monkeypatch):
    def fail(forward, **_):
        def call(x):
            raise TorchDynamoException('no such instruction\nand more')

        return call

    monkeypatch.setattr(torch, 'compile', fail)
    with pytest.warns(CXRWarning) as warnings:
        run = train(small, images, tmp_path / 'run', compile='on')
    assert sum('compiling failed (no such instruction)' in str(warning.message) for warning in warnings) == 1
    assert history(run).equals(history(train(small, images, tmp_path / 'plain')))


def test_compile_is_on_or_off():
    with pytest.raises(UsageError, match='--compile auto: choose on or off'):
        check_compile('auto')


def test_without_a_compiler_a_warning_says_that_training_is_not_compiled(monkeypatch):
    assert can_compile(CPU) or not shutil.which('g++')
    monkeypatch.setattr(shutil, 'which', lambda name: None)
    with pytest.warns(CXRWarning, match='no C\\+\\+ compiler was found, so training is not compiled'):
        assert not can_compile(CPU)


def test_options_of_the_command_line_reach_training(images, tmp_path, monkeypatch):
    calls = []

    def record(recipe, data, out, **options):
        calls.append((recipe.precision, options))
        return Run(out)

    monkeypatch.setattr(training, 'train', record)
    argv = ['train', '--data', str(images), '--out', str(tmp_path / 'run')]
    assert main(argv) == 0
    assert main([*argv, '--precision', 'bf16', '--compile', 'on', '--track', 'wandb']) == 0
    assert main([*argv, '--device', 'cpu']) == 0
    assert calls == [
        ('fp32', {'compile': 'off', 'track': None, 'device': None, 'precision': 'auto'}),
        ('bf16', {'compile': 'on', 'track': 'wandb', 'device': None, 'precision': None}),
        ('fp32', {'compile': 'off', 'track': None, 'device': 'cpu', 'precision': 'auto'}),
    ]
    assert main([*argv, '--device', 'tpu']) == 2
