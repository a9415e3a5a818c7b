from .errors import CXRError, CXRWarning, ImageError, OutputError, Stopped, UsageError
from .progress import in_threads, progress_bar
from .recipe import POSITIVE, VOCAB, Phase, Recipe
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
    'progress_bar',
]
