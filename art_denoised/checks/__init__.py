"""Checks of what the user hands in, made once, at the door.

Each function returns the checked value in the form the library works with, or raises `InputError`
with one line that names the value and the remedy. The command line prints that line and exits
with 2; a library user gets a ``ValueError``.
"""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
