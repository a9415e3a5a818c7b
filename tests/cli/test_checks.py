"""`cxr-fastai checks` says what the machine has, never fails itself, and prints JSON on request."""

import json
import sys
from importlib import metadata

import pytest

from cxr_fastai.cli import main
from cxr_fastai.cli.checks import describe_machine, find_extras
from cxr_fastai.core.hardware import available_cores


@pytest.fixture
def facts(capsys):
    def read() -> dict:
        assert main(['checks', '--json']) == 0
        return json.loads(capsys.readouterr().out)

    return read


def test_the_facts_fit_on_a_screen_and_name_what_is_used(capsys):
    assert main(['checks']) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 40 and any(
        line.startswith('cores') and f'{available_cores()} are used' in line for line in lines
    )
    assert any(line.startswith('packages') and 'torch 2.' in line for line in lines)


def test_json_has_the_same_facts_and_nothing_else(facts):
    assert facts().keys() == describe_machine().keys() >= {'device', 'precision', 'ONNX Runtime', 'extras', 'cache'}


def test_missing_extras_have_a_line_that_installs_them(facts, monkeypatch):
    monkeypatch.setattr(metadata, 'version', lambda _name: (_ for _ in ()).throw(metadata.PackageNotFoundError))
    found = facts()
    assert found['extras'] == [] and 'onnx' in found['missing extras']
    assert found['to install'].startswith('pip install "cxr_fastai[') and found['packages']['torch'] == 'not installed'


def test_a_broken_package_and_a_damaged_trust_store_are_named(facts, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, 'onnxruntime', None)
    (tmp_path / 'trust.json').write_text('[')
    monkeypatch.setenv('CXR_TRUST', str(tmp_path / 'trust.json'))
    monkeypatch.setenv('CXR_DATA', str(tmp_path / 'nowhere'))
    found = facts()
    assert found['ONNX Runtime'].startswith('broken: ') and 'damaged' in found['trusted hashes']
    assert found['images'] == 'none found: name a folder with --data DIR or CXR_DATA'
    monkeypatch.setenv('CXR_DATA', str(tmp_path))
    assert facts()['images'] == f'{tmp_path} is used without --data'


def test_every_extra_of_users_is_listed():
    extras = find_extras()
    assert {'dicom', 'onnx', 'serve', 'timm'} <= extras.keys() and not {'dev', 'docs', 'test'} & extras.keys()
    assert 'onnxruntime' in extras['onnx']
