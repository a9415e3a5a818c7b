from .auditing import Audit, Finding, audit, save_audit
from .find import find_images, list_images, shown_path
from .items import data_root, describe_items, image_root, parse_name, read_items
from .loaders import cxr_block, locate, make_dls
from .sources import SOURCES, Source, download
from .splits import check_leakage, check_trainable, count_images, split_patients, validation_warning
from .transforms import AugmentImages

__all__ = [
    'Audit',
    'AugmentImages',
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
    'image_root',
    'list_images',
    'locate',
    'make_dls',
    'parse_name',
    'read_items',
    'save_audit',
    'shown_path',
    'split_patients',
    'validation_warning',
]
