"""What each saving of the erasing step is worth: the same loss, computed the published way and ours.

    python -m benchmarks.cheap_ways

All rows compute the same numbers on the same states (the last column checks it), so they differ in cost
alone. Savings that change the states or the losses are compared in quality by ``benchmarks.erasure``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from recare_patch.erasure import recare_target
from recare_patch.models import PLACEHOLDER, PromptEmbeds, classifier_free, load_base
from recare_patch.models import lora as adapters

NAMES = ("A painting in the style of Van Gogh", "A painting by Van Gogh", "Van Gogh")
ANCHOR, RETAIN, ROWS = "A stars", "A painting of stars", 4


def _loss(base: Any, states: Tensor, times: Tensor, *, batched: bool, half: bool, encode: bool, cached: Any) -> Tensor:
    """ReCARE's loss for one anchor and one retained prompt.

    Args:
        base: with an adapter attached.
        states: ``z_t``, ``[rows, 4, height, width]``.
        times: ``[rows]``.
        batched: all conditions in one forward pass instead of one by one.
        half: compute the unconditional half that guidance 1 multiplies by zero.
        encode: encode prompts again.
        cached: embeddings encoded before.
    """
    rows = len(states)

    def embed(prompt: str) -> PromptEmbeds:
        found: PromptEmbeds = base.encode_prompts([prompt]) if encode else cached[prompt]
        return found.repeat(rows)

    def predict(prompts: list[str]) -> list[Tensor]:
        if batched:
            count = len(prompts)
            both = PromptEmbeds.cat([embed(p) for p in prompts])
            pred = base.denoise(states.repeat(count, 1, 1, 1), times.repeat(count), both)
            return list(pred.chunk(count))
        if not half:
            return [base.denoise(states, times, embed(p)) for p in prompts]
        found = []
        for prompt in prompts:
            both = PromptEmbeds.cat([embed(""), embed(prompt)])
            uncond, cond = base.denoise(states.repeat(2, 1, 1, 1), times.repeat(2), both).chunk(2)
            found.append(classifier_free(uncond, cond, 1.0))
        return found

    with torch.no_grad(), adapters.off(base.denoiser):
        empty, anchor, *names, kept = predict(["", ANCHOR, *NAMES, RETAIN])
        target = recare_target(empty, anchor, torch.stack(names), 1.0, 3.0)
    erase, retain = predict([NAMES[0], RETAIN])
    return F.mse_loss(erase, target) + F.mse_loss(retain, kept)


def _timed(work: Callable[[], Tensor], parameters: list[Any], repeats: int) -> tuple[float, float]:
    seconds, value = [], 0.0
    for _ in range(repeats + 1):
        began = time.perf_counter()
        loss = work()
        loss.backward()
        seconds.append(time.perf_counter() - began)
        value = loss.item()
        for parameter in parameters:
            parameter.grad = None
    return sorted(seconds[1:])[repeats // 2], value


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="atelier")
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    base = load_base(arguments.base, device="cpu")
    generator = torch.Generator().manual_seed(0)
    parameters = adapters.attach(base.denoiser, layers="cross-attention", rank=8, alpha=8, generator=generator)
    states = torch.randn((ROWS, *base.latent_shape), generator=generator)
    times = torch.randint(0, base.num_train_timesteps, (ROWS,), generator=generator)
    cached = {p: base.encode_prompts([p]) for p in ("", ANCHOR, RETAIN, *NAMES)}
    rows = {
        "published: one by one, unconditional halves, prompts encoded each step": (False, True, True),
        "+ no unconditional half": (False, False, True),
        "+ prompts encoded once": (False, False, False),
        "+ conditions in one batch": (True, False, False),
    }
    print(f"{ROWS} states, median of {arguments.repeats} steps\n")
    print("| step | evaluations | milliseconds | loss |\n|---|---|---|---|")
    for name, (batched, half, encode) in rows.items():
        before = base.counter.total

        def work(batched: bool = batched, half: bool = half, encode: bool = encode) -> Tensor:
            return _loss(base, states, times, batched=batched, half=half, encode=encode, cached=cached)

        seconds, value = _timed(work, parameters, arguments.repeats)
        evaluations = (base.counter.total - before) // (arguments.repeats + 1)
        print(f"| {name} | {evaluations} | {1e3 * seconds:.0f} | {value:.6f} |")
    adapters.detach(base.denoiser)
    _inversion(base, arguments.repeats)


def _inversion(base: Any, repeats: int) -> None:
    """One inversion sample: pictures through the autoencoder at every step, or latents encoded once."""
    images = base.generate(["a photo of a cat"], [0], steps=2)
    latents = base.encode_images(images)
    vector = torch.nn.Parameter(base.word_vector("painting")[None].clone())
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    times = torch.tensor([500])

    def step(clean: Callable[[], Tensor], count: int) -> Tensor:
        states = base.add_noise(clean(), noise, times).repeat(count, 1, 1, 1)
        embeds = base.encode_with_vectors([f"A painting in the style of {PLACEHOLDER}"], vector).repeat(count)
        return F.mse_loss(base.denoise(states, times.repeat(count), embeds), noise.repeat(count, 1, 1, 1))

    print("\n| inversion sample | milliseconds |\n|---|---|")
    for name, clean, count in (
        ("published: autoencoder at each step, batch 1", lambda: base.encode_images(images), 1),
        ("latents encoded once, batch 1", lambda: latents, 1),
        ("latents encoded once, batch 8", lambda: latents, 8),
    ):
        seconds, _ = _timed(lambda clean=clean, count=count: step(clean, count), [vector], repeats)
        print(f"| {name} | {1e3 * seconds / count:.1f} |")


if __name__ == "__main__":
    main()
