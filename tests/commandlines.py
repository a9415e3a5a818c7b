"""Command lines that several tests run."""

from pathlib import Path


def small_training(images: Path, run: Path, workers: int = 0) -> list[str]:
    """The command line of a training of one epoch at 48 pixels."""
    argv = ['train', '--data', images, '--out', run, '--epochs', 1, '--size', 48, '--workers', workers]
    return [str(word) for word in argv]
