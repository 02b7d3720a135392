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
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recare_patch.core import CareSetError
from recare_patch.erasure.methods.protocol import ErasingContext, Method, Needs, Stages
from recare_patch.models import TEXT_ROOM, PromptEmbeds, named_tuner_layers, sample_timesteps
from recare_patch.models import lora as adapters

NOISY = (0.75, 0.95)
"""The part of the diffusion process on which an attack is judged: where the prompt decides most."""

WORDS = (3, 20)
"""How many words a sequence has at least and at most."""


class SGrace(Method):
    """Rounds of an attack on word vectors and an edit of the text encoder."""

    needs = Needs(care_set=True, retained=True)

    def __init__(self, context: ErasingContext) -> None:
        """Read the concept, its words and what must stay with the untouched encoder."""
        super().__init__(context)
        if context.retained is None:
            raise CareSetError("method 's-grace' needs at least one retained prompt, and there is none")
        assert context.recipe is not None and context.concept is not None and context.latents is not None
        self.options, self.latents = context.recipe.s_grace, context.latents
        self.kept: PromptEmbeds = context.retained
        self.names = [self._vectors(prompt) for prompt in context.concept.name_prompts]
        self.name = self._vectors(context.concept.text)
        self.words = [self._vectors(word) for word in context.related]
        self.retained = [self._vectors(prompt) for prompt in context.retained_prompts]
        self.replaced = context.recipe.replace_with is not None
        with torch.no_grad(), adapters.off(*context.base.components.values()):
            self.feature = self._features(self.names[:1])
            if self.replaced:
                other = [self._vectors(prompt) for prompt in context.became[: len(self.names)]]
                self.wanted = context.base.encode_token_vectors(other)
                self.wanted_feature = self._features(other[:1])

    def _vectors(self, text: str) -> Tensor:
        """The vectors of a text's tokens, as many as are read, ``[tokens, token_width]``."""
        table, ids = self.context.base.token_table(), self.context.base.token_ids(text)[:TEXT_ROOM]
        return table[torch.tensor(ids, dtype=torch.long, device=table.device)]

    def _features(self, rows: Sequence[Tensor], embeds: PromptEmbeds | None = None) -> Tensor:
        """``f`` of each row, ``[rows, width]``."""
        embeds = embeds or self.context.base.encode_token_vectors(rows)
        states = embeds.prompt_embeds
        # Start of text, the tokens, then end of text.
        ends = torch.tensor([len(row) + 1 for row in rows], device=states.device)
        parts = [states[torch.arange(len(rows), device=states.device), ends]]
        if embeds.pooled_prompt_embeds is not None:
            # Left alone, it would go on telling the denoiser of the concept.
            parts.append(embeds.pooled_prompt_embeds)
        return torch.cat([F.normalize(part.float(), dim=-1) for part in parts], -1) / len(parts) ** 0.5

    # ------------------------------------------------------------------ attack

    def _start(self, generator: torch.Generator) -> list[Tensor]:
        """The concept's own prompts, then sequences of its words, each with its name in front."""
        count = self.context.options.batch_size
        rows = self.names[:count]
        while len(rows) < count:
            size = int(torch.randint(WORDS[0], WORDS[1] + 1, (1,), generator=generator))
            picks = torch.randint(0, len(self.words), (size - 1,), generator=generator).tolist()
            rows.append(torch.cat([self.name, *(self.words[k] for k in picks)])[:TEXT_ROOM])
        return rows

    def attack(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Projected sign-gradient on the sequences' vectors, in a box around where they start.

        It minimises ``‖ε − ε*(z_t, enc(a))‖² + w (1 − cos(f_a, f_c))``.

        Returns:
            ``vectors.<k>`` ``[tokens, token_width]`` of each sequence, and their ``features``.
        """
        base, options = self.context.base, self.options
        start = self._start(generator)
        rows = [nn.Parameter(row.clone()) for row in start]
        if options.attack_steps:
            picks = torch.randint(0, len(self.latents), (len(rows),), generator=generator)
            clean = self.latents[picks.to(self.latents.device)]
            first, last = (int(part * base.num_train_timesteps) for part in NOISY)
            times = sample_timesteps(len(rows), first, last, generator).to(base.device)
            noise = torch.randn(clean.shape, generator=generator).to(clean.device, clean.dtype)
            states, target = base.add_noise(clean, noise, times), base.training_target(clean, noise, times)
        for _ in range(options.attack_steps):
            with adapters.frozen(*base.components.values()):
                embeds = base.encode_token_vectors(rows)
                predicted = base.denoise(states, times, embeds).float()
                error = F.mse_loss(predicted, target.float()) * len(rows)
                apart = (1 - self._features(rows, embeds) @ self.feature.T).sum()
                grads = torch.autograd.grad(error + options.attack_similarity * apart, rows)
            for row, grad in zip(rows, grads, strict=True):
                row.grad = grad
            if base.crew is not None:
                base.crew.mean_gradients(rows)
            box = options.attack_box * options.attack_rate
            with torch.no_grad():
                for row, origin in zip(rows, start, strict=True):
                    assert row.grad is not None
                    moved = row - options.attack_rate * row.grad.sign()
                    row.copy_(torch.minimum(torch.maximum(moved, origin - box), origin + box))
        with torch.no_grad():
            found = {f"vectors.{k}": row.detach() for k, row in enumerate(rows)}
            return found | {"features": self._features([row.detach() for row in rows])}

    # ------------------------------------------------------------------ edit

    def edit(self, found: Mapping[str, Tensor], generator: torch.Generator) -> Tensor:
        """The loss of a step of the edit.

        ``(1 + cos(f_a, f_c)) + w₁ (1 − cos(f_a, f_a⁰)) + w₂ ‖Δθ‖₁ + λ ‖enc(r) − enc*(r)‖²``, where ``f_a⁰``
        is what the sequence read like after the attack. With a replacement, the first term brings ``f_a`` to
        the replacement's feature, the second is left out, and the concept's own prompts come to read as the
        replacement's in all places.
        """
        base, context, options = self.context.base, self.context, self.options
        sequences = [found[f"vectors.{k}"] for k in range(len(found) - 1)]
        rows = context.options.retain_batch_size or context.options.batch_size
        picks = torch.randint(0, len(self.retained), (rows,), generator=generator)
        if context.guarded:
            guarded = torch.randint(0, context.guarded, (rows,), generator=generator)
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
        loss = loss + context.options.retain_weight * _distance(kept, self.kept[picks])
        if own:
            loss = loss + _distance(embeds[count + rows :], self.wanted)
        return loss

    def _size(self) -> Tensor:
        """``‖Δθ‖₁``: the mean absolute update of each layer's weight, summed over the layers."""
        name, total = adapters.ADAPTER_NAME, torch.zeros((), device=self.context.base.device)
        for _, layer in named_tuner_layers(self.context.base.components):
            if name in layer.lora_A:
                update = layer.lora_B[name].weight @ layer.lora_A[name].weight
                total = total + (layer.scaling[name] * update).abs().mean()
        return total

    @classmethod
    def erase(cls, methods: Sequence[Self], stages: Stages) -> None:
        """See :class:`Method`."""
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

            def loss_at(
                step: int, generator: torch.Generator, found: list[dict[str, Tensor]] = found
            ) -> Tensor:
                return methods[step % count].edit(found[step % count], generator)

            stages.fit(f"edit {number}", loss_at, methods[0].context.options.steps * count)


def _distance(found: PromptEmbeds, wanted: PromptEmbeds) -> Tensor:
    """Mean squared difference of what the denoiser reads."""
    loss = F.mse_loss(found.prompt_embeds.float(), wanted.prompt_embeds.float())
    if found.pooled_prompt_embeds is not None and wanted.pooled_prompt_embeds is not None:
        loss = loss + F.mse_loss(found.pooled_prompt_embeds.float(), wanted.pooled_prompt_embeds.float())
    return loss
