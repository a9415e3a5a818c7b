"""A model file gives probabilities: bundles, exported learners, self-test, input gate, prediction tables."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
