from .auditing import Audit, audit, save_audit
from .find import list_images
from .items import data_root, image_root, read_items
from .loaders import cxr_block, locate, make_dls
from .sources import SOURCES, download
from .splits import check_leakage, check_trainable, count_images, split_patients
from .transforms import AugmentImages

__all__ = [
    'Audit',
    'AugmentImages',
    'SOURCES',
    'audit',
    'check_leakage',
    'check_trainable',
    'count_images',
    'cxr_block',
    'data_root',
    'download',
    'image_root',
    'list_images',
    'locate',
    'make_dls',
    'read_items',
    'save_audit',
    'split_patients',
]
