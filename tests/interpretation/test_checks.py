"""The checks of maps pass good maps and fail bad ones, and their results appear in the run and in its report."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from cxr_fastai.cli import main
from cxr_fastai.core.run import Run
from cxr_fastai.inference.config import ModelConfig
from cxr_fastai.inference.engines import TorchEngine
from cxr_fastai.inference.predictor import Predictor
from cxr_fastai.interpretation.cam import METHODS
from cxr_fastai.interpretation.check_targets import CHECKS, verdicts
from cxr_fastai.interpretation.checks import cam_error, check_maps, locate, outside
from cxr_fastai.interpretation.explainer import Explainer
from cxr_fastai.interpretation.faithfulness import (
    COMPARISON_SIZE,
    MAX_BODY_STAGES,
    SSIM_WINDOW,
    STEPS,
    TOP,
    correlation,
    deletion,
    randomisation,
    randomisation_stages,
    rank_correlation,
    ranks,
    shrink,
    similarity,
    ssim,
)
from cxr_fastai.models.architectures import build_model
from cxr_fastai.publishing import reporting

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 255, (4, 64, 64), dtype=np.uint8)


def explainer(head_weight: float = 1.0) -> Explainer:
    """Return the explainer of a baseline with BatchNorm statistics; a head weight of 0 makes every map empty."""
    torch.manual_seed(1)
    model = build_model('baseline').train()
    with torch.no_grad():
        for _ in range(3):
            model[0](torch.randn(8, 3, 64, 64))
        model[1][-1].weight.mul_(head_weight)
    return Explainer(Predictor(TorchEngine(model), ModelConfig('baseline', 64, 0.5)))


class Bright(nn.Module):
    """A head that predicts pneumonia if the upper left quarter is bright."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        bright = images[:, :1, :32, :32].mean(dim=(1, 2, 3))[:, None]
        return bright * torch.tensor([0.0, 8.0])


def corner(row: int, column: int) -> np.ndarray:
    """Return maps (2, 64, 64) that are positive in one quarter only."""
    heat = np.zeros((2, 64, 64), np.float32)
    heat[:, row : row + 32, column : column + 32] = 0.5 + RNG.random((32, 32)) / 2
    return heat


def test_ssim_agrees_with_its_definition():
    a, b = RNG.random((2, 24, 24))
    half = SSIM_WINDOW // 2
    values = []
    for y in range(half, 24 - half):
        for x in range(half, 24 - half):
            u, v = (m[y - half : y + half + 1, x - half : x + half + 1].ravel() for m in (a, b))
            c = np.cov(u, v, bias=True)
            values.append(
                (2 * u.mean() * v.mean() + 1e-4)
                * (2 * c[0, 1] + 9e-4)
                / ((u.mean() ** 2 + v.mean() ** 2 + 1e-4) * (c[0, 0] + c[1, 1] + 9e-4))
            )
    assert ssim(a, b) == pytest.approx(np.mean(values), abs=0.03)  # the implementation mirrors the border
    assert ssim(a, a) == pytest.approx(1) and ssim(a, 1 - a) < 0


def test_the_correlation_with_a_constant_map_is_zero():
    a, flat = RNG.random((8, 8)), np.zeros((8, 8))
    assert rank_correlation(a, flat) == correlation(flat, a) == 0
    assert rank_correlation(a, a**3) == pytest.approx(1) and correlation(a, 2 * a + 1) == pytest.approx(1)
    assert similarity([(a, a), (a, flat)])['spearman'] == pytest.approx(0.5)


def test_large_maps_are_shrunk_by_averaging():
    assert shrink(np.ones((224, 224))).shape == (COMPARISON_SIZE, COMPARISON_SIZE) and shrink(np.eye(8)).shape == (8, 8)
    assert shrink(np.kron(np.eye(COMPARISON_SIZE), np.ones((2, 2)))) == pytest.approx(np.eye(COMPARISON_SIZE))


