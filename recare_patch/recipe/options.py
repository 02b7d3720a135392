"""The sections of a recipe that all methods share, one class each."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from recare_patch.core import Settings, one_of
from recare_patch.recipe.methods import LAYER_SETS

OPTIMIZERS = ("adamw8bit", "adamw")
SCHEDULES = ("cosine", "constant")
SCHEDULERS = ("ddim", "dpm-solver++", "euler", "pndm", "unipc")
STATES = ("target-images", "shared-rollout", "rollout")
ADVERSARY_SPACES = ("words", "embeddings")
CARE_SOURCES = ("base", "clip")
STARTS = ("zero", "closed")
ENDS = ("measured", "steps")
PRECISIONS = ("fp32", "bf16", "fp16")
BASE_WEIGHTS = ("full", "int8", "nf4")

Count = Annotated[int, Field(ge=1, le=1_000_000)]
Scale = Annotated[float, Field(ge=0, le=100)]
Weight = Annotated[float, Field(ge=0, le=10_000)]
Rate = Annotated[float, Field(gt=0, le=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Bar = Annotated[float, Field(gt=0, le=10)]


class AdapterOptions(Settings):
    """The LoRA that is trained."""

    layers: Annotated[str, BeforeValidator(one_of("layer set", LAYER_SETS))] = Field(
        "cross-attention", description="which layers carry it, a name of LAYER_SETS"
    )
    rank: int = Field(8, ge=1, le=256, description="LoRA rank")
    alpha: float = Field(8.0, gt=0, le=1024, description="LoRA alpha, baked into the tensors of the patch")


class TargetImageOptions(Settings):
    """The pictures of the concept, drawn by the untouched base."""

    count: int = Field(24, ge=1, le=100_000, description="how many pictures")
    steps: int = Field(8, ge=1, le=1000, description="denoising steps of each")
    scheduler: Annotated[str, BeforeValidator(one_of("scheduler", SCHEDULERS))] | None = Field(
        "dpm-solver++", description="what takes the steps, a name of SCHEDULERS; null: the base's own"
    )
    guidance_scale: Scale = Field(5.0, description="classifier-free guidance; 1 is none")
    batch_size: Count = Field(8, description="pictures drawn together; changes memory and speed only")


class CareSetOptions(Settings):
    """How the benign companions of the concept are found."""

    source: Annotated[str, BeforeValidator(one_of("source of companions", CARE_SOURCES))] = Field(
        "base",
        description="base: words of the language that CLIP sees more in the concept's pictures than in others, and "
        "that the base confirms; clip: the published way, CLIP's own vocabulary, of which the next keys speak",
    )
    tokens_per_image: Count | None = Field(None, description="tokens of each picture; null: by the vocabulary's size")
    keep: Count | None = Field(None, description="most frequent tokens that go on; at most so many companions")
    clusters: int = Field(7, ge=1, le=1000, description="clusters of the text features")
    clustering: bool = Field(True, description="drop the clusters nearest to the concept and farthest from it")
    refinement: bool = Field(True, description="drop tokens that pull their cluster towards the concept")
    alpha: float = Field(0.01, ge=0, le=100, description="slack of that refinement")
    file: str | None = Field(None, description="a CARE-set made before, used instead")


class SearchOptions(Settings):
    """The search for adversarial names, by textual inversion against an erased model."""

    rounds: int = Field(2, ge=0, le=100, description="how often to erase and invert; 0: no search")
    erase_steps: Count = Field(30, description="training steps of each erasure")
    erase_learning_rate: Rate | None = Field(None, description="of each; null: a quarter of erase.learning_rate")
    inversion_steps: Count = Field(48, description="training steps of each inversion")
    batch_size: Count = Field(8, description="states a step")
    learning_rate: Rate = Field(2.0e-2, description="of the inversion")
    init_word: Annotated[str, Field(min_length=1, max_length=100)] | None = Field(
        None, description="the word that an inversion starts from; null: the kind's own"
    )
    vectors: int = Field(1, ge=1, le=16, description="word vectors of an adversarial name")
    patience: Annotated[int, Field(ge=1, le=1000)] | None = Field(
        None,
        description="an inversion ends when its loss on held-out pictures has had no new best for so many looks, "
        "one in ten steps, and keeps the best; null: it takes all its steps, on all pictures",
    )
    noise_up_to: Rate = Field(
        1.0, description="the share of the process, from its clean end, that an inversion's states come from"
    )
    warm_start: bool = Field(False, description="each round starts from the name that the round before found")


class AdversaryOptions(Settings):
    """Names that are sought in the model while it is erased, and erased at once; ReCARE reads them.

    They cost ``steps * batch_size`` states with gradient a step, and as many erased states more.
    """

    count: int = Field(0, ge=0, le=100, description="adversaries at a time; 0 is the published method")
    space: Annotated[str, BeforeValidator(one_of("space of adversaries", ADVERSARY_SPACES))] = Field(
        "words",
        description="what they may change: the vectors of some words before the text encoder, as an attacker "
        "would, or all that the text encoder has made of a prompt, which an attacker's words reach a part of. "
        "The latter needs a tenth of the steps",
    )
    vectors: int = Field(4, ge=1, le=16, description="word vectors of one; a quarter of them have a single one")
    steps: int = Field(2, ge=1, le=100, description="of textual inversion before each training step")
    life: Count = Field(300, description="after how many of its steps an adversary starts anew")
    batch_size: Count = Field(8, description="states a step of the inversion")
    learning_rate: Rate = Field(2.0e-2, description="of the inversion")
    weight: Scale = Field(1.0, description="of their part of the loss, the concept's own names having 1")


class EraseOptions(Settings):
    """The training that makes the patch."""

    start: Annotated[str, BeforeValidator(one_of("start of the training", STARTS))] = Field(
        "zero", description="of ReCARE's: zero, from the base; closed, from the closed form where the base allows it"
    )
    ends: Annotated[str, BeforeValidator(one_of("end of the training", ENDS))] = Field(
        "measured",
        description="measured: when the run sees itself done, at the latest after `steps`, which a run with "
        "adversaries takes in full; steps: after them, without looking",
    )
    gone: Bar = Field(0.9, description="share of what erased prompts say that is gone before pictures are looked at")
    drift: Bar = Field(0.15, description="how far what is retained may drift, as a share of what it says")
    steps: Count = Field(130, description="training steps of the patch, at most")
    batch_size: Count = Field(3, description="states a step")
    learning_rate: Rate = Field(2.0e-3, description="its highest value")
    optimizer: Annotated[str, BeforeValidator(one_of("optimizer", OPTIMIZERS))] = Field(
        "adamw8bit", description="a name of OPTIMIZERS"
    )
    schedule: Annotated[str, BeforeValidator(one_of("schedule", SCHEDULES))] = Field(
        "cosine", description="how the learning rate runs, a name of SCHEDULES"
    )
    average: float = Field(0.0, ge=0, lt=1, description="decay of the mean of weights a fixed run ends with; 0: none")
    states: Annotated[str, BeforeValidator(one_of("source of states", STATES))] = Field(
        "target-images", description="where noisy latents come from, a name of STATES"
    )
    guidance_plus: Scale = Field(1.0, description="w⁺, towards the anchor")
    guidance_minus: Scale = Field(3.0, description="w⁻, away from the concept")
    retain_weight: Scale = Field(3.0, description="λ, the weight of what must not change")
    retained_vocabulary: int = Field(
        64,
        ge=0,
        le=100_000,
        description="words of CLIP's vocabulary that do not name the concept, half of them its neighbours, whose "
        "prompts are retained beside the CARE-set's; 0 is the published method",
    )
    retain_batch_size: Count | None = Field(6, description="retained states a step; null: as many as erased ones")
    retain_in_picture: Share = Field(
        0.0,
        description="how much of what a retained prediction misses counts in the clean picture that it stands for, "
        "where an error at high noise weighs most; the rest counts in the prediction, as published",
    )
    retained_pairs: int = Field(
        4,
        ge=0,
        le=1000,
        description='prompts for each guarded word that join it to another one, such as "A boat with stars"; '
        "0 is the published method",
    )
    retained_images: int = Field(
        16, ge=0, le=100_000, description="pictures of retained prompts to hold them on; 0: the erased prompts' states"
    )
    composed: bool = Field(
        True,
        description='vary the erased prompt: joined to its anchor ("stars in the style of Van Gogh") or to '
        "another word, or by another of the concept's names; false is the published method",
    )
    eta: Scale = Field(1.0, description="ESD's negative guidance; ReCARE does not read it")


def _resolution(given: Any) -> Any:
    if not isinstance(given, str) or not re.fullmatch(r"[1-9]\d{1,4}x[1-9]\d{1,4}", given.strip().lower()):
        raise ValueError(f"'{given}' is no size of pictures: write WIDTHxHEIGHT in pixels, such as 768x512")
    return given.strip().lower()


class MemoryOptions(Settings):
    """Levers that make a run fit a smaller device, or take less time on it; by default all are off."""

    weights: Annotated[str, BeforeValidator(one_of("form of base weights", BASE_WEIGHTS))] = Field(
        "full", description="the denoiser's linear layers: as loaded, or quantized by bitsandbytes"
    )
    encoders_off_device: bool = Field(
        False, description="text encoders are on the device only while they encode; embeddings are kept"
    )
    vae_off_device: bool = Field(False, description="so is the autoencoder while it works")
    vae_tiling: bool = Field(False, description="it works on one picture at a time, in tiles")
    checkpointing: bool = Field(
        False, description="forget activations, compute them again: less memory, a third slower"
    )
    micro_batch: Count | None = Field(
        None, description="at most so many samples in the denoiser at once; what a step learns is the same"
    )
    offload: bool = Field(
        False, description="layers wait in the host's memory, and each comes to the device to compute"
    )
    resolution: Annotated[str, BeforeValidator(_resolution)] | None = Field(
        None, description="WIDTHxHEIGHT of the pictures in pixels; null: what the base was trained on"
    )
    channels_last: bool = Field(False, description="a pixel's channels side by side in memory, as convolutions like it")
    compile: bool = Field(False, description="compile the denoiser's transformer blocks when they are first used")

    @model_validator(mode="after")
    def _fits_together(self) -> MemoryOptions:
        if self.offload and self.weights != "full":
            raise ValueError(f"offload does not go with {self.weights} weights: choose one")
        if self.offload and not self.checkpointing:
            # Otherwise every layer's weights stay on the device until the backward pass.
            raise ValueError("offload needs checkpointing: true")
        if self.compile and (self.offload or self.weights != "full"):
            other = "offload" if self.offload else f"{self.weights} weights"
            raise ValueError(f"compile does not go with {other}: choose one")
        return self

    def in_words(self) -> str:
        """The levers that are set, for messages."""
        found = self.model_dump(exclude_defaults=True).items()
        return ", ".join(k.replace("_", " ") + ("" if v is True else f" {v}") for k, v in found) or "no lever"
