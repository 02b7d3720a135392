"""A recipe: everything that a run needs to know, in one readable file.

A recipe names only registered things (methods, layer sets, optimizers), never code, because it
travels inside patches. What a run leaves unsaid is filled from the defaults here, and the full
recipe is stored with the result, so that the run can be made again from the patch alone.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from recare_patch.core import (
    RecipeError,
    Settings,
    load_yaml,
    nearest,
    one_of,
    read_safetensors_header,
    unknown_name,
    yaml_mapping,
)
from recare_patch.recipe.concept import MAX_LENGTH, Concept, check_text, same_concept, slug_of
from recare_patch.recipe.methods import (
    DENOISER_LAYERS,
    TEXT_LAYERS,
    ForgetMeNotOptions,
    MethodInfo,
    SGraceOptions,
    UCEOptions,
)
from recare_patch.recipe.methods import METHODS as METHOD_TABLE
from recare_patch.recipe.samplers import SCHEDULERS

METHODS = tuple(METHOD_TABLE)
LAYER_SETS = (*DENOISER_LAYERS, *TEXT_LAYERS)
TEXT_LAYER_SETS = TEXT_LAYERS
"""Those of :data:`LAYER_SETS` that lie in the text encoders, not in the denoiser."""

OPTIMIZERS = ("adamw8bit", "adamw")
SCHEDULES = ("cosine", "constant")
STATES = ("target-images", "shared-rollout", "rollout")
ADVERSARY_SPACES = ("words", "embeddings")
PRECISIONS = ("fp32", "bf16", "fp16")
BASE_WEIGHTS = ("full", "int8", "nf4")

METADATA_KEY = "recare_patch.recipe"
"""The header entry of a patch's safetensors file that holds its recipe."""

PARTS_KEY = "recare_patch.parts"
"""The header entry of a stack's safetensors file that lists the patches in it."""

WEIGHTS_NAME = "pytorch_lora_weights.safetensors"
"""The file that diffusers looks for in a LoRA folder."""

Count = Annotated[int, Field(ge=1, le=1_000_000)]
Scale = Annotated[float, Field(ge=0, le=100)]
Rate = Annotated[float, Field(gt=0, le=1)]


class AdapterOptions(Settings):
    """The LoRA that is trained.

    Attributes:
        layers: which layers carry it, a name of :data:`LAYER_SETS`.
        rank: its rank.
        alpha: its scale times its rank; baked into the tensors of the patch.
    """

    layers: Annotated[str, BeforeValidator(one_of("layer set", LAYER_SETS))] = "cross-attention"
    rank: Annotated[int, Field(ge=1, le=256)] = 8
    alpha: Annotated[float, Field(gt=0, le=1024)] = 8.0


class TargetImageOptions(Settings):
    """The pictures of the concept, drawn by the untouched base.

    Attributes:
        count: how many.
        steps: denoising steps of each.
        scheduler: what takes them, a name of :data:`SCHEDULERS`; None: the base's own.
        guidance_scale: classifier-free guidance; 1 is none.
        batch_size: pictures drawn together; changes memory and speed only.
    """

    count: Annotated[int, Field(ge=1, le=100_000)] = 30
    steps: Annotated[int, Field(ge=1, le=1000)] = 20
    scheduler: Annotated[str, BeforeValidator(one_of("scheduler", SCHEDULERS.names()))] | None = None
    guidance_scale: Scale = 5.0
    batch_size: Count = 8


class CareSetOptions(Settings):
    """How the benign companions of the concept are found.

    Attributes:
        tokens_per_image: vocabulary tokens mined from each picture; None: by the vocabulary's size.
        keep: most frequent tokens that go on; None: by the vocabulary's size.
        clusters: clusters of the text features.
        clustering: drop the clusters nearest to the concept and farthest from it.
        refinement: drop tokens that pull their cluster towards the concept.
        alpha: slack of that refinement.
        file: a CARE-set made before, used instead.
    """

    tokens_per_image: Count | None = None
    keep: Count | None = None
    clusters: Annotated[int, Field(ge=1, le=1000)] = 7
    clustering: bool = True
    refinement: bool = True
    alpha: Annotated[float, Field(ge=0, le=100)] = 0.01
    file: str | None = None


