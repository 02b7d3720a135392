"""One patch on several models: does it hold on the checkpoint that is really run?

Each checkpoint is its own base: what it draws is held against what it draws under the patch. What does not fit is
said before anything is drawn.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recare_patch.careset import default_clip
from recare_patch.core import EvaluationError, IncompatiblePatchError, RecarePatchError, write_text
from recare_patch.measure.board import EMPTY, Cell, figure_cell, figure_in, names_in, write_board
from recare_patch.measure.evidence import Evidence, worst_erased, worst_kept
from recare_patch.measure.run import evaluate
from recare_patch.measure.suites import own_recipe, resolve_suite
from recare_patch.models import find_layout, phantom
from recare_patch.patch import REPORT_NAME, Patch
from recare_patch.recipe import slug_of

TRANSFER_NAME, PAGE_NAME = "transfer.json", "transfer.html"
VERSION = 1

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Transfer:
    """A patch on several models.

    Attributes:
        evidence: by the model's title, in the order in which they were named.
        faults: why the others do not fit, by their titles.
    """

    patch: str
    sha256: str
    evidence: Mapping[str, Evidence]
    faults: Mapping[str, str]
    folder: Path


def transfer(patch: Patch | Path | str, on: Sequence[str | Path], *, out: Path | str, **how: Any) -> Transfer:
    """Evaluate a patch on each of several models, and put the figures into one table.

    Args:
        patch: the patch's folder or file, or a patch loaded from one.
        on: folders, single files, hub ids or "atelier".
        out: the folder, with one for each model in it.
        how: other arguments of :func:`evaluate`, but for ``base`` and ``attacks``.

    Raises:
        IncompatiblePatchError: it fits none of them.
        RecarePatchError: see :func:`evaluate`.
    """
    loaded, folder = patch if isinstance(patch, Patch) else Patch.load(patch), Path(out).expanduser()
    fitting, faults = _checked(loaded, on)
    for title, fault in faults.items():
        logger.warning("%s is left out: %s", title, fault)
    if not fitting:
        raise IncompatiblePatchError(next(iter(faults.values())))
    if loaded.metadata is not None:
        # One suite and one pair of eyes for all, those of the patch's own base: a fine-tune's name tells neither.
        own, recipe = loaded.metadata.base, own_recipe(loaded)
        how["clip"] = how.get("clip") or (recipe and recipe.clip) or default_clip(own)
        how["suite"] = how.get("suite") or resolve_suite(loaded, None, own, concept=how.get("concept"))
    found: dict[str, Evidence] = {}
    for title, source in fitting.items():
        # Attacks beside the patch were run on its own base, and say nothing of this one.
        found[title] = evaluate(loaded, base=source, out=folder / slug_of(title), attacks=(), **how)
        _write(made := Transfer(loaded.name, loaded.sha256(), found, faults, folder))
    return made


def _checked(patch: Patch, on: Sequence[str | Path]) -> tuple[dict[str, str], dict[str, str]]:
    """Title → source of those that a patch fits, by their configurations alone, and title → fault of the others."""
    if not on:
        raise EvaluationError("there is no model to evaluate on: name one at least")
    fitting, faults = dict[str, str](), dict[str, str]()
    for source in map(str, on):
        title = Path(source).stem if Path(source).is_file() else source
        try:
            layout, title = find_layout(source)
            patch.check_shapes(phantom(layout, "fp32").components, f"base '{title}'")
        except RecarePatchError as fault:
            faults[source] = str(fault)
            continue
        number, name = 2, title
        while slug_of(name) in map(slug_of, fitting):
            name, number = f"{title} {number}", number + 1
        fitting[name] = source
    return fitting, faults


def table(found: Transfer) -> list[list[str]]:
    """Figures down, models across, each with its own base's value beside it; the first row is the head."""
    figures, _ = names_in(list(found.evidence.values()))
    rows = [["", *(f"{title} {side}" for title in found.evidence for side in ("base", "patched"))]]
    for name in figures:
        own = [figure_in(one, name) for one in found.evidence.values()]
        rows.append([name, *(str(figure_cell(one, base=base)) for one in own for base in (True, False))])
    return rows


def _write(found: Transfer) -> None:
    """``transfer.json`` and the page."""
    figures, _ = names_in(list(found.evidence.values()))
    rows = []
    for title, one in found.evidence.items():
        where = f"{slug_of(title)}/{REPORT_NAME}"
        same = figure_cell(worst_erased(one))
        lost = worst_kept(one)
        row = [Cell(title, link=where), same, Cell(lost.name, order=lost.patched) if lost else EMPTY]
        for name in figures:
            figure = figure_in(one, name)
            row += [figure_cell(figure, base=True), figure_cell(figure)]
        rows.append(row)
    for title, fault in found.faults.items():
        rows.append([Cell(title, "does not fit: " + fault), *(EMPTY for _ in range(2 + 2 * len(figures)))])
    first = next(iter(found.evidence.values()))
    sides = [f"{name}, {side}" for name in figures for side in ("base", "patched")]
    write_board(
        found.folder / PAGE_NAME,
        f"{first.concept}, erased by one patch from {len(found.evidence)} models",
        ["model", "worst", "lost most", *sides],
        rows,
        eyebrow="Transfer",
        facts=" · ".join(
            filter(None, [first.kind, first.method, str(first.suite.get("name", "")), first.created[:10]])
        ),
        notes=["Each model is its own base, at the same prompts and seeds. Intervals are 95 %, of rates Wilson's."],
    )
    told = [{"model": title, "evidence": one.to_dict()} for title, one in found.evidence.items()]
    faults = [{"model": title, "fault": fault} for title, fault in found.faults.items()]
    note = {"version": VERSION, "kind": "transfer", "patch_sha256": found.sha256, "models": [*told, *faults]}
    write_text(found.folder / TRANSFER_NAME, json.dumps(note, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
