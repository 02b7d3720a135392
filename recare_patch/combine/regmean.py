"""What layers read while prompts are drawn: the figures that ``regmean`` stacks patches by.

A patch was trained to change a layer's output on prompts of its concept, and to leave it on others. Added
up, patches meet on inputs that none of them was trained on together. Regression mean (RegMean, Jin et al.,
arXiv 2212.09849) asks for the one update that does on each concept's inputs what that concept's
patch does there, and on the inputs of what must stay nothing. In one regression for all of them each
part counts for less the more there are: of eight, the one that fares worst keeps 91 % of its effect on its own
prompts. So each part has a regression of its own here, in which its own inputs count twice as much as those of another.
With ``Gᵢ = mean x xᵀ`` over the inputs ``x [in]`` of concept i, ``G₀`` over those of kept prompts, and ``Δᵢ = Bᵢ Aᵢ``
of weight ``wᵢ``,

    Δ = Σᵢ wᵢ Δᵢ Gᵢ (Gᵢ + ½ Σⱼ Gⱼ + k G₀ + ridge)⁻¹,   j ≠ i

so each part keeps its ``Bᵢ`` and changes its ``Aᵢ`` alone: the ranks add up as in a plain sum, and no
training is needed. Unlike the paper, which merges whole fine-tuned weights, the base counts as one more
model (the kept prompts), and inputs are those of an image model: text states, and latents on their way from
noise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from PIL.Image import Image
from torch import Tensor, nn
from torch.nn import functional as F

from recare_patch.careset import Clip, concept_feature, is_barred, known_words
from recare_patch.core import PatchError, Progress
from recare_patch.models import BaseModel, split_name
from recare_patch.patch import Patch
from recare_patch.recipe import Concept

KEPT_WEIGHT = 1.0
"""How much the kept prompts count against one concept's."""

RIDGE = 1e-3  # Added to the diagonal, as a share of its mean: inputs seldom fill their space.
# How prompts are drawn: enough for the states that a layer meets from noise to picture.
STEPS, GUIDANCE_SCALE, BATCH_SIZE = 8, 5.0, 8
_BESIDE = 16  # Words that a concept's name is joined to, beyond those that its patch guards.
_VOCABULARY = 48  # Words of CLIP's vocabulary that stand for everything else that must stay.
_EMPTY = 4  # Pictures without a prompt: guidance starts from what is drawn then.

_Guarded = tuple[Concept, Sequence[str]]  # A concept, and the words that guarded it.