class SearchOptions(Settings):
    """The search for adversarial names, by textual inversion against an erased model.

    Attributes:
        rounds: how often to erase and invert; 0 leaves the search out.
        erase_steps: training steps of each erasure.
        inversion_steps: training steps of each inversion.
        batch_size: states a step.
        learning_rate: of the inversion.
        init_word: the word that an inversion starts from; None: the kind's own.
        vectors: word vectors of an adversarial name.
        patience: an inversion ends when its loss on held-out pictures has had no new best for so many looks,
            one in ten steps, and keeps the best; None: it takes all its steps, on all pictures.
        noise_up_to: the share of the process, from its clean end, that an inversion's states come from.
        warm_start: each round starts from the name that the round before found.
    """

    rounds: Annotated[int, Field(ge=0, le=100)] = 2
    erase_steps: Count = 30
    inversion_steps: Count = 48
    batch_size: Count = 8
    learning_rate: Rate = 2.0e-2
    init_word: Annotated[str, Field(min_length=1, max_length=100)] | None = None
    vectors: Annotated[int, Field(ge=1, le=16)] = 1
    patience: Annotated[int, Field(ge=1, le=1000)] | None = None
    noise_up_to: Rate = 1.0
    warm_start: bool = False


class AdversaryOptions(Settings):
    """Names that are sought in the model while it is erased, and erased at once; ReCARE reads them.

    They cost ``steps * batch_size`` states with gradient a step, and as many erased states more.

    Attributes:
        count: adversaries at a time; 0 is the published method.
        space: what they may change, a name of :data:`ADVERSARY_SPACES`: the vectors of some words before the
            text encoder, as an attacker would, or all that the text encoder has made of a prompt, which an
            attacker's words reach a part of. The latter needs a tenth of the steps.
        vectors: word vectors of an adversary; a quarter of them have one.
        steps: of textual inversion before each training step.
        life: after how many of its steps an adversary starts anew.
        batch_size: states a step of the inversion.
        learning_rate: of the inversion.
        weight: of the adversaries' part of the loss, the concept's own names having 1.
    """

    count: Annotated[int, Field(ge=0, le=100)] = 0
    space: Annotated[str, BeforeValidator(one_of("space of adversaries", ADVERSARY_SPACES))] = "words"
    vectors: Annotated[int, Field(ge=1, le=16)] = 4
    steps: Annotated[int, Field(ge=1, le=100)] = 2
    life: Count = 300
    batch_size: Count = 8
    learning_rate: Rate = 2.0e-2
    weight: Scale = 1.0


class EraseOptions(Settings):
    """The training that makes the patch.

    Attributes:
        steps: training steps.
        batch_size: states a step.
        learning_rate: its highest value.
        optimizer: a name of :data:`OPTIMIZERS`.
        schedule: how the learning rate runs, a name of :data:`SCHEDULES`.
        states: where noisy latents come from, a name of :data:`STATES`.
        guidance_plus: w⁺, towards the anchor.
        guidance_minus: w⁻, away from the concept.
        retain_weight: λ, the weight of what must not change.
        retained_vocabulary: words of CLIP's vocabulary that do not name the concept, half of them its
            neighbours, whose prompts are retained beside the CARE-set's; 0 is the published method.
        retain_batch_size: retained states a step; None: as many as erased ones.
        retained_pairs: prompts for each guarded word that join it to another word, such as "A boat with
            stars"; 0 is the published method.
        retained_images: pictures of retained prompts to hold them on; 0: on the erased prompts' states.
        composed: vary the erased prompt: joined to its anchor ("stars in the style of Van Gogh") or to
            another word, or by another of the concept's names; False is the published method.
        eta: ESD's negative guidance; ReCARE does not read it.
    """

    steps: Count = 130
    batch_size: Count = 3
    learning_rate: Rate = 2.0e-3
    optimizer: Annotated[str, BeforeValidator(one_of("optimizer", OPTIMIZERS))] = "adamw8bit"
    schedule: Annotated[str, BeforeValidator(one_of("schedule", SCHEDULES))] = "cosine"
    states: Annotated[str, BeforeValidator(one_of("source of states", STATES))] = "target-images"
    guidance_plus: Scale = 1.0
    guidance_minus: Scale = 3.0
    retain_weight: Scale = 3.0
    retained_vocabulary: Annotated[int, Field(ge=0, le=100_000)] = 64
    retain_batch_size: Count | None = 6
    retained_pairs: Annotated[int, Field(ge=0, le=1000)] = 4
    retained_images: Annotated[int, Field(ge=0, le=100_000)] = 16
    composed: bool = True
    eta: Scale = 1.0


