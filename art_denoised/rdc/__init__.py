"""Robust diffusion classifier: likelihood maximization, then Bayes' rule, by a diffusion model."""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
