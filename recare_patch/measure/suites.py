"""What is drawn to judge a patch: prompts, labels and seeds, in a file that anyone can read.

A suite holds the prompts of one concept on one base: those that name it, those that name it
otherwise, those that lead to it without its name, and those that must not change. It names only
registered things, as recipes do. A bench holds several concepts, and gives the suite of each.
"""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import AfterValidator, BeforeValidator, Field, StringConstraints, model_validator

from recare_patch.core import (
    EvaluationError,
    Settings,
    SettingsError,
    bundled,
    nearest,
    one_of,
    read_text,
    unknown_name,
    yaml_mapping,
)
from recare_patch.measure.erasers import Eraser
from recare_patch.measure.names import DETECTORS, SOURCES
from recare_patch.measure.prompts import MAX_PROMPT, MOST_SEED, Rows
from recare_patch.models import BaseModel
from recare_patch.patch import concepts_of
from recare_patch.recipe import KINDS, SCHEDULERS, Concept, Kind, Recipe, same_concept, slug_of

logger = logging.getLogger(__name__)

ATELIER, STABLE_DIFFUSION = "atelier", "stable-diffusion"
"""The bases that suites are for; the second stands for every Stable Diffusion 1.x and 2.x."""

FIRST_SEED = 1_700_000_000
"""Where the bundled suites' seeds begin: apart from those of erasing and of choosing settings."""

BLOCK = 100_000
"""Seeds between one set of prompts and the next."""

_SETS = ("plain", "paraphrased", "implicit", "retained", "neighbours", "memorization", "calibration")
_BLOCKS = {name: number for number, name in enumerate(_SETS)}
_FIRST_CARE_BLOCK = 10


def _a_prompt(text: str) -> str:
    if not (text := " ".join(text.split())):
        raise ValueError("a prompt needs a word, got an empty one")
    return text


def _plain_words(text: str) -> str:
    """Letters and digits alone, in small letters, one space between words and at both ends."""
    return " ".join(["", *re.findall(r"[^\W_]+", text.casefold()), ""])


def _distinct(names: Sequence[str], what: str = "") -> Any:
    if twice := next((name for name, number in Counter(names).items() if number > 1), None):
        raise ValueError(f"{what}'{twice}' is there twice")
    return names


def _hint(text: str, names: Sequence[str]) -> str:
    guess = nearest(text, names)
    return f"; did you mean '{guess}'?" if guess else ""


Prompt = Annotated[str, Field(max_length=MAX_PROMPT), AfterValidator(_a_prompt)]
Prompts = Annotated[tuple[Prompt, ...], AfterValidator(_distinct)]
Label = Annotated[str, StringConstraints(min_length=1, max_length=200)]
AnyKind = Annotated[Kind, BeforeValidator(one_of("kind", KINDS))]


Which = Literal["plain", "neighbours", "retained"]
"""The sets of prompts that a table's rows can stand for."""


class _Evaluation(Settings):
    error: ClassVar[type[SettingsError]] = EvaluationError
    noun: ClassVar[str] = "suite"


class PromptSet(_Evaluation):
    """Prompts whose pictures should show one label."""

    label: Label = Field(description="what the detector calls it")
    word: Label | None = Field(None, description="what CLIP compares pictures with; None: the label")
    prompts: Annotated[Prompts, Field(min_length=1)]

    @property
    def clip_word(self) -> str:
        """What CLIP compares pictures with."""
        return self.word or self.label


@dataclass(frozen=True)
class Drawing:
    """One set of pictures to draw: a prompt, a seed and a label each.

    The label is what the picture should show, or must not; "" where there is none. Pictures of a table may have a
    guidance of their own, and the prompt without the concept.
    """

    name: str
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    labels: tuple[str, ...]
    guidance: tuple[float, ...] = ()
    without: tuple[str, ...] = ()


def _turns(name: str, rows: Sequence[tuple[str, str]], first: int, pictures: int) -> Drawing:
    turns = [rows[number % len(rows)] for number in range(pictures if rows else 0)]
    prompts, labels = tuple(prompt for prompt, _ in turns), tuple(label for _, label in turns)
    return Drawing(name, prompts, tuple(range(first, first + len(turns))), labels)


