"""The mined CARE-sets against the true co-occurrence of the bundled base's world.

    python -m benchmarks.care_sets

Target images are drawn by the base as ``erase`` draws them. A mined word is right if it names (in any
synonym) a companion of the concept in the drawn world, or what is drawn with such a companion; a
companion is found if any of its synonyms is kept.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable

from benchmarks.atelier.captions import synonyms
from benchmarks.atelier.scenes import CO_OCCURRENCE
from benchmarks.erasure import NAMES
from benchmarks.suites import CONCEPTS
from recare_patch.careset import CareSet, Clip, build_care_set
from recare_patch.erasure import resolve_recipe, target_seeds
from recare_patch.models import load_base

COMPANIONS = {
    concept: (*links, *(("person",) if concept == "nude" else ())) for concept, links in CO_OCCURRENCE.items()
}
ALLIED = {"van gogh": ("moon", "wheat field"), "tench": ("boat",), "nude": ()}
"""Not listed as companions, but at home beside them: the moon belongs to the night, the boat to the water."""


def _words(labels: Iterable[str]) -> set[str]:
    return {word.lower() for label in labels for phrase in synonyms(label) for word in phrase.split()}


def judge(care_set: CareSet, concept: str) -> tuple[float, float, float, list[str], list[str]]:
    """Precision without and with allied words, recall over companions, wrong words, missed companions."""
    strict = _words(COMPANIONS[concept])
    wide = strict | _words(ALLIED[concept])
    kept = list(care_set.words)
    right, allied = [w for w in kept if w in strict], [w for w in kept if w in wide]
    missed = [label for label in COMPANIONS[concept] if not _words([label]) & set(kept)]
    count = max(1, len(kept))
    recall = 1 - len(missed) / len(COMPANIONS[concept])
    return len(right) / count, len(allied) / count, recall, [w for w in kept if w not in wide], missed


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1, help="runs a concept")
    arguments = parser.parse_args()
    base, clip = load_base("atelier", device="cpu"), Clip.load("atelier")
    print("| concept | variant | precision | with allied | companions found | kept | wrong | missed |")
    print("|---" * 8 + "|")
    for concept in CONCEPTS:
        for seed in range(arguments.seeds):
            recipe = resolve_recipe(NAMES[concept], overrides={"seed": seed})
            options = recipe.target_images
            embeds = base.encode_prompts([recipe.concept.target_prompt] * options.count)
            latents = base.sample_latents(
                embeds, target_seeds(recipe), options.steps, options.guidance_scale, options.batch_size
            )
            images = base.decode_latents(latents)
            for variant, changes in (
                ("full", {}),
                ("no refinement", {"refinement": False}),
                ("no clustering", {"clustering": False}),
                ("neither", {"refinement": False, "clustering": False}),
            ):
                settings = recipe.care_set.model_copy(update=changes)
                found = build_care_set(recipe.concept, images, clip, settings, seed=seed)
                strict, allied, recall, wrong, missed = judge(found, concept)
                print(
                    f"| {NAMES[concept]} ({seed}) | {variant} | {strict:.2f} | {allied:.2f} | {recall:.2f} | "
                    f"{', '.join(found.words)} | {', '.join(wrong) or '–'} | {', '.join(missed) or '–'} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