def _resolution(given: Any) -> Any:
    if not isinstance(given, str) or not re.fullmatch(r"[1-9]\d{1,4}x[1-9]\d{1,4}", given.strip().lower()):
        raise ValueError(f"'{given}' is no size of pictures: write WIDTHxHEIGHT in pixels, such as 768x512")
    return given.strip().lower()


class MemoryOptions(Settings):
    """Levers that make a run fit a smaller device, or take less time on it; by default all are off.

    Attributes:
        weights: how the denoiser's linear layers are kept, a name of :data:`BASE_WEIGHTS`: as loaded, or
            quantized by bitsandbytes.
        encoders_off_device: the text encoders are on the device only while they encode; embeddings are
            kept.
        vae_off_device: the autoencoder is on the device only while it works.
        vae_tiling: it works on one picture at a time, and in tiles.
        checkpointing: the denoiser forgets its blocks' activations and computes them again.
        micro_batch: at most this many samples go through the denoiser at once; what a step learns is the
            same. None: a step's whole batch.
        offload: the denoiser's layers wait in the host's memory, and each comes to the device to compute.
        resolution: ``WIDTHxHEIGHT`` of the pictures in pixels; None: what the base was trained on.
        channels_last: the denoiser and the autoencoder keep a pixel's channels side by side, as convolutions
            on most devices like it.
        compile: the denoiser's transformer blocks are compiled when they are first used.
    """

    weights: Annotated[str, BeforeValidator(one_of("form of base weights", BASE_WEIGHTS))] = "full"
    encoders_off_device: bool = False
    vae_off_device: bool = False
    vae_tiling: bool = False
    checkpointing: bool = False
    micro_batch: Count | None = None
    offload: bool = False
    resolution: Annotated[str, BeforeValidator(_resolution)] | None = None
    channels_last: bool = False
    compile: bool = False

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
        found = self.model_dump(exclude_defaults=True)
        return (
            ", ".join(
                key.replace("_", " ") + ("" if value is True else f" {value}") for key, value in found.items()
            )
            or "no lever"
        )


