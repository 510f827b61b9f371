"""Purification: noise an image, run a diffusion model backwards, and classify what comes out."""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
