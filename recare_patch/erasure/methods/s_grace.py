"""S-GRACE: erase a concept in the text encoder, adversarial words for it too (Yin et al., arXiv 2510.27285).

The denoiser stays as it is, so the patch serves every denoiser that reads this text encoder. Each round
attacks and then edits: sequences of words that name the concept are moved, in a box around their vectors, to
where the encoder's reading of them predicts the concept's pictures best; then the encoder is trained to read
them as something else, and everything that must stay as before.

Notation: ``enc`` is the text encoder with the adapter on, ``enc*`` without; ``f`` its state at end-of-text,
of unit length; ``c`` the concept's prompt, ``a`` an adversarial sequence, ``r`` a retained prompt. Where the
denoiser reads a pooled text as well (Stable Diffusion XL and 3), a cosine of ``f`` is the mean of both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Self

from pydantic import Field

from recare_patch import models
from recare_patch.core import CareSetError, RecipeError, Settings, read_text, yaml_mapping
from recare_patch.erasure.methods import Context, Method, Needs, Work
from recare_patch.recipe import TEXT_LAYER_SETS, MethodInfo, Paper

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from recare_patch.erasure.stages import Stages
    from recare_patch.models import PromptEmbeds
    from recare_patch.recipe import Recipe

NOISY = (0.75, 0.95)
"""The part of the diffusion process on which an attack is judged: where the prompt decides most."""

WORDS = (3, 20)
"""How many words a sequence has at least and at most."""


Weight = Annotated[float, Field(ge=0, le=10_000)]


class SGraceOptions(Settings):
    """S-GRACE's own; its edit has ``erase.steps`` a round, at ``erase.learning_rate``.

    ``erase.batch_size`` is the number of adversarial sequences, ``erase.retain_batch_size`` that of the retained
    prompts a step, and ``erase.retain_weight`` their weight.
    """

    rounds: int = Field(4, ge=1, le=100, description="of attack and edit")
    attack_steps: int = Field(
        10, ge=0, le=1000, description="of sign-gradient in each attack; 0: the words are erased as they stand"
    )
    attack_rate: float = Field(
        5.0e-3, gt=0, le=1, description="length of such a step, in each component of a word's vector"
    )
    attack_box: float = Field(4.0, gt=0, le=1000, description="half the width of the box around each start, in steps")
    attack_similarity: Weight = Field(
        0.1, description="weight of staying a name of the concept, beside predicting its noise"
    )
    consistency_weight: Weight = Field(
        0.2, description="of each sequence staying what it was at the start of its round; published 1.2"
    )
    parameter_weight: Weight = Field(0.2, description="of the update's size")
    words: str | None = Field(
        None, description="a YAML file with the lists related and unrelated, instead of mined words"
    )


class SGrace(Method):
    """Rounds of an attack on word vectors and an edit of the text encoder."""

    info = MethodInfo(
        title="S-GRACE",
        paper=Paper("S-GRACE", "Yin et al.", "2025", "2510.27285", "Yin and others", "{S-GRACE}"),
        what="turns the text encoder's reading of the concept, and of adversarial words for it, away",
        touches="the text encoder",
        reads="pictures of the concept, its CARE-set, words that name it and words that do not",
        strength="serves every denoiser that shares the text encoder",
        weakness="what the denoiser draws without being asked stays",
        layers=TEXT_LAYER_SETS,
        options=SGraceOptions,
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
    )
    needs = Needs(care_set=True, retained=True, word_lists=True)

    def __init__(self, context: Context) -> None:
        import torch

        self.context, base, concept = context, context.base, context.concept
        if not context.retained.prompts:
            raise CareSetError("method 's-grace' needs at least one retained prompt, and there is none")
        assert isinstance(context.recipe.own, SGraceOptions)
        self.options, self.latents = context.recipe.own, context.latents
        self.kept = base.encode_prompts(list(context.retained.prompts))
        self.names = [self._vectors(prompt) for prompt in concept.name_prompts]
        self.name = self._vectors(concept.text)
        self.words = [self._vectors(word) for word in context.related]
        self.retained = [self._vectors(prompt) for prompt in context.retained.prompts]
        self.replaced = context.recipe.replace_with is not None
        with torch.no_grad():
            self.feature = self._features(self.names[:1])
            if self.replaced:
                other = [self._vectors(after) for _, after in context.erased.pairs[: len(self.names)]]
                self.wanted = base.encode_token_vectors(other)
                self.wanted_feature = self._features(other[:1])

    @classmethod
    def word_lists(cls, recipe: Recipe) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
        """The lists of the file that the recipe names."""
        assert isinstance(recipe.own, SGraceOptions)
        return read_words(recipe.own.words) if recipe.own.words is not None else None

    @classmethod
    def work(cls, recipe: Recipe) -> Mapping[str, Work]:
        """The attacks; the edits need no denoiser."""
        assert isinstance(recipe.own, SGraceOptions)
        rows = recipe.erase.batch_size
        attack = Work(recipe.own.attack_steps * rows * 3 * len(recipe.concepts), rows, reads=True)
        return {f"attack {k}": attack for k in range(1, recipe.own.rounds + 1)}

    def _vectors(self, text: str) -> Tensor:
        """The vectors of a text's tokens, as many as are read, ``[tokens, token_width]``."""
        import torch

        table, ids = self.context.base.token_table(), self.context.base.token_ids(text)[: models.TEXT_ROOM]
        return table[torch.tensor(ids, dtype=torch.long, device=table.device)]

    def _features(self, rows: Sequence[Tensor], embeds: PromptEmbeds | None = None) -> Tensor:
        """``f`` of each row, ``[rows, width]``."""
        import torch
        from torch.nn import functional as F

        embeds = embeds or self.context.base.encode_token_vectors(rows)
        states = embeds.prompt_embeds
        # Start of text, the tokens, then end of text.
        ends = torch.tensor([len(row) + 1 for row in rows], device=states.device)
        parts = [states[torch.arange(len(rows), device=states.device), ends]]
        if embeds.pooled_prompt_embeds is not None:
            # Left alone, it would go on telling the denoiser of the concept.
            parts.append(embeds.pooled_prompt_embeds)
        return torch.cat([F.normalize(part.float(), dim=-1) for part in parts], -1) / len(parts) ** 0.5

    def _start(self, generator: torch.Generator) -> list[Tensor]:
        """The concept's own prompts, then sequences of its words, each with its name in front."""
        import torch

        count = self.context.recipe.erase.batch_size
        rows = self.names[:count]
        while len(rows) < count:
            size = int(torch.randint(WORDS[0], WORDS[1] + 1, (1,), generator=generator))
            picks = torch.randint(0, len(self.words), (size - 1,), generator=generator).tolist()
            rows.append(torch.cat([self.name, *(self.words[k] for k in picks)])[: models.TEXT_ROOM])
        return rows

    def attack(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Projected sign-gradient on the sequences' vectors, in a box around where they start.

        It minimises ``‖ε − ε*(z_t, enc(a))‖² + w (1 − cos(f_a, f_c))``, and returns ``vectors.<k>``
        ``[tokens, token_width]`` of each sequence, and their ``features``.
        """
        import torch
        from torch import nn
        from torch.nn import functional as F

        base, options = self.context.base, self.options
        start = self._start(generator)
        rows = [nn.Parameter(row.clone()) for row in start]
        if options.attack_steps:
            picks = torch.randint(0, len(self.latents), (len(rows),), generator=generator)
            clean = self.latents[picks.to(self.latents.device)]
            first, last = (int(part * base.num_train_timesteps) for part in NOISY)
            times = models.sample_timesteps(len(rows), first, last, generator).to(base.device)
            noise = torch.randn(clean.shape, generator=generator).to(clean.device, clean.dtype)
            states, target = base.add_noise(clean, noise, times), base.training_target(clean, noise, times)
        scaling = models.LossScale(base.dtype)
        for step in range(options.attack_steps):
            with models.frozen(*base.components.values()):
                embeds = base.encode_token_vectors(rows)
                predicted = base.denoise(states, times, embeds).float()
                error = F.mse_loss(predicted, target.float()) * len(rows)
                apart = (1 - self._features(rows, embeds) @ self.feature.T).sum()
                loss = error + options.attack_similarity * apart
                if not scaling.backward(loss, rows, base.crew, f"loss of step {step + 1}"):
                    continue
            box = options.attack_box * options.attack_rate
            with torch.no_grad():
                for row, origin in zip(rows, start, strict=True):
                    assert row.grad is not None
                    moved = row - options.attack_rate * row.grad.sign()
                    row.copy_(torch.minimum(torch.maximum(moved, origin - box), origin + box))
        with torch.no_grad():
            found = {f"vectors.{k}": row.detach() for k, row in enumerate(rows)}
            return found | {"features": self._features([row.detach() for row in rows])}

    def edit(self, found: Mapping[str, Tensor], generator: torch.Generator) -> Tensor:
        """The loss of a step of the edit.

        ``(1 + cos(f_a, f_c)) + w₁ (1 − cos(f_a, f_a⁰)) + w₂ ‖Δθ‖₁ + λ ‖enc(r) − enc*(r)‖²``, where ``f_a⁰``
        is what the sequence read like after the attack. With a replacement, the first term brings ``f_a`` to
        the replacement's feature, the second is left out, and the concept's own prompts come to read as the
        replacement's in all places.
        """
        import torch

        base, erase, options = self.context.base, self.context.recipe.erase, self.options
        sequences = [found[f"vectors.{k}"] for k in range(len(found) - 1)]
        rows = erase.retain_batch_size or erase.batch_size
        picks = torch.randint(0, len(self.retained), (rows,), generator=generator)
        if self.context.retained.guarded:
            guarded = torch.randint(0, self.context.retained.guarded, (rows,), generator=generator)
            picks = torch.where(torch.rand(rows, generator=generator) < 0.5, guarded, picks)
        retained = [self.retained[k] for k in picks.tolist()]
        own = self.names if self.replaced else []
        embeds = base.encode_token_vectors([*sequences, *retained, *own])
        count = len(sequences)
        features = self._features(sequences, embeds[:count])
        if self.replaced:
            loss = 1 - (features @ self.wanted_feature.T).mean()
        else:
            consistent = (features * found["features"]).sum(1).mean()
            loss = 1 + (features @ self.feature.T).mean() + options.consistency_weight * (1 - consistent)
        loss = loss + options.parameter_weight * self._size()
        kept = embeds[count : count + rows]
        loss = loss + erase.retain_weight * _distance(kept, self.kept[picks])
        if own:
            loss = loss + _distance(embeds[count + rows :], self.wanted)
        return loss

    def _size(self) -> Tensor:
        """``‖Δθ‖₁``: the mean absolute update of each layer's weight, summed over the layers."""
        import torch

        name, total = models.ADAPTER_NAME, torch.zeros((), device=self.context.base.device)
        for _, layer in models.named_tuner_layers(self.context.base.components):
            if name in layer.lora_A:
                update = layer.lora_B[name].weight @ layer.lora_A[name].weight
                total = total + (layer.scaling[name] * update).abs().mean()
        return total

    @classmethod
    def erase(cls, methods: Sequence[Self], stages: Stages) -> None:
        """Rounds over all concepts."""
        count = len(methods)
        for number in range(1, methods[0].options.rounds + 1):

            def attacks(generator: torch.Generator) -> dict[str, Tensor]:
                made = [one.attack(generator) for one in methods]
                return {f"{k}.{key}": value for k, one in enumerate(made) for key, value in one.items()}

            kept = stages.once(f"attack {number}", attacks)
            found = [
                {key.removeprefix(f"{k}."): one for key, one in kept.items() if key.startswith(f"{k}.")}
                for k in range(count)
            ]

            def loss_at(step: int, generator: torch.Generator, found: list[dict[str, Tensor]] = found) -> Tensor:
                return methods[step % count].edit(found[step % count], generator)

            stages.fit(f"edit {number}", loss_at, methods[0].context.recipe.erase.steps * count)


def _distance(found: PromptEmbeds, wanted: PromptEmbeds) -> Tensor:
    """Mean squared difference of what the denoiser reads."""
    from torch.nn import functional as F

    loss = F.mse_loss(found.prompt_embeds.float(), wanted.prompt_embeds.float())
    if found.pooled_prompt_embeds is not None and wanted.pooled_prompt_embeds is not None:
        loss = loss + F.mse_loss(found.pooled_prompt_embeds.float(), wanted.pooled_prompt_embeds.float())
    return loss


def read_words(file: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The lists ``related`` and ``unrelated`` of a YAML file.

    Raises:
        RecipeError: it cannot be read, a list is missing or empty, or holds something else than words.
    """
    text = read_text(file, f"the word list {file}", RecipeError)
    lists = yaml_mapping(text, source=file, noun="word list", error=RecipeError)
    unknown = [key for key in lists if key not in ("related", "unrelated")]
    if unknown:
        raise RecipeError(f"{file} has a key '{unknown[0]}': a word list has related and unrelated")
    found = []
    for key in ("related", "unrelated"):
        words = lists.get(key)
        if not isinstance(words, list) or not words or not all(isinstance(w, str) and w.strip() for w in words):
            raise RecipeError(f"{file} needs a list of words under '{key}'")
        found.append(tuple(dict.fromkeys(word.strip() for word in words)))
    return found[0], found[1]
