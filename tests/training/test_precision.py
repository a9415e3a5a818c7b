"""The precision of a training is chosen by a trial, recorded in the journal, and kept when it is resumed."""

import pytest
import torch

from cxr_fastai.core.errors import UsageError
from cxr_fastai.models.architectures import make_recipe
from cxr_fastai.training import precision as module
from cxr_fastai.training.precision import MIN_STEPS, choose_precision, lower_precision, time_steps
from cxr_fastai.training.training import train

CPU = torch.device('cpu')
RECIPE = make_recipe('baseline', size=64, epochs=2, batch_size=4)
LONG = 4 * MIN_STEPS


@pytest.fixture
def machine(monkeypatch):
    """Pretend that the processor has instructions, and that steps take these seconds; `set(flags, fp32, bf16)`."""

    def pretend(flags: list[str], fp32: float, bf16: float) -> None:
        monkeypatch.setattr(module, 'bf16_instructions', lambda: flags)
        monkeypatch.setattr(module, 'time_steps', lambda *_: {'fp32': fp32, 'bf16': bf16})

    return pretend


CASES = {
    'no instructions': ([], 2.0, 1.0, LONG, 'fp32', 'no faster'),
    'twice as fast': (['amx_bf16'], 2.0, 1.0, LONG, 'bf16', '2.00 times'),
    'slower': (['avx512_bf16'], 1.0, 1.1, LONG, 'fp32', '0.91 times'),
    'hardly faster': (['avx512_bf16'], 1.1, 1.0, LONG, 'fp32', '1.10 times'),
    'a short training': (['amx_bf16'], 2.0, 1.0, 40, 'fp32', 'too short'),
}


@pytest.mark.parametrize(('flags', 'fp32', 'bf16', 'n', 'expected', 'reason'), CASES.values(), ids=CASES)
def test_a_lower_precision_is_chosen_where_it_is_faster(flags, fp32, bf16, n, expected, reason, machine):
    machine(flags, fp32, bf16)
    facts = choose_precision(RECIPE, CPU, n)
    assert facts['precision'] == expected and reason in facts['reason']


@pytest.mark.parametrize(('supported', 'expected'), [(True, 'bf16'), (False, 'fp16')])
def test_a_gpu_tries_bf16_before_fp16(supported, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda including_emulation: supported)
    assert lower_precision(torch.device('cuda')) == expected
    assert choose_precision(RECIPE, torch.device('cuda'), 40)['precision'] == expected
    assert lower_precision(torch.device('mps')) is None


def test_a_trial_times_both_and_uses_up_no_random_numbers():
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    times = time_steps(RECIPE, CPU, ('fp32', 'bf16'))
    assert times.keys() == {'fp32', 'bf16'} and all(0 < seconds < 60 for seconds in times.values())
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(('compiled', 'entered'), [(False, 8), (True, 0)])
def test_a_trial_computes_the_gradients_of_depthwise_convolutions_as_the_training_does(compiled, entered, monkeypatch):
    modes = []

    class Counted(module.DepthwiseGradients):
        def __enter__(self):
            modes.append(self)
            return super().__enter__()

    monkeypatch.setattr(module, 'DepthwiseGradients', Counted)
    time_steps(RECIPE, CPU, ('fp32', 'bf16'), compiled)
    assert len(modes) == entered


def test_the_choice_is_in_the_recipe_and_the_journal_of_the_run(images, tmp_path, machine, monkeypatch):
    machine(['amx_bf16'], 2.0, 1.0)
    monkeypatch.setattr(module, 'MIN_STEPS', 1)
    run = train(make_recipe('baseline', size=64, epochs=1, batch_size=16), images, tmp_path / 'run', precision='auto')
    assert run.recipe.precision == 'bf16'
    trial = run.last_event('start')['precision_trial']
    assert trial == {'precision': 'bf16', 'reason': trial['reason'], 'milliseconds': {'fp32': 2000.0, 'bf16': 1000.0}}


def test_an_unknown_precision_is_refused(images, tmp_path):
    with pytest.raises(UsageError, match='--precision fp8: choose auto or fp32'):
        train(RECIPE, images, tmp_path / 'run', precision='fp8')
    assert not (tmp_path / 'run').exists()
