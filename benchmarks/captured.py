"""A base through its own class and through the general way: seconds of each, and how far apart they predict.

python -m benchmarks.captured [--base FOLDER] [--repeats 20]
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable
from typing import Any

import torch

from recare_patch.models import ATELIER, base_folder, load_base, read_layout
from recare_patch.models.captured import Captured
from recare_patch.recipe import MemoryOptions

PROMPTS = ["a painting of a house", "a cat", "a photo of a boat at night", ""]


def seconds(work: Callable[[], Any], repeats: int) -> float:
    """Of one call, the fastest of several."""
    found = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        found.append(time.perf_counter() - began)
    return min(found)


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
    for way, load in ways.items():
        began = time.perf_counter()
        base = load()
        loading = time.perf_counter() - began
        states = torch.randn((4, *base.latent_shape), generator=torch.Generator().manual_seed(0))
        at = torch.tensor([50, 300, 600, 950])
        with torch.no_grad():
            embeds = base.encode_prompts(PROMPTS)
            made.append(base.denoise(states, at, embeds))
            works: dict[str, Callable[[], Any]] = {
                "encode 4 prompts": lambda base=base: base.encode_prompts(PROMPTS),
                "predict 4 states": functools.partial(base.denoise, states, at, embeds),
                "draw 4 pictures, 5 steps": lambda base=base, e=embeds: base.decode_latents(
                    base.sample_latents(e, [0, 1, 2, 3], steps=5, guidance_scale=5.0)
                ),
            }
            rows.append((way, loading, {what: seconds(work, given.repeats) for what, work in works.items()}))
    print(f"| way | load | {' | '.join(rows[0][2])} |\n|---|---|{'---|' * len(rows[0][2])}")
    for way, loading, found in rows:
        print(f"| {way} | {loading:.2f} s | {' | '.join(f'{one * 1e3:.0f} ms' for one in found.values())} |")
    print(f"\nlargest difference of a prediction: {float((made[0] - made[1]).abs().max()):.1e}")


if __name__ == "__main__":
    main()