def test_the_highest_pixel_of_each_map_has_rank_zero():
    heat = RNG.random((3, 8, 8))
    places = ranks(heat)
    assert places.min() == 0 and places.max() == pytest.approx(63 / 64)
    for one, place in zip(heat, places, strict=True):
        assert one.ravel()[place.ravel().argsort()].argmax() == 0
    assert ((places < 0.25).sum(axis=(1, 2)) == 16).all()


@pytest.mark.parametrize('row', [0, 32])
def test_deletion_distinguishes_relevant_from_irrelevant_regions(row):
    images, normal = np.full((2, 64, 64), 220, np.uint8), np.zeros((64, 64), np.uint8)
    engine = TorchEngine(nn.Sequential(nn.Identity(), Bright()))
    brightness = Explainer(Predictor(engine, ModelConfig('baseline', 64, 0.5)))
    found = deletion(brightness, images, corner(row, 0), normal, np.random.default_rng(0))
    at = STEPS.index(0.3)
    if row:
        assert found['drop'] == 0 and found['deletion'][0] == pytest.approx(found['deletion'][at - 1])
    else:
        assert found['deletion'][at] < found['deletion_random'][at] < found['deletion'][0]
    assert found['deletion'][-1] == found['insertion'][0] and found['insertion'][-1] == found['deletion'][0]
    assert found['drop'] == pytest.approx(found['deletion'][0] - found['deletion'][STEPS.index(TOP)])


class ImageMaps(Explainer):
    """Maps that show the image, independent of the network."""

    def maps(self, images: np.ndarray) -> np.ndarray:
        return (images / 255).astype(np.float32)


def test_maps_that_do_not_depend_on_the_network_fail():
    blind = ImageMaps(explainer().predictor)
    found = randomisation(blind, IMAGES, blind.maps(IMAGES), np.random.default_rng(0))
    assert found['spearman_margin'] < 0 and found['ssim_margin'] < 0
    assert all(stage['ssim'] == pytest.approx(1) for stage in found['stages'])
    assert [stage['layer'] for stage in found['stages']][::9] == ['1.6', '0.0.0']
    assert found['stages'][0]['ssim_above'] == 1


def test_maps_that_are_always_equal_fail():
    class Centre(Explainer):
        def maps(self, images: np.ndarray) -> np.ndarray:
            return np.tile(np.outer(*[np.hanning(64)] * 2), (len(images), 1, 1))

    blind = Centre(explainer().predictor)
    found = randomisation(blind, IMAGES, blind.maps(IMAGES), np.random.default_rng(0))
    assert not verdicts(found)['ssim_margin'] and not verdicts(found)['spearman_margin']
    assert randomisation(blind, IMAGES[:1], blind.maps(IMAGES[:1]), np.random.default_rng(0)) == {}


def test_each_layer_of_the_head_is_one_stage():
    names = ['1.2', '1.0', *(f'0.{i}' for i in range(50))]
    stages = randomisation_stages(names)
    assert [len(stage) for stage in stages[:2]] == [1, 1] and len(stages) == 2 + MAX_BODY_STAGES
    assert [name for stage in stages for name in stage] == names


def test_randomisation_does_not_change_the_network_or_the_random_state():
    original = explainer()
    before = {name: weight.clone() for name, weight in original.predictor.model.state_dict().items()}
    state = torch.get_rng_state()
    found = randomisation(original, IMAGES, original.maps(IMAGES), np.random.default_rng(0))
    after = original.predictor.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before) and torch.equal(state, torch.get_rng_state())
    assert found['stages'][-1]['spearman'] < 0.7


def test_a_map_equal_to_its_mask_has_all_its_energy_in_it():
    heat = corner(0, 0)
    found = locate(heat, heat > 0)
    assert found['pointing'] == found['energy'] == 1 and found['energy_ratio'] == pytest.approx(4)
    elsewhere = locate(heat, corner(32, 32) > 0)
    assert elsewhere['pointing'] == elsewhere['energy_ratio'] == 0
    assert locate(heat, np.stack([heat[0] > 0, np.zeros((64, 64), bool)])) == found  # an empty mask is ignored
    assert locate(heat, np.zeros((2, 64, 64), bool)) == {}