class Recipe(Settings):
    """One erasure from end to end.

    Attributes:
        version: of this format.
        concept: what is erased.
        also: more concepts that the same patch erases.
        replace_with: what the concept's prompts show instead, such as "cat"; None: nothing in particular.
        subject: the concept is an attribute, and only what shows this subject loses it: stars from Van Gogh.
        continue_from: a patch whose training is gone on with, so that what it erased stays erased; None: a
            new one.
        base: "atelier" (bundled), a pipeline folder or a hub id.
        clip: a CLIP folder or hub id; None: the one that fits the base.
        method: a name of :data:`METHODS`.
        seed: every random draw follows from it.
        precision: in which the base computes; the adapter is always fp32.
        adapter, target_images, care_set, search, erase, adversary, memory: options of each part.
        notes: for the reader; no effect.

    Raises:
        RecipeError: with all faults at once.
    """

    noun: ClassVar[str] = "recipe"

    version: Literal[1] = 1
    concept: Concept
    also: tuple[Concept, ...] = ()
    replace_with: (
        Annotated[str, Field(min_length=1, max_length=MAX_LENGTH), AfterValidator(check_text)] | None
    ) = None
    subject: Concept | None = None
    continue_from: Annotated[str, Field(min_length=1)] | None = None
    base: Annotated[str, Field(min_length=1)] = "atelier"
    clip: Annotated[str, Field(min_length=1)] | None = None
    method: Annotated[str, BeforeValidator(one_of("method", METHODS))] = "recare"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    precision: Annotated[
        Literal["fp32", "bf16", "fp16"], BeforeValidator(one_of("precision", PRECISIONS))
    ] = "fp32"
    adapter: AdapterOptions = AdapterOptions()
    target_images: TargetImageOptions = TargetImageOptions()
    care_set: CareSetOptions = CareSetOptions()
    search: SearchOptions = SearchOptions()
    erase: EraseOptions = EraseOptions()
    adversary: AdversaryOptions = AdversaryOptions()
    memory: MemoryOptions = MemoryOptions()
    s_grace: SGraceOptions = SGraceOptions()
    forget_me_not: ForgetMeNotOptions = ForgetMeNotOptions()
    uce: UCEOptions = UCEOptions()
    notes: str = ""

    @model_validator(mode="before")
    @classmethod
    def _with_method_defaults(cls, data: Any) -> Any:
        """What a recipe leaves unsaid has its method's default, where the method has one of its own."""
        method = data.get("method") if isinstance(data, dict) else None
        info = METHOD_TABLE.get(method.strip().casefold()) if isinstance(method, str) else None
        if info is None:
            return data
        filled = dict(data)
        for key, value in info.defaults.items():
            section, _, name = key.partition(".")
            given = filled.get(section, {})
            if isinstance(given, Settings):
                given = given.model_dump(exclude_unset=True)
            if isinstance(given, Mapping) and name not in given:
                filled[section] = {**given, name: value}
        return filled

    @model_validator(mode="after")
    def _fits_its_method(self) -> Recipe:
        info, quoted = self.method_info, f"method '{self.method}'"
        if self.adapter.layers not in info.layers:
            raise ValueError(
                f"{quoted} trains {' or '.join(info.layers)}: adapter.layers cannot be {self.adapter.layers}"
            )
        for name, other in METHOD_TABLE.items():
            section = other.options
            if (
                section
                and section != info.options
                and getattr(self, section) != type(getattr(self, section))()
            ):
                raise ValueError(
                    f"the section {section} is that of method '{name}', and {quoted} has no use for it"
                )
        if self.replace_with is not None and self.subject is not None:
            raise ValueError(
                "replace_with and subject do not go together: a concept is replaced or taken out"
            )
        for key, value, can in (
            ("replace_with", self.replace_with, info.replaces),
            ("subject", self.subject, info.separates),
            ("continue_from", self.continue_from, info.continues),
        ):
            if value is not None and not can:
                able = [n for n, one in METHOD_TABLE.items() if getattr(one, _ABILITIES[key])]
                raise ValueError(f"{quoted} cannot {_WHAT[key]}: {', '.join(able)} can")
        if self.also and (self.replace_with is not None or self.subject is not None):
            raise ValueError(
                "also, and replace_with or subject, do not go together: write a recipe for each concept"
            )
        if self.method == "forget-me-not" and self.memory.compile:
            raise ValueError(f"{quoted} looks into layers, and compiled ones are closed: no memory.compile")
        if self.search.patience is not None and self.target_images.count < 2:
            raise ValueError("search.patience holds pictures out: target_images.count must be at least 2")
        if self.replace_with is not None and same_concept(self.replace_with, self.concept):
            raise ValueError(f"the concept '{self.concept}' cannot be replaced with itself")
        if self.subject is not None and same_concept(self.subject, self.concept):
            raise ValueError(f"the concept '{self.concept}' cannot be taken out of itself")
        names = [self.concept, *self.also]
        for k, one in enumerate(names):
            if any(same_concept(one, other) for other in names[:k]):
                raise ValueError(f"the concept '{one}' is there twice")
        return self

    @property
    def method_info(self) -> MethodInfo:
        """What is known of its method."""
        return METHOD_TABLE[self.method]

    @property
    def concepts(self) -> tuple[Concept, ...]:
        """All that its patch erases, the first one first."""
        return (self.concept, *self.also)

    @property
    def slug(self) -> str:
        """Its title, fit for a folder: "stars-from-van-gogh"."""
        return slug_of(self.title)

    @property
    def title(self) -> str:
        """What its patch erases, in words: "Van Gogh", "tench + cat", "stars from Van Gogh"."""
        text = " + ".join(one.text for one in self.concepts)
        return f"{text} from {self.subject.text}" if self.subject is not None else text

    def _foreign_sections(self) -> set[str]:
        own = self.method_info.options
        return {one.options for one in METHOD_TABLE.values() if one.options and one.options != own}

    def to_yaml(self) -> str:
        """The whole recipe, defaults included, as YAML; sections of other methods are left out."""
        told = self.model_dump(mode="json", exclude=self._foreign_sections())
        return yaml.safe_dump(told, sort_keys=False, allow_unicode=True, width=100)

    @classmethod
    def from_yaml(cls, text: str, *, source: str = "recipe") -> Recipe:
        """Read a recipe.

        Args:
            text: YAML; only plain data is read, never objects.
            source: where it came from, for messages.

        Raises:
            RecipeError: it is not YAML, no mapping, or holds faults; all are told at once.
        """
        return cls._checked(yaml_mapping(text, source=source, noun="recipe", error=RecipeError), source)

    @classmethod
    def _checked(cls, data: Mapping[str, Any], source: str) -> Recipe:
        try:
            return cls(**data)
        except RecipeError as fault:
            raise RecipeError(f"{source}: {'; '.join(fault.faults)}", fault.faults) from None

    @property
    def hash(self) -> str:
        """SHA-256 of all that decides the result: two recipes with one hash make the same patch."""
        asides = {"notes", "adversary", "memory", *self._foreign_sections()}
        # Unset, these decide nothing; recipes from before they were there keep their hash.
        asides |= {
            key for key in ("also", "replace_with", "subject", "continue_from") if not getattr(self, key)
        }
        deciding = self.model_dump(mode="json", exclude=asides)
        for section, name in _LATER:
            options = getattr(self, section)
            if getattr(options, name) == type(options).model_fields[name].default:
                del deciding[section][name]
        if self.adversary.count:
            plain = {"space"} if self.adversary.space == "words" else None
            deciding["adversary"] = self.adversary.model_dump(mode="json", exclude=plain)
        # Most levers change where and when something is computed, not what.
        if levers := self.memory.model_dump(
            mode="json", include={"weights", "vae_tiling", "resolution"}, exclude_defaults=True
        ):
            deciding["memory"] = levers
        canonical = json.dumps(deciding, sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()

    def with_overrides(self, overrides: Mapping[str, Any]) -> Recipe:
        """A copy with some keys set otherwise.

        Args:
            overrides: dotted key → value, such as ``{"erase.steps": 50, "seed": 1}``. A section
                may be given as a mapping; its other keys keep their values. Where the method changes,
                the sections ``adapter``, ``search`` and ``erase`` start from the new one's defaults.

        Raises:
            RecipeError: unknown keys or bad values; all are told at once.
        """
        data: dict[str, Any] = self.model_dump()
        faults: list[str] = []
        for key, value in overrides.items():
            *path, last = key.split(".")
            place: Any = data
            for part in path:
                place = place.get(part) if isinstance(place, dict) else None
            if not isinstance(place, dict) or last not in place:
                guess = nearest(key, KEYS)
                faults.append(f"{key} is not a key" + (f", did you mean '{guess}'?" if guess else ""))
            elif isinstance(place[last], dict) and isinstance(value, Mapping):
                place[last] = {**place[last], **value}
            else:
                place[last] = value
        self._leave_to_method(data, overrides)
        try:
            changed = type(self)(**data)
        except RecipeError as found:
            faults.extend(found.faults)
        if faults:
            raise RecipeError(f"recipe: {'; '.join(faults)}", faults)
        return changed

    def _leave_to_method(self, data: dict[str, Any], overrides: Mapping[str, Any]) -> None:
        """A recipe's numbers are its method's: another method starts from its own defaults."""
        new, old = METHOD_TABLE.get(str(data["method"]).strip().casefold()), self.method_info
        if new is None or new is old:
            return
        for section in _METHOD_SECTIONS:
            data[section] = {
                name: value
                for name, value in data[section].items()
                if f"{section}.{name}" in _OF_CONCEPT or _is_set(overrides, section, name)
            }
        for key in dict.fromkeys((*old.defaults, *new.defaults)):
            section, _, name = key.partition(".")
            if section in _METHOD_SECTIONS or _is_set(overrides, section, name):
                continue
            # Elsewhere only what was the old one's default is left to the new one.
            plain = getattr(type(self).model_fields[section].default, name)
            if data[section].get(name) == old.defaults.get(key, plain):
                data[section].pop(name, None)


def _is_set(overrides: Mapping[str, Any], section: str, name: str) -> bool:
    return f"{section}.{name}" in overrides or name in overrides.get(section, {})


_METHOD_SECTIONS = ("adapter", "search", "erase")
_OF_CONCEPT = ("search.init_word",)
"""Keys of those sections that speak of the concept, not of the method."""

_LATER = (
    ("target_images", "scheduler"),
    ("search", "patience"),
    ("search", "noise_up_to"),
    ("search", "warm_start"),
)
"""Keys that older recipes lack, and whose defaults are what was done before they were there."""

_ABILITIES = {"replace_with": "replaces", "subject": "separates", "continue_from": "continues"}
_WHAT = {
    "replace_with": "put something in the concept's place",
    "subject": "take an attribute out of a subject",
    "continue_from": "go on from an earlier patch",
}


def _dotted(model: type[Settings]) -> Iterator[str]:
    for name, field in model.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, Settings):
            yield from (f"{name}.{key}" for key in _dotted(inner))
        else:
            yield name


