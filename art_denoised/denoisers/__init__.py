"""Denoisers: networks that implement ``denoiser(x_noisy, sigma) -> x_hat``, and checkpoints."""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
