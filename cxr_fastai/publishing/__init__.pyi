from .dicom_output import DicomFolder
from .dicom_reports import Algorithm, identify_model
from .exporting import export
from .hub import push, write_space
from .model_card import render_card
from .onnx import to_onnx
from .prediction_page import save_prediction_page
from .pretrained import publish_pretrained
from .printing import print_pdf
from .reporting import report
from .review_page import save_review
from .watched_folder import Outputs, watch_folder

__all__ = [
    'Algorithm',
    'DicomFolder',
    'Outputs',
    'export',
    'identify_model',
    'print_pdf',
    'publish_pretrained',
    'push',
    'render_card',
    'report',
    'save_prediction_page',
    'save_review',
    'to_onnx',
    'watch_folder',
    'write_space',
]