KEYS: tuple[str, ...] = tuple(_dotted(Recipe))
"""Every key of a recipe, dotted: "erase.steps"."""


PRESETS: dict[str, dict[str, Any]] = {
    # Seconds, and weak: see `recare-patch methods forget-me-not`.
    "fast": {"method": "forget-me-not"},
    # A third of the default's evaluations: fewer pictures in fewer steps, no search, half the training.
    "quick": {
        "target_images.count": 24,
        "target_images.steps": 8,
        "target_images.scheduler": "dpm-solver++",
        "search.rounds": 0,
        "erase.steps": 68,
    },
    # Against learnt names of several vectors, at a third of the default's evaluations and ten times its size:
    # adversaries in the loop, which take the search's place, and layers enough to lose the concept itself
    # and not its names alone. Many steps of few states, since what counts is how often patch and adversaries
    # answer each other; and many retained states, as this is a harsher loss.
    "robust": {
        "adapter.layers": "all",
        "target_images.count": 24,
        "target_images.steps": 8,
        "target_images.scheduler": "dpm-solver++",
        "search.rounds": 0,
        "erase.steps": 55,
        "erase.batch_size": 2,
        "erase.retain_batch_size": 7,
        "erase.learning_rate": 3.0e-3,
        "adversary.count": 2,
        "adversary.space": "embeddings",
        "adversary.steps": 1,
        "adversary.life": 20,
        "adversary.batch_size": 2,
        "adversary.learning_rate": 0.1,
        "adversary.weight": 2.0,
    },
}
"""Name → recipe keys that belong together, see ``docs/erasure.md``."""


