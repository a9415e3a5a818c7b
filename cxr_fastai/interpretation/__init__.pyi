from .checks import check_maps, check_run
from .explainer import Explainer, Subject, save_explanations
from .interpretation import CXRInterpretation
from .overlays import Explanation, plot_explanation, plot_gallery, plot_mean_maps

__all__ = [
    'CXRInterpretation',
    'Explainer',
    'Explanation',
    'Subject',
    'check_maps',
    'check_run',
    'plot_explanation',
    'plot_gallery',
    'plot_mean_maps',
    'save_explanations',
]
