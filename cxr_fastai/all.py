"""Everything a notebook needs, by one `from cxr_fastai.all import *`."""

from pathlib import Path

from cxr_fastai.core.errors import CXRError
from cxr_fastai.core.recipe import POSITIVE, VOCAB, Phase, Recipe
from cxr_fastai.core.run import Run
from cxr_fastai.core.series import Series
from cxr_fastai.data.auditing import audit, save_audit
from cxr_fastai.data.find import list_images
from cxr_fastai.data.items import data_root, image_root, read_items, read_table
from cxr_fastai.data.loaders import CXRDataLoaders, cxr_block, find_preprocessing, locate
from cxr_fastai.data.sources import download
from cxr_fastai.data.splits import count_images, split_patients
from cxr_fastai.data.transforms import AugmentImages
from cxr_fastai.evaluation.combining import combine
from cxr_fastai.evaluation.comparison import compare, same_images
from cxr_fastai.evaluation.cross_validation import evaluate_folds
from cxr_fastai.evaluation.curves import (
    plot_calibration,
    plot_net_benefit,
    plot_precision_recall,
    plot_risk_coverage,
    plot_roc,
    plot_scores,
)
from cxr_fastai.evaluation.evaluation import evaluate
from cxr_fastai.evaluation.figures import typical_correct, worst_errors
from cxr_fastai.evaluation.intervals import format_estimate
from cxr_fastai.evaluation.label_review import review_labels
from cxr_fastai.evaluation.metrics import measure
from cxr_fastai.evaluation.out_of_fold import adopt_out_of_fold
from cxr_fastai.evaluation.plots import plot_confusion_matrix, plot_history, plot_robustness
from cxr_fastai.evaluation.robustness import measure_robustness, summarise
from cxr_fastai.evaluation.shift import evaluate_shift
from cxr_fastai.evaluation.thresholds import decide
from cxr_fastai.examples import example_images, example_run, hold_out, list_held_out
from cxr_fastai.images.anatomy import ANATOMY
from cxr_fastai.images.cache import find_cache, prepare
from cxr_fastai.images.corruptions import CORRUPTIONS, corrupt
from cxr_fastai.images.decode import open_image, read_image
from cxr_fastai.images.preprocessing import Preprocessing
from cxr_fastai.images.synthetic import make_demo
from cxr_fastai.inference.bundle import Bundle
from cxr_fastai.inference.decision import Decision
from cxr_fastai.inference.pickles import save_learner
from cxr_fastai.inference.predictor import Predictor, prediction_table
from cxr_fastai.interpretation.checks import check_maps, check_run
from cxr_fastai.interpretation.explainer import Explainer, Subject
from cxr_fastai.interpretation.interpretation import CXRInterpretation
from cxr_fastai.interpretation.overlays import plot_explanation, plot_gallery, plot_mean_maps
from cxr_fastai.models.architectures import ARCHS, BaselineCNN, add_arch, build_model, make_recipe
from cxr_fastai.models.networks import create_network
from cxr_fastai.publishing.exporting import export
from cxr_fastai.publishing.reporting import report
from cxr_fastai.publishing.review_page import save_review
from cxr_fastai.training.extending import extend_recipe
from cxr_fastai.training.learner import CXRLearner, cxr_learner, recipe_learner
from cxr_fastai.training.restoring import load_learner
from cxr_fastai.training.saving import save_run
from cxr_fastai.training.series import resume_series, train_folds, train_seeds
from cxr_fastai.training.training import train

__all__ = [
    'ANATOMY',
    'ARCHS',
    'AugmentImages',
    'BaselineCNN',
    'Bundle',
    'CORRUPTIONS',
    'CXRDataLoaders',
    'CXRError',
    'CXRInterpretation',
    'CXRLearner',
    'Decision',
    'Explainer',
    'POSITIVE',
    'Path',
    'Phase',
    'Predictor',
    'Preprocessing',
    'Recipe',
    'Run',
    'Series',
    'Subject',
    'VOCAB',
    'add_arch',
    'adopt_out_of_fold',
    'audit',
    'build_model',
    'check_maps',
    'check_run',
    'combine',
    'compare',
    'corrupt',
    'count_images',
    'create_network',
    'cxr_block',
    'cxr_learner',
    'data_root',
    'decide',
    'download',
    'evaluate',
    'evaluate_folds',
    'evaluate_shift',
    'example_images',
    'example_run',
    'export',
    'extend_recipe',
    'find_cache',
    'find_preprocessing',
    'format_estimate',
    'hold_out',
    'image_root',
    'list_held_out',
    'list_images',
    'load_learner',
    'locate',
    'make_demo',
    'make_recipe',
    'measure',
    'measure_robustness',
    'open_image',
    'plot_calibration',
    'plot_confusion_matrix',
    'plot_explanation',
    'plot_gallery',
    'plot_history',
    'plot_mean_maps',
    'plot_net_benefit',
    'plot_precision_recall',
    'plot_risk_coverage',
    'plot_robustness',
    'plot_roc',
    'plot_scores',
    'prediction_table',
    'prepare',
    'read_image',
    'read_items',
    'read_table',
    'recipe_learner',
    'report',
    'resume_series',
    'review_labels',
    'same_images',
    'save_audit',
    'save_learner',
    'save_review',
    'save_run',
    'split_patients',
    'summarise',
    'train',
    'train_folds',
    'train_seeds',
    'typical_correct',
    'worst_errors',
]