def test_energy_outside_the_thorax_is_measured():
    edge = np.zeros((1, 100, 100), np.float32)
    edge[:, :, :5] = 1
    assert outside(edge)['outside'] == outside(edge)['border'] == 1 and not verdicts(outside(edge))['border']
    middle = np.zeros_like(edge)
    middle[:, 40:60, 40:60] = 1
    assert outside(middle)['outside'] == outside(middle)['border'] == 0
    assert (outside(middle)['lungs'], outside(edge)['lungs']) == (1, 0)
    assert outside(np.ones_like(edge))['lungs'] == pytest.approx(0.56)


def test_a_wrong_grad_cam_is_detected(monkeypatch):
    model, images = explainer().predictor.model, torch.randn(2, 3, 64, 64)
    assert cam_error(model, images) <= 1e-5
    right = METHODS['gradcam']
    monkeypatch.setitem(METHODS, 'gradcam', lambda *args: right(*args) * 1.001)
    assert cam_error(model, images) > 1e-4


def test_empty_maps_are_counted_and_only_checks_without_maps_have_a_verdict():
    found = check_maps(explainer(head_weight=0), IMAGES, IMAGES[0])
    assert found['empty'] == 1 and found['mirror'] is found['drop_ratio'] is None
    assert verdicts(found) == {'cam_error': True, 'empty': False}


def test_maps_are_reproducible_and_the_scores_of_the_classes_add_up_to_one():
    found = check_maps(explainer(), IMAGES, IMAGES.mean(axis=0).astype(np.uint8))
    assert found['repeat_error'] == 0 and found['batch_error'] <= 1e-5 and found['pointing'] is None
    other = replace(explainer(), target='NORMAL')
    assert other.scores(IMAGES) == pytest.approx(1 - explainer().scores(IMAGES))


@pytest.fixture(scope='module')
def checked(evaluated, images, tmp_path_factory) -> Run:
    """Return a copy of the evaluated run with maps checked by the command."""
    folder = tmp_path_factory.mktemp('checked') / 'run'
    shutil.copytree(evaluated.path, folder)
    assert main(['explain', str(folder), '--check', '--data', str(images)]) == 0
    return Run.open(folder)


def test_the_check_writes_every_number_and_a_figure(checked, images):
    found = json.loads((checked / 'figures/cam_check.json').read_text())
    assert all(isinstance(found[name], float) for name in CHECKS) and found['verdicts'].keys() == CHECKS.keys()
    assert found['layer'] == '0.3.2' and found['split'] == 'test' and found['images'] == 7
    masks = len(list((images / 'masks/test').rglob('*.png')))
    assert found['images'] == masks and 0 < found['area'] < 0.5
    assert (checked / 'figures/cam_check.png').stat().st_size > 10_000


def test_the_report_shows_the_check_unless_it_belongs_to_another_network(checked, tmp_path, monkeypatch):
    monkeypatch.setattr(reporting, 'draw', lambda *_: {})  # the curves are slow and tested elsewhere
    page = reporting.report(checked).read_text()
    assert 'Reliability of the maps' in page
    assert all(check.description[1:].replace("'", '&#39;') in page for check in CHECKS.values())
    copy = Run(tmp_path / 'run')
    shutil.copytree(checked.path, copy.path)
    found = json.loads((copy / 'figures/cam_check.json').read_text())
    (copy / 'figures/cam_check.json').write_text(json.dumps(found | {'model': 'another'}))
    assert 'Reliability of the maps' not in reporting.report(copy).read_text()


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (['--top-losses', '3'], 'give either images'),
        (['--out', 'x'], '--out x: --check writes into the figures'),
        (['--target', 'NORMAL'], '--target NORMAL: --check supports only maps for PNEUMONIA'),
        (['--split', 'nowhere'], 'nowhere'),
        (['--layer', '7'], '--layer 7: no such layer'),
    ],
)
def test_options_that_do_not_fit_a_check_are_rejected(evaluated, capsys, options, message):
    assert main(['explain', str(evaluated.path), '--check', *options]) == 2
    assert message in capsys.readouterr().err and not (evaluated / 'figures/cam_check.json').exists()
