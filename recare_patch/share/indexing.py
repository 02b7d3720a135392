"""An index of patches as a Markdown table: the page of a collection."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from recare_patch.core import PatchError, file_sha256
from recare_patch.measure import RATE, Evidence, show_value, worst_erased, worst_kept
from recare_patch.patch import EVIDENCE_NAME, Patch, plain, template
from recare_patch.recipe import WEIGHTS_NAME
from recare_patch.recipe.recipe import METHODS
from recare_patch.share.hub import PREFIX
from recare_patch.share.searching import Found

_NONE = "–"


@dataclass(frozen=True)
class Row:
    """One patch.

    Attributes:
        patch: where it is: a link's text.
        link: its target.
        concept: what is erased.
        base, method: as its metadata says.
        size: of the weights, in words.
        shown: the highest rate at which the concept still shows, with the base's.
        kept: the rate that lost most, with the base's.
    """

    patch: str
    link: str
    concept: str
    base: str
    method: str = _NONE
    size: str = _NONE
    shown: str = _NONE
    kept: str = _NONE


def row_of_folder(folder: str | Path) -> Row:
    """The row of a patch on the disk; figures come from the evidence beside it.

    Raises:
        PatchError: there is no patch of this package.
        EvidenceError: its evidence cannot be read, or is of another patch.
    """
    place = Path(folder)
    patch = Patch.load(place)
    about = patch.metadata
    if about is None:
        raise PatchError(f"{place} carries no record of its making: only patches of recare-patch are listed")
    file = place / WEIGHTS_NAME if place.is_dir() else place
    shown = kept = _NONE
    if (file.parent / EVIDENCE_NAME).is_file():
        evidence = Evidence.load(file.parent / EVIDENCE_NAME)
        evidence.check_patch(file_sha256(file), str(place))
        gone, lost = worst_erased(evidence), worst_kept(evidence)
        shown = f"{gone.show(gone.patched)} (base {gone.show(gone.base)})" if gone else _NONE
        kept = f"{lost.name}: {lost.show(lost.patched)} (base {lost.show(lost.base)})" if lost else _NONE
    size = f"rank {about.rank}, {file.stat().st_size / 1e3:,.0f} kB"
    name = place.name if place.is_dir() else place.parent.name
    return Row(name, place.as_posix(), about.concept, about.base, about.method, size, shown, kept)


def row_of_found(found: Found, endpoint: str) -> Row:
    """The row of a patch on the Hub; figures are those that its card claims.

    Args:
        found: what the search gave.
        endpoint: of the Hub, for the link.
    """
    gone = max((one.value for one in found.rates("concept-rate")), default=None)
    lost = min(found.rates("companion-shown", "neighbour-shown"), key=lambda one: one.value, default=None)
    return Row(
        f"{PREFIX}{found.repo}",
        f"{endpoint}/{found.repo}",
        ", ".join(found.concepts) or _NONE,
        found.base,
        next((tag for tag in found.tags if tag in (*METHODS, "stack")), _NONE),
        shown=show_value(gone, RATE),
        kept=f"{lost.name}: {show_value(lost.value, RATE)}" if lost is not None else _NONE,
    )


def index_text(rows: Sequence[Row], title: str = "Patches") -> str:
    """A page that lists patches, in Markdown.

    Args:
        rows: in their order.
        title: its heading.
    """
    lines = []
    for row in rows:
        cells = [row.concept, row.base, row.method, row.size, row.shown, row.kept]
        link = row.link.replace(" ", "%20").replace("(", "%28").replace(")", "%29")
        lines.append(f"| {' | '.join(map(plain, cells))} | [{plain(row.patch)}]({plain(link)}) |")
    return template("index_template.md").render(title=plain(title), rows="\n".join(lines))
