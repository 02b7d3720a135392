"""A page that is one table, sorted by any of its columns: of an audit, of a patch on several bases, of many patches.

It stands alone as the report does. Its only script is its own, whose hash the page names, so that a browser runs no
other, whatever a text should smuggle in.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import jinja2
from markupsafe import Markup

from recare_patch.core import write_text
from recare_patch.measure.evidence import AttackFigure, Evidence, Figure, show_value
from recare_patch.measure.report import environment


@dataclass(frozen=True)
class Cell:
    """What stands in one place.

    Attributes:
        small: a line below, such as an interval.
        order: what its column is sorted by; None: its text.
        link: a path or address that it leads to.
    """

    text: str
    small: str = ""
    order: float | None = None
    link: str = ""

    @property
    def target(self) -> str:
        """The link as a page may hold it: nothing where it is no path and no web address."""
        plain = self.link.startswith(("https://", "http://")) or ":" not in self.link.partition("/")[0]
        return quote(self.link, safe="/:@.-_~%?=&") if self.link and plain else ""

    def __str__(self) -> str:
        return f"{self.text} ({self.small})" if self.small else self.text


EMPTY = Cell("–", order=math.inf)
"""Of what was not measured: at the end of its column."""


def figure_cell(figure: Figure | None, *, base: bool = False) -> Cell:
    """A figure of the patched model, or of the base, with its interval."""
    value = None if figure is None else figure.base if base else figure.patched
    if figure is None or value is None:
        return EMPTY
    return Cell(figure.show(value), figure.show_interval(figure.base_interval if base else figure.interval), value)


def attack_cell(attack: AttackFigure | None) -> Cell:
    """How often an attack brings the concept back."""
    if attack is None:
        return EMPTY
    told = f"{attack.successes} of {attack.trials}, {attack.show_interval()}"
    return Cell(show_value(attack.rate, "rate"), told, attack.rate)


def names_in(evidence: Sequence[Evidence]) -> tuple[list[str], list[str]]:
    """Figures and attacks that any of them has, in their order."""
    figures = dict.fromkeys(one.name for each in evidence for one in each.figures)
    return list(figures), list(dict.fromkeys(one.attack for each in evidence for one in each.attacks))


def figure_in(evidence: Evidence, name: str) -> Figure | None:
    """A figure by its name, where it was measured."""
    return next((one for one in evidence.figures if one.name == name), None)


def attack_in(evidence: Evidence, name: str) -> AttackFigure | None:
    """The first record of an attack, where there is one."""
    return next((one for one in evidence.attacks if one.attack == name), None)


def write_board(
    file: Path,
    title: str,
    head: Sequence[str],
    rows: Sequence[Sequence[Cell]],
    *,
    eyebrow: str,
    facts: str = "",
    notes: Sequence[str] = (),
) -> Path:
    """Write the page, whole or not at all; OutputError where it cannot be written."""
    template, script = _template()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    page = template.render(
        **{"title": title, "eyebrow": eyebrow, "facts": facts, "notes": notes, "head": head, "rows": rows},
        script=Markup(script),
        digest=digest,
    )
    write_text(file, page.lstrip())
    return file


@functools.cache
def _template() -> tuple[jinja2.Template, str]:
    """The page's template, and its script."""
    pages = environment()
    pages.globals["isinf"] = math.isinf
    assert pages.loader is not None
    return pages.get_template("board.html.j2"), pages.loader.get_source(pages, "board.js")[0]
