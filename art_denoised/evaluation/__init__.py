"""Certify and attack data sets, and check that the results are reliable."""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
