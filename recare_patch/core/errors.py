"""One family of errors, each told in one sentence.

A caller that catches :class:`RecarePatchError` has caught everything this package raises on bad
input, a full disk or a missing file. Whatever else escapes is a bug. The command line prints the
sentence and exits with code 2.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

_LONGEST_NAME = 500
"""Nothing longer is compared with names: that takes time by the square of the length."""

_LONGEST_MESSAGE = 4000

_UNPRINTABLE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ufff9-\ufffb\ud800-\udfff"
    "\U000e0000-\U000e007f]"
)
"""Control characters, halves of characters, and what turns the direction of writing round or is not seen at all."""


class RecarePatchError(Exception):
    """Base of all errors that the package raises on purpose.

    The message is one sentence that says what was given, what is allowed and, where there is one,
    the nearest allowed name. What was given may come from a file of unknown make: control characters
    in it are shown as escapes, so that no file writes a second line or colours a terminal, and what is
    longer than people read is cut.
    """

    def __str__(self) -> str:
        told = super().__str__()
        if len(told) > _LONGEST_MESSAGE:
            told = f"{told[:_LONGEST_MESSAGE]}… ({len(told) - _LONGEST_MESSAGE:,} characters more)"
        return printable(told)


class SettingsError(RecarePatchError, ValueError):
    """Settings of any kind that hold faults, one phrase each in ``faults``; all of them are told at once.

    It is a ``ValueError`` as well, so that a model that contains another collects the faults of
    both instead of stopping at the first.
    """

    def __init__(self, message: str, faults: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.faults = tuple(faults) or (message,)


class RecipeError(SettingsError):
    """A recipe has an unknown key, a value out of range, or cannot be read."""


class UnknownNameError(RecarePatchError):
    """A name that no table holds: a method, an optimizer, a layer set, a recipe."""


class ConceptError(SettingsError):
    """A concept that is empty, too long or of an unknown kind."""


class BaseModelError(RecarePatchError):
    """A base model that is missing, incomplete or of a shape that cannot be patched."""


class ClipError(RecarePatchError):
    """A CLIP model that is missing, incomplete or not a CLIP model."""


class CareSetError(RecarePatchError):
    """A CARE-set that cannot be built, read or edited as asked."""


class NoMatchingModuleError(RecarePatchError):
    """A layer set that matches no module of the denoiser."""


class PatchError(RecarePatchError):
    """A patch file that is not safetensors, or has missing, extra, misshapen or NaN tensors."""


class IncompatiblePatchError(RecarePatchError):
    """A sound patch that was made for another base model."""


class OutputError(RecarePatchError):
    """An output that cannot be written: folder in use, disk full, permission denied."""


class ResumeError(RecarePatchError):
    """A run that cannot be resumed: nothing there, or made from another recipe."""


class HubError(RecarePatchError):
    """The Hub cannot be reached, refuses what is asked of it, or holds something that is no patch."""


class EvidenceError(SettingsError):
    """Evidence that is malformed, cannot be read, or belongs to another patch."""


class DemoError(SettingsError):
    """What the demo's page was asked for cannot be drawn, or the page cannot be served."""


class EvaluationError(SettingsError):
    """A suite, a detector, a metric or a prompt file that cannot be used as asked."""


class NonFiniteError(RecarePatchError):
    """A loss, gradient, weight or picture that is NaN or infinite; ``stage`` is where, once that is told."""

    stage: str | None = None


@contextmanager
def noted(what: str) -> Iterator[None]:
    """A device whose memory is full says what it was asked for; inside, the fault is told what for, once.

    The notes are the fault's own (``__notes__``), the innermost first.
    """
    try:
        yield
    except RuntimeError as fault:
        if not any(one.startswith(what) for one in getattr(fault, "__notes__", ())):
            fault.add_note(what)
        raise


@contextmanager
def told_at(stage: str, more: str = "") -> Iterator[None]:
    """A :class:`NonFiniteError` from inside begins with the stage and ends with ``more``, once; also :func:`noted`."""
    try:
        with noted(stage):
            yield
    except NonFiniteError as fault:
        if fault.stage is not None:
            raise
        found = NonFiniteError(f"{stage}: {fault}{more}")
        found.stage = stage
        raise found from fault


def printable(text: str) -> str:
    """Text from anywhere as one line that only shows signs: whatever else is in it is an escape."""
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape", "surrogatepass").decode("ascii"), text)


def reason(fault: OSError) -> str:
    """Why the system refused, in words that go on a sentence."""
    return (fault.strerror or str(fault)).lower()


def nearest(given: str, allowed: Iterable[str]) -> str | None:
    """The allowed name most like the given one, whatever their case, or None where none is alike."""
    if len(given) > _LONGEST_NAME:
        return None
    by_folded: dict[str, str] = {}
    for name in allowed:
        by_folded.setdefault(name.casefold(), name)
    found = difflib.get_close_matches(given.casefold(), list(by_folded), n=1, cutoff=0.5)
    return by_folded[found[0]] if found else None


def unknown_name(what: str, given: str, allowed: Iterable[str]) -> UnknownNameError:
    """The error to raise for a name that is not among the allowed ones, with the nearest of them.

    Args:
        what: the kind of thing named, such as "optimizer".
        given: what the user wrote.
        allowed: the names there are, in the order in which to list them.
    """
    names = tuple(allowed)
    guess = nearest(given, names)
    hint = f"; did you mean '{guess}'?" if guess is not None else ""
    return UnknownNameError(f"unknown {what} '{given}': allowed are {', '.join(names) or 'none at all'}{hint}")
