"""Fixtures that run the command line and look at its errors."""

import re
from collections.abc import Callable, Sequence

import pytest
from commandlines import small_training

from cxr_fastai.cli import main


@pytest.fixture
def fails(capsys) -> Callable[[Sequence[object], int, str], None]:
    """Runs a command and checks its exit code and that its only error line matches a pattern."""

    def run(argv: Sequence[object], code: int, pattern: str) -> None:
        assert main([str(word) for word in argv]) == code
        (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith('error: ')]
        assert re.search(pattern, error), error

    return run


@pytest.fixture
def train_argv(images, tmp_path) -> list[str]:
    """The command line of a training of one epoch on small images, into the folder `run`."""
    return small_training(images, tmp_path / 'run')
