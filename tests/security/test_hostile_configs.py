"""Hostile settings of a bundle, and a hostile store of trusted hashes: one line of error, and nothing is allocated."""

import json
import os
import resource
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from bundlefiles import change_json, seal

from cxr_fastai.cli import main
from cxr_fastai.core.errors import CXRError, UsageError
from cxr_fastai.inference.bundle import CONFIG, MANIFEST, Bundle
from cxr_fastai.inference.config import LEARNER, WEIGHTS, ModelConfig
from cxr_fastai.inference.networks import load_network
from cxr_fastai.inference.pickles import trust, trusted
from cxr_fastai.inference.tensors import tensor_bytes

SOURCE = Path('config.json')
GOOD = {'arch': 'baseline', 'size': 64, 'threshold': 0.5}


@pytest.fixture
def changed(bundle, tmp_path) -> Path:
    """A copy of a bundle, without its learner, for a test to change."""
    copy = Path(shutil.copytree(bundle, tmp_path / 'bundle'))
    (copy / LEARNER).unlink()
    seal(copy)
    return copy


@pytest.mark.parametrize(
    'field, value',
    [
        ('threshold', float('nan')),
        ('threshold', -5),
        ('threshold', True),
        ('threshold', 1.5),
        ('threshold', '0.5'),
        ('threshold', [0.5]),
        ('threshold', 10**400),
        ('temperature', -1),
        ('temperature', 0),
        ('temperature', float('inf')),
        ('temperature', False),
        ('size', 0),
        ('size', 64.0),
        ('size', True),
        ('size', 2**13),
        ('size', '64'),
        ('low_pass', float('nan')),
        ('low_pass', 0.2),
        ('low_pass', 10**9),
        ('resize', 'stretch'),
        ('resize', ['squish']),
        ('resize', None),
        ('arch', ''),
        ('arch', 'a' * 1000),
        ('arch', '../../etc/passwd'),
        ('arch', 'hf-hub:someone/network'),
        ('arch', 'local-dir:/tmp'),
        ('arch', 'resnet18\n'),
        ('arch', '\x1b[2J'),
        ('arch', {'a': 1}),
        ('threshold_rule', 'a\nb'),
        ('threshold_rule', '\x1b]0;title\x07'),
        ('threshold_rule', '\ud800'),
        ('threshold_rule', 'x' * 10**6),
        ('threshold_rule', 5),
        ('vocab', ['PNEUMONIA', 'NORMAL']),
        ('vocab', 'NORMAL'),
        ('vocab', None),
    ],
)
def test_settings_out_of_range_are_refused(field, value):
    with pytest.raises(CXRError, match=f'{SOURCE}: ') as caught:
        ModelConfig.from_dict(GOOD | {field: value}, SOURCE)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize('field', GOOD)
def test_missing_settings_are_refused(field):
    with pytest.raises(CXRError, match=f'{field} is missing'):
        ModelConfig.from_dict({name: value for name, value in GOOD.items() if name != field}, SOURCE)


@pytest.mark.parametrize(
    'text',
    [
        '{"arch": "baseline", "arch": "resnet50"}',
        '{"schema": 2, "threshold": NaN}',
        '{"schema": 2, "threshold": 1e999}',
        '[' * 10**5,
        '{"schema": ' + '9' * 10**5 + '}',
        '"text"',
        '\ufeff\ufeff{}',
        '{"schema": 2}\0',
        '',
        ' ' * (2**20 + 1),
    ],
    ids=['twice', 'NaN', 'infinite', 'deep', 'digits', 'a text', 'two marks', 'a null', 'nothing', 'long'],
)
@pytest.mark.parametrize('name', [CONFIG, MANIFEST])
def test_json_that_programs_read_in_different_ways_is_refused(name, text, changed, refused):
    (changed / name).write_text(text, encoding='utf-8')
    if name == CONFIG:
        seal(changed)
    assert refused(changed) == 1


@pytest.mark.parametrize(
    'files',
    [
        {'../config.json': {'sha256': '0' * 64, 'size': 1}},
        {CONFIG: {'sha256': 'G' * 64, 'size': 1}},
        {CONFIG: {'sha256': '0' * 64, 'size': -1}},
        {CONFIG: {'sha256': '0' * 64, 'size': 2**40}},
        {CONFIG: {'sha256': '0' * 64, 'size': True}},
        {f'{number}.json': {'sha256': '0' * 64, 'size': 1} for number in range(100)},
        [CONFIG],
    ],
    ids=['a path', 'no hash', 'a size below 0', 'a huge size', 'true', 'other names', 'a list'],
)
def test_a_manifest_of_other_files_is_refused(files, changed, refused):
    change_json(changed, MANIFEST, files=files)
    assert refused(changed) == 1


@pytest.mark.parametrize('name', [CONFIG, MANIFEST])
def test_a_file_of_a_terabyte_is_not_read(name, changed):
    with (changed / name).open('a') as file:
        file.truncate(2**40)  # without using the disk
    with pytest.raises(CXRError, match='larger than|does not match its hash'):
        Bundle.open(changed)


def test_a_zip_in_which_a_file_grows_a_thousand_times_is_not_unpacked(changed, tmp_path):
    (changed / WEIGHTS).write_bytes(bytes(2**26))
    seal(changed)
    with zipfile.ZipFile(tmp_path / 'b.zip', 'w', zipfile.ZIP_DEFLATED) as archive:
        for path in changed.iterdir():
            archive.write(path, path.name)
    with pytest.raises(CXRError, match='67,108,864, more than 100 times as many'):
        Bundle.open(tmp_path / 'b.zip').engine('torch')


