"""Any image file as one grey uint8 array, what the network sees of it, and synthetic images."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
