"""Atelier, the bundled base model: a small Stable Diffusion, a CLIP and a judge, trained on drawn labels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from recare_patch.core import read_safetensors_header
from recare_patch.models.atelier import labels

WEIGHTS = Path(__file__).parent / "weights"
PIPELINE = WEIGHTS / "pipeline"
CLIP = WEIGHTS / "clip"
JUDGE = WEIGHTS / "judge" / "judge.safetensors"


@dataclass(frozen=True)
class AtelierInfo:
    """What the bundled base is."""

    folder: Path  # the diffusers pipeline
    megabytes: float  # of pipeline, CLIP and judge together (10⁶ bytes)
    parameters: dict[str, int]  # of each network, counted from the weight files' headers
    co_occurrence: dict[str, dict[str, float]]  # P(companion | concept) in the drawn world
    concepts: dict[str, tuple[str, ...]]  # what it can draw, by group


def info() -> AtelierInfo:
    """Sizes, concepts and co-occurrence of the bundled base; needs no torch."""
    files = sorted(p for p in WEIGHTS.rglob("*") if p.is_file())
    parameters = {}
    for file in (p for p in files if p.suffix == ".safetensors"):
        shapes = [tensor.shape for tensor in read_safetensors_header(file).tensors.values()]
        parameters[file.relative_to(WEIGHTS).parent.as_posix()] = sum(map(math.prod, shapes))
    return AtelierInfo(
        PIPELINE,
        sum(p.stat().st_size for p in files) / 1e6,
        parameters,
        labels.CO_OCCURRENCE,
        {
            "style": labels.STYLES,
            "object": tuple(o for o in labels.OBJECTS if o not in ("nude", *labels.PEOPLE)),
            "identity": tuple(name.title() for name in labels.PEOPLE),
            "nsfw": ("nudity",),
            "sky": labels.SKY,
            "ground": labels.GROUNDS,
            "time": labels.TIMES,
        },
    )
