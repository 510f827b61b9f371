"""A certified leaderboard: entries that anyone can recompute from their votes."""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
