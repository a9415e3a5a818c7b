"""The checks of maps pass what is right and fail what is wrong, and their numbers reach the run and its report."""

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
from cxr_fastai.interpretation.checks import CHECKS, cam_error, check_maps, judge, locate, outside
from cxr_fastai.interpretation.explainer import Explainer
from cxr_fastai.interpretation.faithfulness import (
    SIDE,
    STAGES,
    STEPS,
    TOP,
    WINDOW,
    _stages,
    correlation,
    deletion,
    forgetting,
    likeness,
    rank_correlation,
    ranks,
    shrink,
    ssim,
)
from cxr_fastai.models.architectures import build_model
from cxr_fastai.publishing.reporting import report

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 255, (4, 64, 64), dtype=np.uint8)


def explainer(head_weight: float = 1.0) -> Explainer:
    """Of a baseline whose BatchNorm has seen images; a weight of 0 makes every map empty."""
    torch.manual_seed(1)
    model = build_model('baseline').train()
    with torch.no_grad():
        for _ in range(3):
            model[0](torch.randn(8, 3, 64, 64))
        model[1][-1].weight.mul_(head_weight)
    return Explainer(Predictor(TorchEngine(model), ModelConfig('baseline', 64, 0.5)))


class Bright(nn.Module):
    """Says pneumonia where the upper left quarter is bright."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        bright = images[:, :1, :32, :32].mean(dim=(1, 2, 3))[:, None]
        return bright * torch.tensor([0.0, 8.0])


def corner(row: int, column: int) -> np.ndarray:
    """A map (2, 64, 64) of one quarter."""
    heat = np.zeros((2, 64, 64), np.float32)
    heat[:, row : row + 32, column : column + 32] = 0.5 + RNG.random((32, 32)) / 2
    return heat


def test_ssim_is_its_definition_in_every_whole_window():
    a, b = RNG.random((2, 24, 24))
    half, values = WINDOW // 2, []
    for y in range(half, 24 - half):
        for x in range(half, 24 - half):
            u, v = (m[y - half : y + half + 1, x - half : x + half + 1].ravel() for m in (a, b))
            c = np.cov(u, v, bias=True)
            values.append(
                (2 * u.mean() * v.mean() + 1e-4)
                * (2 * c[0, 1] + 9e-4)
                / ((u.mean() ** 2 + v.mean() ** 2 + 1e-4) * (c[0, 0] + c[1, 1] + 9e-4))
            )
    assert ssim(a, b) == pytest.approx(np.mean(values), abs=0.03)  # whose border it mirrors
    assert ssim(a, a) == pytest.approx(1) and ssim(a, 1 - a) < 0


def test_flat_maps_are_like_nothing():
    a, flat = RNG.random((8, 8)), np.zeros((8, 8))
    assert rank_correlation(a, flat) == correlation(flat, a) == 0
    assert rank_correlation(a, a**3) == pytest.approx(1) and correlation(a, 2 * a + 1) == pytest.approx(1)
    assert likeness([(a, a), (a, flat)])['spearman'] == pytest.approx(0.5)


def test_maps_are_compared_at_one_resolution():
    assert shrink(np.ones((224, 224))).shape == (SIDE, SIDE) and shrink(np.eye(8)).shape == (8, 8)
    assert shrink(np.kron(np.eye(SIDE), np.ones((2, 2)))) == pytest.approx(np.eye(SIDE))


def test_ranks_order_the_pixels_of_each_map():
    heat = RNG.random((3, 8, 8))
    places = ranks(heat)
    assert places.min() == 0 and places.max() == pytest.approx(63 / 64)
    for one, place in zip(heat, places, strict=True):
        assert one.ravel()[place.ravel().argsort()].argmax() == 0
    assert ((places < 0.25).sum(axis=(1, 2)) == 16).all()


@pytest.mark.parametrize('row', [0, 32])
def test_deletion_tells_a_map_of_what_counts_from_one_of_what_does_not(row):
    images, normal = np.full((2, 64, 64), 220, np.uint8), np.zeros((64, 64), np.uint8)
    engine = TorchEngine(nn.Sequential(nn.Identity(), Bright()))
    judging = Explainer(Predictor(engine, ModelConfig('baseline', 64, 0.5)))
    found = deletion(judging, images, corner(row, 0), normal, np.random.default_rng(0))
    at = STEPS.index(0.3)
    if row:
        assert found['drop'] == 0 and found['deletion'][0] == pytest.approx(found['deletion'][at - 1])
    else:
        assert found['deletion'][at] < found['deletion_random'][at] < found['deletion'][0]
    assert found['deletion'][-1] == found['insertion'][0] and found['insertion'][-1] == found['deletion'][0]
    assert found['drop'] == pytest.approx(found['deletion'][0] - found['deletion'][STEPS.index(TOP)])


class ImageMaps(Explainer):
    """Maps that show the image, whatever the network has learned."""

    def maps(self, images: np.ndarray) -> np.ndarray:
        return (images / 255).astype(np.float32)


def test_maps_that_do_not_mind_what_the_network_learned_fail():
    blind = ImageMaps(explainer().predictor)
    found = forgetting(blind, IMAGES, blind.maps(IMAGES), np.random.default_rng(0))
    assert found['spearman_margin'] < 0 and found['ssim_margin'] < 0
    assert all(stage['ssim'] == pytest.approx(1) for stage in found['stages'])
    assert [stage['layer'] for stage in found['stages']][::9] == ['1.6', '0.0.0']
    assert found['stages'][0]['ssim_above'] == 1


def test_a_map_that_is_always_the_same_does_not_pass():
    class Centre(Explainer):
        def maps(self, images: np.ndarray) -> np.ndarray:
            return np.tile(np.outer(*[np.hanning(64)] * 2), (len(images), 1, 1))

    blind = Centre(explainer().predictor)
    found = forgetting(blind, IMAGES, blind.maps(IMAGES), np.random.default_rng(0))
    assert not judge(found)['ssim_margin'] and not judge(found)['spearman_margin']
    assert forgetting(blind, IMAGES[:1], blind.maps(IMAGES[:1]), np.random.default_rng(0)) == {}


def test_each_layer_of_the_head_is_a_stage_of_its_own():
    names = ['1.2', '1.0', *(f'0.{i}' for i in range(50))]
    stages = _stages(names)
    assert [len(stage) for stage in stages[:2]] == [1, 1] and len(stages) == 2 + STAGES
    assert np.concatenate(stages).tolist() == list(range(52))


def test_forgetting_leaves_the_network_as_it_was():
    judging = explainer()
    before = {name: weight.clone() for name, weight in judging.predictor.model.state_dict().items()}
    state = torch.get_rng_state()
    found = forgetting(judging, IMAGES, judging.maps(IMAGES), np.random.default_rng(0))
    after = judging.predictor.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before) and torch.equal(state, torch.get_rng_state())
    assert found['stages'][-1]['spearman'] < 0.7


def test_a_map_that_is_the_mask_has_all_its_energy_there():
    heat = corner(0, 0)
    found = locate(heat, heat > 0)
    assert found['pointing'] == found['energy'] == 1 and found['energy_ratio'] == pytest.approx(4)
    elsewhere = locate(heat, corner(32, 32) > 0)
    assert elsewhere['pointing'] == elsewhere['energy_ratio'] == 0
    assert locate(heat, np.stack([heat[0] > 0, np.zeros((64, 64), bool)])) == found  # a mask without opacity
    assert locate(heat, np.zeros((2, 64, 64), bool)) == {}


def test_energy_outside_the_thorax_is_told():
    edge = np.zeros((1, 100, 100), np.float32)
    edge[:, :, :5] = 1
    assert outside(edge)['outside'] == outside(edge)['border'] == 1 and not judge(outside(edge))['border']
    middle = np.zeros_like(edge)
    middle[:, 40:60, 40:60] = 1
    assert outside(middle)['outside'] == outside(middle)['border'] == 0


def test_a_wrong_grad_cam_is_found(monkeypatch):
    model, images = explainer().predictor.model, torch.randn(2, 3, 64, 64)
    assert cam_error(model, images) <= 1e-5
    right = METHODS['gradcam']
    monkeypatch.setitem(METHODS, 'gradcam', lambda *args: right(*args) * 1.001)
    assert cam_error(model, images) > 1e-4


def test_where_every_map_is_empty_nothing_is_judged_but_what_needs_none():
    found = check_maps(explainer(head_weight=0), IMAGES, IMAGES[0])
    assert found['empty'] == 1 and found['mirror'] is found['drop_ratio'] is None
    assert judge(found) == {'cam_error': True, 'empty': False}


def test_a_map_is_the_same_again_alone_and_of_the_other_class():
    found = check_maps(explainer(), IMAGES, IMAGES.mean(axis=0).astype(np.uint8))
    assert found['repeat_error'] == 0 and found['batch_error'] <= 1e-5 and found['pointing'] is None
    other = replace(explainer(), target='NORMAL')
    assert other.scores(IMAGES) == pytest.approx(1 - explainer().scores(IMAGES))


@pytest.fixture(scope='module')
def checked(evaluated, images, tmp_path_factory) -> Run:
    """A copy of the evaluated run, its maps checked through the command line."""
    folder = tmp_path_factory.mktemp('checked') / 'run'
    shutil.copytree(evaluated.path, folder)
    assert main(['explain', str(folder), '--check', '--data', str(images)]) == 0
    return Run.open(folder)


def test_the_command_writes_every_number_and_a_figure(checked, images):
    found = json.loads((checked / 'figures/cam_check.json').read_text())
    assert all(isinstance(found[name], float) for name in CHECKS) and found['verdicts'].keys() == CHECKS.keys()
    assert found['layer'] == '0.3.2' and found['split'] == 'test' and found['images'] == 7
    masks = len(list((images / 'masks/test').rglob('*.png')))
    assert found['images'] == masks and 0 < found['area'] < 0.5
    assert (checked / 'figures/cam_check.png').stat().st_size > 10_000


def test_the_report_shows_it_unless_it_is_of_another_network(checked, tmp_path, monkeypatch):
    monkeypatch.setattr(
        'cxr_fastai.publishing.reporting.draw', lambda *_: {}
    )  # curves take their time, and have their own tests
    page = report(checked).read_text()
    assert 'Whether maps can be believed' in page
    assert all(check.words[1:].replace("'", '&#39;') in page for check in CHECKS.values())
    copy = Run(tmp_path / 'run')
    shutil.copytree(checked.path, copy.path)
    found = json.loads((copy / 'figures/cam_check.json').read_text())
    (copy / 'figures/cam_check.json').write_text(json.dumps(found | {'model': 'another'}))
    assert 'Whether maps can be believed' not in report(copy).read_text()


@pytest.mark.parametrize(
    ('options', 'says'),
    [
        (['--top-losses', '3'], 'one of them'),
        (['--out', 'x'], '--out x: a check goes into the figures'),
        (['--target', 'NORMAL'], '--target NORMAL: --check is of maps for PNEUMONIA'),
        (['--split', 'nowhere'], 'nowhere'),
        (['--layer', '7'], '--layer 7: no such layer'),
    ],
)
def test_what_does_not_go_with_a_check_is_told(evaluated, capsys, options, says):
    assert main(['explain', str(evaluated.path), '--check', *options]) == 2
    assert says in capsys.readouterr().err and not (evaluated / 'figures/cam_check.json').exists()
