"""Prompt files of public repositories: fetched from there by a pinned commit, never shipped.

``published.json`` names those with a licence that lets anyone use them. Where a file's SHA-256 was at hand it is pinned
as well; that of every other file is written down when it first comes, and must be the same from then on.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Annotated, Any
from urllib.error import HTTPError
from urllib.parse import quote
from urllib.request import urlopen

from pydantic import BaseModel, ConfigDict, Field

from recare_patch.core import (
    EvaluationError,
    file_sha256,
    read_json,
    read_text,
    unknown_name,
    user_cache,
    write_bytes,
    write_text,
)
from recare_patch.measure.prompts import is_table, read_prompt_file

SOURCE = "https://raw.githubusercontent.com"
"""Where repositories' files are read; ``RECARE_PATCH_SUITES_URL`` names a mirror."""

PATIENCE = 30.0
"""Seconds without an answer."""

MOST_BYTES = 16_000_000


class Published(BaseModel):
    """One file of a public repository.

    Attributes:
        rows: as they were counted in the repository; None where nobody has.
        sha256: of the file; None where it was not at hand.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    repository: str
    licence: str
    commit: Annotated[str, Field(pattern="^[0-9a-f]{40}$")]
    path: str
    rows: int | None = None
    note: str = ""
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None

    @property
    def url(self) -> str:
        """Where it is fetched."""
        place = os.environ.get("RECARE_PATCH_SUITES_URL") or SOURCE
        return f"{place.rstrip('/')}/{self.repository}/{self.commit}/{quote(self.path)}"

    @property
    def file(self) -> Path:
        """Where it lies, or would, on this machine."""
        return user_cache("suites") / self.commit[:12] / self.path

    def check(self) -> Path:
        """The file, if it is the one that was pinned, or that first came.

        Raises:
            EvaluationError: it is not here, or another one.
        """
        if not self.file.is_file():
            told = f"is not on this machine: fetch it by `recare-patch suites fetch {self.name}`"
            raise EvaluationError(f"the prompt file {self.name} {told}, or put {self.url} at {self.file}")
        kept, found = self.file.with_name(f"{self.file.name}.sha256"), file_sha256(self.file)
        wanted = self.sha256
        if wanted is None and kept.is_file():
            wanted = read_text(kept, f"the hash {kept}", EvaluationError).strip()
        if wanted is None:
            read_prompt_file(self.file)
            write_text(kept, f"{found}\n")
        elif wanted != found:
            told = f"has SHA-256 {found[:12]}…, and {wanted[:12]}… was {'pinned' if self.sha256 else 'there at first'}"
            raise EvaluationError(f"{self.file} is not the prompt file {self.name}: it {told}; delete it")
        return self.file


@cache
def published() -> dict[str, Published]:
    """All files that can be fetched, by name."""
    place = Path(__file__).with_name("published.json")
    found: dict[str, Any] = read_json(place, f"the package's {place.name}", EvaluationError)
    repositories = found["repositories"]
    return {
        name: Published(name=name, **repositories[one["repository"]], **one) for name, one in found["files"].items()
    }


def find_table(source: str | Path) -> Path | None:
    """The table that a suite's name means: a file by its ending, or a published one; None for any other suite."""
    text = str(source).strip()
    if (one := published().get(text.casefold())) is not None:
        return one.check()
    return Path(text).expanduser() if is_table(text) else None


def fetch_suite(name: str) -> Published:
    """Bring a published file into the user's cache, if it is not there.

    Raises:
        UnknownNameError: none of this name.
        EvaluationError: it cannot be fetched, and where to put it; or another file came.
    """
    one = published().get(name.strip().casefold())
    if one is None:
        raise unknown_name("prompt file", name, published())
    if not one.file.is_file():
        try:
            with urlopen(one.url, timeout=PATIENCE) as answer:
                data = answer.read(MOST_BYTES + 1)
        except (OSError, ValueError) as fault:
            # Errors of addresses are system faults too, and say why in a field of their own.
            why = f"HTTP {fault.code}" if isinstance(fault, HTTPError) else getattr(fault, "reason", fault)
            told = f"from {one.url} ({why}): put the file at {one.file}, and --suite {one.name} finds it"
            raise EvaluationError(f"{one.name} cannot be fetched {told}") from None
        if len(data) > MOST_BYTES:
            raise EvaluationError(f"{one.url} has more than {MOST_BYTES:,} bytes, which no prompt file has")
        write_bytes(one.file, data)
    try:
        one.check()
    except EvaluationError:
        one.file.unlink(missing_ok=True)
        raise
    return one
