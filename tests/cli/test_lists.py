"""The commands `archs` and `recipes`."""

import subprocess
import sys

from cxr_fastai.cli import lists, main
from cxr_fastai.core import environment


def test_archs_lists_the_networks_of_this_package_and_names_the_others(capsys):
    assert main(['archs']) == 0
    header, baseline, resnet50, lite0, *rest = capsys.readouterr().out.splitlines()
    assert header.split() == ['network', 'parameters', 'image', 'size', 'weights']
    assert baseline.split() == ['baseline', '422,530', '224', 'none']
    assert resnet50.split() == ['resnet50', '23,512,130', '224', 'imagenet,', 'imagenet-v2,', 'none']
    assert lite0.startswith('efficientnet_lite0')
    assert 'torchvision' in rest[-1] and 'timm' in rest[-1] and 'CXR_ARCHS=NAME=package.module:function' in rest[-1]


def test_archs_lists_registered_networks_and_why_one_cannot_be_built(capsys, monkeypatch, tmp_path):
    source = 'from torch import nn\nfrom cxr_fastai.models import BaselineCNN as Net\nNoNet = nn.Identity\n'
    (tmp_path / 'listed_nets.py').write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv('CXR_ARCHS', 'listed=listed_nets:Net,broken=listed_nets:NoNet,missing=listed_nets:Missing')
    assert main(['archs']) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert lines['listed'].split() == ['listed', '422,530', '224', 'own,', 'none']
    assert '?' in lines['broken'] and 'contains pooling' in lines['broken']
    assert '?' in lines['missing'] and 'cannot be imported' in lines['missing']


def test_archs_says_how_to_install_timm_where_it_is_missing(capsys, monkeypatch):
    monkeypatch.setattr(environment, 'find_spec', lambda package: None)
    assert main(['archs']) == 0
    text = capsys.readouterr().out
    assert 'efficientnet_lite0            ?' in text and 'needs the package timm' in text
    assert text.rstrip().endswith('timm is not installed: pip install "cxr_fastai[timm]".')


def test_archs_lists_matching_networks_up_to_a_limit(capsys, monkeypatch):
    monkeypatch.setattr(lists, 'MAX_ARCHS', 2)
    assert main(['archs', 'test_*']) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and lines[1].startswith('test_') and lines[3].startswith('and ')
    assert main(['archs', 'test_vit']) == 0
    assert '160 only' in capsys.readouterr().out


def test_archs_refuses_a_pattern_that_matches_nothing(fails):
    fails(['archs', 'no-such-network'], 2, 'no-such-network: no network has such a name. Patterns: ')


def test_recipes_lists_fields_with_defaults_values_and_meaning(capsys):
    assert main(['recipes']) == 0
    text = capsys.readouterr().out
    assert 'reference: the specification. 15 epochs.' in text and 'networks from scratch: train at 0.003' in text
    rows = {
        line.split()[-1 if '=' not in line else 1].split('=')[0]: line for line in text.splitlines() if '--' in line
    }
    assert rows['crop'].split()[:3] == ['--set', 'crop=1', '0.25'] and rows['crop'].endswith('(0.01 to 1)')
    assert any(line.startswith('--batch-size 32') for line in text.splitlines())
    assert any(line.startswith('--set optimizer=adam') and 'adamw' in line for line in text.splitlines())


def test_recipes_loads_no_torch():
    code = (
        'import sys; from cxr_fastai.cli import main; code = main(["recipes"]); '
        'print(code, *{"torch", "fastai", "pandas", "numpy"} & set(sys.modules))'
    )
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == '0'
