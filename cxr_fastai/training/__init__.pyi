from .learner import CXRLearner, cxr_learner, recipe_learner
from .lr_finder import Rates, find_rates
from .saving import save_run
from .training import train

__all__ = [
    'CXRLearner',
    'Rates',
    'cxr_learner',
    'find_rates',
    'recipe_learner',
    'save_run',
    'train',
]
