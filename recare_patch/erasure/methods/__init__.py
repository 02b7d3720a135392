"""What an erasing method is given, and what it must do; each method is one file here.

A method's file imports torch inside its functions: recipes, `recare-patch methods` and the planner read what it
says of itself (:attr:`Method.info`, :meth:`Method.work`) without it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

from recare_patch import models
from recare_patch.core import BaseModelError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from recare_patch.erasure.methods.adversaries import Adversaries
    from recare_patch.erasure.stages import Stages
    from recare_patch.models import BaseModel, PromptEmbeds
    from recare_patch.recipe import Concept, MethodInfo, Recipe


@dataclass(frozen=True)
class Needs:
    """What a method must be given; what it does not need is not made.

    Attributes:
        target_images: pictures of the concept.
        care_set: the concept's benign companions.
        retained: prompts that must not change.
        retained_images: pictures of some of them, as many as the recipe says.
        joined: the erased prompts joined to other words, where the recipe varies them.
        words: words of the language that do not name it.
        word_lists: it may read words from a file of the user's; see :meth:`Method.word_lists`.
    """

    target_images: bool = True
    care_set: bool = False
    retained: bool = False
    retained_images: bool = False
    joined: bool = False
    words: bool = False
    word_lists: bool = False


@dataclass(frozen=True)
class Work:
    """What one stage of a method computes, for the planner.

    Attributes:
        evaluations: denoiser evaluations; a training sample counts as 3.
        trained: samples of one prediction that gradients flow through.
        predicted: samples of one that they do not.
        reads: prompts of one that gradients flow through the text encoders to.
        pictures: drawn together, then decoded.
    """

    evaluations: int
    trained: int = 0
    predicted: int = 0
    reads: int = 0
    pictures: int = 0


@dataclass(frozen=True)
class ErasedPrompts:
    """The texts that a method takes the concept out of, and what they become.

    Attributes:
        names: the concept's target prompt; where an attribute is taken from a subject, with it too.
        joined: the concept beside each of some other words: "A painting of stars in the style of Van Gogh".
        anchors: what each of ``joined``, or of the guarded words, is steered to: "A stars".
        guarded_anchors: how many of them are the CARE-set's, from the first; the others go with their row of
            ``joined`` alone.
        aliases: further prompts that name the concept.
        instead: what ``names``, ``joined`` and ``aliases`` become where the recipe says so: a replacement's
            prompts, or those of the subject without the attribute; None: nothing in particular.
        attribute: the subject with the attribute, and by itself, where one is taken from it.
        pairs: prompts that name the concept, then ``joined``, each with what it says afterwards: the
            replacement's prompt, or a class word's.
    """

    names: tuple[str, ...]
    joined: tuple[str, ...]
    anchors: tuple[str, ...]
    guarded_anchors: int
    aliases: tuple[str, ...]
    instead: tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]] | None
    attribute: tuple[str, str] | None
    pairs: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class RetainedPrompts:
    """The texts that must not move.

    Attributes:
        prompts: all of them.
        guarded: how many, from the first, speak of the CARE-set; they are drawn as often as all together. 0 makes
            no difference between them.
        latents: clean latents of pictures of some of them, ``[pictures, c, h, w]``; there may be none.
        pictured: which prompt each picture shows, ``[pictures]``.
    """

    prompts: tuple[str, ...]
    guarded: int
    latents: Tensor
    pictured: Tensor


@dataclass(frozen=True)
class Context:
    """Everything a method may look at, about one concept.

    Attributes:
        base: the base model, without the adapter that is going to be trained.
        recipe: all of it.
        concept: whose prompts are erased.
        number: of the concept in the run, from 0.
        latents: clean latents of its target images, ``[images, c, h, w]``; none where they are not needed.
        erased: prompts, and what becomes of them.
        retained: prompts that must not move.
        related: words that name the concept.
        companions: its CARE-set's words and those that may belong to it, where it has one.
        words: what none of the run's concepts is called by, things and other words, the most frequent first.
        neighbours: the same of manners, and of people and places.
    """

    base: BaseModel
    recipe: Recipe
    concept: Concept
    number: int
    latents: Tensor
    erased: ErasedPrompts
    retained: RetainedPrompts
    related: tuple[str, ...]
    companions: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    neighbours: tuple[str, ...] = ()


class Instead:
    """What erased prompts become, where the recipe names it.

    Either another concept is put in the place of the erased one, or an attribute is taken out of a subject, and
    everything else about it stays.
    """

    def __init__(self, base: BaseModel, erased: ErasedPrompts, names: int) -> None:
        """Encode it.

        Args:
            base: of the run.
            erased: with something instead.
            names: how many rows name the concept, those of ``erased.names`` first.
        """
        assert erased.instead is not None
        name, joined, aliases = erased.instead
        self.prompts = base.encode_prompts([*name, *name[:1] * (names - len(name)), *joined, *aliases])
        self.pair = [base.encode_prompts([one]) for one in erased.attribute or ()]

    def conditions(self, chosen: Tensor) -> list[PromptEmbeds]:
        """What the frozen model must predict for erased prompts of these rows, ``[batch]``."""
        return [self.prompts[chosen], *(one.repeat(len(chosen)) for one in self.pair)]

    def target(self, predictions: Sequence[Tensor], weight: float) -> Tensor:
        """The target, from predictions ``[batch, channels, height, width]`` in the order of :meth:`conditions`.

        A replacement's own prediction, or ``y = ε*(s) − w [ε*(p ∘ a) − ε*(p)]``: what the attribute ``a`` adds to
        the subject's plain prompt ``p`` is taken away from any of its prompts ``s``. It is ESD's target (Gandikota
        et al., arXiv 2303.07345, equation 5) with the subject in the place of the empty prompt.
        """
        if len(predictions) == 1:
            return predictions[0]
        subject, joined, plain = predictions
        return subject - weight * (joined - plain)


class Method(ABC):
    """An erasing method, for one concept of a run."""

    info: ClassVar[MethodInfo]
    needs: ClassVar[Needs] = Needs()

    @abstractmethod
    def __init__(self, context: Context) -> None:
        """Look at what the run has prepared; no adapter is there yet."""

    @classmethod
    def word_lists(cls, recipe: Recipe) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
        """Words that name the concept and words that do not, from a file of the user's; None: they are mined.

        It is called before anything is drawn too, so that a faulty file is told at once.
        """
        return None

    def search(self, stages: Stages) -> None:
        """Look for what is to be erased beside the concept's own name; called before :meth:`erase`.

        ``stages`` tells the concept's stages apart from those of the run's other concepts.
        """
        return

    @classmethod
    @abstractmethod
    def work(cls, recipe: Recipe) -> Mapping[str, Work]:
        """The stages of :meth:`search` and :meth:`erase`, and what each computes."""

    @classmethod
    @abstractmethod
    def erase(cls, methods: Sequence[Self], stages: Stages) -> None:
        """Give the adapter values under which all concepts are gone.

        Args:
            methods: one a concept; all look at the same base and its adapter.
            stages: the run's loops.
        """


class LossMethod(Method):
    """A method that is one loss on noisy states; :meth:`Stages.fit_losses` is its loop.

    Attributes:
        context: what it was given.
        names: embeddings of what names the concept, a row each.
        sure_names: which of them the base is sure to know it by; none said: all.
        adversaries: what else changes while the loop runs, and must go on where it stopped.
        retain_scale: by how much the run has raised the weight of what must not change.
        held_shares: how often each guarded prompt is to be held, beside the others, ``[guarded]``; None: equally.
    """

    context: Context
    names: PromptEmbeds
    sure_names: tuple[int, ...] = ()
    adversaries: Adversaries | None = None
    retain_scale: float = 1.0
    held_shares: Tensor | None = None

    @abstractmethod
    def loss(self, latents: Tensor, timesteps: Tensor, which: Tensor, generator: torch.Generator) -> Tensor:
        """The loss of one step.

        Args:
            latents: noisy latents ``z_t``, ``[batch, channels, height, width]``.
            timesteps: ``[batch]``.
            which: index into :attr:`names` of each row's prompt, ``[batch]``.
            generator: for every further draw.
        """


class SolvedMethod(Method):
    """A method that is computed from what the text encoders make of prompts, without the denoiser."""

    context: Context

    @classmethod
    def work(cls, recipe: Recipe) -> Mapping[str, Work]:
        """No denoiser at all."""
        return {}

    @property
    def modules(self) -> list[str]:
        """The layers that are edited."""
        return models.target_modules(self.context.base.denoiser, self.context.recipe.adapter.layers)

    def check_reads(self, width: int) -> None:
        """Refuse a base whose layers do not read the text embeddings, of ``width`` numbers a token, themselves.

        Raises:
            BaseModelError: it is one.
        """
        import torch

        base, modules = self.context.base, set(self.modules)
        for name, layer in models.base_layers(base.denoiser):
            if name in modules and isinstance(layer, torch.nn.Linear) and layer.in_features != width:
                raise BaseModelError(
                    f"method '{self.context.recipe.method}' cannot edit base '{base.id}': '{name}' reads "
                    f"{layer.in_features} numbers a token, and the text encoder makes {width}"
                )

    def weights(self) -> dict[str, Tensor]:
        """The weights of those layers, fp64."""
        return weights_of(self.context.base, self.modules)


def weights_of(base: BaseModel, names: Sequence[str]) -> dict[str, Tensor]:
    """The weights of some of the denoiser's layers, fp64."""
    import torch

    layers, found = dict(models.base_layers(base.denoiser)), {}
    for name in names:
        weight = layers[name].weight
        assert isinstance(weight, torch.Tensor)
        found[name] = models.in_double(weight.detach())
    return found


def at_rank(update: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """``A`` ``[rank, in]`` and ``B`` ``[out, rank]`` nearest to an update, and the squared norm that is cut off."""
    import torch

    u, s, vh = torch.linalg.svd(update, full_matrices=False)
    root = s[:rank].sqrt()
    a, b = padded(root[:, None] * vh[:rank], u[:, :rank] * root, rank)
    return a, b, float(s[rank:].square().sum())


def padded(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors with zeros up to a rank."""
    import torch

    room = rank - len(a)
    return torch.cat([a, a.new_zeros(room, a.shape[1])]), torch.cat([b, b.new_zeros(len(b), room)], 1)
