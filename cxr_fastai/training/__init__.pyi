from .learner import make_learner
from .lr_finder import Rates, find_rates
from .training import fit, train

__all__ = [
    'Rates',
    'find_rates',
    'fit',
    'make_learner',
    'train',
]
