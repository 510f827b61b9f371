"""Diffusion models of every family in one form: D(x_noisy, sigma, y) -> E[x | x_noisy, y]."""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
