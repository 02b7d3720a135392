"""How far an optimiser can move the weights by the end of a run: ours beside what others use.

    python -m benchmarks.reach

AdamW moves an element of LoRA's B by about its rate a step, whatever the gradient's size; ΔW = α/r · B·A then moves by
at most Σ rate · α/r · √r · rms(A), where A's elements have a rms of 1/√(3·fan-in) (diffusers' and PEFT's uniform
start) or 1/√fan-in (a start with a = 1, as LECO's descendants have). In units of 1/√fan-in the width of the model drops
out: what is left is how far an output moves, in units of its input. Whole weights move by Σ rate, which is measured in
the same unit at a fan-in of 768. The settings of others are those that their repositories or papers ship.
"""

from __future__ import annotations

import math

from recare_patch.erasure.loop import learning_rate_at
from recare_patch.models import FULL_SIZE_VALUES
from recare_patch.recipe import PRESETS, Beneath, Recipe

WIDTH = 768
"""Fan-in of SD 1.x's cross-attention, for weights that are moved whole."""


def lora(moved: float, rank: int = 8, alpha: float = 8, *, wide: bool = False) -> float:
    """Of a LoRA whose rates add up to ``moved``, in units of 1/√fan-in; ``wide`` for a start with rms 1/√fan-in."""
    return moved * alpha / rank * math.sqrt(rank) / (1 if wide else math.sqrt(3))


def ours(recipe: Recipe) -> float:
    """Of a recipe's LoRA at the schedule of its run."""
    erase, adapter = recipe.erase, recipe.adapter
    moved = sum(learning_rate_at(k, erase.steps, erase.learning_rate, erase.schedule) for k in range(erase.steps))
    return lora(moved, adapter.rank, adapter.alpha)


def whole(rate: float, steps: int) -> float:
    """Of weights that are moved themselves, at a constant rate."""
    return rate * steps * math.sqrt(WIDTH)


def main() -> None:
    """Print the table."""
    plain = Recipe(concept={"text": "x", "kind": "style"})
    base = Beneath(FULL_SIZE_VALUES)
    rows = {
        "LECO (rank 4, alpha 1, 1e-4, 500 steps)": lora(1e-4 * 500, 4, 1),
        "SPM (rank 1, 1e-4, 3,000 steps, cosine to zero)": lora(1e-4 * 3000 / 2, 1, 1),
        "Concept Sliders (rank 4, alpha 1, 2e-4, 1,000 steps)": lora(2e-4 * 1000, 4, 1, wide=True),
        "ReCARE's release, stage 1 (weights, 5e-6, 200 steps)": whole(5e-6, 200),
        "ReCARE's release, stage 2 (weights, 2e-5, 200 steps)": whole(2e-5, 200),
        "ESD today (weights, 5e-5, 200 steps)": whole(5e-5, 200),
        "here, small bases": ours(plain),
    }
    full = plain.with_overrides(base.values)
    for name in (None, "quick", "robust"):
        title = f"here, full size{f', --preset {name}' if name else ''}"
        rows[title] = ours(full.with_overrides(base.preset(PRESETS[name] if name else {})))
    rows["here, SDXL (rank 4)"] = ours(full.with_overrides({"adapter.rank": 4, "adapter.alpha": 4.0}))
    search = {"erase.learning_rate": full.erase.learning_rate / 4, "erase.steps": full.search.erase_steps}
    rows["here, full size, each erasure of the search"] = ours(full.with_overrides(search))
    print("| run | reach |\n|---|--:|")
    for title, reach in rows.items():
        print(f"| {title} | {reach:.3f} |")


if __name__ == "__main__":
    main()
