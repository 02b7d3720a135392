"""What a run measures of itself: the two numbers by hand, how it steers by them, and where it ends."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from recare_patch.careset import OTHERS
from recare_patch.erasure import EraseResult, erase, evaluations, gauge, prepare
from recare_patch.erasure.gauge import (
    LOOK_EVERY,
    LOOKED_AT,
    PICTURE_STEPS,
    PICTURES,
    STATES,
    WORD_STATES,
    Gauge,
    Governor,
    Reading,
)
from recare_patch.models import BaseModel
from recare_patch.recipe import Recipe
from tests.erasure.making import STARS_FROM_VAN_GOGH, Killed, Killer, disturb, prepared

Small = Callable[..., Recipe]
Runs = Callable[..., EraseResult]
SHORT: dict[str, Any] = {"search.rounds": 0, "care_set.source": "clip"}


class Recorder:
    """What a base was asked and what it said; ``says`` takes the place of what it would say."""

    def __init__(self, base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[Tensor] = []
        self.said: list[Tensor] = []
        self.says: Iterator[Tensor] = iter(())
        denoise = base.denoise

        def record(latents: Tensor, timesteps: Tensor, embeds: Any) -> Tensor:
            found = next(self.says, None)
            self.asked.append(embeds.prompt_embeds)
            self.said.append(denoise(latents, timesteps, embeds) if found is None else found)
            return self.said[-1]

        monkeypatch.setattr(base, "denoise", record)


@pytest.fixture
def recorder(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> Recorder:
    return Recorder(base, monkeypatch)


def test_the_numbers_by_hand(base: BaseModel, method: Callable[..., Any], recorder: Recorder) -> None:
    one = method("recare", **SHORT)
    rows = WORD_STATES * len(one.context.companions)
    recorder.said.clear()
    before = base.counter.total
    measure = Gauge(one, 0)
    plain, named, kept, nothing, *words = recorder.said
    untouched = measure.look()
    assert untouched.gone == pytest.approx(0, abs=1e-5) and untouched.drift == pytest.approx(0, abs=1e-8)
    disturb(base)
    recorder.said.clear()
    found = measure.look()
    assert base.counter.total - before == 4 * STATES + 2 * 2 * STATES + 4 * rows
    now, moved, *after = recorder.said
    said, left = (named - plain).double(), (now - plain).double()
    halves = slice(None, STATES // 2), slice(STATES // 2, None)
    gone = [1 - float((left[half] * said[half]).sum() / said[half].square().sum()) for half in halves]
    assert found.gone == pytest.approx(min(gone), rel=1e-3) and found.gone != pytest.approx(0, abs=1e-3)
    drift = (moved - kept).double().square().sum() / (kept - nothing).double().square().sum()
    assert found.drift == pytest.approx(float(drift), rel=1e-3) and found.drift > 1e-3
    own = drifts(torch.cat(words)[:rows], torch.cat(words)[rows:], torch.cat(after))
    assert one.held_shares is not None
    assert float(one.held_shares.max()) == pytest.approx(0.25 + float(own.max() / own.mean()), rel=1e-3)
    # Always at the same states: other seeds have others.
    assert measure.look() == found != Gauge(one, 1).look()


def drifts(kept: Tensor, nothing: Tensor, after: Tensor) -> Tensor:
    """How far each guarded word has drifted beside what it says."""
    moved, said = ((one - kept).double().flatten(1).square().sum(1) for one in (after, nothing))
    said = said.view(-1, WORD_STATES).sum(1)
    return moved.view(-1, WORD_STATES).sum(1) / said.clamp(min=float(said.median()) / 2)


def test_guarded_words_are_held_as_often_as_they_drift(
    base: BaseModel, method: Callable[..., Any], recorder: Recorder
) -> None:
    one = method("recare", **SHORT)
    words, rows = one.context.companions, WORD_STATES * len(one.context.companions)
    recorder.said.clear()
    measure = Gauge(one, 0)
    kept, nothing = torch.cat(recorder.said[4:])[:rows], torch.cat(recorder.said[4:])[rows:]
    assert one.held_shares is None
    # The first word goes half of the way to nothing, the others stay.
    after = kept.clone()
    after[:WORD_STATES] = (kept + nothing)[:WORD_STATES] / 2
    recorder.says = iter([recorder.said[0], recorder.said[2], *after.split(STATES)])
    assert measure.look().drift == pytest.approx(0, abs=1e-8) and len(words) > 1
    shares = one.held_shares
    named = torch.tensor([words[0] in text for text in one.context.retained.prompts[: one.context.retained.guarded]])
    assert shares is not None and len(shares) == len(named) and named.any() and not named.all()
    assert bool((shares[named] == shares.max()).all()) and float(shares[~named].min()) < shares.max() / 4


def test_what_says_no_more_than_what_it_becomes_is_gone(method: Callable[..., Any], recorder: Recorder) -> None:
    one = method("recare", **SHORT)
    rows = WORD_STATES * len(one.context.companions)
    recorder.said.clear()
    measure = Gauge(one, 0)
    plain, named, kept, nothing, *words = recorder.said
    held = torch.cat(words)[:rows].split(STATES)
    recorder.says = iter([plain, nothing, *held, 2 * plain - named, kept, *held])
    assert measure.look() == Reading(pytest.approx(1, abs=1e-5), pytest.approx(1, rel=1e-4))
    assert measure.look() == Reading(pytest.approx(2, abs=1e-5), pytest.approx(0, abs=1e-8))
    # Half of the rows gone is not gone: the least counts.
    recorder.says = iter([torch.cat([plain[: STATES // 2], named[STATES // 2 :]]), kept, *held])
    assert measure.look().gone == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize(
    ("changes", "names", "becomes"),
    [
        ({"replace_with": "Monet"}, "A painting in the style of Van Gogh", "A painting in the style of Monet"),
        (STARS_FROM_VAN_GOGH, "A painting of stars in the style of Van Gogh", "A painting in the style of Van Gogh"),
    ],
)
def test_what_takes_its_place_is_no_trace_of_it(
    base: BaseModel, method: Callable[..., Any], recorder: Recorder, changes: Any, names: str, becomes: str
) -> None:
    one = method("esd", **changes)
    recorder.asked.clear()
    Gauge(one, 0)
    plain, named = recorder.asked[:2]
    for rows, prompt in ((named, names), (plain, becomes)):
        wanted = base.encode_prompts([prompt]).prompt_embeds
        torch.testing.assert_close(rows[: STATES // 2], wanted.expand(STATES // 2, -1, -1))


def steered(monkeypatch: pytest.MonkeyPatch, readings: list[tuple[float, float]], **options: Any) -> Governor:
    """A governor at bars of 0.5 and 0.1 whose gauges find what is told, in turn."""
    found = iter([Reading(*one) for one in readings])
    monkeypatch.setattr(gauge, "Gauge", lambda method, seed: SimpleNamespace(look=lambda: next(found)))
    methods: Any = [SimpleNamespace(retain_scale=1.0, held_shares=None) for _ in range(options.pop("concepts", 1))]
    return Governor(methods, 0, gone=0.5, drift=0.1, **options)


def looks(governor: Governor, count: int) -> list[float]:
    """The rate after each of so many looks."""
    found = []
    for _ in range(count):
        governor.look()
        found.append(governor.rate)
    return found


class TestSteering:
    def test_it_ends_on_small_steps(self, monkeypatch: pytest.MonkeyPatch) -> None:
        governor = steered(monkeypatch, [(0.2, 0.0), (0.6, 0.0), (0.6, 0.0), (0.6, 0.0)])
        assert looks(governor, 3) == [1.0, 0.5, 0.25] and not governor.over and governor.reached
        governor.look()
        assert governor.over and governor.told()["reached"]
        assert governor.told()["looks"] == [[0.2, 0.0], [0.6, 0.0], [0.6, 0.0], [0.6, 0.0]]

    def test_what_comes_back_and_steps_too_far(self, monkeypatch: pytest.MonkeyPatch) -> None:
        # Gone, back (the rate rises again); then 0.2 of it back between two looks, and a drift that jumps.
        governor = steered(monkeypatch, [(0.6, 0.0), (0.4, 0.0), (0.2, 0.0), (0.3, 0.0), (0.4, 0.3)])
        assert looks(governor, 5) == pytest.approx([0.5, 1.0, 0.7, 0.7, 0.49])

    def test_the_retained_weight_follows_the_drift(self, monkeypatch: pytest.MonkeyPatch) -> None:
        governor = steered(monkeypatch, [(0.1, 0.2)] * 6 + [(0.1, 0.1)] * 12)
        weights = []
        for _ in range(18):
            governor.look()
            weights.append(governor.methods[0].retain_scale)
        assert weights[:2] == [1.5, 2.25] and weights[5] == 8.0 == max(weights)
        assert weights[6] == pytest.approx(8 / 1.25) and weights[-1] == 1.0
        assert not governor.reached

    def test_gone_with_a_drift_is_not_the_end(self, monkeypatch: pytest.MonkeyPatch) -> None:
        governor = steered(monkeypatch, [(0.9, 0.2)] * 5, still_seen=pytest.fail)
        assert looks(governor, 5)[-1] == 0.125 and not governor.over and not governor.reached

    def test_beside_adversaries_it_steers_the_retained_weight_alone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        governor = steered(monkeypatch, [(0.9, 0.2)] + [(0.9, 0.0)] * 4, still_seen=pytest.fail, early=False)
        governor.look()
        assert governor.methods[0].retain_scale == 1.5
        assert looks(governor, 4) == [1.0] * 4 and not governor.over and governor.reached
        assert governor.methods[0].retain_scale == 1.0

    def test_the_bar_rises_while_pictures_show_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pictures = iter([0.25, 0.0])
        governor = steered(monkeypatch, [(0.6, 0.0)] * 3 + [(0.7, 0.0)] * 3, still_seen=lambda: next(pictures))
        assert looks(governor, 3) == [0.5, 0.25, 1.0]
        assert (governor.seen, governor.bars.gone, governor.over) == (0.25, 0.625, False)
        # As the numbers stand it would have been reached, but a picture has shown it.
        governor.look()
        assert governor.last.gone > governor.bars.gone and not governor.told()["reached"]
        looks(governor, 2)
        assert governor.over and governor.reached and governor.told()["bars"] == {"gone": 0.625, "drift": 0.1}

    def test_pictures_tell_whether_less_is_enough(self, monkeypatch: pytest.MonkeyPatch) -> None:
        standing = [(0.1, 0.0), (0.3, 0.0), (0.31, 0.0), (0.32, 0.0), (0.32, 0.0), (0.32, 0.0), (0.33, 0.0)]
        pictures = iter([0.0])
        governor = steered(monkeypatch, standing, still_seen=lambda: next(pictures))
        assert looks(governor, 5) == [1.0, 1.0, 1.0, 1.0, 0.5]
        # The bar is where the number stands, and nothing is reached as long as no picture was looked at.
        assert governor.bars.gone == governor.last.gone == 0.32 and not governor.reached
        looks(governor, 2)
        assert governor.over and governor.reached
        # Where nobody looks at pictures, the bar stays.
        blind = steered(monkeypatch, standing)
        assert looks(blind, 7) == [1.0] * 7 and blind.bars.gone == 0.5 and not blind.reached

    def test_what_stood_and_went_on_to_the_bar_is_reached(self, monkeypatch: pytest.MonkeyPatch) -> None:
        readings = [(gone, 0.0) for gone in (0.3, 0.31, 0.32, 0.32, 0.52)]
        governor = steered(monkeypatch, readings, still_seen=lambda: 1.0)
        looks(governor, 4)
        assert governor.bars.gone == 0.32 and not governor.reached
        governor.look()
        assert governor.seen is None and governor.reached

    def test_the_concept_that_has_gone_least_counts(self, monkeypatch: pytest.MonkeyPatch) -> None:
        governor = steered(monkeypatch, [(0.9, 0.0), (0.3, 0.05)], concepts=2)
        governor.look()
        assert governor.last == Reading(0.3, 0.05)
        assert steered(monkeypatch, []).told()["looks"] == []

    def test_it_goes_on_where_it_stopped(self, monkeypatch: pytest.MonkeyPatch) -> None:
        readings = [(0.6, 0.2), (0.6, 0.0), (0.6, 0.0), (0.3, 0.3)]
        inner: Any = SimpleNamespace(state=lambda: {"a": torch.ones(2)}, load_state=lambda state: given.update(state))
        given: dict[str, Tensor] = {}
        whole = steered(monkeypatch, readings, still_seen=lambda: 0.5, carried=inner)
        looks(whole, 4)
        again = steered(monkeypatch, [], still_seen=lambda: 0.5, carried=inner)
        again.load_state(whole.state())
        for one in ("rate", "over", "seen", "bars", "readings", "last", "reached"):
            assert getattr(again, one) == getattr(whole, one), one
        assert again.methods[0].retain_scale == whole.methods[0].retain_scale == 1.5
        assert set(given) == {"a"} and again.told() == whole.told()
        fresh = steered(monkeypatch, [])
        fresh.load_state(fresh.state())
        assert (fresh.seen, fresh.readings, fresh.rate) == (None, [], 1.0)


class TestRuns:
    # Bars that any step of a random model passes.
    EASY: dict[str, Any] = SHORT | {"erase.gone": 1e-9, "erase.drift": 10.0, "erase.retained_images": 0}

    def test_short_of_its_bars_it_says_so_and_saves(self, small: Small, run: Runs) -> None:
        result = run(small(**SHORT, **{"erase.steps": 11, "erase.gone": 10.0}))
        (warning,) = [one for one in result.warnings if "short of its bars" in one]
        assert "(bar 10)" in warning and "preview.png" in warning and "--steps" in warning
        told = json.loads((result.folder / "training.json").read_text())
        measured = told["measured"]
        assert warning in told["warnings"] and not measured["reached"]
        assert measured["bars"] == {"gone": 10.0, "drift": 0.15}
        assert measured["looks"][-1] == [measured["gone"], measured["drift"]] and len(measured["looks"]) == 2
        assert len(told["losses"]["erase"]) == 11
        assert result.patch.tensors and (result.folder / "pytorch_lora_weights.safetensors").exists()

    def test_it_ends_when_the_bars_are_reached(self, small: Small, run: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(prepare, "looker", lambda targets: None)
        recipe = small(**self.EASY, **{"erase.steps": 60})
        result = run(recipe)
        # Three looks: the rate falls twice.
        assert len(result.cost["losses"]["erase"]) == 3 * LOOK_EVERY
        assert result.cost["measured"]["reached"] and not any("bars" in one for one in result.warnings)
        counted = {stage: one["evaluations"] for stage, one in result.cost["stages"].items()}
        planned = evaluations(recipe)
        assert all(count <= planned[stage] for stage, count in counted.items() if count)
        assert counted["erase"] < planned["erase"]

    def test_on_a_schedule_nothing_is_measured(self, small: Small, run: Runs, tmp_path: Path) -> None:
        told = run(small(**SHORT, **{"erase.steps": 2, "erase.ends": "steps"})).cost
        assert "measured" not in told and len(told["losses"]["erase"]) == 2

    def test_a_steered_run_goes_on_to_the_same_bits(
        self, small: Small, run: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Killed after the pictures have shown the concept once: bar, rate and weight are not what they were."""
        monkeypatch.setattr(prepare, "looker", lambda targets: lambda: 0.5)
        recipe = small(**self.EASY, **{"erase.steps": 44})
        counting = Killer(float("inf"))
        whole = run(recipe, "whole", progress=counting)
        assert whole.cost["measured"]["bars"]["gone"] == 1.25e-9 and not whole.cost["measured"]["reached"]
        with pytest.raises(Killed):
            run(recipe, "killed", progress=Killer(counting.seen - 1))
        resumed = erase(recipe, tmp_path / "killed", device="cpu", preview=False, resume=True)
        assert all(torch.equal(one, resumed.patch.tensors[key]) for key, one in whole.patch.tensors.items())
        for key in ("losses", "measured", "denoiser_evaluations", "warnings"):
            assert resumed.cost[key] == whole.cost[key], key


