"""A base through its own class and through the general way: seconds of each, and how far apart they predict.

python -m benchmarks.captured [--base FOLDER] [--repeats 20]
"""

from __future__ import annotations

import argparse
import functools
import math
import time
from collections.abc import Callable
from typing import Any

import torch

from recare_patch.models import ATELIER, base_folder, load_base, read_layout
from recare_patch.models.captured import Captured
from recare_patch.recipe import MemoryOptions

PROMPTS = ["a painting of a house", "a cat", "a photo of a boat at night", ""]


def seconds(work: Callable[[], Any]) -> float:
    """Of the processor, for one call: what other programs take does not count."""
    began = time.process_time()
    work()
    return time.process_time() - began


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default=ATELIER)
    parser.add_argument("--repeats", type=int, default=10)
    given = parser.parse_args()
    torch.set_num_threads(1)
    folder, name = base_folder(given.base)
    layout, cpu = read_layout(folder, name), torch.device("cpu")
    ways: dict[str, Callable[[], Any]] = {
        "own class": lambda: load_base(folder, device="cpu"),
        "general": lambda: Captured.of(layout).load(layout, name, torch.float32, cpu, MemoryOptions()),
    }
    rows, made = [], []
    works: list[dict[str, Callable[[], Any]]] = []
    for way, load in ways.items():
        load()  # what is imported on the way is not counted
        began = time.process_time()
        base = load()
        loading = time.process_time() - began
        states = torch.randn((4, *base.latent_shape), generator=torch.Generator().manual_seed(0))
        at = torch.tensor([50, 300, 600, 950])
        with torch.no_grad():
            embeds = base.encode_prompts(PROMPTS)
            made.append(base.denoise(states, at, embeds))
        works.append(
            {
                "encode 4 prompts": functools.partial(base.encode_prompts, PROMPTS),
                "predict 4 states": functools.partial(base.denoise, states, at, embeds),
                "draw 4 pictures, 5 steps": lambda base=base, e=embeds: base.decode_latents(
                    base.sample_latents(e, [0, 1, 2, 3], steps=5, guidance_scale=5.0)
                ),
            }
        )
        rows.append((way, loading, dict.fromkeys(works[-1], math.inf)))
    # In turns, so that what else the machine does is shared by both.
    with torch.no_grad():
        for _ in range(given.repeats):
            for (_, _, found), own in zip(rows, works, strict=True):
                for what, work in own.items():
                    found[what] = min(found[what], seconds(work))
    print(f"| way | load | {' | '.join(rows[0][2])} |\n|---|---|{'---|' * len(rows[0][2])}")
    for way, loading, found in rows:
        print(f"| {way} | {loading:.2f} s | {' | '.join(f'{one * 1e3:.0f} ms' for one in found.values())} |")
    print(f"\nlargest difference of a prediction: {float((made[0] - made[1]).abs().max()):.1e}")


if __name__ == "__main__":
    main()