class _Drawn(_Evaluation):
    """What suites and benches have in common: who judges, and how pictures are drawn."""

    version: Literal[1] = 1
    name: Label
    base: Label = Field(ATELIER, description="atelier or stable-diffusion: which its words are meant for")
    detector: Annotated[str, BeforeValidator(one_of("detector", DETECTORS.names()))]
    detector_options: dict[str, Any] = Field({}, description="as source of a classifier or labels of CLIP")
    retained: tuple[Prompt, ...] = Field((), description="for agreement and distances to the base's pictures")
    retained_seeds: tuple[Annotated[int, Field(ge=0, le=MOST_SEED)], ...] = Field(
        (), description="of the retained prompts, one each; none: they follow from first_seed"
    )
    steps: Annotated[int, Field(ge=1, le=1000)] = 20
    scheduler: Annotated[str, BeforeValidator(one_of("scheduler", SCHEDULERS))] | None = None
    guidance_scale: Annotated[float, Field(ge=0, le=100)] = 5.0
    first_seed: int = Field(FIRST_SEED, ge=0, le=2**62, description="every seed follows from it")
    notes: str = ""


class Suite(_Drawn):
    """The prompts that judge how one concept was erased from one base."""

    concept: Label
    kind: AnyKind
    label: Label = Field(description="what the detector calls the concept")
    plain: Prompts = Field((), description="name the concept as recipes do")
    paraphrased: Prompts = Field((), description="name it in other words or company")
    implicit: Prompts = Field((), description="lead to it and do not name it")
    care: tuple[PromptSet, ...] = Field((), description="benign prompts about each CARE concept")
    neighbours: tuple[PromptSet, ...] = Field((), description="other concepts of its kind")
    tables: dict[Which, Rows] = Field({}, description="rows of a prompt file that stand for a set, each drawn once")
    labels: tuple[Label, ...] | None = Field(
        None, description="what CARE concepts compete with (O of the CARE score); None: COCO and two words"
    )

    @model_validator(mode="after")
    def _check(self) -> Suite:
        if not (self.plain or self.care or self.neighbours or self.retained or self.tables):
            raise ValueError("there is no prompt to draw")
        given = self.detector_options.get("labels")
        if given is not None:
            names = [str(one).strip() for one in given] if isinstance(given, list | tuple) else []
            if self.label.casefold() not in map(str.casefold, names):
                hint = _hint(self.label, names)
                raise ValueError(f"the label set does not hold the target's label '{self.label}'{hint}")
        if self.retained_seeds and len(self.retained_seeds) != len(self.retained):
            told = f"{len(self.retained)} retained prompts have {len(self.retained_seeds)} seeds"
            raise ValueError(f"{told}: one each is needed, or none")
        _distinct([one.clip_word.casefold() for one in self.care], "the CARE concept ")
        words = Concept(text=self.concept, kind=self.kind).words if self.kind == "nsfw" else ()
        for prompt in self.implicit:
            if any(_plain_words(name) in _plain_words(prompt) for name in (self.concept, *words)):
                raise ValueError(f"the implicit prompt '{prompt}' names the concept")
        return self

    @property
    def sampler(self) -> dict[str, Any]:
        """How a studio is asked for its pictures."""
        return {name: getattr(self, name) for name in ("steps", "guidance_scale", "scheduler")}

    def block(self, name: str) -> int:
        """The first seed of a set."""
        return self.first_seed + BLOCK * _BLOCKS[name]

    def holds(self, which: Which) -> bool:
        """Whether a set has a prompt."""
        return which in self.tables or bool(getattr(self, which))

    @property
    def neighbour_labels(self) -> tuple[str, ...]:
        """What pictures of the neighbours should show, each once."""
        rows = self.tables.get("neighbours")
        return tuple(dict.fromkeys(rows.concepts if rows else [one.label for one in self.neighbours]))

    def _rows(self, which: str, rows: Rows, pictures: int) -> Drawing:
        some = slice(min(pictures, len(rows.prompts)))
        first, count = self.block(which), len(rows.prompts[some])
        own = {"plain": (self.label,) * count, "neighbours": rows.concepts[some]}
        seeds = rows.seeds[some] or tuple(range(first, first + count))
        labels = own.get(which, ("",) * count)
        return Drawing(which, rows.prompts[some], seeds, labels, rows.guidance[some], rows.without[some])

    def drawing(self, which: str, pictures: int) -> Drawing:
        """So many pictures of one set of prompts, which take turns; more pictures go on where fewer end.

        Of a table's rows, each has one, and no more are drawn.
        """
        for name, held in self.tables.items():
            if name == which:
                return self._rows(which, held, pictures)
        if which == "neighbours":
            # Each label has its turn before any has a second: a few pictures show them all.
            most = max((len(one.prompts) for one in self.neighbours), default=0)
            turns = ((turn, one) for turn in range(most) for one in self.neighbours)
            rows = [(one.prompts[turn % len(one.prompts)], one.label) for turn, one in turns]
        else:
            label = "" if which == "retained" else self.label
            rows = [(prompt, label) for prompt in getattr(self, which)]
        made = _turns(which, rows, self.block(which), pictures)
        if which == "retained" and (given := self.retained_seeds):
            # In its next turn a prompt has the next seed, below what torch takes.
            own = (given[k % len(given)] + k // len(given) for k in range(len(made.seeds)))
            made = replace(made, seeds=tuple(own))
        return made

    def care_drawing(self, number: int, pictures: int) -> Drawing:
        """The pictures of a CARE concept, by its place in :attr:`care`."""
        one, first = self.care[number], self.first_seed + BLOCK * (_FIRST_CARE_BLOCK + number)
        return _turns(f"CARE {one.clip_word}", [(text, one.label) for text in one.prompts], first, pictures)

    def with_changes(self, **changes: Any) -> Suite:
        """A copy with some values set otherwise, checked again."""
        return Suite(**{**self.model_dump(), **changes})

    def with_detector(self, detector: str, label: str | None = None) -> Suite:
        """The suite judged by another detector, whose name may have the source of its weights behind a colon.

        ``label`` is what it calls the concept; None: as the suite says.
        """
        name, colon, source = map(str.strip, detector.partition(":"))
        name = name.casefold()
        if name not in DETECTORS:
            raise unknown_name("detector", name, DETECTORS.names())
        options = dict(self.detector_options) if name == self.detector else {}
        if colon and name == "ensemble":
            options = {"members": [self._member(one) for one in source.split("+")]}
        elif colon:
            if name not in SOURCES:
                told = (
                    f"takes no source: only {', '.join(f'{one}:FOLDER' for one in SOURCES)} and ensemble:NAME+NAME do"
                )
                raise EvaluationError(f"the detector {name} {told}")
            if not source:
                raise EvaluationError(f"the source of the detector {name} is empty in '{detector}'")
            options[SOURCES[name]] = source
        if label is not None and "labels" in options:
            options["labels"] = list(dict.fromkeys([label, *options["labels"]]))
        return self.with_changes(detector=name, detector_options=options, label=label or self.label)

    def _member(self, text: str) -> dict[str, Any]:
        """An ensemble's detector from "NAME[:SOURCE][=LABEL]"; the suite's own keeps its options."""
        text, _, label = map(str.strip, text.partition("="))
        own = self.with_detector(text)
        return {**own.detector_options, "detector": own.detector, **({"label": label} if label else {})}

    def to_yaml(self) -> str:
        """The whole suite as YAML."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=100)


class BenchConcept(_Evaluation):
    """One concept of a bench."""

    concept: Label
    kind: AnyKind | None = None
    label: Label
    name: Label | None = Field(None, description="what stands for {} in templates; None: the concept's text")
    plain: Prompts = Field((), description="with none, the bench's templates")
    paraphrased: Prompts = ()
    implicit: Prompts = ()


class ConceptBench(_Drawn):
    """Several concepts of one group, each of which may be erased while the others stay.

    The groups are those of Forget-Me-Not's ConceptBench (Zhang et al., arXiv 2303.17591); which concepts and
    prompts, and how they are judged, is our own choice.
    """

    noun: ClassVar[str] = "bench"

    group: Annotated[str, BeforeValidator(one_of("group", ("identity", "object", "style")))]
    templates: Prompts = Field((), description="with {} for a concept's name, where it has no own prompts")
    concepts: Annotated[tuple[BenchConcept, ...], Field(min_length=2)]

    @model_validator(mode="after")
    def _check(self) -> ConceptBench:
        if bad := next((one for one in self.templates if "{}" not in one), None):
            raise ValueError(f"the template '{bad}' has no {{}} for the concept's name")
        if bare := next((one for one in self.concepts if not (one.plain or self.templates)), None):
            raise ValueError(f"the concept '{bare.concept}' has no prompts, and there are no templates")
        return self

    def suite(self, concept: str, kind: str | None = None) -> Suite:
        """The suite of a concept: itself erased, the others its neighbours.

        A concept that the bench does not hold has no plain prompts here: all of the bench must stay.
        """
        prompts = {one.concept: one.plain or self._filled(one) for one in self.concepts}
        own = next((one for one in self.concepts if same_concept(one.concept, concept)), None)
        others = [one for one in self.concepts if one is not own]
        shared = {name: getattr(self, name) for name in _Drawn.model_fields}
        return Suite(
            **shared,
            concept=concept,
            kind=(own and own.kind) or kind or self.group,
            # A concept from elsewhere still needs a label that the detector knows: any of the bench's serves.
            label=(own or self.concepts[0]).label,
            plain=prompts[own.concept] if own else (),
            paraphrased=own.paraphrased if own else (),
            implicit=own.implicit if own else (),
            neighbours=[PromptSet(label=one.label, prompts=prompts[one.concept]) for one in others],
        )

    def _filled(self, one: BenchConcept) -> tuple[str, ...]:
        return tuple(form.replace("{}", one.name or one.concept) for form in self.templates)


def suites_folder() -> Path:
    """The folder of bundled suites."""
    return bundled("recipes") / "suites"


def list_suites() -> dict[str, Path]:
    """The files of all bundled suites and benches, by name."""
    return {path.stem: path for path in sorted(suites_folder().glob("*.yaml"))}


def load_suite(name_or_path: str | Path, *, concept: str | None = None, kind: str | None = None) -> Suite:
    """A suite by name ("van-gogh" is short for "van-gogh-atelier") or from a YAML file.

    A name goes before a file of that name; write "./name" for the file. A bench has to be told the patch's
    concept and kind.
    """
    text, bundled = str(name_or_path).strip(), list_suites()
    wanted = re.sub(r"[\s_]+", "-", text.casefold())
    path = bundled.get(wanted) or bundled.get(f"{wanted}-{ATELIER}") or Path(text).expanduser()
    # Unlike Path's own, this one says no where a name is too long for any file.
    if not os.path.isfile(path):  # noqa: PTH113
        raise unknown_name("suite", text, bundled)
    made = _read(path)
    if isinstance(made, Suite):
        return made
    if concept is None:
        count = len(made.concepts)
        raise EvaluationError(f"{text} is a bench of {count} concepts: say which of them was erased")
    return made.suite(concept, kind)


def parse_suite(text: str, source: str = "suite") -> Suite | ConceptBench:
    """A suite or bench from YAML; ``source`` is where it is from, for messages."""
    data = yaml_mapping(text, source=source, noun="suite", error=EvaluationError)
    try:
        return ConceptBench(**data) if "concepts" in data else Suite(**data)
    except EvaluationError as fault:
        raise EvaluationError(f"{source}: {'; '.join(fault.faults)}", fault.faults) from None


def _read(path: Path) -> Suite | ConceptBench:
    return parse_suite(read_text(path, f"the suite {path}", EvaluationError), str(path))


def find_suite_for(concept: Concept | str, base: str) -> Suite | None:
    """The bundled suite of a concept on a base; every one but "atelier" is taken for a Stable Diffusion."""
    family = ATELIER if base.strip().casefold() == ATELIER else STABLE_DIFFUSION
    for made in map(_read, list_suites().values()):
        if isinstance(made, Suite) and made.base == family and same_concept(made.concept, concept):
            return made
    return None


@dataclass(frozen=True)
class Subject:
    """One concept that a patch erases, what was guarded along with it, and the patch's method.

    The recipe is the patch's, with this concept alone; of a stack, one of defaults with its base.
    """

    recipe: Recipe
    care_words: tuple[str, ...]
    method: str

    @property
    def concept(self) -> Concept:
        """What was erased."""
        return self.recipe.concept


def subject_of(patch: Eraser, concept: str | None = None) -> Subject:
    """One concept that a patch erases, which may be left out where there is only one."""
    metadata, known = patch.metadata, concepts_of(patch)
    if metadata is None or not known:
        raise EvaluationError(f"{patch.source} does not say what it erases, so that nothing can be judged")
    chosen = [one for one in metadata.erased if concept is None or same_concept(one.concept, concept)]
    if not chosen:
        hint = _hint(str(concept), known) if len(known) > 1 else ""
        raise EvaluationError(f"patch {patch.name} erases {' and '.join(known)}, not '{concept}'{hint}")
    if len(chosen) > 1:
        raise EvaluationError(f"patch {patch.name} erases several concepts: choose one of {', '.join(known)}")
    if not metadata.by_concept:
        return Subject(metadata.parsed_recipe, metadata.care_words, metadata.method)
    (told,) = chosen
    if told.kind is not None:
        one = told.as_concept()
    elif suite := find_suite_for(told.concept, metadata.base):
        one = Concept(text=told.concept, kind=suite.kind)
    else:
        raise EvaluationError(
            f"patch '{metadata.concept}' does not say what kind of concept '{told.concept}' is: make it "
            "again from patches that do"
        )
    recipe = own_recipe(patch) or Recipe(concept=one, base=metadata.base)
    alone = recipe.model_copy(update={"concept": one, "also": (), "subject": None})
    return Subject(alone, told.care_words, metadata.method)


def own_recipe(patch: Eraser) -> Recipe | None:
    """The recipe that one run made a patch by; None for stacks, and where the patch does not say."""
    metadata = patch.metadata
    return None if metadata is None or metadata.parts else metadata.parsed_recipe


def folder_of(patch: Eraser, folder: Path, concept: str) -> Path:
    """Where evidence on one concept lies: in the folder, or of several concepts in one of its own within."""
    by_concept = patch.metadata is not None and patch.metadata.by_concept
    return folder / slug_of(concept) if by_concept else folder


def resolve_suite(
    patch: Eraser,
    suite: Suite | str | Path | None,
    base_id: str,
    *,
    concept: str | None = None,
    first_seed: int | None = None,
) -> Suite:
    """The suite that a patch is judged by.

    Args:
        patch: what it erases and guards decides where nothing is named.
        suite: a suite, its name or file; None: the concept's bundled one, else one made from the recipe.
        base_id: of the base.
        concept: which of several; None: the only one, or that of ``suite``.
        first_seed: instead of the suite's own.
    """
    known = concepts_of(patch)
    if suite is None and not known:
        told = "was not made by recare-patch and does not say what it erases: name a suite"
        raise EvaluationError(f"{patch.source} {told}")
    if concept is None and len(known) > 1 and suite is not None:
        # A suite that is no bench says itself which of them it is for.
        concept = (suite if isinstance(suite, Suite) else load_suite(suite)).concept
    subject = subject_of(patch, concept) if known else None
    erased = subject.concept if subject else None
    if isinstance(suite, Suite):
        found = suite
    elif suite is not None:
        found = load_suite(suite, **({"concept": erased.text, "kind": erased.kind} if erased else {}))
    else:
        from recare_patch.measure.unwritten import default_suite

        assert subject is not None and erased is not None
        found = (
            find_suite_for(erased, base_id)
            # The recipe knows a hub id or "atelier" where the base is a folder of any name.
            or find_suite_for(erased, subject.recipe.base)
            or default_suite(subject.recipe, subject.care_words)
        )
    if erased is not None and not same_concept(found.concept, erased):
        told = f"is for '{found.concept}', and the patch erases '{erased.text}'"
        raise EvaluationError(f"the suite '{found.name}' {told}")
    return found if first_seed is None else found.with_changes(first_seed=first_seed)


def suited(suite: Suite, base: BaseModel) -> Suite:
    """A suite as a base can draw it: one that was distilled to few steps draws noise, or burns, in any other way."""
    few = base.few_steps
    if few is None or suite.steps <= 2 * few.steps:
        return suite
    told = "base %s is drawn with in %d steps at guidance %g, and not as suite '%s' says: %s"
    logger.info(told, base.id, few.steps, few.guidance, suite.name, few.why)
    tables = {which: rows.model_dump() | {"guidance": ()} for which, rows in suite.tables.items()}
    return suite.with_changes(steps=few.steps, guidance_scale=few.guidance, scheduler=None, tables=tables)
