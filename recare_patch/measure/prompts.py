"""Prompt files that users have: one prompt a line, or the tables that other tools' prompts come in."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from pathlib import Path

from recare_patch.core import EvaluationError, read_text
from recare_patch.models import BaseModel

MAX_PROMPT = 1000
"""Longest prompt in characters; no text tower reads as much."""

MOST_SEED = 2**63 - 1
_SEED_COLUMNS = ("evaluation_seed", "sd_seed", "seed")


def read_prompts(path: str | Path) -> tuple[str, ...]:
    """The prompts of :func:`read_prompt_file`."""
    return read_prompt_file(path)[0]


def read_prompt_file(path: str | Path) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """The prompts of a file, and their seeds where it tells them; the first faulty line is named.

    One prompt a line; or a table with a column "prompt", and maybe one of :data:`_SEED_COLUMNS`, as those of I2P and of
    ESD's, UCE's and UnlearnDiffAtk's code.
    """
    text = read_text(path, f"the prompt file {path}", EvaluationError)
    if not text.strip():
        raise EvaluationError(f"the prompt file {path} is empty: one prompt a line is needed")
    rows = _table_rows(text, path)
    if rows is None:
        rows = [(number, line, None) for number, line in enumerate(text.removesuffix("\n").split("\n"), 1)]
    prompts, seeds = [], []
    for number, given, seed in rows:
        if not (prompt := " ".join((given or "").split())):
            raise EvaluationError(f"line {number} of {path} is empty: one prompt a line is needed")
        if len(prompt) > MAX_PROMPT:
            told = f"it has {len(prompt)} characters, and may have {MAX_PROMPT}"
            raise EvaluationError(f"line {number} of {path} is over-long: {told}")
        if seed is not None:
            if not re.fullmatch(r"[0-9]{1,19}(\.0)?", seed.strip()) or int(seed.split(".")[0]) > MOST_SEED:
                told = f"a whole number from 0 to {MOST_SEED} is needed"
                raise EvaluationError(f"line {number} of {path} has the seed '{seed:.40}': {told}")
            seeds.append(int(seed.split(".")[0]))
        prompts.append(prompt)
    if not prompts:
        raise EvaluationError(f"the prompt file {path} has column names and no prompt")
    return tuple(prompts), tuple(seeds)


def _table_rows(text: str, path: str | Path) -> list[tuple[int, str | None, str | None]] | None:
    """Line, prompt and seed of a table's rows; None where the text is no table."""
    first = text.split("\n", 1)[0]
    names = {mark: [name.strip(' "\r').casefold() for name in first.split(mark)] for mark in ",;\t"}
    mark = next((mark for mark, found in names.items() if len(found) > 1 and "prompt" in found), None)
    if mark is None:
        if Path(path).suffix.casefold() not in (".csv", ".tsv"):
            return None
        if names[","] != ["prompt"]:
            raise EvaluationError(f"the table {path} has no column 'prompt' in its first line, '{first.strip():.100}'")
    reader = csv.DictReader(io.StringIO(text, newline=""), names[mark or ","], delimiter=mark or ",", strict=True)
    seeds = next((name for name in _SEED_COLUMNS if name in names[mark or ","]), "")
    try:
        next(reader)
        return [(reader.line_num, row["prompt"], (row[seeds] or "") if seeds else None) for row in reader]
    except csv.Error as fault:
        raise EvaluationError(f"line {reader.line_num + 1} of {path} is no row of a table: {fault}") from None


def check_lengths(base: BaseModel, prompts: Sequence[str], source: str | Path) -> None:
    """Refuse prompts whose end the text encoder would not read: their pictures would show something else."""
    most = int(base.pipeline.tokenizer.model_max_length) - 2
    for number, prompt in enumerate(prompts, 1):
        if (tokens := len(base.token_ids(prompt))) > most:
            raise EvaluationError(
                f"line {number} of {source} is over-long: {tokens} tokens, and base '{base.id}' reads {most}"
            )
