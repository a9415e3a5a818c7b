from .auditing import Audit, Finding, audit, save_audit
from .find import find_images, list_images, shown_path
from .items import data_root, describe_items, image_root, parse_name, read_items, read_table
from .loaders import CXRDataLoaders, cxr_block, find_preprocessing, locate
from .sources import SOURCES, Source, download
from .splits import (
    check_leakage,
    check_trainable,
    count_images,
    split_patients,
    unknown_patients,
    unknown_patients_warning,
    validation_warning,
)
from .transforms import AugmentImages

__all__ = [
    'Audit',
    'AugmentImages',
    'CXRDataLoaders',
    'Finding',
    'SOURCES',
    'Source',
    'audit',
    'check_leakage',
    'check_trainable',
    'count_images',
    'cxr_block',
    'data_root',
    'describe_items',
    'download',
    'find_images',
    'find_preprocessing',
    'image_root',
    'list_images',
    'locate',
    'parse_name',
    'read_items',
    'read_table',
    'save_audit',
    'shown_path',
    'split_patients',
    'unknown_patients',
    'unknown_patients_warning',
    'validation_warning',
]
