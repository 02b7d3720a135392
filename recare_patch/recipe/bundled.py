"""The recipes that come with the package, the presets, and the recipe that a user's words stand for."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from recare_patch.core import (
    MOST_YAML,
    PatchError,
    RecarePatchError,
    RecipeError,
    bundled,
    load_json,
    load_yaml,
    read_bytes,
    read_safetensors_header,
    read_text,
    reason,
    unknown_name,
)
from recare_patch.recipe.concept import Concept, same_concept
from recare_patch.recipe.methods import METHODS, RANK_KEYS, method_info
from recare_patch.recipe.options import EraseOptions
from recare_patch.recipe.recipe import Fill, Recipe

logger = logging.getLogger(__name__)

METADATA_KEY = "recare_patch.recipe"
"""The header entry of a patch's safetensors file that holds its recipe."""

PARTS_KEY = "recare_patch.parts"
"""The header entry of a stack's safetensors file that lists the patches in it."""

WEIGHTS_NAME = "pytorch_lora_weights.safetensors"
"""The file that diffusers looks for in a LoRA folder."""

FIGURES_FILE = Path(__file__).parent / "method_figures.json"
"""What was measured of the methods, where a benchmark has written it."""

_BRIEF: dict[str, Any] = {
    "target_images.count": 24,
    "target_images.steps": 8,
    "target_images.scheduler": "dpm-solver++",
    "search.rounds": 0,
}
"""Few pictures in few steps, which small bases have by themselves, and no search."""

PRESETS: dict[str, dict[str, Any]] = {
    # The closed form alone: a second, and no picture is looked at.
    "fast": {"method": "closed"},
    # A search for adversarial names, and an erasing that ends by its own measure: what bases with a transformer have by
    # default, and runs that replace a concept or take it out of a subject.
    "measured": {},
    # The same with fewer pictures in fewer steps, and no search.
    "quick": {**_BRIEF, "erase.steps": 100},
    # The default elsewhere, and against learnt names of several vectors: adversaries in the loop, which take the
    # search's place, and all linear layers of the transformer blocks, to lose the concept itself and not its names
    # alone; a rank of two is enough there. Many steps of few states, since what counts is how often patch and
    # adversaries answer each other.
    "robust": {
        "adapter.layers": "transformer-blocks",
        "adapter.rank": 2,
        "adapter.alpha": 4.0,
        **_BRIEF,
        # What adversaries find is not what the run's own look sees: it takes all its steps.
        "erase.ends": "steps",
        "erase.steps": 72,
        "erase.batch_size": 2,
        "erase.retain_batch_size": 4,
        "erase.learning_rate": 3.0e-3,
        # The further the push beyond nothing, the better it stands, and the more of the companions goes along.
        "erase.guidance_minus": 2.0,
        "erase.retain_weight": 6.0,
        "erase.retain_in_picture": 1.0,
        "adversary.count": 2,
        "adversary.space": "embeddings",
        "adversary.steps": 1,
        "adversary.life": 20,
        "adversary.batch_size": 2,
        "adversary.learning_rate": 0.1,
    },
}
"""Name → recipe keys that belong together, see ``docs/erasure.md``."""

DEFAULT_PRESET = "robust"
"""What a plain erasing by ReCARE starts from where nobody names a preset and the base allows it."""


