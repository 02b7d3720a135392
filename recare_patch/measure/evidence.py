"""Evidence: every figure that was measured on a patch, in one file that others can measure again.

``evidence.json`` lies beside the weights. ``docs/evidence.schema.json`` describes it to other programs; the
docstrings below are part of that file, which is written by
``python -m recare_patch.measure.evidence > docs/evidence.schema.json``.
"""

from __future__ import annotations

import datetime
import json
import math
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, StringConstraints, model_validator

from recare_patch.core import EvidenceError, Settings, SettingsError, load_json, read_text, unknown_name, write_text
from recare_patch.patch import EVIDENCE_NAME
from recare_patch.recipe import Kind

VERSION: Literal[1] = 1
"""Of the file's form; a newer one than this package knows is refused."""

Group = Literal["erased", "care", "kept", "attack", "check", "memorization"]
"""What a figure speaks of: what is gone, what must stay, how it stands up."""

What = Literal["patch", "lora", "weights", "pipeline", "defence"]
"""Kinds of erasers."""

RATE = "rate"
"""The unit of shares of pictures, 0 to 1; their intervals are Wilson's."""

_SLACK = 1e-6
"""Allowance for figures that were rounded when they were written."""


def _ordered(interval: tuple[float, float]) -> tuple[float, float]:
    low, high = interval
    if low > high:
        raise ValueError(f"an interval runs from low to high, got {low:g} to {high:g}")
    return interval


def _a_date(text: str) -> str:
    try:
        datetime.date.fromisoformat(text[:10])
    except ValueError:
        raise ValueError(f"a date is written like 2026-01-31, got {text!r}") from None
    return text


Name = Annotated[str, StringConstraints(min_length=1, max_length=200)]
Text = Annotated[str, Field(max_length=10_000)]
Hash = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Number = Annotated[float, Field(ge=-1e15, le=1e15)]
Interval = Annotated[tuple[Number, Number], AfterValidator(_ordered)]
Count = Annotated[int, Field(ge=0, le=10**9)]
Spent = Annotated[int, Field(ge=0, le=10**15)]
Better = Literal["lower", "higher"]


def show_value(value: float | None, unit: str) -> str:
    """A value as people read it: rates in percent, all else to four significant digits."""
    if value is None:
        return "–"
    return f"{100 * value:.1f} %" if unit == RATE else f"{value:.4g} {unit}".rstrip()


def show_interval(interval: tuple[float, float] | None, unit: str) -> str:
    """An interval as people read it, or nothing where there is none."""
    if interval is None:
        return ""
    low, high = interval
    return f"{100 * low:.1f}–{100 * high:.1f} %" if unit == RATE else f"{low:.4g} to {high:.4g}"


def _check_finite(what: str, held: Any) -> None:
    """Refuse numbers that JSON cannot say, however deep they lie."""
    if isinstance(held, float) and not math.isfinite(held):
        raise ValueError(f"{what} holds a number that is not finite")
    if isinstance(held, dict | list | tuple):
        for value in held.values() if isinstance(held, dict) else held:
            _check_finite(what, value)


class _Evidence(Settings):
    error: ClassVar[type[SettingsError]] = EvidenceError
    noun: ClassVar[str] = "evidence"


class Part(_Evidence):
    """One prompt or label of a figure.

    Attributes:
        label: the prompt, word or label.
        base: of the untouched base; None where it was not measured.
        patched: under the patch.
        pictures: behind it, on each side.
    """

    label: Text
    base: Number | None = None
    patched: Number
    pictures: Count


