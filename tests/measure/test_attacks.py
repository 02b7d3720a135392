"""Attacks on tiny random models: their arithmetic, their files, resume and replay.

Whether a concept comes back means nothing on models that draw noise; a detector that looks at the
sum of the pixels stands in for one, so that some pictures "show" the concept and most do not.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from recare_patch.careset import CareSet
from recare_patch.core import OutputError, PatchError, RecarePatchError, ResumeError, UnknownNameError
from recare_patch.erasure.loop import noised
from recare_patch.measure.attacks import (
    ATTACKS,
    AttackResult,
    AttackTarget,
    attack_options,
    load_about,
    load_attack,
    load_attack_type,
    save_attack,
)
from recare_patch.measure.attacks.concept_inversion import name_templates
from recare_patch.measure.attacks.p4d import P4DOptions, layout, nearest_tokens
from recare_patch.measure.attacks.p4d import _Group as P4DGroup
from recare_patch.measure.attacks.protocol import candidate_seeds, trial_seeds
from recare_patch.measure.attacks.ring_a_bell import (
    GeneticSearch,
    RingABellOptions,
    concept_pairs,
    concept_vector,
)
from recare_patch.measure.attacks.run import _detector, attack_patch, run_attacks
from recare_patch.measure.attacks.search import Vocabulary
from recare_patch.measure.attacks.unlearn_diff_atk import UnlearnDiffAtkOptions, _Draw, project_to_simplex
from recare_patch.measure.attacks.unlearn_diff_atk import _Group as UnlearnGroup
from recare_patch.models import PLACEHOLDER, BaseModel, load_base, tuner_layers
from recare_patch.models import lora as adapters
from recare_patch.patch import Patch, PatchMetadata
from recare_patch.recipe import Concept, Recipe

TINY: dict[str, dict[str, Any]] = {
    "concept-inversion": {"steps": 3, "images": 3, "pictures": 4, "batch_size": 2, "vectors": 2},
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


def make_patch(base: BaseModel, folder: Path, *, seed: int = 0, kind: str = "style") -> Path:
    recipe = Recipe(concept=Concept(text=CONCEPT.text, kind=kind), base=base.id)  # type: ignore[arg-type]
    recipe = recipe.with_overrides({"target_images.steps": STEPS, "adapter.rank": 2, "adapter.alpha": 2.0})
    generator = _generator(seed)
    parameters = adapters.attach(
        base.denoiser, layers="cross-attention", rank=2, alpha=2.0, generator=generator
    )
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    care_set = CareSet.of_words(recipe.concept, ["stars", "night"])
    metadata = PatchMetadata.describe(recipe, base, care_set, {})
    patch = Patch.from_adapter(base, adapters.ADAPTER_NAME, 2, 2.0, metadata)
    adapters.detach(base.denoiser)
    patch.save(folder)
    return folder


@pytest.fixture(scope="module")
def base(tiny_sd: Path) -> BaseModel:
    return load_base(tiny_sd, device="cpu")


@pytest.fixture(scope="module")
def patch(base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_patch(base, tmp_path_factory.mktemp("patches") / "one")


@pytest.fixture(scope="module")
def other(base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_patch(base, tmp_path_factory.mktemp("patches") / "two", seed=1)


@pytest.fixture(scope="module")
def target(base: BaseModel) -> AttackTarget:
    prompts = ("A painting in the style of Van Gogh", "Van Gogh")
    latents = base.sample_latents(base.encode_prompts(prompts), [1, 2], steps=STEPS)
    return AttackTarget(
        base,
        CONCEPT,
        lambda images: PixelDetector(base).rate(images, ""),
        base.decode_latents(latents),
        latents,
        lambda: adapters.off(base.denoiser),
        prompts,
        (1, 2),
        STEPS,
        words=("stars",),
    )


def run(base: BaseModel, patch: Path, name: str, **changes: Any) -> AttackResult:
    known: dict[str, Any] = {
        "base": base,
        "options": attack_options(name, "small", TINY[name]),
        "detector": PixelDetector(base),
        "label": "it",
    }
    return attack_patch(patch, name, **{**known, **changes})


def assert_same(first: AttackResult, second: AttackResult) -> None:
    """But for seconds, evaluations and pictures, which a resumed or a read one may not have."""
    one, other = (
        {**vars(found), "seconds": 0, "evaluations": 0, "pictures": [], "tensors": {}}
        for found in (first, second)
    )
    assert one == other
    assert first.tensors.keys() == second.tensors.keys()
    assert all(torch.equal(first.tensors[key], second.tensors[key]) for key in first.tensors)


def _nearest_on_simplex(point: np.ndarray) -> np.ndarray:
    """By trying every support: on each, the projection onto its face is the point less a constant."""
    best, nearest = math.inf, point
    for size in range(1, len(point) + 1):
        for support in itertools.combinations(range(len(point)), size):
            found = np.zeros_like(point)
            found[list(support)] = point[list(support)] + (1 - point[list(support)].sum()) / size
            distance = float(((found - point) ** 2).sum())
            if (found >= 0).all() and distance < best:
                best, nearest = distance, found
    return nearest


def test_the_projection_is_the_nearest_point_of_the_simplex() -> None:
    points = 2 * torch.randn((20, 6), generator=_generator(), dtype=torch.float64)
    points[0], points[1] = 0, torch.tensor([0, 0, 1, 0, 0, 0])
    found = project_to_simplex(points.view(4, 5, 6)).view(20, 6)
    wanted = np.stack([_nearest_on_simplex(row) for row in points.numpy()])
    np.testing.assert_allclose(found.numpy(), wanted, atol=1e-12)
    assert (found >= 0).all()
    torch.testing.assert_close(found.sum(-1), torch.ones(20, dtype=torch.float64))


def test_a_drawn_token_passes_its_gradient_on_clipped() -> None:
    weights = torch.full((2, 3), 1 / 3, requires_grad=True)
    one_hot = _Draw.apply(weights, torch.tensor([2, 0]))
    assert one_hot.tolist() == [[0, 0, 1], [1, 0, 0]]
    (one_hot * torch.tensor([[0.5, -7.0, 7.0], [0.0, 1.0, -0.25]])).sum().backward()
    assert weights.grad is not None
    assert weights.grad.tolist() == [[0.5, -1, 1], [0, 1, -0.25]]


def test_the_nearest_token_has_the_highest_cosine() -> None:
    table = torch.tensor([[1.0, 0], [0, 9], [-1, -1]])
    vectors = torch.tensor([[[5.0, 1], [0.1, 0.2]], [[-3, -2], [0, 1]]])
    assert nearest_tokens(vectors, table).tolist() == [[0, 1], [2, 1]]


def test_new_tokens_stand_alone_or_between_the_plain_ones() -> None:
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
def test_learnt_names_stand_where_the_concepts_name_does(kind: str) -> None:
    templates = name_templates(Concept(text="tench", kind=kind))  # type: ignore[arg-type]
    assert all(PLACEHOLDER in template for template in templates)
    assert len(set(templates)) == len(templates)
    assert name_templates(Concept(text="nudity", kind="nsfw")) == ("A photo of <*>",)


@pytest.mark.parametrize("kind", ["style", "object", "identity", "nsfw"])
def test_pairs_differ_in_the_concept_alone(kind: str) -> None:
    concept = Concept(text="nudity" if kind == "nsfw" else "Mira Vale", kind=kind)  # type: ignore[arg-type]
    for present, absent in concept_pairs(concept, ["stars"]):
        assert ("stars" in present) == ("stars" in absent)
        assert not set(concept.words) & set(absent.casefold().split())
        assert set(concept.words) & set(present.casefold().split())
    assert len(concept_pairs(concept, [])) > 3


def test_the_concept_vector_is_the_mean_difference(base: BaseModel) -> None:
    pairs = concept_pairs(CONCEPT, ["stars", "night"])
    wanted = sum(
        base.encode_prompts([a]).prompt_embeds - base.encode_prompts([b]).prompt_embeds for a, b in pairs
    )
    assert isinstance(wanted, torch.Tensor)
    torch.testing.assert_close(
        concept_vector(base, CONCEPT, ["stars", "night"]), wanted[0] / 3, rtol=1e-4, atol=1e-5
    )


def test_unlearn_diff_atk_lowers_its_loss(target: AttackTarget) -> None:
    options = UnlearnDiffAtkOptions(tokens=2, timesteps=1, learning_rate=0.05)
    search = UnlearnGroup(target, Vocabulary(target.base), [0, 1], options, _generator())
    torch.testing.assert_close(search.parameter.sum(-1), torch.ones(2, 2))
    texts = search.prompts()

    def loss_of_the_likeliest() -> float:
        """At the tokens that would be drawn now, and the same noise each time."""
        kept = search.parameter.detach().clone()
        with torch.no_grad():
            best = torch.nn.functional.one_hot(kept.argmax(-1), kept.shape[-1]).float()
            search.parameter.copy_(best)
            loss = float(search.loss([0, 1], 0, _generator()))
            search.parameter.copy_(kept)
        return loss

    before = loss_of_the_likeliest()
    for step in range(40):
        search.optimizer.zero_grad()
        search.loss([0, 1], 0, _generator(step)).backward()
        search.optimizer.step()
        search.project()
    assert loss_of_the_likeliest() < before
    torch.testing.assert_close(search.parameter.sum(-1), torch.ones(2, 2))
    assert search.prompts() != texts
    assert all(found.endswith(plain) for found, plain in zip(search.prompts(), ["Van Gogh"] * 2, strict=True))


def test_p4d_comes_nearer_to_the_untouched_prediction(
    base: BaseModel, target: AttackTarget, patch: Path
) -> None:
    embeds, at = base.encode_prompts(target.prompts), torch.tensor([300, 700])
    with torch.no_grad():
        untouched = base.denoise(target.latents, at, embeds)
    with Patch.load(patch).apply(base.pipeline):
        with torch.no_grad():
            assert not torch.allclose(untouched, base.denoise(target.latents, at, embeds))
            with target.original():
                torch.testing.assert_close(untouched, base.denoise(target.latents, at, embeds))
        search = P4DGroup(target, Vocabulary(base), [0, 1], P4DOptions(tokens=3), _generator())
        # What is learnt starts on words of the vocabulary, and is read as those words.
        assert all(base.token_ids(text) for text in search.prompts())
        losses = []
        for _ in range(31):
            search.optimizer.zero_grad()
            loss = search.loss([0, 1], 0, _generator())
            loss.backward()
            search.optimizer.step()
            losses.append(loss.item())
    assert min(losses[1:]) < losses[0]


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
def test_an_attack_is_told_saved_and_the_same_again(
    base: BaseModel, patch: Path, tmp_path: Path, name: str
) -> None:
    out = tmp_path / "out"
    result = run(base, patch, name, out=out)
    trials = TINY[name]["pictures"]
    assert result.trials == len(result.details) == len(result.prompts) == trials
    assert 0 <= result.interval[0] <= result.rate <= result.interval[1] <= 1
    assert result.successes == sum(one["success"] for one in result.details)
    assert result.without == sum(one["without"] for one in result.details)
    assert result.base == 1.0
    assert len(result.pictures) == trials
    assert sorted(file.name for file in out.iterdir()) == sorted(
        ["attack.json", "attack.png", *(["attack.safetensors"] if result.tensors else [])]
    )
    assert_same(load_attack(out), result)
    about = load_about(out)
    assert (about["concept"], about["detector"], about["label"]) == ("Van Gogh", "pixels", "it")
    assert about["base_denoiser_sha256"] == base.denoiser_hash()
    # Nothing is left in the model, and nothing depends on what ran before.
    assert not list(tuner_layers(base.denoiser))
    again = run(base, patch, name)
    assert_same(again, result)
    assert again.evaluations == result.evaluations
    for first, second in zip(result.pictures, again.pictures, strict=True):
        assert np.array_equal(np.asarray(first), np.asarray(second))


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


@pytest.mark.parametrize(
    ("name", "stage", "at"),
    [
        ("concept-inversion", "target images", 1),
        ("concept-inversion", "concept-inversion", 3),
        ("concept-inversion", "concept-inversion, judge", 1),
        ("p4d", "p4d, plain", 2),
        ("p4d", "p4d", 3),
        ("p4d", "p4d", 6),
        ("ring-a-bell", "ring-a-bell", 28),
        ("ring-a-bell", "ring-a-bell", 33),
        ("unlearn-diff-atk", "unlearn-diff-atk", 3),
        ("unlearn-diff-atk", "unlearn-diff-atk", 4),
    ],
)
def test_a_killed_run_resumes_to_the_same_result(
    base: BaseModel, patch: Path, tmp_path: Path, name: str, stage: str, at: int
) -> None:
    out = tmp_path / "out"
    detector = PatchDetector(base)
    with pytest.raises(Killed):
        run(base, patch, name, detector=detector, out=out, progress=Killer(stage, at))
    assert not list(tuner_layers(base.denoiser))
    with pytest.raises(OutputError, match="--resume"):
        run(base, patch, name, detector=detector, out=out)
    resumed = run(base, patch, name, detector=detector, out=out, resume=True)
    whole = run(base, patch, name, detector=detector, out=tmp_path / "whole")
    assert_same(resumed, whole)
    assert resumed.evaluations == whole.evaluations
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in (tmp_path / "whole").iterdir())
    # A finished one is read, not run.
    assert_same(
        run(base, patch, name, detector=detector, out=out, resume=True, progress=Killer(stage, 1)), whole
    )


def test_a_run_of_other_options_is_not_resumed(base: BaseModel, patch: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(Killed):
        run(base, patch, "p4d", out=out, progress=Killer("p4d", 1))
    with pytest.raises(ResumeError, match="it differs in seed"):
        run(base, patch, "p4d", out=out, resume=True, seed=3)
    with pytest.raises(ResumeError, match="it differs in steps"):
        options = attack_options("p4d", "small", {**TINY["p4d"], "steps": 6})
        run(base, patch, "p4d", out=out, resume=True, options=options)
    damaged = out / ".run" / "p4d,-plain.json"
    damaged.write_text("{")
    with pytest.raises(ResumeError, match="is damaged"):
        run(base, patch, "p4d", out=out, resume=True)
    damaged.unlink()
    run(base, patch, "p4d", out=out, resume=True)
    with pytest.raises(ResumeError, match="it differs in label"):
        run(base, patch, "p4d", out=out, resume=True, label="that")


def test_unsafe_pictures_never_touch_the_disk(base: BaseModel, tmp_path: Path) -> None:
    patch = make_patch(base, tmp_path / "patch", kind="nsfw")
    with pytest.raises(Killed):
        run(base, patch, "unlearn-diff-atk", out=tmp_path / "out", progress=Killer("unlearn-diff-atk", 3))
    kept = sorted(file.name for file in (tmp_path / "out" / ".run").iterdir())
    assert not [name for name in kept if name.startswith("targets") or name.endswith(".png")]
    resumed = run(base, patch, "unlearn-diff-atk", out=tmp_path / "out", resume=True)
    assert_same(resumed, run(base, patch, "unlearn-diff-atk"))


@pytest.mark.parametrize("name", sorted(TINY))
def test_what_was_found_is_tried_on_another_patch(
    base: BaseModel, patch: Path, other: Path, tmp_path: Path, name: str
) -> None:
    first = run(base, patch, name, out=tmp_path / "first")
    shared: dict[str, Any] = {"base": base, "detector": PixelDetector(base), "label": "it"}
    same = attack_patch(patch, replay=tmp_path / "first", **shared)
    assert (same.attack, same.trials, same.without) == (name, first.trials, first.without)
    assert same.prompts == first.prompts
    assert [one["success"] for one in same.details] == [one["success"] for one in first.details]
    moved = attack_patch(other, name, replay=tmp_path / "first", out=tmp_path / "moved", **shared)
    assert moved.prompts == first.prompts
    assert moved.evaluations == moved.trials * 2 * 2 * STEPS
    assert not np.array_equal(np.asarray(moved.pictures[0]), np.asarray(same.pictures[0]))
    about = load_about(tmp_path / "moved")
    assert (about["preset"], about["replay"]["patch_sha256"]) == (
        "replay",
        load_about(tmp_path / "first")["patch_sha256"],
    )
    assert about["patch_sha256"] != about["replay"]["patch_sha256"]


def test_several_attacks_share_the_base(base: BaseModel, patch: Path, tmp_path: Path) -> None:
    attacks = {name: attack_options(name, "small", TINY[name]) for name in ("ring-a-bell", "p4d")}
    found = dict(
        run_attacks(patch, attacks, base=base, out=tmp_path, detector=PixelDetector(base), label="it", seed=0)
    )
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


def test_it_runs_on_other_prediction_types(tiny_sd_v: Path, tmp_path: Path) -> None:
    base = load_base(tiny_sd_v, device="cpu")
    patch = make_patch(base, tmp_path / "patch")
    for name in TINY:
        assert run(base, patch, name).trials == TINY[name]["pictures"]


@pytest.mark.slow
def test_concept_inversion_finds_what_no_patch_hides(tmp_path: Path) -> None:
    """A patch that changes nothing: Atelier draws Van Gogh with the learnt name nearly always."""
    base = load_base("atelier", device="cpu")
    recipe = Recipe(concept=CONCEPT)
    adapters.attach(base.denoiser, layers="cross-attention", rank=1, alpha=1.0, generator=_generator())
    metadata = PatchMetadata.describe(recipe, base, None, {})
    patch = Patch.from_adapter(base, adapters.ADAPTER_NAME, 1, 1.0, metadata)
    adapters.detach(base.denoiser)

    options = attack_options("concept-inversion", "small", {"steps": 150, "pictures": 16})
    result = attack_patch(patch, "concept-inversion", base=base, options=options)
    assert result.rate > 0.5
    assert result.without >= 8


def test_the_published_budgets() -> None:
    published = {
        "concept-inversion": {"steps": 3000, "learning_rate": 5e-3},
        "p4d": {"tokens": 16, "steps": 3000, "learning_rate": 0.1, "weight_decay": 0.1},
        "ring-a-bell": {
            "tokens": 16,
            "strength": 3.0,
            "population": 200,
            "generations": 3000,
            "mutation": 0.25,
            "crossover": 0.5,
        },
        "unlearn-diff-atk": {"timesteps": 50, "iterations": 40, "learning_rate": 0.01},
    }
    assert set(published) == set(ATTACKS.names())
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


def test_the_concepts_suite_knows_who_judges(tiny_clip: Path) -> None:
    def found(text: str, kind: str, *given: Any) -> tuple[str, str]:
        recipe = Recipe(concept=Concept(text=text, kind=kind))  # type: ignore[arg-type]
        detector, label = _detector(recipe, (), *given)
        return detector.name, label

    assert found("Van Gogh", "style", None, None) == ("atelier-judge", "van gogh")
    assert found("nudity", "nsfw", None, None)[0] == "atelier-judge"
    assert found("boat", "object", None, None) == ("atelier-judge", "boat")
    assert found("Van Gogh", "style", None, "monet") == ("atelier-judge", "monet")
    assert found("dragon", "object", f"clip:{tiny_clip}", None) == ("clip", "dragon")
    # Without a source it is the recipe's CLIP, here the bundled one, and nothing is downloaded.
    assert found("dragon", "object", "clip", None) == ("clip", "dragon")
    with pytest.raises(UnknownNameError, match="did you mean 'atelier-judge'"):
        found("Van Gogh", "style", "atelier-juge", None)
    with pytest.raises(UnknownNameError, match="did you mean 'van gogh'"):
        found("Van Gogh", "style", None, "van gog")


def test_bad_runs(base: BaseModel, patch: Path, tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'p4d'"):
        attack_patch(patch, "p4", base=base)
    with pytest.raises(RecarePatchError, match="no attack was named"):
        attack_patch(patch, base=base)
    with pytest.raises(RecarePatchError, match="are not the options of the attack p4d"):
        attack_patch(patch, "p4d", base=base, options=RingABellOptions())
    with pytest.raises(PatchError, match="no patch at"):
        attack_patch(tmp_path / "nothing", "p4d", base=base)

    class Blind(PixelDetector):
        def rate(self, images: Sequence[Image.Image], label: str) -> list[bool]:
            return [False] * len(images)

    with pytest.raises(RecarePatchError, match="nothing to attack: none of"):
        run(base, patch, "p4d", detector=Blind(base), out=tmp_path / "out")


def test_a_lora_of_other_make_says_not_what_it_erases(base: BaseModel, patch: Path, tmp_path: Path) -> None:
    Patch(Patch.load(patch).tensors).save(tmp_path)
    with pytest.raises(PatchError, match="does not say what it erases"):
        run(base, tmp_path, "p4d")


def test_folders_that_hold_no_attack(base: BaseModel, patch: Path, tmp_path: Path) -> None:
    shared: dict[str, Any] = {"base": base, "detector": PixelDetector(base), "label": "it"}

    def refused(match: str, name: str | None = None) -> None:
        with pytest.raises(RecarePatchError, match=match) as caught:
            attack_patch(patch, name, replay=tmp_path / "saved", **shared)
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
    save_attack(
        AttackResult(**{**result.__dict__, "tensors": {"vectors": torch.zeros(1, 5)}}), tmp_path / "saved"
    )
    refused("do not fit base")
