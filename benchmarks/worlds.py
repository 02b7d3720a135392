"""Erasing on every world with one set of numbers, and a run's own two numbers against the judge's figures.

    python -m benchmarks.worlds run --world hamlet --concept "van gogh"
    python -m benchmarks.worlds run --world atelier --concept tench --row fixed --set erase.ends=steps
    python -m benchmarks.worlds table

Nothing here reads a recipe that was written for a world: every concept starts from the defaults of ``--preset quick``.
What is scored are captions that training never used, by the world's own judge, at seeds of their own: those that name
the concept (does the picture show it), those that name a companion, and those that name neither (is what they name
there). Each call leaves one JSON file in ``benchmarks/results/worlds``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.erasure import NAMES, RESULTS, assignments, made_before
from benchmarks.scoring import GUIDANCE_SCALE, SCHEDULER, STEPS
from recare_patch.core import write_json
from recare_patch.measure import wilson_interval
from recare_patch.models.atelier.judge import Judge

if TYPE_CHECKING:
    from benchmarks.atelier.training import Source
    from recare_patch.models import BaseModel
    from recare_patch.recipe import Recipe

KINDS = {"van gogh": "style", "tench": "object", "nude": "nsfw"}
FOLDER = RESULTS / "worlds"
FLOW_STEPS = 12
_FIRST_SEED = 5_000_000
_CAPTIONS = 4_001
"""Seed of the captions: apart from training's, and from the reports on the bases."""


@dataclass(frozen=True)
class World:
    """A base, what it was trained on, who judges it, and how its pictures are drawn."""

    base: str
    clip: str
    judge: Judge
    source: Source
    links: dict[str, dict[str, float]]
    steps: int = STEPS
    scheduler: str | None = SCHEDULER
    guidance_scale: float = GUIDANCE_SCALE


def world(name: str, weights: Path | None) -> World:
    """One of the worlds; ``weights`` is the folder that its trainer wrote."""
    from benchmarks.atelier import scenes as atelier
    from benchmarks.atelier.training import SOURCE

    if name == "hamlet":
        from benchmarks.hamlet import WEIGHTS
        from benchmarks.hamlet import scenes as hamlet
        from benchmarks.hamlet.report import load_judge
        from benchmarks.hamlet.training import SOURCE as HAMLET

        place = weights or WEIGHTS
        return World(str(place / "pipeline"), str(place / "clip"), load_judge(place), HAMLET, hamlet.CO_OCCURRENCE)
    base = "atelier" if name == "atelier" else str((weights or Path(name)) / "pipeline")
    plain = World(base, "atelier", Judge.load(), SOURCE, atelier.CO_OCCURRENCE)
    # A flow is drawn as its pipeline draws it.
    return replace(plain, steps=FLOW_STEPS, scheduler=None, guidance_scale=3.5) if name == "atelier-flow" else plain


def captions(source: Source, wanted: Callable[[str], bool], count: int) -> list[tuple[str, frozenset[str]]]:
    """Captions that training never used and that are wanted, each with the labels that it names."""
    rng, found = np.random.default_rng(_CAPTIONS), {}
    for _ in range(200 * count):
        scene = source.sample(rng)
        try:
            text = source.caption(scene, rng, held_out=True)
        except ValueError:
            continue
        if wanted(text):
            found.setdefault(text, frozenset(one for one in scene.labels if source.mentions(text, one)))
        if len(found) == count:
            break
    return list(found.items())


def figures(place: World, concept: str, count: int) -> dict[str, list[tuple[str, frozenset[str]]]]:
    """Figure → captions, each with the labels that a picture must show."""
    mentions, companions = place.source.mentions, list(place.links[concept])

    def named(text: str) -> bool:
        return mentions(text, concept)

    found = {"concept": [(text, frozenset({concept})) for text, _ in captions(place.source, named, count)]}
    for label in companions:
        texts = captions(place.source, lambda text, label=label: mentions(text, label) and not named(text), count)
        found[f"companion {label}"] = [(text, frozenset({label})) for text, _ in texts]
    others = captions(
        place.source, lambda text: not any(mentions(text, one) for one in (concept, *companions)), 2 * count
    )
    known = frozenset(place.source.labels.names)
    found["everything else"] = [(text, labels & known) for text, labels in others if labels & known]
    return found


def score(base: BaseModel, place: World, concept: str, count: int) -> dict[str, tuple[int, int]]:
    """Figure → hits and looks, of the model as it stands."""
    from recare_patch.models import scheduled

    found = {}
    for figure, rows in figures(place, concept, count).items():
        seeds = [_FIRST_SEED + k for k in range(len(rows))]
        with scheduled(base.pipeline, place.scheduler):
            texts = [text for text, _ in rows]
            images = base.generate(texts, seeds, steps=place.steps, guidance_scale=place.guidance_scale, batch_size=16)
        seen = place.judge(images)
        hits = [label in shown for (_, labels), shown in zip(rows, seen, strict=True) for label in labels]
        found[figure] = (sum(hits), len(hits))
        print(f"  {figure:28} {sum(hits)} of {len(hits)}", flush=True)
    return found


