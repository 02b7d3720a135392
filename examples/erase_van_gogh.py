"""Erase Van Gogh from the bundled base model, in Python.

python examples/erase_van_gogh.py --out van-gogh-patch
python examples/erase_van_gogh.py --steps-small      # seconds, for a look at the mechanics only
"""

import argparse

from recare_patch import erase, load_recipe
from recare_patch.core import RichProgress

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--out", default="van-gogh-patch")
parser.add_argument("--base", help="a pipeline folder or hub id instead of the bundled model")
parser.add_argument("--clip", help="a CLIP folder or hub id instead of the one that fits the base")
parser.add_argument("--steps-small", action="store_true", help="hardly train: shows the mechanics, erases nothing")
arguments = parser.parse_args()

recipe = load_recipe("van-gogh")
changes = {key: value for key, value in (("base", arguments.base), ("clip", arguments.clip)) if value}
if arguments.steps_small:
    changes |= {
        "target_images.count": 4,
        "target_images.steps": 2,
        "search.rounds": 1,
        "search.erase_steps": 1,
        "search.inversion_steps": 1,
        "erase.steps": 2,
        "erase.retained_images": 2,
    }

with RichProgress() as progress:
    result = erase(recipe.with_overrides(changes), arguments.out, progress=progress)

print(f"patch: {result.folder}")
print(f"kept on purpose: {', '.join(result.care_set.words) if result.care_set else 'nothing'}")
print(f"denoiser evaluations: {result.cost['denoiser_evaluations']:,}")
