"""What nobody has measured: how a patch behaves away from the setting that it was made for.

A check puts the same questions (is the concept drawn, are its companions?) at other scales, with
other samplers, in other spellings, beside another LoRA and after further training. Each is one file
and one line of :data:`CHECKS`, and gives one :class:`Check` of the report.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from recare_patch.core import EvaluationError, unknown_name
from recare_patch.measure.checks.protocol import PICTURES as PICTURES
from recare_patch.measure.checks.protocol import CheckContext as CheckContext
from recare_patch.measure.checks.protocol import Checker
from recare_patch.measure.evidence import Check
from recare_patch.measure.judges import check_label
from recare_patch.measure.names import CHECKS

ALL = "all"
"""Stands for every check."""


def check_names(names: Sequence[str]) -> tuple[str, ...]:
    """Checks as the user named them, each once; a wrong name is told with the nearest."""
    found: list[str] = []
    for given in names:
        name = given.strip().casefold()
        if name != ALL and name not in CHECKS:
            raise unknown_name(CHECKS.what, given, (*CHECKS.names(), ALL))
        found += CHECKS.names() if name == ALL else [name]
    return tuple(dict.fromkeys(found))


def run_checks(
    names: Sequence[str], context: CheckContext, options: Mapping[str, Mapping[str, Any]] | None = None
) -> Iterator[Check]:
    """Run checks one after the other, in the order of their names; each comes when it is there.

    All names and options are checked before anything is drawn.

    Args:
        names: of :data:`CHECKS`, or ``all``.
        context: what is checked, and who judges.
        options: name → what is set otherwise in a check's options.

    Raises:
        UnknownNameError: no such check, or the detector does not know the concept's label.
        EvaluationError: bad options, options of a check that is not run, a suite without plain prompts,
            or a studio that shares its work with other processes.

    Example:
        >>> list(run_checks(["scales", "spellings"], context))  # doctest: +SKIP
    """
    wanted, given, suite = check_names(names), dict(options or {}), context.suite
    for name in given.keys() - wanted:
        raise EvaluationError(
            f"options were given for the check '{name}', and what is run is {', '.join(wanted) or 'none'}"
        )
    checkers: list[Checker[Any]] = [CHECKS.get(name)() for name in wanted]
    chosen = [checker.options_type(**given.get(checker.name, {})) for checker in checkers]
    if wanted:
        if not suite.holds("plain"):
            raise EvaluationError(
                f"the suite '{suite.name}' has no plain prompts, and every check asks whether such show the concept"
            )
        check_label(context.detector, suite.label)
    if context.studio.processes > 1:
        raise EvaluationError("checks run in one process: give them a studio with shard=(0, 1)")
    return (checker.run(context, one) for checker, one in zip(checkers, chosen, strict=True))