def _recipe(place: World, arguments: argparse.Namespace) -> Recipe:
    from recare_patch.models import defaults_for
    from recare_patch.recipe import Concept, Recipe, preset_overrides

    told, asked = assignments(arguments.set), defaults_for(place.base, "cpu")
    method = told.get("method")
    concept = Concept(text=NAMES[arguments.concept], kind=KINDS[arguments.concept])
    plain = asked.under({"concept": concept.model_dump(), "base": place.base, "clip": place.clip}, method)
    drawn = {} if place.scheduler else {"steps": place.steps, "scheduler": None, "guidance_scale": place.guidance_scale}
    drawn = {f"target_images.{key}": value for key, value in drawn.items()}
    changes = {**asked.preset(preset_overrides(arguments.preset)), **drawn, **asked.unsaid(method), **told}
    return Recipe(**plain).with_overrides(changes)


def _run(arguments: argparse.Namespace) -> None:
    from recare_patch.careset import Clip
    from recare_patch.erasure import erase
    from recare_patch.models import load_base
    from recare_patch.patch import Patch

    place = world(arguments.world, arguments.weights)
    base, file = load_base(place.base, device="cpu"), f"{arguments.world}.{arguments.concept.replace(' ', '-')}"
    plain = FOLDER / f"{file}.base.json"
    if not plain.exists():
        write_json(plain, {"scores": score(base, place, arguments.concept, arguments.pictures)})
    if arguments.row == "base":
        return
    recipe = _recipe(place, arguments)
    out = Path(arguments.work) / f"{file}-{arguments.row}"
    if not made_before(out, recipe):
        erase(recipe, out, device="cpu", resume=out.exists(), base=base, clip=Clip.load(place.clip))
    patch, cost = Patch.load(out), json.loads((out / "training.json").read_text(encoding="utf-8"))
    care = out / "care_set.json"  # Not of every method.
    words = json.loads(care.read_text(encoding="utf-8"))["tokens"] if care.exists() else []
    with patch.apply(base.pipeline) if patch else nullcontext():
        scores = score(base, place, arguments.concept, arguments.pictures)
    kept = [token["text"] for token in words if token["kept"]]
    keys = ("denoiser_evaluations", "seconds", "measured", "seen", "warnings")
    row = {"scores": scores, "care_set": kept, **{key: cost.get(key) for key in keys}}
    write_json(FOLDER / f"{file}.{arguments.row}.json", row)
    print(kept, cost["denoiser_evaluations"], cost.get("measured"), cost["warnings"], flush=True)


def _share(found: Sequence[int], base: Sequence[int]) -> float:
    """Of the untouched base's rate."""
    return found[0] / found[1] / (base[0] / base[1])


def _cell(found: Sequence[int], base: Sequence[int] | None) -> str:
    hits, looks = found
    low, high = wilson_interval(hits, looks)
    share = f" = {_share(found, base):.0%}" if base and base[0] else ""
    return f"{hits / looks:.2f} ({low:.2f}–{high:.2f}){share}"


def _table() -> None:
    print("| world | concept | row | still shown | companions | everything else | gone | drift | evaluations |")
    print("|---" * 9 + "|")
    points: list[tuple[float, float, float, float]] = []
    for plain in sorted(FOLDER.glob("*.base.json")):
        name, concept, _, _ = plain.name.split(".")
        base = json.loads(plain.read_text())["scores"]
        for file in sorted(FOLDER.glob(f"{name}.{concept}.*.json")):
            row = json.loads(file.read_text())
            scores, own = row["scores"], file != plain
            sums = [
                [sum(x) for x in zip(*(s[k] for k in s if k.startswith("companion")), strict=True)]
                for s in (scores, base)
            ]
            measured: dict[str, Any] = row.get("measured") or {}
            cells = [
                _cell(scores["concept"], None),
                _cell(sums[0], sums[1] if own else None),
                _cell(scores["everything else"], base["everything else"] if own else None),
                *(f"{measured[key]:.2f}" if key in measured else "–" for key in ("gone", "drift")),
                f"{row['denoiser_evaluations']:,}" if own else "–",
            ]
            print(f"| {name} | {concept} | {file.name.split('.', 2)[2][:-5]} | " + " | ".join(cells) + " |")
            if measured:
                # Worlds differ in what their untouched base draws: kept are shares of that.
                rate = scores["concept"]
                kept = _share(scores["everything else"], base["everything else"]), _share(*sums)
                points.append((measured["gone"], rate[0] / rate[1], measured["drift"], sum(kept) / 2))
    if len(points) > 3:
        gone, shown, drift, kept = np.array(points).T
        print(f"\nOver {len(points)} runs: correlation of gone with still shown {np.corrcoef(gone, shown)[0, 1]:.2f},")
        print(f"of drift with what is kept {np.corrcoef(drift, kept)[0, 1]:.2f}.")


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["run", "table"])
    parser.add_argument("--world", choices=["atelier", "atelier-xl", "atelier-flow", "hamlet"], default="atelier")
    parser.add_argument("--weights", type=Path, help="folder of the trained world")
    parser.add_argument("--concept", choices=list(KINDS), default="van gogh")
    parser.add_argument("--row", default="measured", help="name of the row; base: the untouched base alone")
    parser.add_argument("--preset", default="quick")
    parser.add_argument("--pictures", type=int, default=48, help="captions a figure")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--work", default="benchmark-runs")
    arguments = parser.parse_args()
    if arguments.action == "table":
        _table()
    else:
        _run(arguments)


if __name__ == "__main__":
    main()
