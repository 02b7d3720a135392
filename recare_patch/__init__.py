"""Erase a concept from a diffusion model and keep its benign companions, as a small LoRA patch.

Example:
    >>> from recare_patch import erase, load_recipe  # doctest: +SKIP
    >>> result = erase(load_recipe("van-gogh"), "van-gogh-patch")  # doctest: +SKIP
    >>> result.patch.apply(pipe, scale=1.0)  # doctest: +SKIP

``__init__.pyi`` lists what there is; torch takes seconds to import, so each name is loaded when it is first asked for.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