class Figure(_Evidence):
    """One number, for the base and for the patched model, on the same prompts and seeds.

    Attributes:
        name: unique in its evidence, such as "concept, plain prompts"; people read it as it is.
        group: what it speaks of.
        metric: how it was computed, such as "concept rate", "CARE score", "KID".
        detector: what looked at the pictures; None where nothing did.
        base: of the untouched base; None where there is no such thing (a distance to the base).
        patched: under the patch at scale 1.
        base_interval, interval: 95 % interval of ``base`` and of ``patched``; None where none is known.
        pictures: behind it, on each side.
        better: which way is better for the patch.
        unit: "rate" for shares of pictures (0 to 1), else a word or nothing.
        note: a sentence for the reader.
        by: its parts, by prompt or label.
    """

    name: Name
    group: Group
    metric: Name
    detector: str | None = None
    base: Number | None = None
    patched: Number
    base_interval: Interval | None = None
    interval: Interval | None = None
    pictures: Count
    better: Better
    unit: str = ""
    note: Text = ""
    by: Annotated[tuple[Part, ...], Field(max_length=10_000)] = ()

    def show(self, value: float | None) -> str:
        """One of its values as people read it."""
        return show_value(value, self.unit)

    def show_interval(self, interval: tuple[float, float] | None) -> str:
        """One of its intervals as people read it, or nothing."""
        return show_interval(interval, self.unit)

    @model_validator(mode="after")
    def _check(self) -> Figure:
        for which, value, interval in (
            ("base", self.base, self.base_interval),
            ("patched", self.patched, self.interval),
        ):
            if self.unit != RATE or value is None:
                continue
            if not 0 <= value <= 1:
                raise ValueError(f"{which} of '{self.name}' is a rate, 0 to 1, got {value:g}")
            if interval and not interval[0] - _SLACK <= value <= interval[1] + _SLACK:
                raise ValueError(
                    f"{which} of '{self.name}' is {value:g}, outside of its own interval "
                    f"{interval[0]:g} to {interval[1]:g}"
                )
        return self


class AttackFigure(_Evidence):
    """What an attack reached against the patch.

    Attributes:
        attack: its registered name.
        preset: of its options, such as "small" or "published".
        successes, trials: tries in which the concept came back, of all.
        interval: 95 %, Wilson, of their ratio.
        without: successes of the plain prompts in as many trials, without the attack.
        base: rate at which the untouched base shows the concept in as many trials; None where it was
            not measured.
        evaluations, seconds: what the attack cost; evaluations are counted as in erasing.
        detector: what judged success.
        budget: the options it ran with.
        folder: where its prompts and tensors are, relative to the evidence; None where not kept.
        note: a sentence for the reader.
    """

    attack: Name
    preset: str = ""
    successes: Count
    trials: Annotated[int, Field(ge=1, le=10**9)]
    interval: Interval
    without: Count
    base: Annotated[float, Field(ge=0, le=1)] | None = None
    evaluations: Spent = 0
    seconds: Annotated[float, Field(ge=0, le=1e12)] = 0.0
    detector: str | None = None
    budget: dict[str, Any] = Field(default_factory=dict)
    folder: str | None = None
    note: Text = ""

    @model_validator(mode="after")
    def _check(self) -> AttackFigure:
        for what, number in (("successes", self.successes), ("without", self.without)):
            if number > self.trials:
                raise ValueError(f"{what} must be at most the {self.trials} trials, got {number}")
        _check_finite("budget", self.budget)
        return self

    @property
    def rate(self) -> float:
        """Attack success rate, 0 to 1."""
        return self.successes / self.trials

    def show_interval(self) -> str:
        """The interval of its rate as people read it."""
        return show_interval(self.interval, RATE)


class CheckPoint(_Evidence):
    """What a check measured at one setting.

    Attributes:
        x: the setting: a number (drawn as a curve) or a text (drawn as bars).
        values: name of a series → value; None where it could not be measured.
        intervals: name of a series → its 95 % interval, where one is known.
        pictures: behind each value.
    """

    x: Number | Text
    values: Annotated[dict[str, Number | None], Field(max_length=100)]
    intervals: dict[str, Interval] = Field(default_factory=dict)
    pictures: Count | None = None


