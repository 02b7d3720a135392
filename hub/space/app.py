"""A Space that shows what patches change: the patches in ``patches/`` on the base that RECARE_BASE names."""

import os
from pathlib import Path

from demo import Comparison, build_interface, find_patches, launch, load_patches

from recare_patch import load_base

base = load_base(os.environ.get("RECARE_BASE", "atelier"))
patches = load_patches(find_patches(Path(__file__).parent / "patches"), base)
page = build_interface(Comparison(base, patches))

if __name__ == "__main__":
    launch(page)