@pytest.mark.parametrize('large', [False, True], ids=['many', 'more than 65,535'])
def test_a_zip_of_very_many_files_is_not_listed(large, changed, tmp_path):
    with zipfile.ZipFile(tmp_path / 'b.zip', 'w') as archive:
        archive.write(changed / MANIFEST, MANIFEST)
        for number in range(70_000 if large else 2000):
            archive.writestr(zipfile.ZipInfo(f'{number}'), b'')
    with pytest.raises(CXRError, match='not the zip file of a bundle'):
        Bundle.open(tmp_path / 'b.zip')


def test_a_zip_with_a_comment_is_read(changed, tmp_path):
    with zipfile.ZipFile(tmp_path / 'b.zip', 'w') as archive:
        for path in changed.iterdir():
            archive.write(path, path.name)
        archive.comment = b'PK\5\6' * 10_000
    with pytest.raises(CXRError):  # `zipfile` takes the comment for the end, too
        Bundle.open(tmp_path / 'b.zip')
    with zipfile.ZipFile(tmp_path / 'c.zip', 'w') as archive:
        for path in changed.iterdir():
            archive.write(path, path.name)
        archive.comment = b'a network of radiographs' * 1000
    assert Bundle.open(tmp_path / 'c.zip').config.arch == 'baseline'


@pytest.mark.parametrize(
    'arch', ['eva_giant_patch14_224', 'vit_giant_patch14_224', 'torchvision.regnet_y_128gf', 'resnet50', 'vgg19']
)
def test_a_network_that_the_weights_do_not_fit_is_not_allocated(arch):
    weights = tensor_bytes({'0.0.0.weight': np.zeros((32, 3, 3, 3), np.float32)})
    config = ModelConfig(arch, 224, 0.5)
    with pytest.raises(CXRError, match=f'not the weights of the network {arch}'):
        load_network(config, weights, Path(WEIGHTS))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CXRError, match=f'not the weights of the network {arch}'):
        load_network(config, weights, Path(WEIGHTS))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024  # of several GB


@pytest.mark.parametrize(
    'arch',
    [
        'resnet18.no_such_tag',
        'vision_learner.timm.resnet18.x',
        'vision_learner.timm.',
        'torchvision.',
        'torchvision.get_model',
        'torchvision.vit_b_16',
        'timm.resnet18',
        'os',
        'cxr_fastai',
    ],
)
def test_a_name_of_no_architecture_is_refused(arch):
    with pytest.raises(UsageError, match=r'^model\.safetensors: its network cannot be built by its name'):
        load_network(ModelConfig(arch, 64, 0.5), tensor_bytes({}), Path(WEIGHTS))


def test_an_architecture_of_a_fixed_size_is_refused_for_other_images():
    with pytest.raises(CXRError, match='made for images of 64 px, but vit_tiny_patch16_224 accepts only 224'):
        load_network(ModelConfig('vit_tiny_patch16_224', 64, 0.5), tensor_bytes({}), Path(WEIGHTS))


# The store of trusted hashes.


@pytest.fixture
def store(tmp_path, monkeypatch) -> Path:
    """The file of the trusted hashes of this test."""
    monkeypatch.setenv('CXR_TRUST', str(tmp_path / 'trust.json'))
    return tmp_path / 'trust.json'


DIGEST = 'a' * 64
ENTRY = {'since': '2026-01-01', 'why': 'test'}


@pytest.mark.parametrize(
    'value',
    [
        [],
        None,
        {'short': ENTRY},
        {DIGEST.upper(): ENTRY},
        {DIGEST: None},
        {DIGEST: 'yes'},
        {DIGEST: {}},
        {DIGEST: {'since': 5, 'why': 'test'}},
        {DIGEST: {'since': '2026-01-01'}},
        {DIGEST: ENTRY | {'why': '\x1b[2J'}},
        {DIGEST: ENTRY | {'why': '\ud800'}},
        {DIGEST: ENTRY | {'why': 'x' * 10**6}},
    ],
    ids=lambda value: repr(value)[:40],
)
def test_an_odd_store_of_trusted_hashes_is_an_error_of_one_line(value, store, capsys):
    store.write_text(json.dumps(value))
    assert main(['trust', 'list']) == 1
    error = capsys.readouterr().err
    assert error.count('\n') == 1 and f'{store}: not a store of trusted hashes' in error


@pytest.mark.parametrize('text', ['', '{', '{"a": NaN}', '[' * 10**5, '\0'])
def test_a_store_that_is_no_json_is_an_error_of_one_line(text, store, capsys):
    store.write_text(text)
    assert main(['trust', 'list']) == 1
    assert capsys.readouterr().err.count('\n') == 1


def test_a_pipe_or_a_device_as_store_does_not_hang(store, capsys, monkeypatch):
    os.mkfifo(store)
    assert main(['trust', 'list']) == 2
    monkeypatch.setenv('CXR_TRUST', '/dev/zero')
    assert main(['trust', 'list']) == 2
    assert capsys.readouterr().err.count('\n') == 2


def test_a_pipe_or_a_device_cannot_be_trusted(tmp_path, store, capsys):
    os.mkfifo(tmp_path / 'model.pkl')
    for path in (tmp_path / 'model.pkl', '/dev/zero', tmp_path, tmp_path / 'missing'):
        assert main(['trust', str(path), '--sha256', DIGEST]) == 2
    assert capsys.readouterr().err.count('\n') == 4


def test_a_name_with_control_characters_does_not_break_the_store(store):
    trust(DIGEST, 'hash confirmed: \x1b[2J\udcff' + 'x' * 1000)
    assert trusted()[DIGEST]['why'].startswith('hash confirmed: ?[2J?')
