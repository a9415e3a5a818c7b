"""A run becomes a report, a model card, a bundle, an ONNX file or a Hub repository; predictions become DICOM files."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
