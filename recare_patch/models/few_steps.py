"""Bases that were distilled to draw in few steps, told by what their configurations and names say."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

_STEPS_IN_NAME = re.compile(r"(?<!\d)(1|2|4|6|8|16)[-_ ]?steps?(?![a-z])")
_NAMED = {
    "lcm": r"lcm|latent consistency",
    "lightning": r"lightning",
    "hyper": r"hyper[-_ ]?(sd|sdxl|xl|\d)",
    "turbo": r"turbo",
    "dmd2": r"dmd2?",
    "tcd": r"tcd",
}
_CAPITAL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
_EULER = ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler")


@dataclasses.dataclass(frozen=True)
class FewSteps:
    """How a few-step base is drawn with: guidance of 1 is none."""

    steps: int
    guidance: float
    why: str  # what tells it, for a message; "probably" where it is a guess


def few_steps(name: str, index: Mapping[str, Any], configs: Mapping[str, Mapping[str, Any]]) -> FewSteps | None:
    """How a base is drawn with that was distilled to few steps; None where nothing says that it was.

    Sure are the schedulers of consistency models (Luo et al., arXiv 2310.04378) and a denoiser that reads
    its guidance. Adversarially distilled ones (Sauer et al., arXiv 2311.17042) are published with an Euler
    scheduler whose timesteps trail, which a base trained on all steps seldom has. A name alone is a guess.
    """
    denoiser = configs.get("unet") or configs.get("transformer") or {}
    scheduler = configs.get("scheduler", {})
    kind = str((index.get("scheduler") or ["", ""])[1] or scheduler.get("_class_name"))
    origins = (name, index.get("_name_or_path"), denoiser.get("_name_or_path"))
    last = " ".join(str(one).rpartition("/")[2].strip("'") for one in origins if one)
    words = _CAPITAL.sub(" ", last).lower()
    told = next((word for word, form in _NAMED.items() if re.search(rf"(?<![a-z])({form})(?![a-z])", words)), None)
    in_name = _STEPS_IN_NAME.search(words)
    steps = int(in_name[1]) if in_name else 4
    if denoiser.get("time_cond_proj_dim") is not None:
        return FewSteps(steps, 8.0, "its denoiser reads the guidance, as those of latent consistency models do")
    if kind in ("LCMScheduler", "TCDScheduler"):
        return FewSteps(steps, 1.0, f"its scheduler is the {kind}")
    # A schedule without signal at its end needs trailing timesteps too, and is no sign of few steps.
    ordinary = scheduler.get("prediction_type", "epsilon") == "epsilon" and not scheduler.get("rescale_betas_zero_snr")
    trails = scheduler.get("timestep_spacing") == "trailing" and ordinary
    if trails and told:
        return FewSteps(steps, 1.0, f"its timesteps trail and '{told}' is in its name")
    if trails and kind in _EULER:
        return FewSteps(steps, 1.0, f"probably, as its {kind} has trailing timesteps")
    if told:
        return FewSteps(steps if in_name or told != "turbo" else 8, *_by_name(told))
    return None


def _by_name(word: str) -> tuple[float, str]:
    # Fine-tunes called Turbo are mixed from the distilled model and the plain one, and take some guidance.
    return 2.0 if word == "turbo" else 1.0, f"probably, as '{word}' is in its name"