@dataclass(frozen=True)
class Beneath:
    """What a base asks of a recipe, by dotted keys.

    Attributes:
        values: hold where neither a recipe, a method nor a user says otherwise.
        firm: go before a recipe and a preset too: a base that draws in four steps draws in no other way.
        of_method: method → values that go before the method's own defaults.
        by_default: whether :data:`DEFAULT_PRESET` is for it.
    """

    values: Mapping[str, Any] = field(default_factory=dict)
    firm: Mapping[str, Any] = field(default_factory=dict)
    of_method: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    by_default: bool = False

    def unsaid(self, method: Any) -> dict[str, Any]:
        """The values of which a method has no default of its own."""
        if not isinstance(method, str) or method not in METHODS:
            return dict(self.values)
        info = method_info(method)
        own = {*info.defaults, *(RANK_KEYS if info.rank_per_name else ())}
        return {key: one for key, one in self.values.items() if key not in own} | dict(self.of_method.get(method, {}))

    def under(self, data: Mapping[str, Any], method: str | None = None) -> dict[str, Any]:
        """A recipe's plain data, filled where neither it nor its method's own defaults say anything."""
        return _filled(data, self.unsaid(method or data.get("method", "recare")))

    def preset(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """A preset's keys for this base: its rate, so that steps in another number reach as far as they are to.

        What AdamW can move a weight by is its rate times its steps; where both are the base's own, a preset's number of
        steps alone would change it by accident. And a base that says which layers are trained says it of every run.
        """
        steps, rate = "erase.steps", "erase.learning_rate"
        found = dict(given)
        if "adapter.layers" in self.values:
            found = {key: one for key, one in found.items() if not key.startswith("adapter.")}
        if steps in given and {steps, rate} <= self.values.keys():
            plain = EraseOptions()
            reach = self.values[steps] * self.values[rate] / (plain.steps * plain.learning_rate)
            found[rate] = float(f"{given.get(rate, plain.learning_rate) * reach:.3g}")
        return found

    def default(self) -> dict[str, Any]:
        """The keys of :data:`DEFAULT_PRESET` for this base, but for pictures where it asks for other ones itself."""
        found = self.preset(PRESETS[DEFAULT_PRESET])
        return {key: one for key, one in found.items() if not (key.startswith("target_images.") and key in self.values)}


def _filled(data: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's plain data with values by dotted keys where it says nothing."""
    filled = dict(data)
    for key, value in values.items():
        section, _, option = key.rpartition(".")
        said = filled.get(section, {}) if section else filled
        if isinstance(said, Mapping) and option not in said:
            filled |= {section: {**said, option: value}} if section else {option: value}
    return filled


def _nothing(_: str) -> Beneath:
    return Beneath()


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


@dataclass(frozen=True)
class RecipeInfo:
    """One bundled recipe; ``name`` is what ``--recipe`` takes."""

    name: str
    path: Path
    concept: str
    base: str
    kind: str


def list_recipes() -> list[RecipeInfo]:
    """All bundled recipes, by name."""
    found = []
    for path in sorted(bundled("recipes").glob("*.yaml")):
        recipe = _read_yaml(path)
        found.append(RecipeInfo(path.stem, path, recipe.concept.text, recipe.base, recipe.concept.kind))
    return found


def find_recipe_for(concept_text: str, base: str | None = None, *, fill: Fill = dict) -> Recipe | None:
    """The bundled recipe of a concept, or None; ``fill`` as :func:`load_recipe` takes it.

    Args:
        concept_text: the concept's name; case does not count.
        base: the base model it must be for. A folder or another owner's copy counts when its last
            part has the same name ("models/stable-diffusion-v1-5"). None: any base.
    """

    def last(source: str) -> str:
        return re.split(r"[/\\]", source.rstrip("/\\"))[-1].casefold()

    for info in list_recipes():
        if same_concept(info.concept, concept_text) and (base is None or last(base) == last(info.base)):
            return _read_yaml(info.path, fill)
    return None


def load_recipe(source: str, *, fill: Fill = dict) -> Recipe:
    """A recipe by name, from a file, or out of a patch.

    What it leaves unsaid has the plain defaults; :func:`recipe_for` fills in those of its base.

    Args:
        source: the name of a bundled recipe ("van-gogh" is short for "van-gogh-atelier"), a YAML
            file, a patch folder or a patch's safetensors file. A name goes before a file of that
            name; write "./name" for the file.
        fill: makes a file's plain data whole before it is checked; a patch's recipe is whole already.

    Raises:
        UnknownNameError: no such name or file.
        RecipeError: the file holds no sound recipe.
        PatchError: the safetensors file cannot be read.
    """
    source = source.strip()
    by_name = {path.stem.casefold(): path for path in sorted(bundled("recipes").glob("*.yaml"))}
    wanted = re.sub(r"[\s_]+", "-", source.casefold())
    for name in (wanted, f"{wanted}-atelier"):
        if name in by_name:
            return _read_yaml(by_name[name], fill)
    path = Path(source)
    try:
        if path.is_dir():
            if (path / WEIGHTS_NAME).is_file():
                return _recipe_in_patch(path / WEIGHTS_NAME)
            if (path / "recipe.yaml").is_file():
                return _read_yaml(path / "recipe.yaml", fill)
            raise RecipeError(f"{source} holds no recipe: neither {WEIGHTS_NAME} nor recipe.yaml is in it")
        if path.is_file():
            return _recipe_in_patch(path) if path.suffix == ".safetensors" else _read_yaml(path, fill)
    except OSError as fault:
        raise RecipeError(f"cannot read {source}: {reason(fault)}") from fault
    short = [name.removesuffix("-atelier") for name in by_name if name.endswith("-atelier")]
    raise unknown_name("recipe", source, [*sorted(short), *sorted(by_name)])


def _read_yaml(path: Path, fill: Fill = dict) -> Recipe:
    text = read_text(path, str(path), RecipeError, most=MOST_YAML)
    return Recipe.from_yaml(text, source=str(path), fill=fill)


def stack_has_no_recipe(name: str, parts: int) -> str:
    """The sentence for whoever asks a stack of patches for its recipe."""
    return f"{name} is a stack of {parts} patches and has no recipe of its own: name one of its parts instead"


def _recipe_in_patch(path: Path) -> Recipe:
    header = read_safetensors_header(path).metadata
    text = header.get(METADATA_KEY)
    if text is None and PARTS_KEY in header:
        raise RecipeError(stack_has_no_recipe(str(path), len(parts_in_header(header, str(path)))))
    if text is None:
        raise RecipeError(f"{path} carries no recipe: it was not made by recare-patch, or its header was stripped")
    return Recipe.from_yaml(text, source=f"the recipe in {path}")


def parts_in_header(header: Mapping[str, str], source: str) -> list[dict[str, Any]]:
    """The parts that a stack's header lists, as plain data, read without torch.

    Raises:
        RecipeError: the entry of ``source`` is malformed.
    """
    try:
        parts = load_json(header[PARTS_KEY])
    except ValueError:
        parts = None
    wanted = (("name", str), ("sha256", str), ("scale", (int, float)))
    if not isinstance(parts, list) or not all(
        isinstance(part, dict) and all(isinstance(part.get(key), kind) for key, kind in wanted) for part in parts
    ):
        raise RecipeError(f"{source} has a malformed header entry '{PARTS_KEY}'")
    return parts


# Long for its arguments and what they mean.
def recipe_for(
    concept: str,
    *,
    guess_kind: Callable[[str, str, str | None], str],
    beneath: Callable[[str], Beneath] = _nothing,
    also: Sequence[str] = (),
    subject: str | None = None,
    kind: str | None = None,
    recipe: str | None = None,
    preset: str | None = None,
    base: str | None = None,
    clip: str | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Recipe:
    """The recipe that a user's words stand for: looked up by the concept's name, or made from defaults.

    Args:
        concept: what to erase, in any case; may be empty where ``recipe`` names one.
        guess_kind: the kind of a concept that nothing else tells, from its text, the base and the CLIP.
        beneath: what a base asks of a recipe, by its source; it holds where nothing else is said.
        also: more concepts that the same patch erases.
        subject: take the concept out of this alone, as an attribute of it: "stars" from "Van Gogh".
        kind: ``style``, ``object``, ``identity`` or ``nsfw``, of all concepts, and of the subject where
            there is one; else from a recipe of that concept, else guessed.
        recipe: name of a bundled recipe, a YAML file or a patch to take the recipe from.
        preset: a name of :data:`PRESETS`; ``overrides`` go before it.
        base, clip: where to find the models; else the recipe's, else the bundled ones.
        overrides: dotted recipe keys and their values, for example ``{"erase.steps": 50}``.
    """
    told, given = dict(overrides or {}), preset_overrides(preset)
    earlier = _earlier_adapter(told.get("continue_from"))
    source = base or earlier.get("base") or "atelier"
    method = {**earlier, **given, **told}.get("method")
    asked_of = functools.cache(beneath)

    def fill(data: dict[str, Any]) -> dict[str, Any]:
        own = base or data.get("base", "atelier")
        if not isinstance(own, str):
            return data
        asked = asked_of(own)
        if asked.by_default and preset is None and subject is None and _plain({**data, **told}):
            data = _filled(data, asked.default())
        return asked.under(data, method)

    def named(text: str) -> Concept:
        if kind is not None:
            return Concept(text=text, kind=kind)
        if (found := find_recipe_for(text, source)) is not None:
            logger.info("kind of '%s' taken from its recipe: %s", text, found.concept.kind)
            return Concept(text=text, kind=found.concept.kind)
        guessed = guess_kind(text, source, clip)
        logger.info("kind of '%s' guessed from what the base draws: %s (--kind to choose)", text, guessed)
        return Concept(text=text, kind=guessed)

    def plain(one: Concept) -> Recipe:
        return Recipe(**fill({"concept": one.model_dump(), "base": source, "clip": clip}))

    if recipe:
        made = load_recipe(recipe, fill=fill)
    elif subject is not None:
        # An attribute needs no kind of its own: it is a word beside the subject's name.
        made = plain(Concept(text=concept, kind="object"))
    elif (known := find_recipe_for(concept, source, fill=fill)) is not None:
        logger.info("kind of '%s' taken from its recipe: %s", concept, known.concept.kind)
        made = known
    else:
        made = plain(named(concept))
    changes: dict[str, Any] = dict(earlier)
    if concept and concept.strip().lower() != made.concept.text.lower():
        # Whose other names a recipe of another concept tells is not asked.
        changes |= {"concept.text": concept, "concept.aliases": []}
    if kind is not None and subject is None:
        changes["concept.kind"] = kind
    changes |= {key: value for key, value in (("base", base), ("clip", clip)) if value is not None}
    if also:
        changes["also"] = [named(one).model_dump() for one in also]
    if subject is not None:
        changes["subject"] = named(subject).model_dump()
    asked = asked_of(base or made.base)
    if method not in (None, made.method):
        # Another method starts from its own numbers, and from the base's where it has none.
        changes = asked.unsaid(method) | changes
    changes |= {**asked.preset(given), **asked.firm, **told}
    return made.with_overrides(changes) if changes else made


def _plain(data: Mapping[str, Any]) -> bool:
    """Whether a recipe's plain data asks for an erasing by ReCARE, from nothing and of the whole concept."""
    other = ("replace_with", "subject", "continue_from")
    return data.get("method", "recare") == "recare" and not any(data.get(key) for key in other)


def _earlier_adapter(patch: str | None) -> dict[str, Any]:
    """What a run must share with the patch that it goes on from."""
    if patch is None:
        return {}
    if not Path(patch).exists():
        raise PatchError(f"there is no patch at {patch}")
    # A name of a recipe would go before a folder of that name; a whole path is none.
    found = load_recipe(str(Path(patch).absolute()))
    shared = {f"adapter.{key}": getattr(found.adapter, key) for key in ("layers", "rank", "alpha")}
    return {"base": found.base, "method": found.method, **shared}


def measured() -> dict[str, dict[str, dict[str, Any]]]:
    """Method → concept → figures, of the bundled base; empty where nothing was measured.

    Raises:
        RecarePatchError: the file is damaged.
    """
    try:
        found = load_json(read_bytes(FIGURES_FILE, FIGURES_FILE.name, RecarePatchError))
        return {name: dict(rows) for name, rows in found["methods"].items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, LookupError, AttributeError, TypeError) as fault:
        raise RecarePatchError(f"cannot read {FIGURES_FILE}: it is damaged; reinstall the package") from fault


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
        raise RecipeError(f"'{text}' is not an assignment: the value of {key.strip()} is not readable") from None