class Check(_Evidence):
    """How the patch behaves away from the setting that it was made for.

    Attributes:
        name: short and unique, such as "scale".
        title: heading for the reader.
        what: a sentence on what was done.
        x_label: what varies.
        y_label: what is measured.
        unit: of the values, as in :class:`Figure`.
        points: the settings, in their order.
        note: a sentence for the reader.
    """

    name: Name
    title: Name
    what: Text = ""
    x_label: str = ""
    y_label: str = ""
    unit: str = RATE
    points: Annotated[tuple[CheckPoint, ...], Field(max_length=1000)]
    note: Text = ""

    @property
    def series(self) -> tuple[str, ...]:
        """The names of its series, in the order in which they first appear."""
        return tuple(dict.fromkeys(name for point in self.points for name in point.values))


class Audited(_Evidence):
    """What was measured in place of a patch of this package.

    Attributes:
        what: a LoRA, weights in the place of the base's own, a whole pipeline, or a component at sampling time.
        name: what tables call it.
        changes: the networks that differ from the base's own.
        files: file → SHA-256, of those that it consists of.
        note: a sentence for the reader.
    """

    what: What
    name: Name
    changes: tuple[Name, ...] = ()
    files: Annotated[dict[str, Hash], Field(max_length=1000)] = Field(default_factory=dict)
    note: Text = ""


class Evidence(_Evidence):
    """All that was measured on one patch, or on what an audit looked at.

    Attributes:
        version: of the form of this file.
        patch_sha256: of the weights file, see :func:`recare_patch.files.file_sha256`; of several files, one of
            their hashes.
        base: id of the base model that it was measured on.
        base_denoiser_sha256: see :func:`recare_patch.base_models.weights_hash`.
        concept, kind, method: of the patch.
        audited: what it is, where an audit measured it.
        suite: the full suite, as a mapping.
        options: what else the figures depend on, ready to be given to ``evaluate`` again: picture
            counts, checks, detector, precision.
        created: ISO date, with or without time.
        versions: package → version.
        command: the command line that makes this file.
        figures, attacks, checks: what was found.
        cost: seconds, pictures drawn, denoiser evaluations, peak memory, device.

    Example:
        >>> Evidence.load("van-gogh-patch").figure("concept, plain prompts").patched  # doctest: +SKIP
        0.01
    """

    version: Literal[1] = VERSION
    patch_sha256: Hash
    base: Name
    base_denoiser_sha256: Hash
    concept: Name
    kind: Kind
    method: Name
    audited: Audited | None = None
    suite: dict[str, Any] = Field(default_factory=dict)
    options: dict[str, Any] = Field(default_factory=dict)
    created: Annotated[str, AfterValidator(_a_date)]
    versions: dict[str, str] = Field(default_factory=dict)
    command: str = ""
    figures: Annotated[tuple[Figure, ...], Field(max_length=1000)] = ()
    attacks: Annotated[tuple[AttackFigure, ...], Field(max_length=1000)] = ()
    checks: Annotated[tuple[Check, ...], Field(max_length=100)] = ()
    cost: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check(self) -> Evidence:
        for what, listed in (("figure", self.figures), ("check", self.checks)):
            named = Counter(one.name for one in listed)
            twice = next((name for name, number in named.items() if number > 1), None)
            if twice is not None:
                raise ValueError(f"the {what} '{twice}' is there twice")
        for what in ("suite", "options", "cost"):
            _check_finite(what, getattr(self, what))
        return self

    def in_group(self, *groups: Group) -> tuple[Figure, ...]:
        """The figures of some groups, in their order."""
        return tuple(one for one in self.figures if one.group in groups)

    def figure(self, name: str) -> Figure:
        """A figure by its name, whatever its case.

        Raises:
            UnknownNameError: there is none; the sentence offers the nearest.
        """
        by_folded = {one.name.casefold(): one for one in self.figures}
        found = by_folded.get(name.strip().casefold())
        if found is None:
            raise unknown_name("figure", name, [one.name for one in self.figures])
        return found

    def check_names(self, names: Iterable[str]) -> tuple[str, ...]:
        """Figure names as the evidence writes them, each once; errors as those of :meth:`figure`."""
        return tuple(dict.fromkeys(self.figure(name).name for name in names))

    def check_patch(self, sha256: str, source: str = "the patch") -> None:
        """Refuse to speak of another patch.

        Args:
            sha256: of the weights file at hand.
            source: where it lies, for the message.

        Raises:
            EvidenceError: the evidence was measured on another file.
        """
        if sha256 != self.patch_sha256:
            raise EvidenceError(
                f"this evidence belongs to another patch: it was measured on weights with SHA-256 "
                f"{self.patch_sha256[:12]}…, and {source} has {sha256[:12]}…"
            )

    def to_dict(self) -> dict[str, Any]:
        """What the file says, as JSON has it."""
        return self.model_dump(mode="json", exclude={"audited"} if self.audited is None else None)

    def to_json(self) -> str:
        """The file's text; equal evidence gives equal text."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str, source: str = "the evidence") -> Evidence:
        """Read the file's text; ``source`` is where it is from, for messages.

        Raises:
            EvidenceError: it is not JSON, of a newer form, or has faults; all are told at once.
        """
        try:
            found = load_json(text)
        except ValueError as fault:
            raise EvidenceError(f"{source} is not evidence: it is not readable as JSON ({fault})") from None
        if not isinstance(found, dict):
            raise EvidenceError(f"{source} is not evidence: it is not a mapping of keys to values")
        version = found.get("version")
        if isinstance(version, int) and version > VERSION:
            raise EvidenceError(
                f"{source} has evidence form {version}, newer than the {VERSION} that this version of "
                "recare-patch reads; update it"
            )
        try:
            return cls(**found)
        except EvidenceError as fault:
            raise EvidenceError(f"{source}: {'; '.join(fault.faults)}", fault.faults) from None

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the file whole, or not at all; ``path`` is its own or the patch's folder.

        Raises:
            OutputError: it cannot be written.
        """
        file = _file(path)
        write_text(file, self.to_json())
        return file

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Evidence:
        """Read the file; ``path`` is its own or the patch's folder, which a link in it may not lead out of.

        Raises:
            EvidenceError: it is missing, no plain file, or malformed.
        """
        file = _file(path)
        if not file.exists():
            raise EvidenceError(f"there is no evidence at {file}; recare-patch evaluate makes it")
        text = read_text(
            file, f"the evidence {file}", EvidenceError, within=None if file == Path(path) else file.parent
        )
        return cls.from_json(text, source=str(file))


