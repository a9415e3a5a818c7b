from .bundle import Bundle
from .config import ModelConfig
from .decision import Decision
from .gate import Gate
from .pickles import save_learner, trust, trust_file
from .predictor import Predictor, prediction_table
from .selftest import SelfTest
from .tables import Predictions, predict_to_table

__all__ = [
    'Bundle',
    'Decision',
    'Gate',
    'ModelConfig',
    'Predictions',
    'Predictor',
    'SelfTest',
    'predict_to_table',
    'prediction_table',
    'save_learner',
    'trust',
    'trust_file',
]
