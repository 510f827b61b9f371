"""The ART faces: estimators, a trainer and attacks. The only room that imports ART."""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
