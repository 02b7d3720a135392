"""Several patches in one, and patches in a base's weights.

``__init__.pyi`` lists what other rooms may use; each name is loaded when it is first asked for.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
