"""Reports: results of attack and certify runs, as tables, plots, a page, JSON or TSV."""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
