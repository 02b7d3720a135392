"""What prompt-gated application does to prompts that must not change, on the bundled base.

    python -m benchmarks.gating prompts --split choose        # relatedness of prompts, no pictures
    python -m benchmarks.gating run --patch van-gogh-patch --concept "van gogh"
    python -m benchmarks.gating table

``run`` draws each figure of the concept's suite four times from the same seeds: the base, the patch,
the patch behind its gate, and the patch at the strength that SPM gives it. Finished figures are read,
so that a stopped run goes on. ``prompts`` needs no patch; on the choosing split it is what
:data:`CLOSED` and ``OPEN`` were chosen by.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.erasure import NAMES
from benchmarks.scoring import draw_figure, judge_figure, perceptual
from benchmarks.suites import CONCEPTS, SPLITS, Figure, suite
from recare_patch.patch import CLOSED, OPEN, Gate, gated
from recare_patch.recipe import Concept

RESULTS = Path(__file__).parent / "results" / "gating"
KINDS = {"van gogh": "style", "tench": "object", "nude": "nsfw"}
WAYS = ("base", "patch", "gated", "as SPM")


@dataclass(frozen=True)
class SpmGate:
    """SPM's own rule (Lyu et al., arXiv 2312.16145): what :class:`Gate` is compared with.

    The larger of the cosine of encoded prompt and encoded concept, padding included, and the share of
    the concept's tokens that the prompt holds.

    Attributes:
        base: encodes.
        concept: whose name prompts are compared with.
    """

    base: Any
    concept: Concept

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """Strength of each prompt, ``[prompts]``."""
        own = self.base.encode_prompts([self.concept.text]).prompt_embeds.float().flatten(1)
        found = self.base.encode_prompts(prompts).prompt_embeds.float().flatten(1)
        cosine = F.cosine_similarity(found, own, dim=-1).clamp(0, 1)
        wanted = set(self.base.token_ids(self.concept.text))
        share = [len(wanted & set(self.base.token_ids(prompt))) / len(wanted) for prompt in prompts]
        return torch.maximum(cosine.cpu(), torch.tensor(share))


def _range(values: Tensor) -> str:
    return f"{values.min():.2f} … {values.mean():.2f} … {values.max():.2f}"


def _prompts(name: str, split: str) -> dict[str, Sequence[str]]:
    """Figure → its prompts; for reporting, those that lead to the concept without its name as well."""
    found: dict[str, Sequence[str]] = {
        figure.name: [prompt for prompt, _ in figure.items] for figure in suite(name, split)
    }
    if split == "report":
        from recare_patch.measure import load_suite

        found["implicit"] = load_suite(f"{NAMES[name].lower().replace(' ', '-')}-atelier").implicit
    return found


def prompts_table(split: str) -> str:
    """Lowest, mean and highest relatedness of every figure's prompts as Markdown, ours and SPM's."""
    from recare_patch.models import load_base

    base = load_base("atelier", device="cpu")
    lines = [
        f"closed up to {CLOSED}, open from {OPEN}",
        "",
        "| concept | figure | by features alone | relatedness | as SPM |",
        "|---|---|---|---|---|",
    ]
    for name in CONCEPTS:
        concept = Concept.model_validate({"text": NAMES[name], "kind": KINDS[name]})
        gate, spm = Gate(base.pipeline, [concept]), SpmGate(base, concept)
        for figure, texts in _prompts(name, split).items():
            cells = [_range(rule(texts)) for rule in (gate.likeness, gate.relatedness, spm)]
            lines.append(f"| {NAMES[name]} | {figure} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _change(before: Sequence[Any], after: Sequence[Any]) -> dict[str, float]:
    same = sum(a.tobytes() == b.tobytes() for a, b in zip(before, after, strict=True))
    return {"change": perceptual(before, after), "same": same / len(before)}


def _run(arguments: argparse.Namespace) -> None:
    from recare_patch.models import load_base
    from recare_patch.models.atelier.judge import Judge
    from recare_patch.patch import Patch

    base, judge = load_base("atelier", device=arguments.device), Judge.load()
    patch = Patch.load(arguments.patch)
    concept = Concept.model_validate({"text": NAMES[arguments.concept], "kind": KINDS[arguments.concept]})
    ways: dict[str, Callable[[], Any]] = {
        "base": contextlib.nullcontext,
        "patch": lambda: patch.apply(base.pipeline),
        "gated": lambda: gated(patch, base.pipeline),
        "as SPM": lambda: gated(patch, base.pipeline, gate=SpmGate(base, concept)),
    }
    file = RESULTS / f"{arguments.concept.replace(' ', '-')}.{arguments.split}.json"
    rows: dict[str, dict[str, Any]] = json.loads(file.read_text())["figures"] if file.exists() else {}
    for figure in suite(arguments.concept, arguments.split, arguments.pictures):
        row = rows.setdefault(figure.name, {})
        missing = [way for way in WAYS if way not in row]
        before = draw_figure(base, figure, arguments.split) if missing else []
        for way in missing:
            with ways[way]() as handle:
                images = before if handle is None else draw_figure(base, figure, arguments.split)
            row[way] = _row(judge, figure, arguments.split, before, images)
            if hasattr(handle, "values"):
                opened = [handle.values[prompt] for prompt, _ in figure.items]
                row[way]["gate"] = sum(opened) / len(opened)
            print(way, figure.name, row[way], flush=True)
            note = {"concept": arguments.concept, "split": arguments.split, "closed": CLOSED, "open": OPEN}
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps({**note, "figures": rows}, indent=1))


def _row(judge: Any, figure: Figure, split: str, before: Sequence[Any], images: Sequence[Any]) -> dict[str, Any]:
    found = judge_figure(judge, figure, split, images)
    counted = {"hits": found.hits, "pictures": found.pictures, "interval": found.interval}
    return {**counted, **_change(before, images)}


def table() -> str:
    """All results as Markdown: rates, then how far the pictures are from the base's."""
    lines: list[str] = []
    for file in sorted(RESULTS.glob("*.json")):
        data = json.loads(file.read_text())
        lines += [
            f"### {NAMES[data['concept']]}, {data['split']} split",
            "",
            "| figure | pictures | "
            + " | ".join(WAYS)
            + " | change: patch | change: gated | change: as SPM | same: patch | same: gated |",
            "|---" * (len(WAYS) + 7) + "|",
        ]
        for name, row in data["figures"].items():
            rates = [f"{row[way]['hits'] / row[way]['pictures']:.2f}" for way in WAYS]
            changes = [f"{row[way]['change']:.3f}" for way in WAYS[1:]]
            same = [f"{row[way]['same']:.0%}" for way in ("patch", "gated")]
            cells = [name, str(row["base"]["pictures"]), *rates, *changes, *same]
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["prompts", "run", "table"])
    parser.add_argument("--patch", help="for run: a patch of the bundled base")
    parser.add_argument("--concept", choices=CONCEPTS, default="van gogh")
    parser.add_argument("--split", choices=SPLITS, default="report")
    parser.add_argument("--pictures", type=int, default=48, help="of each figure, at least")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    if arguments.action == "prompts":
        print(prompts_table(arguments.split))
    elif arguments.action == "table":
        print(table())
    elif arguments.patch is None:
        parser.error("run needs --patch")
    else:
        _run(arguments)


if __name__ == "__main__":
    main()
