"""What layers read while prompts are drawn: the figures that ``regmean`` stacks patches by.

A patch was trained to change a layer's output on prompts of its concept, and to leave it on others. Added
up, patches meet on inputs that none of them was trained on together. Regression mean (RegMean, Jin et al.,
arXiv 2212.09849) asks for the one update that does on each concept's inputs what that concept's
patch does there, and on the inputs of what must stay nothing. With ``Gᵢ = mean x xᵀ`` over the inputs
``x [in]`` of concept i, ``G₀`` over those of kept prompts, and ``Δᵢ = Bᵢ Aᵢ`` of weight ``wᵢ``, the least
squares solution is

    Δ = Σᵢ wᵢ Δᵢ Gᵢ (Σⱼ Gⱼ + k G₀ + ridge)⁻¹

so each part keeps its ``Bᵢ`` and changes its ``Aᵢ`` alone: the ranks add up as in a plain sum, and no
training is needed. Unlike the paper, which merges whole fine-tuned weights, the base counts as one more
model (the kept prompts), and inputs are those of an image model: text states, and latents on their way from
noise.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from PIL.Image import Image
from torch import Tensor, nn
from torch.nn import functional as F

from recare_patch.careset import Clip, concept_feature
from recare_patch.core import PatchError, Progress
from recare_patch.models import BaseModel, split_name
from recare_patch.patch import Patch
from recare_patch.recipe import Concept, names_concept

KEPT_WEIGHT = 1.0
"""How much the kept prompts count against one concept's."""

RIDGE = 1e-3
"""Added to the diagonal, as a share of its mean: inputs seldom fill their space."""

STEPS, GUIDANCE_SCALE, BATCH_SIZE = 8, 5.0, 8
"""How prompts are drawn: enough for the states that a layer meets from noise to picture."""

_BESIDE = 16
"""Words that a concept's name is joined to, beyond those that its patch guards."""

_VOCABULARY = 48
"""Words of CLIP's vocabulary that stand for everything else that must stay."""

_EMPTY = 4
"""Pictures without a prompt: guidance starts from what is drawn then."""


@dataclass(frozen=True)
class Moments:
    """What the layers of several patches read.

    Attributes:
        read: for each patch, layer → ``Aᵢ Gᵢ`` ``[rank, in]``, fp32.
        total: layer → ``Σⱼ Gⱼ + k G₀`` ``[in, in]``, fp32.
        kept_weight: ``k``.
        evaluations: of the denoiser, that measuring took.
    """

    read: tuple[Mapping[str, Tensor], ...]
    total: Mapping[str, Tensor]
    kept_weight: float
    evaluations: int

    def solve(self, module: str) -> dict[int, Tensor]:
        """The parts' new ``Aᵢ``: ``Aᵢ Gᵢ (total + ridge)⁻¹``, ``[rank, in]``, fp64.

        Args:
            module: a layer that some of them change.

        Returns:
            By the part's place among those that were measured.
        """
        total = self.total[module].double()
        ridge = RIDGE * total.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
        steadied = total + ridge * torch.eye(len(total), dtype=torch.float64)
        read = {k: one[module].double() for k, one in enumerate(self.read) if module in one}
        # All parts at once: the matrix is decomposed a single time.
        found = torch.linalg.solve(steadied, torch.cat(list(read.values())).T).T
        return dict(zip(read, found.split([len(rows) for rows in read.values()]), strict=True))


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
        base: the base that they were made for.
        clip: whose vocabulary says what else there is.
        kept_weight: ``k``: more keeps better and erases less.
        seed: of the first picture and of the choice of words.
        progress: told after every batch.

    Returns:
        The figures, on the CPU.

    Raises:
        PatchError: a patch does not say what it erases.
        IncompatiblePatchError: a patch does not fit the base.
    """
    for patch in patches:
        patch.check_base(base)
    concepts = [_concepts(patch) for patch in patches]
    asked = _Asked([one for own in concepts for one, _ in own], clip, seed)
    modules = tuple(dict.fromkeys(module for patch in patches for module in patch.modules))
    layers = {module: _layer(base, module) for module in modules}
    before = base.counter.total
    total: dict[str, Tensor] = {}
    read: list[dict[str, Tensor]] = []
    first = seed
    for number in range(len(patches) + 1):
        # Last come those that must stay: which these are is seen in the concepts' pictures.
        prompts = asked.of_concepts(concepts[number]) if number < len(patches) else asked.kept(concepts)
        found, latents = _second_moments(base, layers, prompts, first, progress)
        first += len(prompts)
        weight = kept_weight if number == len(patches) else 1.0
        for module, own in found.items():
            total[module] = total[module] + weight * own if module in total else weight * own
        if number < len(patches):
            patch = patches[number]
            read.append({m: patch.factors(m)[0].float().flatten(1) @ found[m] for m in patch.modules})
            for concept, guarded in concepts[number]:
                shown = [prompts.index(one) for one in concept.name_prompts]
                asked.look(concept, guarded, base.decode_latents(latents[shown]))
    return Moments(tuple(read), total, kept_weight, base.counter.total - before)


# ------------------------------------------------------------------------ prompts


def _concepts(patch: Patch) -> list[tuple[Concept, tuple[str, ...]]]:
    """Each concept that a patch erases, and the words that guarded it.

    Raises:
        PatchError: it does not say.
    """
    erased = patch.metadata.erased if patch.metadata is not None else ()
    if not erased or any(one.kind is None for one in erased):
        raise PatchError(
            f"'regmean' draws what each part erases, and {patch.name} does not say what that is: "
            "stack it by 'concat'"
        )
    return [(one.as_concept(), one.care_words) for one in erased]


class _Asked:
    """The prompts: of concepts, and of what must stay."""

    def __init__(self, erased: Sequence[Concept], clip: Clip, seed: int) -> None:
        self.erased, self.clip = erased, clip
        self.named: set[str] = set()
        words = self._free(clip.vocabulary()[0])
        order = torch.randperm(len(words), generator=torch.Generator().manual_seed(seed)).tolist()
        self.words = [words[k] for k in order]

    def _free(self, words: Sequence[str]) -> list[str]:
        """Words that name no concept which is erased."""
        return [word for word in words if not any(names_concept(word, one) for one in self.erased)]

    def of_concepts(self, own: Sequence[tuple[Concept, Sequence[str]]]) -> list[str]:
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

        Args:
            concept: which.
            guarded: its companions.
            images: what the base draws by its name.
        """
        shown = self.clip.image_features(list(images)).mean(0)
        words, companions = self.words[: 2 * _VOCABULARY], self._free(guarded)
        resembled = self.clip.text_features(words) @ shown
        itself = concept_feature(concept, self.clip) @ shown
        beside = (self.clip.text_features(companions) @ shown).max() if companions else resembled.median()
        self.named |= {words[k] for k in (resembled > (itself + beside) / 2).nonzero().flatten().tolist()}

    def kept(self, concepts: Sequence[Sequence[tuple[Concept, Sequence[str]]]]) -> list[str]:
        """Prompts that must not change: companions, everything else, and none at all."""
        companions = self._free([word for own in concepts for _, words in own for word in words])
        others = [word for word in self.words[: 2 * _VOCABULARY] if word not in self.named]
        forms = ("A photo of {}", "A painting of {}")
        words = dict.fromkeys([*companions, *others[:_VOCABULARY]])
        return [*(form.format(word) for word in words for form in forms), *[""] * _EMPTY]