def preset_overrides(name: str | None) -> dict[str, Any]:
    """The keys that a preset sets; none where there is no name.

    Raises:
        UnknownNameError: with the nearest name.
    """
    if name is None:
        return {}
    if name not in PRESETS:
        raise unknown_name("preset", name, PRESETS)
    return dict(PRESETS[name])


# ------------------------------------------------------------------------ bundled recipes


@dataclass(frozen=True)
class RecipeInfo:
    """One bundled recipe.

    Attributes:
        name: what ``--recipe`` takes.
        path: its file.
        concept: the concept's text.
        base: the base model that it is for.
        kind: the concept's kind.
    """

    name: str
    path: Path
    concept: str
    base: str
    kind: str


def recipes_folder() -> Path:
    """The folder of bundled recipes: inside an installed package, beside it in a source checkout."""
    package = Path(__file__).parents[1]
    inside = package / "_recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


def list_recipes() -> list[RecipeInfo]:
    """All bundled recipes, by name."""
    found = []
    for path in sorted(recipes_folder().glob("*.yaml")):
        recipe = _read_yaml(path)
        found.append(RecipeInfo(path.stem, path, recipe.concept.text, recipe.base, recipe.concept.kind))
    return found


def find_recipe_for(concept_text: str, base: str | None = None) -> Recipe | None:
    """The bundled recipe of a concept, or None.

    Args:
        concept_text: the concept's name; case does not count.
        base: the base model it must be for. A folder or another owner's copy counts when its last
            part has the same name ("models/stable-diffusion-v1-5"). None: any base.
    """
    for info in list_recipes():
        if same_concept(info.concept, concept_text) and (
            base is None or _base_name(base) == _base_name(info.base)
        ):
            return _read_yaml(info.path)
    return None


