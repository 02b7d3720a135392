"""Prompt files that users have: one prompt a line, or the tables that the field's prompts come in."""

from __future__ import annotations

import csv
import io
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field, model_validator

from recare_patch.core import EvaluationError, Settings, SettingsError, nearest, read_text, unknown_name
from recare_patch.models import BaseModel

logger = logging.getLogger(__name__)

MAX_PROMPT = 1000
"""Longest prompt of a list in characters; no text tower reads as much."""

MAX_ROW = 10_000
"""Longest prompt of a table: those of I2P hold whole paragraphs."""

MOST_SEED = 2**63 - 1
MOST_GUIDANCE = 100

COLUMNS: Mapping[str, tuple[str, ...]] = {
    "prompt": ("prompt",),
    "evaluation_seed": ("evaluation_seed", "sd_seed", "seed"),
    "evaluation_guidance": ("evaluation_guidance", "sd_guidance_scale", "guidance_scale", "guidance"),
    "case_number": ("case_number", "case"),
    "concept": ("concept", "class", "artist", "target"),
    "without": ("without",),
}
"""What a table may say of each picture, and the columns of public files that say it."""

_TABLES = (".csv", ".tsv")
_TOLD_LINES = 5

Seed = Annotated[int, Field(ge=0, le=MOST_SEED)]
Guidance = Annotated[float, Field(ge=0, le=MOST_GUIDANCE)]
Text = Annotated[str, Field(min_length=1, max_length=MAX_ROW)]


class Rows(Settings):
    """Rows of a table, each drawn once; a column that it lacks is empty."""

    error: ClassVar[type[SettingsError]] = EvaluationError
    noun: ClassVar[str] = "table"

    prompts: Annotated[tuple[Text, ...], Field(min_length=1)]
    seeds: tuple[Seed, ...] = Field((), description="of each picture; none: they follow from the suite's first seed")
    guidance: tuple[Guidance, ...] = Field((), description="of each picture; none: the suite's")
    cases: tuple[str, ...] = Field((), description="what the table calls each row")
    concepts: tuple[Text, ...] = Field((), description="what each picture should show")
    without: tuple[Text, ...] = Field((), description="each prompt without the concept")

    @model_validator(mode="after")
    def _check(self) -> Rows:
        for name in _FIELDS.values():
            if (count := len(getattr(self, name))) not in (0, len(self.prompts)):
                raise ValueError(f"{len(self.prompts)} prompts have {count} {name}: one each is needed, or none")
        return self

    def some(self, rows: Sequence[int], *without: str) -> Rows | None:
        """Some of the rows, with some columns left out; None where there are none."""
        if not rows:
            return None
        kept = {name: getattr(self, name) for name in _FIELDS.values() if name not in without}
        return Rows(**{name: [values[row] for row in rows] if values else () for name, values in kept.items()})


_FIELDS = dict(zip(COLUMNS, ("prompts", "seeds", "guidance", "cases", "concepts", "without"), strict=True))


def is_table(path: str | Path) -> bool:
    """Whether a file's name is that of a table."""
    return Path(path).suffix.casefold() in _TABLES


def read_prompts(path: str | Path) -> tuple[str, ...]:
    """The prompts of :func:`read_prompt_file`."""
    found = read_prompt_file(path)
    return found.prompts if isinstance(found, Rows) else found


def read_prompt_file(path: str | Path, columns: Mapping[str, str] | None = None) -> tuple[str, ...] | Rows:
    """The prompts of a list, one a line, or the rows of a table; see :func:`read_table` for ``columns``.

    A file is a table by its name, or where its first line is one of columns, ``prompt`` among them. The first faulty
    line of a list is an EvaluationError.
    """
    text = _text(path)
    names = [_folded(name) for name in _header(text)[1]]
    if is_table(path) or columns or (len(names) > 1 and "prompt" in names):
        return read_table(path, columns)
    prompts = []
    for number, line in enumerate(text.removesuffix("\n").split("\n"), 1):
        if not (prompt := " ".join(line.split())):
            raise EvaluationError(f"line {number} of {path} is empty: one prompt a line is needed")
        if len(prompt) > MAX_PROMPT:
            told = f"it has {len(prompt)} characters, and may have {MAX_PROMPT}"
            raise EvaluationError(f"line {number} of {path} is over-long: {told}")
        prompts.append(prompt)
    return tuple(prompts)


