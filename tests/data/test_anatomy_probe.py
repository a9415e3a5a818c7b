"""A small network finds the label around the lungs where it is there, and only there."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from cxr_fastai.cli import main
from cxr_fastai.data import anatomy_probe
from cxr_fastai.data.anatomy_probe import probe_anatomy
from cxr_fastai.data.auditing import audit

SIDE = 64


def write_images(folder: Path, place: slice, n: int = 60) -> Path:
    """Images of noise, with a bright square at `place` (rows and columns) in those of pneumonia."""
    rng = np.random.default_rng(0)
    for i in range(n):
        pixels = rng.integers(60, 120, (SIDE, SIDE), np.uint8)
        label = ('NORMAL', 'PNEUMONIA')[i % 2]
        if i % 2:
            pixels[place, place] = 220
        name = f'train/{label}/person{i}_bacteria_{i}.png' if i % 2 else f'train/{label}/IM-{i:04}-0001.png'
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / name)
    return folder


@pytest.fixture
def quick(monkeypatch) -> None:
    monkeypatch.setattr(anatomy_probe, 'CHANNELS', (3, 4, 8, 8, 8))
    monkeypatch.setattr(anatomy_probe, 'BATCH_SIZE', 8)
    monkeypatch.setattr(anatomy_probe, 'EPOCHS', 8)


def aucs(folder) -> dict[str, float]:
    table = audit(folder, anatomy=True).probes
    table = table[table.probe == 'label, by a network']
    return dict(zip(table.trait, table.auc, strict=True))


def test_a_mark_around_the_lungs_is_found_and_one_within_is_not(quick, tmp_path):
    outside = aucs(write_images(tmp_path / 'outside', slice(54, 64)))
    inside = aucs(write_images(tmp_path / 'inside', slice(27, 37)))
    assert outside.keys() == {'lungs hidden', 'thorax hidden'} and min(outside.values()) > 0.9
    assert all(auc < 0.75 for auc in inside.values())


def test_the_finding_is_in_the_audit_with_its_figure(quick, tmp_path, capsys):
    folder = write_images(tmp_path / 'images', slice(54, 64))
    main(['data', 'audit', str(folder), '--anatomy', '--out', str(tmp_path / 'audit')])
    assert 'the label without the lungs' in capsys.readouterr().out
    findings = json.loads((tmp_path / 'audit/audit.json').read_text())['findings']
    (finding,) = [finding for finding in findings if finding['name'] == 'the label without the lungs']
    assert 'lungs hidden' in finding['advice'] and 'hide_lungs' in finding['advice']
    assert 'by a network' in (tmp_path / 'audit/audit.html').read_text()


def test_it_needs_enough_images_and_is_not_measured_without_the_option(images, tmp_path):
    folder = write_images(tmp_path / 'few', slice(54, 64), n=20)
    assert aucs(folder) == {}
    assert 'label, by a network' not in set(audit(folder).probes.probe)


def test_two_calls_give_the_same(quick, tmp_path):
    folder = write_images(tmp_path / 'images', slice(54, 64))
    paths = sorted(folder.rglob('*.png'))
    rows = [(str(path.relative_to(folder)), path.parent.name, 'train', path.stem) for path in paths]
    table = pd.DataFrame(rows, columns=['path', 'label', 'split', 'patient'])
    pd.testing.assert_frame_equal(probe_anatomy(table, folder), probe_anatomy(table, folder))