def _base_name(base: str) -> str:
    return re.split(r"[/\\]", base.rstrip("/\\"))[-1].casefold()


def load_recipe(source: str) -> Recipe:
    """A recipe by name, from a file, or out of a patch.

    Args:
        source: the name of a bundled recipe ("van-gogh" is short for "van-gogh-atelier"), a YAML
            file, a patch folder or a patch's safetensors file. A name goes before a file of that
            name; write "./name" for the file.

    Raises:
        UnknownNameError: no such name or file.
        RecipeError: the file holds no sound recipe.
        PatchError: the safetensors file cannot be read.
    """
    source = source.strip()
    by_name = {path.stem.casefold(): path for path in sorted(recipes_folder().glob("*.yaml"))}
    wanted = re.sub(r"[\s_]+", "-", source.casefold())
    for name in (wanted, f"{wanted}-atelier"):
        if name in by_name:
            return _read_yaml(by_name[name])
    path = Path(source)
    try:
        if path.is_dir():
            if (path / WEIGHTS_NAME).is_file():
                return _recipe_in_patch(path / WEIGHTS_NAME)
            if (path / "recipe.yaml").is_file():
                return _read_yaml(path / "recipe.yaml")
            raise RecipeError(f"{source} holds no recipe: neither {WEIGHTS_NAME} nor recipe.yaml is in it")
        if path.is_file():
            return _recipe_in_patch(path) if path.suffix == ".safetensors" else _read_yaml(path)
    except OSError as fault:
        raise RecipeError(f"cannot read {source}: {(fault.strerror or str(fault)).lower()}") from fault
    short = [name.removesuffix("-atelier") for name in by_name if name.endswith("-atelier")]
    raise unknown_name("recipe", source, [*sorted(short), *sorted(by_name)])


def _read_yaml(path: Path) -> Recipe:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise RecipeError(f"{path} is not a recipe: it is not UTF-8 text") from None
    except OSError as fault:
        raise RecipeError(f"cannot read {path}: {(fault.strerror or str(fault)).lower()}") from fault
    return Recipe.from_yaml(text, source=str(path))


def stack_has_no_recipe(name: str, parts: int) -> str:
    """The sentence for whoever asks a stack of patches for its recipe."""
    return f"{name} is a stack of {parts} patches and has no recipe of its own: name one of its parts instead"


def _recipe_in_patch(path: Path) -> Recipe:
    header = read_safetensors_header(path).metadata
    text = header.get(METADATA_KEY)
    if text is None and PARTS_KEY in header:
        raise RecipeError(stack_has_no_recipe(str(path), len(parts_in_header(header, str(path)))))
    if text is None:
        raise RecipeError(
            f"{path} carries no recipe: it was not made by recare-patch, or its header was stripped"
        )
    return Recipe.from_yaml(text, source=f"the recipe in {path}")


def parts_in_header(header: Mapping[str, str], source: str) -> list[dict[str, Any]]:
    """The parts that a stack's header lists, as plain data, read without torch.

    Args:
        header: all entries of a safetensors header.
        source: where they came from, for messages.

    Raises:
        RecipeError: the entry is malformed.
    """
    try:
        parts = json.loads(header[PARTS_KEY])
    except (ValueError, RecursionError):
        parts = None
    wanted = (("name", str), ("sha256", str), ("scale", (int, float)))
    if not isinstance(parts, list) or not all(
        isinstance(part, dict) and all(isinstance(part.get(key), kind) for key, kind in wanted)
        for part in parts
    ):
        raise RecipeError(f"{source} has a malformed header entry '{PARTS_KEY}'")
    return parts


def parse_assignment(text: str) -> tuple[str, Any]:
    """One "key=value" of the command line, the value read as YAML: numbers, true, null, text.

    Raises:
        RecipeError: there is no "=" or the value is not YAML.
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise RecipeError(f"'{text}' is not an assignment: write key=value, such as erase.steps=50")
    try:
        return key.strip(), load_yaml(value)
    except yaml.YAMLError:
        raise RecipeError(
            f"'{text}' is not an assignment: the value of {key.strip()} is not readable"
        ) from None
