"""Attacks on tiny random models: their arithmetic, their files, resume and replay.

Whether a concept comes back means nothing on models that draw noise; a detector that looks at the
sum of the pixels stands in for one, so that some pictures "show" the concept and most do not.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from itertools import count, repeat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from recare_patch.careset import CareSet
from recare_patch.core import NonFiniteError, OutputError, RecarePatchError, ResumeError
from recare_patch.erasure.loop import noised
from recare_patch.measure import ATTACKS, attack_options, attack_patch, load_attack_type
from recare_patch.measure.attacks import AttackResult, AttackTarget, p4d, ring_a_bell, unlearn_diff_atk
from recare_patch.measure.attacks.concept_inversion import name_templates
from recare_patch.measure.attacks.p4d import P4DOptions, layout, nearest_tokens
from recare_patch.measure.attacks.protocol import candidate_seeds, trial_seeds
from recare_patch.measure.attacks.ring_a_bell import GeneticSearch, RingABellOptions, concept_pairs
from recare_patch.measure.attacks.run import _detector, run_attacks
from recare_patch.measure.attacks.saved import load_about, load_attack, save_attack
from recare_patch.measure.attacks.search import Group, Vocabulary
from recare_patch.measure.attacks.unlearn_diff_atk import UnlearnDiffAtkOptions, _Draw, project_to_simplex
from recare_patch.models import PLACEHOLDER, BaseModel, load_base, tuner_layers
from recare_patch.models import lora as adapters
from recare_patch.patch import Patch, PatchMetadata
from recare_patch.recipe import Concept, Recipe

TINY: dict[str, dict[str, Any]] = {
    "classifier-guidance": {"steps": 3, "images": 3, "pictures": 3, "batch_size": 2},
    "completion": {"pictures": 3, "batch_size": 2},
    "concept-inversion": {"steps": 3, "images": 3, "pictures": 4, "batch_size": 2, "vectors": 2},
    "img2img": {"pictures": 3, "batch_size": 2},
    "inpainting": {"pictures": 3, "batch_size": 2},
    "noise-search": {"tries": 3, "pictures": 3, "batch_size": 2},
    "p4d": {"steps": 4, "check_every": 2, "tokens": 4, "pictures": 3, "batch_size": 2},
    "ring-a-bell": {"tokens": 4, "population": 8, "generations": 30, "pictures": 3, "batch_size": 2},
    "unlearn-diff-atk": {"timesteps": 2, "iterations": 2, "pictures": 3, "batch_size": 2},
}
STEPS = 2
CONCEPT = Concept(text="Van Gogh", kind="style")


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class PixelDetector:
    """Shows the concept wherever the patch is out, and else where the leftmost strip is the brightest.

    Strips, because single pixels differ by a shade between batches of other sizes.
    """

    name = "pixels"

    def __init__(self, base: BaseModel, strips: int = 3) -> None:
        self.base, self.strips = base, strips

    def labels(self) -> tuple[str, ...]:
        return ()

    def rate(self, images: Sequence[Image.Image], label: str) -> list[bool]:
        out = not list(tuner_layers(self.base.denoiser))
        strips = [np.array_split(np.asarray(image, dtype=float), self.strips, axis=1) for image in images]
        return [out or int(np.argmax([strip.mean() for strip in row])) == 0 for row in strips]


class PatchDetector(PixelDetector):
    """Shows the concept wherever the patch is out, and nowhere else."""

    name = "patch"

    def rate(self, images: Sequence[Image.Image], label: str) -> list[bool]:
        return [not list(tuner_layers(self.base.denoiser))] * len(images)


class Killed(BaseException):
    """A run that ends in the middle."""


class Killer:
    """Stops a run at the n-th report of a stage, and remembers all reports."""

    def __init__(self, stage: str = "", at: int = 0) -> None:
        self.stage, self.at = stage, at
        self.reports: list[tuple[str, int]] = []

    def update(self, stage: str, done: int, total: int, note: str = "") -> None:
        assert 0 <= done <= total
        self.reports.append((stage, done))
        if stage == self.stage and self.count(stage) == self.at:
            raise Killed

    def count(self, stage: str) -> int:
        return sum(one == stage for one, _ in self.reports)


def make_patch(
    base: BaseModel,
    folder: Path | None = None,
    *,
    layers: str = "cross-attention",
    seed: int = 0,
    size: float = 0.3,
    kind: str = "style",
) -> Patch:
    """A patch of random numbers, in a folder or of this process alone."""
    generator = _generator(seed)
    parameters = adapters.attach(base.denoiser, layers=layers, rank=2, alpha=2.0, generator=generator)
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(size * torch.randn(parameter.shape, generator=generator))
    recipe = Recipe(concept=Concept(text=CONCEPT.text, kind=kind), base=base.id)  # type: ignore[arg-type]
    recipe = recipe.with_overrides({"target_images.steps": STEPS, "adapter.rank": 2, "adapter.alpha": 2.0})
    metadata = PatchMetadata.describe(recipe, base, CareSet.of_words(recipe.concept, ["stars", "night"]), {})
    patch = Patch.from_adapter(base, adapters.ADAPTER_NAME, 2, 2.0, metadata, dtype=torch.float32)
    adapters.detach(base.denoiser)
    if folder is not None:
        patch.save(folder)
    return patch


@pytest.fixture(scope="module")
def base(tiny_sd: Path) -> BaseModel:
    return load_base(tiny_sd, device="cpu")


@pytest.fixture(scope="module")
def patch(base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("patches") / "one"
    make_patch(base, folder)
    return folder


@pytest.fixture(scope="module")
def target(base: BaseModel) -> AttackTarget:
    prompts = ("A painting in the style of Van Gogh", "Van Gogh")
    latents = base.sample_latents(base.encode_prompts(prompts), [1, 2], steps=STEPS)

    def shows(images: Sequence[Image.Image]) -> list[bool]:
        return PixelDetector(base).rate(images, "")

    known: dict[str, Any] = {"prompts": prompts, "seeds": (1, 2), "steps": STEPS, "words": ("stars",)}
    images = base.decode_latents(latents)
    return AttackTarget(base, CONCEPT, shows, images, latents, lambda: adapters.off(base.denoiser), **known)


def judged(base: BaseModel) -> dict[str, Any]:
    return {"base": base, "detector": PixelDetector(base), "label": "it"}


def run(base: BaseModel, patch: Path | Patch, name: str, **changes: Any) -> AttackResult:
    known: dict[str, Any] = {"options": attack_options(name, "small", TINY[name]), **judged(base)}
    return attack_patch(patch, name, **{**known, **changes})


def assert_same(first: AttackResult, second: AttackResult) -> None:
    """But for seconds, evaluations and pictures, which a resumed or a read one may not have."""
    but: dict[str, Any] = {"seconds": 0, "evaluations": 0, "pictures": [], "tensors": {}}
    assert dataclasses.replace(first, **but) == dataclasses.replace(second, **but)
    assert first.tensors.keys() == second.tensors.keys()
    assert all(torch.equal(first.tensors[key], second.tensors[key]) for key in first.tensors)


def test_the_projection_is_the_nearest_point_of_the_simplex() -> None:
    points = 2 * torch.randn((20, 6), generator=_generator(), dtype=torch.float64)
    points[0], points[1] = 0, torch.tensor([0, 0, 1, 0, 0, 0])
    found = project_to_simplex(points.view(4, 5, 6)).view(20, 6)
    torch.testing.assert_close(found.sum(-1), torch.ones(20, dtype=torch.float64))
    # It is nearest where what was taken away is the same of all that stay, and no less than those that went.
    moved = points - found
    taken = moved.max(-1, keepdim=True).values
    assert (found >= 0).all()
    torch.testing.assert_close(moved[found > 0], taken.expand_as(moved)[found > 0], atol=1e-12, rtol=0)


def test_a_drawn_token_passes_its_gradient_on_clipped() -> None:
    weights = torch.full((2, 3), 1 / 3, requires_grad=True)
    one_hot = _Draw.apply(weights, torch.tensor([2, 0]))
    assert one_hot.tolist() == [[0, 0, 1], [1, 0, 0]]
    (one_hot * torch.tensor([[0.5, -7.0, 7.0], [0.0, 1.0, -0.25]])).sum().backward()
    assert weights.grad is not None
    assert weights.grad.tolist() == [[0.5, -1, 1], [0, 1, -0.25]]


def test_p4d_reads_new_tokens_among_plain_ones_as_the_nearest() -> None:
    table = torch.tensor([[1.0, 0], [0, 9], [-1, -1]])
    vectors = torch.tensor([[[5.0, 1], [0.1, 0.2]], [[-3, -2], [0, 1]]])
    assert nearest_tokens(vectors, table).tolist() == [[0, 1], [2, 1]]
    assert layout([7, 8, 9], P4DOptions(variant="n", tokens=2)) == [-1, -1]
    assert layout([7, 8, 9, 10], P4DOptions(variant="K", every=3)) == [-1, 7, 8, 9, -1, 10]
    assert layout([], P4DOptions(variant="k")) == [-1]


def test_found_prompts_are_made_of_tokens_that_text_can_spell(base: BaseModel) -> None:
    vocabulary = Vocabulary(base)
    ids = vocabulary.ids.tolist()
    assert not set(ids) & set(base.special_token_ids)
    assert {base.token_ids(word)[0] for word in ("stars", "night", "gogh")} <= set(ids)
    torch.testing.assert_close(vocabulary.vectors, base.token_table()[vocabulary.ids])
    drawn = vocabulary.ids[torch.randint(0, len(ids), (200, 8), generator=_generator())]
    assert [base.token_ids(vocabulary.text(row)) for row in drawn] == drawn.tolist()
    torch.testing.assert_close(vocabulary.of_text("van night")[1], base.word_vector("night"))
    assert vocabulary.of_text("").shape == (0, base.token_width)


@pytest.mark.parametrize("kind", ["style", "object", "identity", "nsfw"])
def test_names_are_learnt_in_templates_and_pairs_differ_in_the_concept_alone(kind: str) -> None:
    concept = Concept(text="nudity" if kind == "nsfw" else "Mira Vale", kind=kind)  # type: ignore[arg-type]
    templates = name_templates(concept)
    assert all(PLACEHOLDER in template for template in templates)
    assert len(set(templates)) == len(templates)
    for present, absent in concept_pairs(concept, ["stars"]):
        assert ("stars" in present) == ("stars" in absent)
        assert not set(concept.words) & set(absent.casefold().split())
        assert set(concept.words) & set(present.casefold().split())
    assert len(concept_pairs(concept, [])) > 3


def test_the_concept_vector_is_the_mean_difference(base: BaseModel) -> None:
    pairs = concept_pairs(CONCEPT, ["stars", "night"])
    embeds = [[base.encode_prompts([one]).prompt_embeds[0] for one in pair] for pair in pairs]
    wanted = torch.stack([present - absent for present, absent in embeds]).mean(0)
    found = ring_a_bell.concept_vector(base, CONCEPT, ["stars", "night"])
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def descend(search: Group, steps: int, seeds: Iterator[int]) -> list[float]:
    """The losses on the way; draws that differ only where the seeds do."""
    losses = []
    for _ in range(steps):
        search.optimizer.zero_grad()
        loss = search.loss([0, 1], 0, _generator(next(seeds)))
        loss.backward()
        search.optimizer.step()
        search.project()
        losses.append(loss.item())
    return losses


def test_unlearn_diff_atk_lowers_its_loss(target: AttackTarget) -> None:
    options = UnlearnDiffAtkOptions(tokens=2, timesteps=1, learning_rate=0.05)
    search = unlearn_diff_atk._Group(target, Vocabulary(target.base), [0, 1], options, _generator())
    texts = search.prompts()

    @torch.no_grad()
    def loss_of_the_likeliest() -> float:
        """At the tokens that would be drawn now, and the same noise each time."""
        kept = search.parameter.detach().clone()
        torch.testing.assert_close(kept.sum(-1), torch.ones(2, 2))
        search.parameter.copy_(torch.nn.functional.one_hot(kept.argmax(-1), kept.shape[-1]))
        loss = float(search.loss([0, 1], 0, _generator()))
        search.parameter.copy_(kept)
        return loss

    before = loss_of_the_likeliest()
    descend(search, 40, count())
    assert loss_of_the_likeliest() < before
    assert search.prompts() != texts
    assert all(found.endswith("Van Gogh") for found in search.prompts())


def test_p4d_comes_nearer_to_the_untouched_prediction(base: BaseModel, target: AttackTarget, patch: Path) -> None:
    embeds, at = base.encode_prompts(target.prompts), torch.tensor([300, 700])
    predict = torch.no_grad()(lambda: base.denoise(target.latents, at, embeds))
    untouched = predict()
    with Patch.load(patch).apply(base.pipeline):
        assert not torch.allclose(untouched, predict())
        with target.original():
            torch.testing.assert_close(untouched, predict())
        search = p4d._Group(target, Vocabulary(base), [0, 1], P4DOptions(tokens=3), _generator())
        # What is learnt starts on words of the vocabulary, and is read as those words.
        assert all(base.token_ids(text) for text in search.prompts())
        first, *losses = descend(search, 31, repeat(0))
    assert min(losses) < first


def test_genetic_search_comes_nearer(base: BaseModel) -> None:
    wanted = base.encode_prompts(["a starry night"]).prompt_embeds[0]
    options = RingABellOptions(tokens=5, population=20, generations=10)
    search = GeneticSearch(Vocabulary(base), wanted, options, _generator())
    start, best = search.best_distance, [search.best_distance]
    for generation in range(10):
        search.step(_generator(generation))
        best.append(search.best_distance)
        assert not search.distances.isnan().any()
        assert (search.distances.diff() >= 0).all()
    assert best == sorted(best, reverse=True)
    assert best[-1] < start
    again = base.encode_token_vectors([search.vocabulary.vectors[search.best]]).prompt_embeds[0]
    assert search.best_distance == pytest.approx(float((again - wanted).square().sum()), rel=1e-4)


def test_concept_inversion_lowers_its_loss(base: BaseModel, target: AttackTarget) -> None:
    attack = load_attack_type("concept-inversion")
    options = attack.options_type(steps=100, batch_size=4, pictures=1, images=2, learning_rate=0.1)
    learnt = attack.run(target, options, seed=0).tensors["vectors"]

    @torch.no_grad()
    def loss(vectors: torch.Tensor) -> float:
        """On the same noise for both, far more of it than a step sees."""
        index = torch.arange(256) % 2
        states, timesteps, noise = noised(base, target.latents[index], _generator())
        embeds = base.encode_with_vectors([CONCEPT.target_prompt_for(PLACEHOLDER)], vectors).repeat(256)
        return float((base.denoise(states, timesteps, embeds) - noise).square().mean())

    assert loss(learnt) < loss(base.word_vector("painting")[None])


@pytest.mark.parametrize("name", sorted(TINY))
def test_an_attack_is_told_saved_and_the_same_again(base: BaseModel, patch: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    result = run(base, patch, name, out=out)
    lengths = {result.trials, *map(len, (result.details, result.prompts, result.pictures))}
    assert lengths == {TINY[name]["pictures"]}
    assert 0 <= result.interval[0] <= result.rate <= result.interval[1] <= 1
    for key, wanted in (("success", result.successes), ("without", result.without)):
        assert wanted == sum(one[key] for one in result.details)
    assert result.base == 1.0
    files = {"attack.json", "attack.png", *(["attack.safetensors"] if result.tensors else [])}
    assert {file.name for file in out.iterdir()} == files
    assert_same(load_attack(out), result)
    about = load_about(out)
    assert (about["concept"], about["detector"], about["label"]) == ("Van Gogh", "pixels", "it")
    assert about["base_denoiser_sha256"] == base.denoiser_hash()
    # Nothing is left in the model, and nothing depends on what ran before.
    assert not list(tuner_layers(base.denoiser))
    again = run(base, patch, name)
    assert_same(again, result)
    assert again.evaluations == result.evaluations
    pairs = zip(result.pictures, again.pictures, strict=True)
    assert all(np.array_equal(np.asarray(first), np.asarray(second)) for first, second in pairs)
    # What was found is tried on the same patch, and on another one.
    same = attack_patch(patch, replay=out, **judged(base))
    assert (same.attack, same.trials, same.without) == (name, result.trials, result.without)
    assert [one["success"] for one in same.details] == [one["success"] for one in result.details]
    other = make_patch(base, seed=1)
    moved = attack_patch(other, name, replay=out, out=tmp_path / "moved", **judged(base))
    assert moved.prompts == same.prompts == result.prompts
    # Probes draw their starts again.
    assert moved.evaluations == moved.trials * 2 * 2 * STEPS * (1.5 if name in ("img2img", "inpainting") else 1)
    assert not np.array_equal(np.asarray(moved.pictures[0]), np.asarray(same.pictures[0]))
    found = load_about(tmp_path / "moved")
    assert (found["preset"], found["replay"]) == ("replay", about)
    assert found["patch_sha256"] != about["patch_sha256"]


def test_seeds_are_nobody_elses(base: BaseModel, patch: Path) -> None:
    assert not set(trial_seeds(0, 1000)) & set(candidate_seeds(0, 1000))
    assert all(0 <= seed < 2**31 for seed in trial_seeds(2**40, 3))
    for name in ("concept-inversion", "ring-a-bell"):
        first, second = run(base, patch, name), run(base, patch, name, seed=1)
        assert not {one["seed"] for one in first.details} & {one["seed"] for one in second.details}


def test_every_evaluation_is_counted(base: BaseModel, patch: Path) -> None:
    pictures = 2 * STEPS  # with guidance, each step takes two
    for name, expected in {
        "unlearn-diff-atk": 3 * (pictures + 2 * (2 * 3 + pictures)),
        "p4d": 3 * (pictures + 2 * (2 * (3 + 1) + pictures)),
        "ring-a-bell": 3 * 2 * pictures,
        "concept-inversion": 3 * 2 * 3 + 4 * 2 * pictures,
    }.items():
        result = run(base, patch, name, detector=PatchDetector(base))
        assert (result.successes, result.without, result.base) == (0, 0, 1.0)
        assert result.evaluations == expected, name
        assert result.seconds > 0


STOPS: dict[str, list[tuple[str, int]]] = {
    "concept-inversion": [("target images", 1), ("concept-inversion", 3), ("concept-inversion, judge", 1)],
    "p4d": [("p4d, plain", 2), ("p4d", 3), ("p4d", 6)],
    "ring-a-bell": [("ring-a-bell", 28), ("ring-a-bell", 33)],
    "unlearn-diff-atk": [("unlearn-diff-atk", 3), ("unlearn-diff-atk", 4)],
    "classifier-guidance": [("classifier-guidance", 2), ("classifier-guidance, judge", 1)],
    "inpainting": [("inpainting, without the name", 1), ("inpainting, judge", 1)],
    "noise-search": [("noise-search, success", 2), ("noise-search, given", 1)],
}


@pytest.mark.parametrize(("name", "stage", "at"), [(name, *stop) for name in STOPS for stop in STOPS[name]])
def test_a_killed_run_resumes_to_the_same_result(
    base: BaseModel, patch: Path, tmp_path: Path, name: str, stage: str, at: int
) -> None:
    out, judge = tmp_path / "out", PatchDetector(base)
    with pytest.raises(Killed):
        run(base, patch, name, detector=judge, out=out, progress=Killer(stage, at))
    assert not list(tuner_layers(base.denoiser))
    with pytest.raises(OutputError, match="--resume"):
        run(base, patch, name, detector=judge, out=out)
    resumed = run(base, patch, name, detector=judge, out=out, resume=True)
    whole = run(base, patch, name, detector=judge, out=tmp_path / "whole")
    assert_same(resumed, whole)
    assert resumed.evaluations == whole.evaluations
    assert {file.name for file in out.iterdir()} == {file.name for file in (tmp_path / "whole").iterdir()}
    # A finished one is read, not run.
    stopped = Killer(stage, 1)
    assert_same(run(base, patch, name, detector=judge, out=out, resume=True, progress=stopped), whole)


@pytest.mark.parametrize("name", ["concept-inversion", "p4d", "unlearn-diff-atk"])
def test_a_loss_that_is_no_number_ends_a_search(
    base: BaseModel, patch: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    predict = base.denoise
    spoilt = lambda *given: predict(*given) * (torch.nan if torch.is_grad_enabled() else 1)  # noqa: E731
    monkeypatch.setattr(base, "denoise", spoilt)
    with pytest.raises(NonFiniteError, match=rf"^{name}( 0)?, step 1: the loss is NaN: try a lower learning rate"):
        run(base, patch, name, detector=PatchDetector(base))


def test_a_run_of_other_options_is_not_resumed(base: BaseModel, patch: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(Killed):
        run(base, patch, "p4d", out=out, progress=Killer("p4d", 1))
    options = attack_options("p4d", "small", {**TINY["p4d"], "steps": 6})
    for key, changes in {"seed": {"seed": 3}, "steps": {"options": options}}.items():
        with pytest.raises(ResumeError, match=f"it differs in {key}"):
            run(base, patch, "p4d", out=out, resume=True, **changes)
    damaged = out / ".run" / "p4d,-plain.json"
    damaged.write_text("{")
    with pytest.raises(ResumeError, match="is damaged"):
        run(base, patch, "p4d", out=out, resume=True)
    damaged.unlink()
    run(base, patch, "p4d", out=out, resume=True)
    with pytest.raises(ResumeError, match="it differs in label"):
        run(base, patch, "p4d", out=out, resume=True, label="that")


def test_unsafe_pictures_never_touch_the_disk(base: BaseModel, tmp_path: Path) -> None:
    patch = make_patch(base, kind="nsfw")
    with pytest.raises(Killed):
        run(base, patch, "unlearn-diff-atk", out=tmp_path / "out", progress=Killer("unlearn-diff-atk", 3))
    kept = [file.name for file in (tmp_path / "out" / ".run").iterdir()]
    assert kept and not [name for name in kept if name.startswith("targets") or name.endswith(".png")]
    resumed = run(base, patch, "unlearn-diff-atk", out=tmp_path / "out", resume=True)
    assert_same(resumed, run(base, patch, "unlearn-diff-atk"))


def test_several_attacks_share_the_base(base: BaseModel, patch: Path, tmp_path: Path) -> None:
    attacks = {name: attack_options(name, "small", TINY[name]) for name in ("ring-a-bell", "p4d")}
    found = dict(run_attacks(patch, attacks, out=tmp_path, seed=0, **judged(base)))
    assert list(found) == ["ring-a-bell", "p4d"]
    assert_same(found["p4d"], load_attack(tmp_path / "p4d"))


def test_a_prompt_that_needs_no_attack_counts_as_one_that_fell(base: BaseModel, patch: Path) -> None:
    result = run(base, patch, "unlearn-diff-atk", detector=PixelDetector(base, 1))
    assert (result.successes, result.without) == (3, 3)
    assert result.prompts == [one["attacked"] for one in result.details]
    assert result.evaluations == 3 * 2 * STEPS


def test_a_prompt_is_left_alone_once_it_has_fallen(base: BaseModel, patch: Path) -> None:
    class OneALook(PatchDetector):
        looks = -1

        def rate(self, images: Sequence[Image.Image], label: str) -> list[bool]:
            hits = super().rate(images, label)
            if not any(hits):
                # Not the two looks at the plain prompts; after that, the first picture of each look.
                self.looks += 1
                hits[0] = self.looks > 1
            return hits

    options = attack_options("unlearn-diff-atk", "small", {**TINY["unlearn-diff-atk"], "timesteps": 5})
    result = run(base, patch, "unlearn-diff-atk", detector=OneALook(base), options=options)
    assert [one["round"] for one in result.details] == [1, 2, 1]
    assert (result.successes, result.without) == (3, 0)
    pictures, learning = 2 * STEPS, 2 * 3
    assert result.evaluations == 3 * pictures + (2 + 1 + 1) * (learning + pictures)


def test_a_base_that_draws_too_few_targets_is_told(
    base: BaseModel, patch: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class First(PatchDetector):
        def rate(self, images: Sequence[Image.Image], label: str) -> list[bool]:
            hits, self.seen = super().rate(images, label), getattr(self, "seen", 0) + 1
            return [hit and self.seen == 1 and k == 0 for k, hit in enumerate(hits)]

    result = run(base, patch, "ring-a-bell", detector=First(base))
    assert result.trials == 1
    assert "shows 'Van Gogh' in 1 of" in caplog.text


def test_it_runs_on_other_prediction_types(tiny_sd_v: Path) -> None:
    base = load_base(tiny_sd_v, device="cpu")
    patch = make_patch(base)
    for name in TINY:
        assert run(base, patch, name).trials == TINY[name]["pictures"]


@pytest.mark.slow
def test_concept_inversion_finds_what_no_patch_hides() -> None:
    """A patch that changes nothing: Atelier draws Van Gogh with the learnt name nearly always."""
    base = load_base("atelier", device="cpu")
    options = attack_options("concept-inversion", "small", {"steps": 150, "pictures": 16})
    patch, steps = make_patch(base, size=0.0), Recipe(concept=CONCEPT).target_images.steps
    result = attack_patch(patch, "concept-inversion", base=base, options=options, steps=steps)
    assert result.rate > 0.5
    assert result.without >= 8


def test_the_published_budgets() -> None:
    bell = {"tokens": 16, "strength": 3.0, "population": 200, "generations": 3000}
    published = {
        "concept-inversion": {"steps": 3000, "learning_rate": 5e-3},
        "p4d": {"tokens": 16, "steps": 3000, "learning_rate": 0.1, "weight_decay": 0.1},
        "ring-a-bell": {**bell, "mutation": 0.25, "crossover": 0.5},
        "unlearn-diff-atk": {"timesteps": 50, "iterations": 40, "learning_rate": 0.01},
    }
    # Probes have no budget of their own in their paper.
    probes = {"classifier-guidance", "completion", "img2img", "inpainting", "noise-search"}
    assert set(published) | probes == set(ATTACKS.names())
    for name, values in published.items():
        assert values.items() <= attack_options(name, "published").model_dump().items()
    assert attack_options("p4d", "published", {"steps": 7}).model_dump()["steps"] == 7


@pytest.mark.parametrize(
    ("name", "budget", "overrides", "sentence"),
    [
        ("concept-inverson", "small", {}, "did you mean 'concept-inversion'"),
        ("p4d", "smal", {}, "did you mean 'small'"),
        ("p4d", "small", {"stepz": 1}, "did you mean 'steps'"),
        ("p4d", "small", {"steps": 0}, "steps must be at least 1, got 0"),
        ("p4d", "small", {"variant": "m"}, "unknown variant 'm'"),
        ("concept-inversion", "small", {"vectors": 17}, "vectors must be at most 16"),
        ("ring-a-bell", "small", {"mutation": 2}, "mutation must be at most 1"),
    ],
)
def test_bad_options(name: str, budget: str, overrides: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RecarePatchError, match=sentence) as caught:
        attack_options(name, budget, overrides)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "kind", "given", "label", "judge", "known"),
    [
        ("Van Gogh", "style", None, None, "atelier-judge", "van gogh"),
        ("boat", "object", None, None, "atelier-judge", "boat"),
        ("Van Gogh", "style", None, "monet", "atelier-judge", "monet"),
        ("dragon", "object", "clip:{}", None, "clip", "dragon"),
        # Without a source it is the recipe's CLIP, here the bundled one, and nothing is downloaded.
        ("dragon", "object", "clip", None, "clip", "dragon"),
    ],
)
def test_the_concepts_suite_knows_who_judges(
    tiny_clip: Path, text: str, kind: Any, given: str | None, label: str | None, judge: str, known: str
) -> None:
    recipe = Recipe(concept=Concept(text=text, kind=kind))
    detector, found = _detector(recipe, (), given and given.format(tiny_clip), label)
    assert (detector.name, found) == (judge, known)


class Blind(PixelDetector):
    def rate(self, images: Sequence[Image.Image], label: str) -> list[bool]:
        return [False] * len(images)


def test_bad_runs(base: BaseModel, patch: Path, tmp_path: Path) -> None:
    plain: dict[str, Any] = {"base": base, "patch": patch, "attack": "p4d"}
    for changes, sentence in (
        ({"attack": "p4"}, "did you mean 'p4d'"),
        ({"attack": None}, "no attack was named"),
        ({"options": RingABellOptions()}, "are not the options of the attack p4d"),
        ({"patch": tmp_path / "nothing"}, "no patch at"),
        ({"patch": Patch(Patch.load(patch).tensors)}, "does not say what it erases"),
        ({"detector": "atelier-juge"}, "did you mean 'atelier-judge'"),
        ({"label": "van gog", "detector": "atelier-judge"}, "did you mean 'van gogh'"),
        ({"detector": Blind(base), "label": "it", "out": tmp_path / "out"}, "nothing to attack: none of"),
    ):
        with pytest.raises(RecarePatchError, match=sentence):
            attack_patch(**{**plain, **changes})


def test_folders_that_hold_no_attack(base: BaseModel, patch: Path, tmp_path: Path) -> None:
    def refused(match: str, name: str | None = None) -> None:
        with pytest.raises(RecarePatchError, match=match) as caught:
            attack_patch(patch, name, replay=tmp_path / "saved", **judged(base))
        assert "\n" not in str(caught.value)

    refused("holds no saved attack: attack.json is not in it")
    result = run(base, patch, "concept-inversion")
    file = save_attack(result, tmp_path / "saved", {"concept": "van gogh"})
    refused("holds a saved concept-inversion, not a p4d", "p4d")
    note = json.loads(file.read_text())
    for changes, sentence in (
        ({"version": 2}, "has format 2, newer than the 1"),
        ({"attack": "telepathy"}, "'telepathy' that this version does not know"),
        ({"details": []}, "lacks parts"),
        ({"prompts": [1, 2, 3, 4]}, "lacks parts"),
        ({"tensors": ["other"]}, "attack.safetensors is of another one"),
        ({"interval": ["a", 0]}, "lacks parts"),
        ({"budget": {"vektors": 1}}, "did you mean 'vectors'"),
        ({"about": {"concept": "tench"}}, "is after 'tench', and the patch erases 'Van Gogh'"),
    ):
        file.write_text(json.dumps(note | changes))
        refused(sentence)
    file.write_text("{")
    refused("attack.json is not readable")
    file.write_text(json.dumps(note))
    tensors = tmp_path / "saved" / "attack.safetensors"
    assert load_file(tensors)["vectors"].shape == (2, base.token_width)
    tensors.write_bytes(tensors.read_bytes()[:40])
    refused("attack.safetensors")
    save_attack(dataclasses.replace(result, tensors={"vectors": torch.zeros(1, 5)}), tmp_path / "saved")
    refused("do not fit base")