class TestLooker:
    @pytest.fixture
    def target(self, base: BaseModel, small: Small, tmp_path: Path) -> prepare.Target:
        _, (target,) = prepared(small(**SHORT), base, tmp_path)
        return target

    def test_nobody_looks_where_clip_would_see_nothing(self, target: prepare.Target) -> None:
        target.seen_by_clip = False
        assert prepare.looker([target]) is None

    def test_it_draws_the_concept_and_counts(self, target: prepare.Target, monkeypatch: pytest.MonkeyPatch) -> None:
        target.seen_by_clip, base = True, target.run.base
        # With the name, and without it; in the last picture the name says nothing. Then what the model draws later.
        rows = [[1.0] * 12, [0.0] * 11 + [1.0], [0.6] * 3 + [0.4] * 8 + [2.0], [0.6] + [0.4] * 11]
        told = iter(torch.tensor(row) for row in rows)
        monkeypatch.setattr(prepare, "margins", lambda images, *asked: next(told))
        steps = min(PICTURE_STEPS, target.run.recipe.target_images.steps)
        before = base.counter.total
        look = prepare.looker([target])
        assert look is not None and len(target.run.others) == OTHERS
        booked = [target.run.ledger.stages[stage]["evaluations"] for stage in LOOKED_AT]
        assert booked == [PICTURES * steps * 2] * 2 and base.counter.total - before >= sum(booked)
        before = base.counter.total
        assert look() == 3 / PICTURES
        assert base.counter.total - before == PICTURES * steps * 2
        # One picture may be taken for what it is not.
        assert look() == 0

    def test_it_looks_where_the_name_stands_among_other_words(self, target: prepare.Target) -> None:
        concept = target.concept
        looked_at, unnamed = zip(*prepare._looked_at(target), strict=True)
        assert len(looked_at) == PICTURES and all(concept.text in one for one in looked_at)
        assert not [one for one in unnamed if concept.text in one]
        deep = [one for one in looked_at if " and " in one]
        assert len(set(deep)) >= PICTURES // 2
        assert {concept.text in one.split(" and ")[0] for one in deep} == {True, False}

    def test_a_picture_shows_it_beyond_the_middle(
        self, target: prepare.Target, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        margin = {"own": 0.3, "other": 0.1, "near": 0.21, "far": 0.19}
        monkeypatch.setattr(prepare, "margins", lambda images, *asked: torch.tensor([margin[one] for one in images]))
        images: Any = ["near", "far"]
        target.images, target.run.others = ["own", "own"], ["other"] * 3  # type: ignore[list-item]
        assert prepare.sees(target, images) == [True, False]
        # Without pictures to compare with, whatever is more like it than like anything plain.
        target.level, target.run.others = None, []
        assert prepare.sees(target, images) == [True, True]

    def test_a_plain_thing_is_not_its_own_rival(self) -> None:
        assert "A photo of a tree" in prepare.plain_rivals("red tree")
        assert not [one for one in prepare.plain_rivals("Tree") if one.endswith("tree")]

    def test_what_is_replaced_is_not_looked_for(self, base: BaseModel, small: Small, tmp_path: Path) -> None:
        _, (target,) = prepared(small(replace_with="Monet", **SHORT), base, tmp_path)
        target.seen_by_clip = True
        assert prepare.looker([target]) is None


def test_a_search_steps_by_a_quarter(small: Small, run: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    from recare_patch.erasure import stages

    rates: dict[str, float] = {}
    fit = stages.fit

    def keep(parameters: Any, loss_at: Any, loop: Any, **options: Any) -> Any:
        rates[loop.stage] = loop.learning_rate
        return fit(parameters, loss_at, loop, **options)

    monkeypatch.setattr(stages, "fit", keep)
    short = {"erase.steps": 1, "search.erase_steps": 1, "search.inversion_steps": 1, "care_set.source": "clip"}
    run(small(**short, **{"erase.learning_rate": 4e-3}))
    assert (rates["search 1 erase"], rates["erase"]) == (1e-3, 4e-3)
    run(small(**short, **{"search.erase_learning_rate": 5e-4}), "q")
    assert (rates["search 1 erase"], rates["erase"]) == (5e-4, 2e-3)
