"""The erasing methods as users see them: names, options, defaults, and what each is good for.

It is read without torch: by recipes, which check themselves against it, and by the command line. What a
method computes is one file in :mod:`methods`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from recare_patch.core import RecarePatchError, Settings

DENOISER_LAYERS = (
    "cross-attention",
    "cross-attention-kv",
    "self-attention",
    "attention",
    "outside-cross-attention",
    "all",
)
TEXT_LAYERS = ("text-encoder",)

FIGURES_FILE = Path(__file__).parent / "method_figures.json"
"""What was measured of the methods, where a benchmark has written it."""

Count = Annotated[int, Field(ge=1, le=1_000_000)]
Weight = Annotated[float, Field(ge=0, le=10_000)]


class SGraceOptions(Settings):
    """S-GRACE's own; its edit has ``erase.steps`` a round, at ``erase.learning_rate``.

    ``erase.batch_size`` is the number of adversarial sequences, ``erase.retain_batch_size`` that of the
    retained prompts a step, and ``erase.retain_weight`` their weight.

    Attributes:
        rounds: of attack and edit.
        attack_steps: of sign-gradient in each attack; 0: the words are erased as they stand.
        attack_rate: length of such a step, in each component of a word's vector.
        attack_box: half the width of the box around each start, in steps.
        attack_similarity: weight of staying a name of the concept, beside predicting its noise.
        consistency_weight: of each sequence staying what it was at the start of its round; published 1.2.
        parameter_weight: of the update's size.
        words: a YAML file with the lists ``related`` and ``unrelated``, instead of mined words.
    """

    rounds: Annotated[int, Field(ge=1, le=100)] = 4
    attack_steps: Annotated[int, Field(ge=0, le=1000)] = 10
    attack_rate: Annotated[float, Field(gt=0, le=1)] = 5.0e-3
    attack_box: Annotated[float, Field(gt=0, le=1000)] = 4.0
    attack_similarity: Weight = 0.1
    consistency_weight: Weight = 0.2
    parameter_weight: Weight = 0.2
    words: str | None = None


class ForgetMeNotOptions(Settings):
    """Forget-Me-Not's own.

    Attributes:
        inversion_steps: of a textual inversion that finds the concept's tokens in its pictures; 0: the
            tokens are those of its name.
        vectors: how many tokens the inversion fits.
    """

    inversion_steps: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    vectors: Annotated[int, Field(ge=1, le=16)] = 1


class UCEOptions(Settings):
    """UCE's own: the weights of its closed form.

    Attributes:
        erase_weight: of the erased embeddings.
        retain_weight: of the retained ones.
        ridge: λ, of staying near the old weights everywhere.
    """

    erase_weight: Weight = 1.0
    retain_weight: Weight = 0.1
    ridge: Annotated[float, Field(gt=0, le=10_000)] = 0.5


@dataclass(frozen=True)
class MethodInfo:
    """One method.

    Attributes:
        target: its class, "module:attribute".
        title: as its paper writes it.
        source: the paper.
        what: how it erases, in one sentence.
        touches: what its patch changes.
        reads: what it needs beside the concept's name.
        strength, weakness: against the others.
        layers: layer sets that it can train, the default first.
        options: the recipe's section that is its own.
        replaces: what ``replace_with`` does, in one sentence; ``None``: it cannot.
        separates: what ``subject`` does (removing an attribute from it); ``None``: it cannot.
        continues: whether it can go on from an earlier patch.
        defaults: dotted recipe keys whose defaults are its own.
    """

    target: str
    title: str
    source: str
    what: str
    touches: str
    reads: str
    strength: str
    weakness: str
    layers: tuple[str, ...] = DENOISER_LAYERS
    options: str | None = None
    replaces: str | None = None
    separates: str | None = None
    continues: bool = True
    defaults: Mapping[str, Any] = field(default_factory=dict)


METHODS: Mapping[str, MethodInfo] = {
    "recare": MethodInfo(
        target="recare_patch.erasure.methods.recare:ReCARE",
        title="ReCARE",
        source="Kim et al., ICLR 2026, arXiv 2606.24192",
        what="steers the concept's names to its companions, and holds what must not change",
        touches="cross-attention of the denoiser, other layers by name",
        reads="pictures of the concept, its CARE-set, adversarial names",
        strength="keeps companions and neighbours best",
        weakness="takes longest",
        replaces="the prediction under the concept's prompts becomes that under the replacement's",
        separates="what the attribute adds to the subject's prompts is taken away",
    ),
    "s-grace": MethodInfo(
        target="recare_patch.erasure.methods.s_grace:SGrace",
        title="S-GRACE",
        source="Yin et al., arXiv 2510.27285",
        what="turns the text encoder's reading of the concept, and of adversarial words for it, away",
        touches="the text encoder",
        reads="pictures of the concept, its CARE-set, words that name it and words that do not",
        strength="serves every denoiser that shares the text encoder",
        weakness="what the denoiser draws without being asked stays",
        layers=TEXT_LAYERS,
        options="s_grace",
        replaces="the text encoder reads the concept's prompts as the replacement's",
        defaults={
            "adapter.layers": "text-encoder",
            "target_images.count": 8,
            "erase.steps": 50,
            "erase.batch_size": 8,
            "erase.retain_batch_size": 16,
            "erase.retain_weight": 50.0,
            "erase.learning_rate": 3.0e-3,
            "erase.retained_images": 0,
        },
    ),
    "forget-me-not": MethodInfo(
        target="recare_patch.erasure.methods.forget_me_not:ForgetMeNot",
        title="Forget-Me-Not",
        source="Zhang et al., arXiv 2303.17591",
        what="takes the picture's attention off the concept's tokens",
        touches="keys of the denoiser's cross-attention, its queries and output by name",
        reads="a few pictures of the concept",
        strength="erases in seconds",
        weakness="nothing holds what is near the concept, and attacks bring it back",
        layers=("cross-attention-kv", "cross-attention"),
        options="forget_me_not",
        replaces="attention gives under the concept's prompts what it gave under the replacement's",
        defaults={
            "adapter.layers": "cross-attention-kv",
            "target_images.count": 8,
            "erase.steps": 35,
            "erase.batch_size": 4,
            "erase.learning_rate": 4.0e-3,
        },
    ),
    "uce": MethodInfo(
        target="recare_patch.erasure.methods.uce:UCE",
        title="UCE",
        source="Gandikota et al., WACV 2024, arXiv 2308.14761",
        what="solves for keys and values that read the concept as nothing",
        touches="keys and values of the denoiser's cross-attention",
        reads="the concept's name, words of CLIP's vocabulary",
        strength="no training and no pictures: a few seconds",
        weakness="only words that it was told; no step looks at a picture",
        layers=("cross-attention-kv",),
        options="uce",
        replaces="keys and values of the concept's tokens become those of the replacement's",
        continues=False,
        defaults={"adapter.layers": "cross-attention-kv", "adapter.rank": 16, "adapter.alpha": 16.0},
    ),
    "esd": MethodInfo(
        target="recare_patch.erasure.methods.esd:ESD",
        title="ESD",
        source="Gandikota et al., ICCV 2023, arXiv 2303.07345",
        what="steers the concept's prompt away from itself",
        touches="cross-attention of the denoiser, other layers by name",
        reads="pictures of the concept",
        strength="the simplest training; a baseline",
        weakness="companions fade with the concept",
        replaces="the prediction under the concept's prompt becomes that under the replacement's",
        separates="what the attribute adds to the subject's prompts is taken away",
    ),
}
"""Name → method, in the order in which they are listed."""


def measured() -> dict[str, dict[str, dict[str, Any]]]:
    """Method → concept → figures, of the bundled base; empty where nothing was measured.

    Raises:
        RecarePatchError: the file is damaged.
    """
    try:
        found = json.loads(FIGURES_FILE.read_text(encoding="utf-8"))
        return {name: dict(rows) for name, rows in found["methods"].items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, LookupError, AttributeError, TypeError) as fault:
        raise RecarePatchError(f"cannot read {FIGURES_FILE}: it is damaged; reinstall the package") from fault
