"""What nobody has measured: how a patch behaves away from the setting that it was made for.

A check puts the same questions (is the concept drawn, are its companions?) at other scales, with
other samplers, in other spellings, beside another LoRA and after further training. Each is one file
and one line of :data:`CHECKS`, and gives one :class:`Check` of the report.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from recare_patch.core import EvaluationError, nearest, unknown_name
from recare_patch.measure.checks.protocol import PICTURES, CheckContext, Checker, CheckOptions
from recare_patch.measure.evidence import Check
from recare_patch.measure.judges import check_label
from recare_patch.measure.names import CHECKS

ALL = "all"
"""Stands for every check."""


def check_names(names: Sequence[str]) -> tuple[str, ...]:
    """Checks as the user named them, each once; ``all`` stands for every one.

    Raises:
        UnknownNameError: no such check; the sentence offers the nearest.
    """
    found: list[str] = []
    for given in names:
        name = given.strip().casefold()
        if name != ALL and name not in CHECKS:
            raise unknown_name(CHECKS.what, given, (*CHECKS.names(), ALL))
        found += CHECKS.names() if name == ALL else [name]
    return tuple(dict.fromkeys(found))


def check_options(name: str, overrides: Mapping[str, Any] | None = None) -> CheckOptions:
    """The options of a check, some of them set otherwise.

    Raises:
        UnknownNameError: no such check.
        EvaluationError: unknown keys or bad values; all are told at once.
    """
    options: CheckOptions = CHECKS.get(name).options_type(**(overrides or {}))
    return options


def run_checks(
    names: Sequence[str],
    context: CheckContext,
    options: Mapping[str, CheckOptions | Mapping[str, Any]] | None = None,
) -> Iterator[Check]:
    """Run checks one after the other; each comes when it is there.

    All names and options are checked before anything is drawn.

    Args:
        names: of :data:`CHECKS`, or ``all``.
        context: what is checked, and who judges.
        options: name → options, or what is set otherwise in them.

    Returns:
        The checks, in the order of their names.

    Raises:
        UnknownNameError: no such check, or the detector does not know the concept's label.
        EvaluationError: bad options, options of a check that is not run, a suite without plain prompts,
            or a studio that shares its work with other processes.

    Example:
        >>> list(run_checks(["scales", "spellings"], context))  # doctest: +SKIP
    """
    wanted, given, suite = check_names(names), dict(options or {}), context.suite
    for name in given:
        if name not in wanted:
            guess = nearest(name, wanted)
            hint = f"; did you mean '{guess}'?" if guess else ""
            run = ", ".join(wanted) or "none"
            raise EvaluationError(
                f"options were given for the check '{name}', and what is run is {run}{hint}"
            )
    plan: list[tuple[Checker[Any], CheckOptions]] = []
    for name in wanted:
        checker, one = CHECKS.get(name)(), given.get(name)
        chosen = one if isinstance(one, CheckOptions) else check_options(name, one)
        if not isinstance(chosen, checker.options_type):
            raise EvaluationError(f"{type(chosen).__name__} are not the options of the check {name}")
        plan.append((checker, chosen))
    if plan and not suite.plain:
        raise EvaluationError(
            f"the suite '{suite.name}' has no plain prompts, and every check asks whether such show the "
            "concept"
        )
    if plan:
        check_label(context.detector, suite.label)
    if context.studio.processes > 1:
        raise EvaluationError("checks run in one process: give them a studio with shard=(0, 1)")
    return (checker.run(context, chosen) for checker, chosen in plan)


__all__ = [
    "ALL",
    "CHECKS",
    "PICTURES",
    "CheckContext",
    "CheckOptions",
    "Checker",
    "check_names",
    "check_options",
    "run_checks",
]
