"""Apply a patch to a pipeline at several scales, and take it off again.

python examples/apply_in_python.py van-gogh-patch --out scales.png
"""

import argparse

from recare_patch import Patch, load_base
from recare_patch.core import SheetRow, save_sheet, sheet

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("patch")
parser.add_argument("--base", default="atelier")
parser.add_argument("--prompt", default="A painting in the style of Van Gogh")
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--out", default="scales.png")
arguments = parser.parse_args()

base = load_base(arguments.base)
patch = Patch.load(arguments.patch)
seeds = [0, 1, 2]
prompts = [arguments.prompt] * len(seeds)

rows = [SheetRow("no patch", base.generate(prompts, seeds, steps=arguments.steps))]
for scale in (0.5, 1.0):
    # On leaving the block the pipeline is what it was before.
    with patch.apply(base.pipeline, scale=scale):
        rows.append(SheetRow(f"scale {scale}", base.generate(prompts, seeds, steps=arguments.steps)))

save_sheet(sheet(rows, [f"seed {seed}" for seed in seeds], arguments.prompt), arguments.out)
print(f"sheet: {arguments.out}")
