from .errors import CXRError, CXRWarning, ImageError, OutputError, Stopped, UsageError
from .progress import in_threads, progress
from .recipe import POSITIVE, Phase, Recipe, VOCAB
from .run import Run

__all__ = [
    'CXRError',
    'CXRWarning',
    'ImageError',
    'OutputError',
    'POSITIVE',
    'Phase',
    'Recipe',
    'Run',
    'Stopped',
    'UsageError',
    'VOCAB',
    'in_threads',
    'progress',
]
