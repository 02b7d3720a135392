"""What an erasing method is given, and what it must do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol, Self

import torch
from torch import Tensor

from recare_patch.core import Registry
from recare_patch.erasure.states import StateSource
from recare_patch.erasure.targets import separated_target
from recare_patch.models import BaseModel, PromptEmbeds
from recare_patch.recipe import METHODS as METHOD_TABLE
from recare_patch.recipe import Concept, EraseOptions, Recipe

if TYPE_CHECKING:
    from recare_patch.erasure.loop import Carried
    from recare_patch.erasure.methods.adversaries import Adversaries

METHODS = Registry("method", {name: info.target for name, info in METHOD_TABLE.items()})


@dataclass(frozen=True)
class Needs:
    """What a method must be given; what it does not need is not made.

    Attributes:
        target_images: pictures of the concept, and noisy states of them.
        care_set: the concept's benign companions.
        search: adversarial names, found before.
        retained: prompts that must not change.
        retained_images: pictures of some of them.
        composed: the erased prompts joined to other words, and anchors for them.
        adversaries: names that are sought while the concept is erased, where the recipe asks for them.
    """

    target_images: bool = True
    care_set: bool = False
    search: bool = False
    retained: bool = False
    retained_images: bool = False
    composed: bool = False
    adversaries: bool = False


@dataclass(frozen=True)
class Instead:
    """What erased prompts become, where the recipe names it.

    Either another concept is put in the place of the erased one (``joined`` is None), or an attribute is
    taken out of a subject, and everything else about it stays.

    Attributes:
        prompts: what each erased prompt becomes, a row each, in the order of the names, the composed
            prompts and the aliases.
        joined: the subject with the attribute, one row.
        plain: the subject by itself, one row.
    """

    prompts: PromptEmbeds
    joined: PromptEmbeds | None = None
    plain: PromptEmbeds | None = None

    def conditions(self, chosen: Tensor) -> list[PromptEmbeds]:
        """What the frozen model must predict for erased prompts of these rows, ``[batch]``."""
        found = [self.prompts[chosen]]
        if self.joined is not None and self.plain is not None:
            found += [self.joined.repeat(len(chosen)), self.plain.repeat(len(chosen))]
        return found

    def target(self, predictions: Sequence[Tensor], weight: float) -> Tensor:
        """The target, from predictions in the order of :meth:`conditions`.

        Args:
            predictions: ``[batch, channels, height, width]`` each.
            weight: of taking an attribute away; a replacement does not read it.
        """
        if len(predictions) == 1:
            return predictions[0]
        subject, joined, plain = predictions
        return separated_target(subject, joined, plain, weight)


@dataclass(frozen=True)
class ErasingContext:
    """Everything a method may look at, about one concept; what needs no gradient is encoded once.

    Attributes:
        base: the base model, with the adapter attached.
        options: the recipe's ``erase`` section.
        erased: embeddings of the concept's names and of the adversarial names found by the search.
        empty: embedding of the empty prompt, one row.
        anchors: benign concepts to steer to, one row each, those of the CARE-set first.
        guarded_anchors: how many of them are the CARE-set's; the others go with their row of
            ``composed`` alone. 0: all.
        retained: prompts that must not move, one row each.
        aliases: further prompts that name the concept, trained beside the first of ``erased``.
        composed: the erased name together with the anchor of the same row, for example "a painting
            of stars in the style of Van Gogh" beside "A stars".
        guarded: how many of ``retained``, from the first, speak of the CARE-set; they are drawn as
            often as all together. 0 makes no difference between them.
        retained_latents: clean latents of pictures of some retained prompts, on which they are held.
        pictured: the row of ``retained`` that each of these pictures shows, ``[pictures]``.
        adversaries: names that are sought while the concept is erased.
        instead: what the erased prompts become; None: nothing in particular.
        recipe: all of it.
        concept: whose prompts are erased.
        latents: clean latents of the target images, ``[images, c, h, w]``.
        states: where noisy latents come from.
        retained_prompts: the texts of ``retained``.
        related: words that name the concept.
        prompts: texts of erased prompts: the concept's names, then joined to other words.
        became: what each of ``prompts`` says afterwards: the replacement in the concept's place, or
            nothing in particular.
    """

    base: BaseModel
    options: EraseOptions
    erased: PromptEmbeds
    empty: PromptEmbeds
    anchors: PromptEmbeds | None = None
    retained: PromptEmbeds | None = None
    aliases: PromptEmbeds | None = None
    composed: PromptEmbeds | None = None
    guarded: int = 0
    guarded_anchors: int = 0
    retained_latents: Tensor | None = None
    pictured: Tensor | None = None
    adversaries: Adversaries | None = None
    instead: Instead | None = None
    recipe: Recipe | None = None
    concept: Concept | None = None
    latents: Tensor | None = None
    states: StateSource | None = None
    retained_prompts: tuple[str, ...] = ()
    related: tuple[str, ...] = ()
    prompts: tuple[str, ...] = ()
    became: tuple[str, ...] = ()


LossAt = Callable[[int, torch.Generator], Tensor]
"""The scalar loss of a step, from its number and its generator."""


class Stages(Protocol):
    """What a run offers a method: loops and results that survive an interruption, counted and told."""

    def fit(
        self, stage: str, loss_at: LossAt, steps: int, *, every: int = 20, carried: Carried | None = None
    ) -> None:
        """Train the adapter.

        Args:
            stage: its name, a different one for each.
            loss_at: of each step.
            steps: how many.
            every: checkpoints fall on multiples of this many steps.
            carried: what else goes on where it stopped.
        """

    def once(self, stage: str, make: Callable[[torch.Generator], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """What ``make`` returns, read from the disk where it was made before.

        Args:
            stage: its name, a different one for each.
            make: is given a generator for all of its draws.
        """

    def invert(self, stage: str, latents: Tensor, prompt: str, start: Tensor, steps: int) -> Tensor:
        """Textual inversion against the model as it stands; see :func:`invert`."""

    def set_adapter(self, factors: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Give the adapter its values, where they are computed and not trained.

        Args:
            factors: full name of a layer → ``A`` ``[rank, in]`` and ``B`` ``[out, rank]``, whose product is
                what is added to its weight.
        """

    def note(self, key: str, value: float) -> None:
        """A figure for ``training.json``."""


