"""What large bases take on cards of several sizes: the levers that a plan chooses, and the peak it expects.

    python -m benchmarks.large_bases [--vram 12 16 24] [--method recare esd] [BASE …]

Counted, not measured: configurations are read, of well-known ids those in the package, and no weights.
"""

from __future__ import annotations

import argparse

from recare_patch.core import RecarePatchError
from recare_patch.erasure import choose, plan, resolve_recipe
from recare_patch.models import find_layout, measure

BASES = (
    "stabilityai/stable-diffusion-3.5-medium",
    "black-forest-labs/FLUX.2-klein-base-4B",
    "Tongyi-MAI/Z-Image",
    "black-forest-labs/FLUX.1-dev",
    "Qwen/Qwen-Image",
)


def main() -> None:
    """Print a row for each base, method and card."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bases", nargs="*", default=list(BASES))
    parser.add_argument("--vram", nargs="+", type=float, default=[12, 16, 24])
    parser.add_argument("--method", nargs="+", default=["recare", "esd"])
    given = parser.parse_args()
    heads = ("base", "parameters: denoiser, text encoders", "method", "card", "levers", "peak expected")
    print(f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|")
    for base in given.bases:
        words = {"base": base, "kind": "style", "device": "cpu"}
        recipes = {
            one: resolve_recipe("Van Gogh", overrides={"method": one, "precision": "bf16"}, **words)
            for one in given.method
        }
        found = measure(find_layout(base, weights=False)[0], next(iter(recipes.values())))
        sizes = f"{found.denoiser / found.size / 1e9:.2f} B, {found.encoders / found.size / 1e9:.2f} B"
        for method, recipe in recipes.items():
            for size in given.vram:
                try:
                    chosen, _ = choose(recipe, size, footprint=found)
                    told = chosen.memory.in_words()
                    took = f"{plan(chosen, speed=1e13, footprint=found).peak / 1e9:.1f} GB"
                except RecarePatchError as fault:
                    told, took = str(fault).partition(": ")[2], "does not fit"
                print(f"| {base} | {sizes} | {method} | {size:g} GB | {told} | {took} |", flush=True)


if __name__ == "__main__":
    main()
