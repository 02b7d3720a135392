"""Attacks on a patched model: how hard is it to get the erased concept back?

Three see the weights (concept inversion, UnlearnDiffAtk, P4D), one sees the text encoder alone
(Ring-A-Bell). Each makes its own prompts or word vectors from the patch's recipe: no set of harmful
prompts comes with them. What they find is saved, so that it can be tried on another patch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from recare_patch.core import unknown_name
from recare_patch.measure.attacks.protocol import BUDGETS, Attack, AttackOptions
from recare_patch.measure.attacks.protocol import AttackError as AttackError
from recare_patch.measure.attacks.protocol import AttackResult as AttackResult
from recare_patch.measure.attacks.protocol import AttackTarget as AttackTarget
from recare_patch.measure.attacks.saved import load_about as load_about
from recare_patch.measure.attacks.saved import load_attack as load_attack
from recare_patch.measure.attacks.saved import save_attack as save_attack
from recare_patch.measure.names import ATTACKS as ATTACKS


def load_attack_type(name: str) -> Attack[Any]:
    """An attack by its name, ready to run; :class:`UnknownNameError` with the nearest where there is none."""
    attack: Attack[Any] = ATTACKS.get(name)()
    return attack


def attack_options(attack: str, budget: str = "small", overrides: Mapping[str, Any] | None = None) -> AttackOptions:
    """The options of an attack: those of one of :data:`BUDGETS`, some values set otherwise.

    Raises:
        UnknownNameError: no such attack or budget.
        AttackError: unknown keys or bad values; all are told at once.
    """
    kind: type[AttackOptions] = load_attack_type(attack).options_type
    if budget not in BUDGETS:
        raise unknown_name("budget", budget, BUDGETS)
    return kind(**{**(kind.published if budget == "published" else {}), **(overrides or {})})