@dataclass(frozen=True)
class Moments:
    """What the layers of several patches read, fp32 on the CPU."""

    own: tuple[Mapping[str, Tensor], ...]  # For each patch, layer → Gᵢ [in, in].
    kept: Mapping[str, Tensor]  # Layer → G₀ [in, in].
    kept_weight: float  # k
    evaluations: int  # Of the denoiser, that measuring took.

    def solve(self, module: str, factors: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """A layer's new ``Aᵢ [rank, in]`` from the old ones, both by the patch's place, fp64."""
        grams = [one[module].double() for one in self.own]
        shared = sum(grams, self.kept_weight * 2 * self.kept[module].double()) / 2
        found = {}
        for k, rows in factors.items():
            total = shared + grams[k] / 2
            ridge = RIDGE * total.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
            steadied = total + ridge * torch.eye(len(total), dtype=torch.float64)
            found[k] = torch.linalg.solve(steadied, (rows @ grams[k]).T).T
        return found


def measure_moments(
    patches: Sequence[Patch],
    base: BaseModel,
    clip: Clip,
    *,
    kept_weight: float = KEPT_WEIGHT,
    seed: int = 0,
    progress: Progress | None = None,
) -> Moments:
    """Draw prompts of each patch's concepts and of what must stay, and look at what the layers read.

    The base draws them as it is. On Stable Diffusion's shapes this is about 150 pictures of eight steps.

    Args:
        patches: those that will be stacked; each must say what it erases.
        base, clip: what they were made for, and whose vocabulary says what else there is.
        kept_weight: ``k``: more keeps better and erases less.
        seed, progress: of the first picture and of the choice of words; told after every batch.

    Raises:
        PatchError: a patch does not say what it erases.
        IncompatiblePatchError: a patch does not fit the base.
    """
    for patch in patches:
        patch.check_base(base)
    concepts = [_concepts(patch) for patch in patches]
    asked = Asked([one for own in concepts for one, _ in own], clip, seed)
    modules = tuple(dict.fromkeys(module for patch in patches for module in patch.modules))
    before, first = base.counter.total, seed
    read: list[dict[str, Tensor]] = []

    def look(prompts: list[str]) -> tuple[dict[str, Tensor], Tensor]:
        nonlocal first
        found = _second_moments(base, modules, prompts, first, progress)
        first += len(prompts)
        return found

    for own in concepts:
        prompts = asked.of_concepts(own)
        found, latents = look(prompts)
        read.append(found)
        for concept, guarded in own:
            shown = [prompts.index(one) for one in concept.name_prompts]
            asked.look(concept, guarded, base.decode_latents(latents[shown]))
    # Last come those that must stay: which these are is seen in the concepts' pictures.
    kept, _ = look(asked.kept(concepts))
    return Moments(tuple(read), kept, kept_weight, base.counter.total - before)


def _concepts(patch: Patch) -> list[_Guarded]:
    erased = patch.metadata.erased if patch.metadata is not None else ()
    if not erased or any(one.kind is None for one in erased):
        raise PatchError(
            f"'regmean' draws what each part erases, and {patch.name} does not say what that is: stack it by 'concat'"
        )
    return [(one.as_concept(), one.care_words) for one in erased]


class Asked:
    """The prompts: of concepts, and of what must stay."""

    def __init__(self, erased: Sequence[Concept], clip: Clip, seed: int) -> None:
        self.erased, self.clip = erased, clip
        self.named: set[str] = set()
        words = self._free(known_words(clip))
        order = torch.randperm(len(words), generator=torch.Generator().manual_seed(seed)).tolist()
        self.words = [words[k] for k in order]

    def _free(self, words: Sequence[str]) -> list[str]:
        return [word for word in words if not any(is_barred(word, one) for one in self.erased)]

    def of_concepts(self, own: Sequence[_Guarded]) -> list[str]:
        """Prompts that name a patch's concepts, by themselves and beside other words."""
        found = []
        for concept, guarded in own:
            beside = [*self._free(guarded), *self.words[:_BESIDE]]
            found += [*concept.name_prompts, *map(concept.composed_prompt, beside)]
        return list(dict.fromkeys(found))

    def look(self, concept: Concept, guarded: Sequence[str], images: Sequence[Image]) -> None:
        """Find further words for a concept in its pictures: "chapel" for a church must not be kept.

        They resemble the pictures about as much as the concept's name does: more than half way from the
        best guarded word, as :mod:`prepare` has it.
        """
        shown = self.clip.image_features(list(images)).mean(0)
        words, companions = self.words[: 2 * _VOCABULARY], self._free(guarded)
        resembled = self.clip.text_features(words) @ shown
        itself = concept_feature(concept, self.clip) @ shown
        beside = (self.clip.text_features(companions) @ shown).max() if companions else resembled.median()
        self.named |= {words[k] for k in (resembled > (itself + beside) / 2).nonzero().flatten().tolist()}

    def kept(self, concepts: Sequence[Sequence[_Guarded]]) -> list[str]:
        """Prompts that must not change: companions, everything else, and none at all."""
        companions = self._free([word for own in concepts for _, words in own for word in words])
        others = [word for word in self.words[: 2 * _VOCABULARY] if word not in self.named]
        words = dict.fromkeys([*companions, *others[:_VOCABULARY]])
        forms = ("A photo of {}", "A painting of {}")
        return [*(form.format(word) for word in words for form in forms), *[""] * _EMPTY]


def _second_moments(
    base: BaseModel, modules: Sequence[str], prompts: list[str], seed: int, progress: Progress | None
) -> tuple[dict[str, Tensor], Tensor]:
    """Layer → mean of ``x xᵀ [in, in]`` over what it read for the prompts; and the latents drawn."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    with ExitStack() as watching, torch.no_grad():
        for module in modules:
            part, name = split_name(module)
            # Guidance draws without the prompt first, in the same batch of the denoiser.
            guided = part == base.denoiser_name

            def add(layer: nn.Module, args: tuple[Tensor, ...], module: str = module, guided: bool = guided) -> None:
                rows = _columns(layer, args[0][len(args[0]) // 2 :] if guided else args[0])
                found = rows.T @ rows
                sums[module] = sums[module] + found if module in sums else found
                counts[module] = counts.get(module, 0) + len(rows)

            layer = base.components[part].get_submodule(name)
            watching.callback(layer.register_forward_pre_hook(add).remove)
        embeds = base.encode_prompts(prompts)
        seeds = list(range(seed, seed + len(prompts)))
        latents = base.sample_latents(
            embeds, seeds, STEPS, GUIDANCE_SCALE, BATCH_SIZE, progress=progress, stage="what layers read"
        )
    return {module: (one / counts[module]).cpu() for module, one in sums.items()}, latents


def _columns(layer: nn.Module, inputs: Tensor) -> Tensor:
    """``[positions, in]``, fp32: what each position of the output is made of."""
    inputs = inputs.float()
    if not isinstance(layer, nn.Conv2d):
        return inputs.flatten(0, -2)
    # A convolution reads windows; several groups would read apart, and no base here has them.
    padding = layer.padding if not isinstance(layer.padding, str) else 0
    windows = F.unfold(inputs, layer.kernel_size, layer.dilation, padding, layer.stride)
    return windows.transpose(1, 2).flatten(0, 1)