# ------------------------------------------------------------------------ inputs


def _layer(base: BaseModel, module: str) -> nn.Module:
    part, name = split_name(module)
    return base.components[part].get_submodule(name)


def _second_moments(
    base: BaseModel,
    layers: Mapping[str, nn.Module],
    prompts: Sequence[str],
    seed: int,
    progress: Progress | None,
) -> tuple[dict[str, Tensor], Tensor]:
    """Layer → mean of ``x xᵀ`` over what it read for the prompts, ``[in, in]``, fp32, on the CPU.

    Returns:
        These, and the latents that were drawn.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    seeds = list(range(seed, seed + len(prompts)))
    with _watched(base, layers, sums, counts), torch.no_grad():
        embeds = base.encode_prompts(prompts)
        latents = base.sample_latents(
            embeds, seeds, STEPS, GUIDANCE_SCALE, BATCH_SIZE, progress=progress, stage="what layers read"
        )
    return {module: (one / counts[module]).cpu() for module, one in sums.items()}, latents


@contextlib.contextmanager
def _watched(
    base: BaseModel, layers: Mapping[str, nn.Module], sums: dict[str, Tensor], counts: dict[str, int]
) -> Iterator[None]:
    """Layers add what they read to the sums, as long as this lasts."""

    def watching(module: str) -> object:
        # Guidance draws without the prompt first, in the same batch of the denoiser.
        guided = split_name(module)[0] == base.denoiser_name

        def add(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
            rows = _columns(layer, args[0][len(args[0]) // 2 :] if guided else args[0])
            found = rows.T @ rows
            sums[module] = sums[module] + found if module in sums else found
            counts[module] = counts.get(module, 0) + len(rows)

        return add

    handles = [layer.register_forward_pre_hook(watching(name)) for name, layer in layers.items()]  # type: ignore[arg-type]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _columns(layer: nn.Module, inputs: Tensor) -> Tensor:
    """``[positions, in]``, fp32: what each position of the output is made of."""
    inputs = inputs.float()
    if not isinstance(layer, nn.Conv2d):
        return inputs.flatten(0, -2)
    # A convolution reads windows; several groups would read apart, and no base here has them.
    padding = layer.padding if not isinstance(layer.padding, str) else 0
    windows = F.unfold(inputs, layer.kernel_size, layer.dilation, padding, layer.stride)
    return windows.transpose(1, 2).flatten(0, 1)
