"""How well the forecast of collateral agrees with what is then measured, over all words of the bundled base.

    python -m benchmarks.forecast --concept "van gogh" --method closed     # tench, nude; --method recare
    python -m benchmarks.forecast table

For each word that the base's captions use and that does not name the concept: by how much the closed form moves what
values make of it (the forecast, see :mod:`recare_patch.erasure.forecast`), and by how much the patch then moves its
pictures: the mean squared difference of clean latents at equal seeds, beside that of two pictures of other seeds. The
figure is Spearman's rank correlation.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.scoring import GUIDANCE_SCALE, SCHEDULER, STEPS

RESULTS = Path(__file__).parent / "results" / "forecast"
EACH, FIRST_SEED = 4, 5_000_000


def _words(but: set[str]) -> list[str]:
    from benchmarks.atelier.captions import synonyms
    from recare_patch.models.atelier.judge import LABELS

    found = dict.fromkeys(form for label in LABELS if label not in but for form in synonyms(label))
    return [word for word in found if not but & set(word.lower().split())]


def measure(concept: str, method: str) -> dict[str, Any]:
    """Forecast and measurement of every word, and their rank correlation."""
    from scipy.stats import spearmanr

    from benchmarks.erasure import KINDS, NAMES
    from recare_patch.careset import Clip, default_clip
    from recare_patch.erasure import erase, forecast, resolve_recipe
    from recare_patch.models import load_base, scheduled

    base = load_base("atelier")
    clip = Clip.load(default_clip("atelier"), device=base.device)
    recipe = resolve_recipe(NAMES[concept], kind=KINDS.get(concept), overrides={"method": method})
    told = forecast(recipe, base=base, clip=clip, most=10_000).words
    words = [word for word in _words({concept, *concept.split()}) if word in told]
    texts = [f"a photo of {word}" for word in words for _ in range(EACH)]

    def draw(first: int) -> Any:
        seeds = [first + k % EACH for k in range(len(texts))]
        with scheduled(base.pipeline, SCHEDULER):
            embeds = base.encode_prompts(texts)
            return base.sample_latents(embeds, seeds, steps=STEPS, guidance_scale=GUIDANCE_SCALE, batch_size=32)

    before, others = draw(FIRST_SEED), draw(FIRST_SEED + EACH)
    with TemporaryDirectory() as folder:
        patch = erase(recipe, Path(folder) / "patch", base=base, clip=clip, preview=False).patch
    with patch.apply(base.pipeline):
        after = draw(FIRST_SEED)

    def apart(one: Any, other: Any) -> list[float]:
        found = (one - other).square().flatten(1).mean(1).reshape(len(words), EACH).mean(1)
        return [float(value) for value in found]

    moved = [a / b for a, b in zip(apart(after, before), apart(others, before), strict=True)]
    rows = {word: [told[word], share] for word, share in zip(words, moved, strict=True)}
    correlation = spearmanr([told[word] for word in words], moved)
    return {
        "concept": concept,
        "method": method,
        "spearman": float(correlation.statistic),
        "p": float(correlation.pvalue),
        "words": rows,
    }


def _table() -> None:
    print("| concept | patch | words | Spearman's ρ | most moved, as told | most moved, as measured |")
    print("|---|---|---|---|---|---|")
    for file in sorted(RESULTS.glob("*.json")):
        row = json.loads(file.read_text(encoding="utf-8"))
        most = [sorted(row["words"], key=lambda word: -row["words"][word][k])[:4] for k in (0, 1)]
        told, seen = (", ".join(words) for words in most)
        print(f"| {row['concept']} | {row['method']} | {len(row['words'])} | {row['spearman']:.2f} | {told} | {seen} |")


def main() -> None:
    """Read the arguments and measure, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", nargs="?", default="run", choices=["run", "table"])
    parser.add_argument("--concept", default="van gogh")
    parser.add_argument("--method", default="closed")
    arguments = parser.parse_args()
    if arguments.job == "table":
        _table()
        return
    found = measure(arguments.concept, arguments.method)
    RESULTS.mkdir(parents=True, exist_ok=True)
    file = RESULTS / f"{arguments.concept.replace(' ', '-')}.{arguments.method}.json"
    file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"Spearman {found['spearman']:.2f} over {len(found['words'])} words")


if __name__ == "__main__":
    main()
