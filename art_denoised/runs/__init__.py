"""Runs: what is written while work is done, so that nothing computed or paid for is lost."""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
