"""The options of every command: help, examples, and one meaning for each name."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from click import Command, Group
from typer.main import get_command

from cxr_fastai.cli import app, main, options, training_options
from cxr_fastai.data.sources import SOURCES
from cxr_fastai.images.preprocessing import RESIZES
from cxr_fastai.inference.bundle import ENGINES
from cxr_fastai.models.architectures import ARCHS
from cxr_fastai.training.tracking import TRACKERS

README = (Path(__file__).parents[2] / 'README.md').read_text()
PATH_OPTIONS = {'--out', '--resume', '--threshold', '--size', '--workers', '--epochs'}
"""Options whose help depends on the command."""


def list_commands(group: Group, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Command]]:
    for name, command in group.commands.items():
        if hasattr(command, 'commands'):
            yield from list_commands(command, (*path, name))
        else:
            yield (*path, name), command


COMMANDS = dict(list_commands(get_command(app)))


@pytest.mark.parametrize('name', COMMANDS, ids=' '.join)
def test_every_command_has_an_example_and_every_option_has_help(name):
    command = COMMANDS[name]
    assert f'Example: cxr-fastai {" ".join(name)}' in command.help
    assert all(parameter.help for parameter in command.params if parameter.name != 'help')


@pytest.mark.parametrize('name', COMMANDS, ids=' '.join)
def test_the_readme_names_every_command(name):
    assert f'cxr-fastai {" ".join(name)}' in README


def test_an_option_has_the_same_help_in_every_command():
    helps: dict[str, set[str]] = {}
    for command in COMMANDS.values():
        for parameter in command.params:
            if hasattr(parameter, 'help') and parameter.opts[0].startswith('--'):
                helps.setdefault(parameter.opts[0], set()).add(parameter.help)
    assert {name for name, texts in helps.items() if len(texts) > 1} <= PATH_OPTIONS


def test_the_help_of_an_option_is_a_sentence():
    for command in COMMANDS.values():
        for parameter in command.params:
            help_text = parameter.help
            assert help_text[0].isupper() or help_text.split()[0].isalnum(), help_text
            assert help_text.endswith('.'), help_text


@pytest.mark.parametrize('name', [(), ('data',), *COMMANDS], ids=' '.join)
def test_the_help_says_what_an_option_takes_and_invents_no_default(name, capsys):
    assert main([*name, '--help']) == 0
    text = capsys.readouterr().out
    assert not re.search(r'^│ --.*<(str|int|float|bool)>|none\)\]|\[default: \]', text, re.MULTILINE)


@pytest.mark.parametrize('name', COMMANDS, ids=' '.join)
def test_the_help_fills_the_lines_of_the_terminal(name):
    paragraphs = COMMANDS[name].help.split('\n\n')
    assert all('\n' not in paragraph for paragraph in paragraphs)


@pytest.mark.parametrize(
    ('option', 'choices'),
    [
        (options.Resize, RESIZES),
        (options.EngineKind, ENGINES),
        (options.Origin, SOURCES),
        (training_options.Track, TRACKERS),
    ],
)
def test_the_choices_in_the_help_are_those_of_the_library(option, choices):
    assert option.__metadata__[0].metavar.split('|') == list(choices)


def test_a_misspelt_option_command_or_network_gets_a_suggestion(capsys, images):
    assert main(['train', '--epoch', '3']) == 2
    assert '--epochs' in capsys.readouterr().err
    assert main(['predit']) == 2
    assert "'predict'" in capsys.readouterr().err
    assert main(['train', '--data', str(images), '--arch', 'resnet5O']) == 2
    assert '--arch resnet5O is unknown (did you mean resnet50?)' in capsys.readouterr().err


@pytest.mark.parametrize('arch', ARCHS)
def test_the_help_of_arch_names_every_architecture(arch):
    assert arch in training_options.Arch.__metadata__[0].help


@pytest.mark.parametrize('words', [['-h'], ['evaluate', '-h'], ['data', 'audit', '-h']])
def test_the_help_has_a_short_option(words, capsys):
    assert main(words) == 0
    assert 'Usage:' in capsys.readouterr().out


def test_other_spellings_of_splits_and_classes_are_understood(evaluated, images, tmp_path, capsys):
    assert main(['evaluate', str(evaluated.path), '--split', 'nowhere']) == 2
    assert '--split nowhere: no such split. Choose train, valid, test, shift' in capsys.readouterr().err
    image = next(images.rglob('*.jpeg'))
    assert main(['explain', str(evaluated.path), str(image), '--target', 'normal', '--out', str(tmp_path / 'e')]) == 0


def test_val_is_the_split_valid(evaluated, tmp_path, images):
    run = shutil.copytree(evaluated.path, tmp_path / 'run')
    assert main(['evaluate', str(run), '--data', str(images), '--split', 'val']) == 0


@pytest.mark.parametrize('words', [['predict', 'bundle', ''], ['train', '--data', ''], ['export', 'run', '--out', ' ']])
def test_an_empty_argument_is_not_the_current_folder(words, capsys):
    assert main(words) == 2
    assert f'the argument after {words[-2]} is empty' in capsys.readouterr().err
