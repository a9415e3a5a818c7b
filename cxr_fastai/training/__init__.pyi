from .extending import extend_recipe
from .learner import CXRLearner, cxr_learner, recipe_learner
from .lr_finder import Rates, find_rates
from .restoring import load_learner
from .saving import save_run
from .series import resume_series, train_folds, train_seeds
from .training import train

__all__ = [
    'CXRLearner',
    'Rates',
    'cxr_learner',
    'extend_recipe',
    'find_rates',
    'load_learner',
    'recipe_learner',
    'resume_series',
    'save_run',
    'train',
    'train_folds',
    'train_seeds',
]
