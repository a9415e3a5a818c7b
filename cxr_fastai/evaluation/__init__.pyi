from .combining import Combination, combine
from .comparison import compare, compare_runs, same_images
from .cross_validation import evaluate_folds
from .curves import plot_calibration, plot_net_benefit, plot_precision_recall, plot_risk_coverage, plot_roc, plot_scores
from .evaluation import Evaluation, evaluate
from .figures import evaluate_and_draw, save_figures, typical_correct, worst_errors
from .intervals import auc_interval, format_estimate, wilson_interval
from .label_review import LabelReview, rank_labels, review_labels
from .metrics import measure
from .out_of_fold import adopt_out_of_fold
from .plots import plot_confusion_matrix, plot_history, plot_robustness
from .robustness import evaluate_robustness, measure_robustness, summarise
from .shift import evaluate_shift, measure_shift
from .thresholds import decide, threshold_table

__all__ = [
    'Combination',
    'Evaluation',
    'LabelReview',
    'adopt_out_of_fold',
    'auc_interval',
    'combine',
    'compare',
    'compare_runs',
    'decide',
    'evaluate',
    'evaluate_and_draw',
    'evaluate_folds',
    'evaluate_robustness',
    'evaluate_shift',
    'format_estimate',
    'measure',
    'measure_robustness',
    'measure_shift',
    'plot_calibration',
    'plot_confusion_matrix',
    'plot_history',
    'plot_net_benefit',
    'plot_precision_recall',
    'plot_risk_coverage',
    'plot_robustness',
    'plot_roc',
    'plot_scores',
    'rank_labels',
    'review_labels',
    'same_images',
    'save_figures',
    'summarise',
    'threshold_table',
    'typical_correct',
    'wilson_interval',
    'worst_errors',
]
