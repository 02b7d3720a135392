"""A suite whose prompts are the rows of a table, such as those of the field's public repositories."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from recare_patch.core import EvaluationError
from recare_patch.measure.prompts import Rows, joined, read_table
from recare_patch.measure.published import find_table
from recare_patch.measure.suites import Suite
from recare_patch.recipe import Concept, concept_key

logger = logging.getLogger(__name__)

Role = Literal["erased", "retained"]
"""What a table's rows are said to be, where that is not read from them."""

_JUDGED = {
    "plain": "{count} are judged as prompts of '{concept}'",
    "neighbours": "{count} as those of other concepts",
    "retained": "{count} as prompts that must not change",
}


@dataclass(frozen=True)
class Reading:
    """How a table is read.

    Attributes:
        columns: see :func:`read_table`.
        role: what all rows are; None: those whose column of concepts, or else whose prompt, names the concept are
            its own, and the others are of other concepts, or retained. Rows without such a column that are for an
            unsafe concept, which prompts seldom name, are its own.
        without: another table, or the name of a published one, of each prompt without the concept.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    role: Role | None = None
    without: str | Path | None = None

    def table(self, suite: object) -> Path | None:
        """The table that a suite's name means; None for a suite of another kind, which is not read so."""
        found = find_table(suite) if isinstance(suite, str | Path) else None
        if found is None and (self.role or self.without):
            told = f"--{'rows' if self.role else 'without'} is for the rows of a table"
            raise EvaluationError(f"{told}: give one by --suite FILE.csv")
        return found

    @property
    def words(self) -> list[str]:
        """Of the command line; folders are left for the reader to name."""
        found = [word for own, name in self.columns.items() for word in ("--column", f"{own}={name}")]
        return [*found, *(["--rows", self.role] if self.role else []), *(["--without", "FILE"] if self.without else [])]


AS_IT_IS = Reading()


def with_table(suite: Suite, path: str | Path, reading: Reading) -> Suite:
    """The suite's judge, label and sampler, with the rows of a table in place of all its prompts."""
    rows, role = read_table(path, reading.columns), reading.role
    if reading.without is not None:
        rows = joined(rows, find_table(reading.without) or reading.without)
    concept = Concept(text=suite.concept, kind=suite.kind)
    sets = _sets(rows, concept, role)
    if role is None:
        told = [_JUDGED[which].format(count=f"{len(some.prompts):,}", concept=concept) for which, some in sets.items()]
        logger.info("%s: of its rows %s; --rows says otherwise", Path(path).name, ", ".join(told))
    if rows.without and "plain" not in sets:
        raise EvaluationError(f"no row of {path} is one of '{concept}', so that there is nothing to pair")
    empty: dict[str, tuple[()]] = dict.fromkeys(
        ("plain", "paraphrased", "implicit", "care", "neighbours", "retained"), ()
    )
    tables = {which: some.model_dump() for which, some in sets.items()}
    return suite.with_changes(name=Path(path).name[:200], **empty, retained_seeds=(), tables=tables, notes="")


def with_retained(suite: Suite, rows: Rows) -> Suite:
    """The suite with the rows of a table as its retained prompts."""
    kept = rows.some(range(len(rows.prompts)), "concepts", "without")
    tables = {**suite.model_dump()["tables"], "retained": kept.model_dump() if kept else {}}
    return suite.with_changes(retained=(), retained_seeds=(), tables=tables)


def _sets(rows: Rows, concept: Concept, role: Role | None) -> dict[str, Rows]:
    every = range(len(rows.prompts))
    told = rows.concepts or rows.prompts
    if role is not None:
        own = list(every) if role == "erased" else []
    elif concept.kind == "nsfw" and not rows.concepts:
        own = list(every)
    else:
        own = [row for row in every if _names(told[row], concept)]
    mine = set(own)
    others = [row for row in every if row not in mine]
    which = "neighbours" if rows.concepts and role is None else "retained"
    left_out = ("without",) if which == "neighbours" else ("without", "concepts")
    found = {"plain": rows.some(own, "concepts"), which: rows.some(others, *left_out)}
    return {name: some for name, some in found.items() if some is not None}


def _names(text: str, concept: Concept) -> bool:
    """Whether a text holds one of the concept's names, word by word."""
    read = _plain(text)
    return any(_plain(name) in read for name in concept.bare_names)


def _plain(text: str) -> str:
    return " ".join(["", *re.findall(r"[^\W_]+", concept_key(text)), ""])
