from .bundle import Bundle
from .config import ModelConfig
from .decision import Decision
from .gate import Gate
from .pickles import load_learner, save_learner, trust
from .predictor import Predictor, prediction_table

__all__ = [
    'Bundle',
    'Decision',
    'Gate',
    'ModelConfig',
    'Predictor',
    'load_learner',
    'prediction_table',
    'save_learner',
    'trust',
]
