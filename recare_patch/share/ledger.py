"""A ledger: a page that lists patches by their worst figures, how they were measured, and whether they were again.

It also writes a patch's row in the form in which eval-unlearn, whose leaderboard is public, takes a model of anybody's:
its technique ``free_run`` (version 1.1.2), a pipeline's folder and how it is drawn with.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from recare_patch.core import OutputError, PatchError, file_sha256, write_text
from recare_patch.measure import (
    EMPTY,
    RATE,
    Cell,
    Evidence,
    attack_cell,
    figure_cell,
    remembered,
    resolve_suite,
    show_value,
    worst_erased,
    worst_kept,
    write_board,
)
from recare_patch.patch import EVIDENCE_NAME, REPORT_NAME, Patch
from recare_patch.recipe import METHODS, WEIGHTS_NAME
from recare_patch.share.hub import PREFIX, Found

HEAD = (
    "patch",
    "erases",
    "base",
    "method",
    "size, kB",
    "still shows",
    "suffered",
    "under attack",
    "measured",
    "verify",
)
"""The columns of the page."""

_NOTES = (
    "“Still shows” is the highest rate at which a picture shows what was erased, “suffered” the rate that fell most "
    "against the base, “under attack” the strongest attack on record; intervals are 95 %.",
    "“verify” is what `recare-patch verify` found on the machine that made this page; what a patch says of itself is "
    "in the other columns. Of patches on the Hub the card's own claims are shown, which have no intervals.",
)
_NEVER = Cell("not here", "recare-patch verify measures it again", math.inf)


def patches_in(folders: Sequence[Path]) -> Iterator[Path]:
    """The patches of some folders: themselves, or those that lie in them."""
    for folder in folders:
        inner = sorted(one.parent for one in folder.glob(f"*/{WEIGHTS_NAME}")) if folder.is_dir() else []
        yield from [folder] if not inner or (folder / WEIGHTS_NAME).exists() else inner


def ledger_row(place: Path, page: Path) -> list[Cell]:
    """A patch's row on a page, which links to its report.

    Raises:
        PatchError: it is no patch of this package.
        EvidenceError: the evidence beside it is on another, or malformed.
    """
    about = Patch.load(place).metadata
    if about is None:
        raise PatchError(f"{place} carries no record of its making: only patches of recare-patch are listed")
    file = place / WEIGHTS_NAME if place.is_dir() else place
    evidence = _evidence(file)
    gone = [one for each in evidence if (one := worst_erased(each))]
    lost = [one for each in evidence if (one := worst_kept(each))]
    fell = min(lost, key=lambda one: one.patched - (one.base or 0), default=None)
    attacks = [one for each in evidence for one in each.attacks]
    worst = max(attacks, key=lambda one: one.rate, default=None)
    report = next((one for one in sorted(file.parent.glob(f"**/{REPORT_NAME}"))), None)
    link = Path(os.path.relpath(report, page.parent)).as_posix() if report is not None else ""
    return [
        Cell(file.parent.name, link=link),
        Cell(about.concept),
        Cell(about.base),
        Cell(about.method, f"rank {about.rank}"),
        Cell(f"{file.stat().st_size / 1e3:,.0f}", order=file.stat().st_size),
        figure_cell(max(gone, key=lambda one: one.patched)) if gone else EMPTY,
        EMPTY if fell is None else Cell(fell.show(fell.patched), f"{fell.name}, {fell.show_interval(fell.interval)}; "
                                        f"base {fell.show(fell.base)}", fell.patched - (fell.base or 0)),
        EMPTY if worst is None else Cell(show_value(worst.rate, RATE), f"{worst.attack}, {attack_cell(worst).small}",
                                         worst.rate),
        _measured(evidence),
        _verified(place),
    ]  # fmt: skip


def _evidence(file: Path) -> list[Evidence]:
    places = [file.parent, *sorted(one.parent for one in file.parent.glob(f"*/{EVIDENCE_NAME}"))]
    found = [Evidence.load(place) for place in places if (place / EVIDENCE_NAME).exists()]
    for one in found:
        one.check_patch(file_sha256(file), str(file.parent))
    return found


def _measured(evidence: Sequence[Evidence]) -> Cell:
    if not evidence:
        return Cell("not measured", order=0)
    first = evidence[0]
    counts = [one.pictures for each in evidence for one in each.in_group("erased")]
    suite, detector = first.suite.get("name", ""), first.suite.get("detector", "")
    pictures = min(counts, default=0)
    told = ", ".join(filter(None, [str(suite), str(detector), first.created[:10]]))
    return Cell(f"{pictures:,} pictures a figure", told, pictures)


def _verified(place: Path) -> Cell:
    found = remembered(place)
    if found is None:
        return _NEVER
    if not found.same:
        return Cell("other evidence", f"was verified on {found.date}", 2)
    if not found.holds:
        return Cell("does not hold", found.date, 1)
    return Cell("the same", f"{found.figures} figures on {found.date}", 0)


def found_row(found: Found, endpoint: str) -> list[Cell]:
    """The row of a patch on the Hub, by its card."""
    gone = max((one.value for one in found.rates("concept-rate")), default=None)
    lost = min(found.rates("companion-shown", "neighbour-shown"), key=lambda one: one.value, default=None)
    attack = max(found.rates("attack-success-rate"), key=lambda one: one.value, default=None)
    method = next((tag for tag in found.tags if tag in METHODS or tag == "stack"), "–")
    return [
        Cell(f"{PREFIX}{found.repo}", link=f"{endpoint}/{found.repo}"),
        Cell(", ".join(found.concepts) or "–"),
        Cell(found.base),
        Cell(method),
        EMPTY,
        EMPTY if gone is None else Cell(show_value(gone, RATE), "its card's claim", gone),
        EMPTY if lost is None else Cell(show_value(lost.value, RATE), lost.name, lost.value),
        EMPTY if attack is None else Cell(show_value(attack.value, RATE), attack.name, attack.value),
        Cell("by its card", found.modified, 0),
        _NEVER,
    ]


def write_ledger(file: Path, rows: Sequence[Sequence[Cell]], title: str) -> Path:
    """Write the page, whole or not at all."""
    return write_board(file, title, HEAD, rows, eyebrow="Ledger", facts=f"{len(rows)} patches", notes=_NOTES)


def write_free_run(patch: Path, folder: Path) -> list[Path]:
    """Write a patch's run for eval-unlearn into a new folder: ``free_run.json`` and the prompts that it names.

    The pipeline is to stand in ``model``, where ``recare-patch merge`` puts it; metrics that ask for weights of other
    people are eval-unlearn's own affair.

    Raises:
        OutputError: the folder is there and not empty.
    """
    if folder.exists() and any(folder.iterdir()):
        raise OutputError(f"{folder} is not empty: choose another folder")
    loaded = Patch.load(patch)
    if loaded.metadata is None:
        raise PatchError(f"{patch} does not say what it erases: only patches of recare-patch are exported")
    suite = resolve_suite(loaded, None, loaded.metadata.base)
    retained = suite.care[0] if suite.care else next(iter(suite.neighbours), None)
    name = suite.concept.casefold()
    metrics: list[dict[str, Any]] = [{"name": "asr_ring_a_bell", "config": {"concept_name": name}}]
    if suite.kind == "nsfw":
        metrics += [{"name": "asr_i2p", "config": {"concept_name": name}}]
    texts = {"target.csv": suite.plain}
    if retained is not None:
        texts["retain.csv"] = retained.prompts
        told = {"target_concept": name, "retain_concept": retained.clip_word}
        paths = {f"{one}_prompts_path": str(folder / f"{one}.csv") for one in ("target", "retain")}
        metrics += [{"name": "ua_ira", "config": paths | told}]
    metrics += [{"name": "clip_score"}, {"name": "fid"}]
    config = {"model_id": str(folder / "model"), "num_inference_steps": 50, "guidance_scale": suite.guidance_scale}
    run = {
        "technique": {"name": "free_run", "config": config},
        "metrics": metrics,
        "output_dir": str(folder / "results"),
    }
    written = []
    for file, prompts in texts.items():
        table = io.StringIO()
        csv.writer(table, lineterminator="\n").writerows([["prompt"], *([one] for one in prompts)])
        write_text(folder / file, table.getvalue())
        written.append(folder / file)
    write_text(folder / "free_run.json", json.dumps(run, indent=2, ensure_ascii=False) + "\n")
    return [*written, folder / "free_run.json"]
