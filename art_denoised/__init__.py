"""Denoising defences for image classifiers, with certificates and honest evaluation.

The public names are listed in ``__init__.pyi``, for this module and for type checkers alike, and
are resolved when they are first used: torch alone takes a second to import, ART several.
"""

import lazy_loader as lazy

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