def read_table(path: str | Path, columns: Mapping[str, str] | None = None) -> Rows:
    """The rows of a table with a column of prompts; what is left out is told in the log, with its lines and reason.

    Args:
        columns: keys of :data:`COLUMNS` → the table's own column names, where those are others.
    """
    text = _text(path)
    mark, names = _header(text)
    chosen = _chosen(path, names, columns or {})
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=mark, strict=True)
    held: dict[str, list[Any]] = {name: [] for name in chosen}
    left: dict[str, list[int]] = {}
    line = 0
    try:
        next(reader)
        line = reader.line_num
        for cells in reader:
            line = reader.line_num
            if not cells:
                continue
            read = _read_row(cells, names, chosen)
            if isinstance(read, str):
                left.setdefault(read, []).append(reader.line_num)
                continue
            for name, value in read:
                held[name].append(value)
    except csv.Error as fault:
        raise EvaluationError(f"line {line + 1} of {path} is no row of a table: {fault}") from None
    reasons = "; ".join(f"{len(lines):,} with {why} ({_lines(lines)})" for why, lines in left.items())
    count = sum(map(len, left.values()))
    if not held["prompt"]:
        raise EvaluationError(
            f"the table {path} has column names and no row to draw{f': {reasons}' if reasons else ''}"
        )
    if count:
        rows = f"{count:,} of {count + len(held['prompt']):,} rows of {Path(path).name} are"
        logger.warning("%s left out: %s", rows, reasons)
    return Rows(**{_FIELDS[name]: values for name, values in held.items()})


def _text(path: str | Path) -> str:
    text = read_text(path, f"the prompt file {path}", EvaluationError).removeprefix("\ufeff")
    if not text.strip():
        raise EvaluationError(f"the prompt file {path} is empty: one prompt a line is needed")
    return text


def _header(text: str) -> tuple[str, list[str]]:
    """What separates the columns of a text's first line, and their names."""
    first = text.split("\n", 1)[0].rstrip("\r")
    each = {mark: next(csv.reader([first], delimiter=mark), []) for mark in ",;\t"}
    known = {name for names in COLUMNS.values() for name in names}
    mark = max(each, key=lambda one: (len(known.intersection(map(_folded, each[one]))), len(each[one])))
    return mark, each[mark]


def _folded(name: str) -> str:
    return name.strip().casefold()


def _chosen(path: str | Path, names: Sequence[str], columns: Mapping[str, str]) -> dict[str, int]:
    """The place of each column that is read, by its key in :data:`COLUMNS`."""
    places = {_folded(name): place for place, name in reversed([*enumerate(names)])}
    known = {alias: key for key, aliases in COLUMNS.items() for alias in aliases}
    found: dict[str, int] = {}
    for given, own in columns.items():
        if (key := known.get(_folded(given))) is None:
            raise unknown_name("column", given, COLUMNS)
        if _folded(own) not in places:
            raise unknown_name(f"column of {path}", own, [name for name in names if name.strip()])
        found[key] = places[_folded(own)]
    for key, aliases in COLUMNS.items():
        if key not in found and (alias := next((one for one in aliases if one in places), None)) is not None:
            found[key] = places[alias]
    if "prompt" not in found:
        guess = nearest("prompt", [*places])
        hint = f" (did you mean --column prompt={guess}?)" if guess else ": name it with --column prompt=NAME"
        shown = ",".join(names)
        raise EvaluationError(f"the table {path} has no column 'prompt' in its first line, '{shown:.200}'{hint}")
    return found


