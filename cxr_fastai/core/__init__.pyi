from .errors import CXRError, CXRWarning, ImageError, OutputError, Stopped, UsageError
from .progress import in_threads, progress_bar
from .recipe import POSITIVE, VOCAB, Phase, Recipe
from .recipe_fields import list_fields
from .run import Run, read_recipe
from .series import Series

__all__ = [
    'CXRError',
    'CXRWarning',
    'ImageError',
    'OutputError',
    'POSITIVE',
    'Phase',
    'Recipe',
    'Run',
    'Series',
    'Stopped',
    'UsageError',
    'VOCAB',
    'in_threads',
    'list_fields',
    'progress_bar',
    'read_recipe',
]