class Method(ABC):
    """An erasing method, for one concept."""

    needs: ClassVar[Needs] = Needs()

    def __init__(self, context: ErasingContext) -> None:
        """Look at what the run has prepared."""
        self.context = context

    @classmethod
    @abstractmethod
    def erase(cls, methods: Sequence[Self], stages: Stages) -> None:
        """Give the adapter values under which all concepts are gone.

        Args:
            methods: one a concept; all look at the same base and its adapter.
            stages: the run's loops.
        """


class LossMethod(Method):
    """A method that is one loss on noisy states."""

    @abstractmethod
    def loss(self, latents: Tensor, timesteps: Tensor, which: Tensor, generator: torch.Generator) -> Tensor:
        """The loss of one step.

        Args:
            latents: noisy latents ``z_t``, ``[batch, channels, height, width]``.
            timesteps: ``[batch]``.
            which: index into ``context.erased`` of each row's prompt, ``[batch]``.
            generator: for every further draw.
        """

    def step(self, number: int, generator: torch.Generator) -> Tensor:
        """The loss of a step on states of its own."""
        context = self.context
        assert context.states is not None
        which = torch.randint(0, len(context.erased), (context.options.batch_size,), generator=generator)
        latents, timesteps = context.states.draw(number, which, generator)
        return self.loss(latents, timesteps, which, generator)

    @classmethod
    def erase(cls, methods: Sequence[Self], stages: Stages) -> None:
        """One loop, in which the concepts take turns; each has as many steps as it would have alone."""
        count = len(methods)

        def loss_at(step: int, generator: torch.Generator) -> Tensor:
            return methods[step % count].step(step // count, generator)

        hunters = [one.context.adversaries for one in methods if one.context.adversaries is not None]
        steps = methods[0].context.options.steps * count
        stages.fit("erase", loss_at, steps, every=20 * count, carried=_together(hunters))


class _AllCarried:
    """Several things to carry as one."""

    def __init__(self, parts: Sequence[Carried]) -> None:
        self.parts = parts

    def state(self) -> Mapping[str, Tensor]:
        return {f"{k}:{key}": one for k, part in enumerate(self.parts) for key, one in part.state().items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        for k, part in enumerate(self.parts):
            prefix = f"{k}:"
            part.load_state({key[len(prefix) :]: one for key, one in state.items() if key.startswith(prefix)})


def _together(parts: Sequence[Carried]) -> Carried | None:
    if len(parts) <= 1:
        return parts[0] if parts else None
    return _AllCarried(parts)


def load_method(name: str) -> type[Method]:
    """The method class of a name.

    Raises:
        UnknownNameError: with the nearest name.
    """
    found = METHODS.get(name)
    assert isinstance(found, type)
    return found


def method_names() -> tuple[str, ...]:
    """The names that ``--method`` takes."""
    return METHODS.names()
