"""Robustness built into a network: denoising of features and smooth activations."""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
