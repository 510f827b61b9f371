"""Randomized and denoised smoothing: who samples, when to stop, what is certified."""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