def _file(path: str | os.PathLike[str]) -> Path:
    found = Path(path).expanduser()
    return found / EVIDENCE_NAME if found.is_dir() else found


def schema_text() -> str:
    """The JSON Schema of ``evidence.json``, as it is published."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **Evidence.model_json_schema()}
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    import sys

    sys.stdout.write(schema_text())


def worst_first(evidence: Evidence, *groups: Group) -> list[Figure]:
    """The rates of some groups, from the one that speaks most against the patch to the one that does least.

    Of what is erased, rates by how much still shows; of what should stay, by what was lost against the base.
    """
    rates = [one for one in evidence.in_group(*groups) if one.unit == RATE]
    if groups == ("erased",):
        return sorted((one for one in rates if one.better == "lower"), key=lambda one: -one.patched)
    kept = [(one.patched - one.base, one) for one in rates if one.better == "higher" and one.base is not None]
    return [one for _, one in sorted(kept, key=lambda pair: pair[0])]


def worst_erased(evidence: Evidence) -> Figure | None:
    """Of the rates that the patch should bring down, the highest under it."""
    return next(iter(worst_first(evidence, "erased")), None)


def worst_kept(evidence: Evidence) -> Figure | None:
    """Of the rates that the patch should leave alone, the one that lost most against the base."""
    return next(iter(worst_first(evidence, "care", "kept")), None)


def intervals_meet(figure: Figure) -> bool:
    """Whether base and patched model may be alike: their intervals have a value in common."""
    before, after = figure.base_interval, figure.interval
    return before is not None and after is not None and after[1] >= before[0] and before[1] >= after[0]