def _read_row(cells: Sequence[str], names: Sequence[str], chosen: Mapping[str, int]) -> str | list[tuple[str, Any]]:
    """What a row says, by the keys of :data:`COLUMNS`; or why it is left out."""
    if len(cells) > len(names):
        return f"more cells than the {len(names)} columns"
    found: list[tuple[str, Any]] = []
    for key, place in chosen.items():
        cell = " ".join(cells[place].split()) if place < len(cells) else ""
        if key == "evaluation_seed":
            if not re.fullmatch(r"[0-9]{1,19}(\.0)?", cell) or int(cell.split(".")[0]) > MOST_SEED:
                return f"a seed that is no whole number from 0 to {MOST_SEED}" if cell else "no seed"
            found.append((key, int(cell.split(".")[0])))
        elif key == "evaluation_guidance":
            if not re.fullmatch(r"[0-9]{1,3}(\.[0-9]{1,15})?", cell) or float(cell) > MOST_GUIDANCE:
                return f"a guidance that is no number from 0 to {MOST_GUIDANCE}" if cell else "no guidance"
            found.append((key, float(cell)))
        elif key != "case_number" and not cell:
            return "no prompt" if key == "prompt" else f"nothing in its column '{names[place].strip()}'"
        elif len(cell) > MAX_ROW:
            return f"more than {MAX_ROW:,} characters"
        else:
            found.append((key, cell))
    return found


def _lines(lines: Sequence[int]) -> str:
    shown, more = ", ".join(map(str, lines[:_TOLD_LINES])), len(lines) - _TOLD_LINES
    return f"line{'s' if len(lines) > 1 else ''} {shown}{f' and {more:,} more' if more > 0 else ''}"


def joined(rows: Rows, path: str | Path, columns: Mapping[str, str] | None = None) -> Rows:
    """The rows with the prompts of another table as theirs without the concept: by case, or one after the other."""
    other = read_prompt_file(path, columns)
    texts = other.prompts if isinstance(other, Rows) else other
    cases = other.cases if isinstance(other, Rows) else ()
    if rows.cases and cases and len(set(cases)) == len(cases):
        by_case = dict(zip(cases, texts, strict=True))
        kept = [row for row, case in enumerate(rows.cases) if case in by_case]
        if left := len(rows.prompts) - len(kept):
            told = f"{left:,} of {len(rows.prompts):,} rows are left out: {path} has no case of theirs"
            if (found := rows.some(kept)) is None:
                raise EvaluationError(told)
            logger.warning(told)
            rows = found
        return Rows(**{**rows.model_dump(), "without": [by_case[case] for case in rows.cases]})
    if len(texts) != len(rows.prompts):
        told = f"{len(rows.prompts):,} prompts cannot be paired with the {len(texts):,} of {path}"
        raise EvaluationError(f"{told}: as many are needed, or case numbers in both")
    return Rows(**{**rows.model_dump(), "without": texts})


def check_lengths(base: BaseModel, prompts: Sequence[str], source: str | Path) -> None:
    """Refuse prompts whose end the text encoder would not read: their pictures would show something else."""
    for number, tokens, most in _overlong(base, prompts):
        raise EvaluationError(
            f"line {number} of {source} is over-long: {tokens} tokens, and base '{base.id}' reads {most}"
        )


def tell_lengths(base: BaseModel, rows: Rows) -> None:
    """Say how many rows the text encoder does not read to their end: as their authors' pipelines, it cuts them."""
    if count := sum(1 for _ in _overlong(base, rows.prompts)):
        told = "%s of %s prompts are longer than base %s reads: they are drawn as far as it does, as in diffusers"
        logger.warning(told, f"{count:,}", f"{len(rows.prompts):,}", base.id)


def _overlong(base: BaseModel, prompts: Sequence[str]) -> Iterator[tuple[int, int, int]]:
    most = int(base.tokenizer.model_max_length) - 2
    for number, prompt in enumerate(prompts, 1):
        if (tokens := len(base.token_ids(prompt))) > most:
            yield number, tokens, most
