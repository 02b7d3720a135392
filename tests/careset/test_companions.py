"""Names, companions and the rest, as CLIP sees words and as the base confirms them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.care_sets import KINDS, WORLDS, judge
from benchmarks.erasure import NAMES
from recare_patch.careset import OTHER_PROMPTS, OTHER_STEPS, OTHERS, CareSet, Clip, build_care_set, concept_feature
from recare_patch.careset.companions import ENOUGH, KIND_OF, LEADS_ELSEWHERE, NO_THING, BaseReading, judge_words
from recare_patch.core import CareSetError
from recare_patch.models import load_base, scheduled
from recare_patch.recipe import CareSetOptions, Concept
from tests.careset.stand_ins import Told, WordClip

PLAIN = [
    "house",
    "tree",
    "car",
    "chair",
    "table",
    "book",
    "door",
    "wall",
    "road",
    "bridge",
    "garden",
    "window",
    "paper",
    "stone",
    "cloud",
    "flower",
]
GROUPS = [["tench", "carp"], ["water"], ["river"], ["person"], ["boat"], ["castle"], ["london"], ["gogh"]]
LEADS = {"water": 4.0, "river": 2.0, "person": 3.0, "carp": 6.0, "london": 5.0}
"""How far words lead towards a tench; boats and castles do not."""


def tench(kind: str = "object", *aliases: str, text: str = "tench") -> Concept:
    return Concept(text=text, kind=kind, aliases=aliases)  # type: ignore[arg-type]


def drawn(count: int = 24) -> list[list[str]]:
    """Pictures of a tench: most with a companion, all with a castle and in London, as far as CLIP sees."""
    always = ["tench", "carp", "castle", "london", "boat"]
    return [[*always, *(["water", "person"] if k % 4 else []), *(["river"] if k % 3 else [])] for k in range(count)]


def others(count: int = 16) -> list[list[str]]:
    return [[PLAIN[k % len(PLAIN)], PLAIN[(3 * k + 1) % len(PLAIN)]] for k in range(count)]


@pytest.fixture(scope="module")
def clip() -> Any:
    return WordClip(*GROUPS, *([word] for word in PLAIN), filler=0, spread=1.0)


def judged(clip: Any, concept: Concept, reading: Any, keep: int | None = None, images: Any = None) -> dict[str, Any]:
    """Word → its token, in order; the notes under ""."""
    seen, elsewhere = clip.image_features(images or drawn()), clip.image_features(others())
    u = concept_feature(concept, clip, seen)
    tokens, notes = judge_words(concept, clip, seen, elsewhere, u, reading=reading, seed=3, keep=keep)
    return {**{token.text: token for token in tokens}, "": notes}


def kept(found: dict[str, Any]) -> list[str]:
    return [word for word, token in found.items() if word and token.kept]


def test_the_base_tells_names_companions_and_the_rest(clip: Any) -> None:
    reading = Told(LEADS, {"carp": 0.8})
    found = judged(clip, tench(), reading)
    assert set(kept(found)) == {"water", "person", "river"} and not found[""]
    reasons = {word: token.reason for word, token in found.items() if word}
    assert reasons["carp"] == "names the concept"
    assert reasons["castle"] == reasons["boat"] == LEADS_ELSEWHERE
    assert reasons["london"] == NO_THING
    assert all((token.reason == "kept") == token.kept for word, token in found.items() if word)
    # Chance is told by plain words that CLIP does not see there.
    assert 3 <= len(set(reading.references)) == len(reading.references)
    assert set(reading.references) <= {*PLAIN, "gogh"} and "london" not in reading.asked


def test_a_word_that_comes_near_is_held_without_being_called_a_companion(clip: Any) -> None:
    seen, elsewhere = clip.image_features(drawn()), clip.image_features(others())
    u = concept_feature(tench(), clip, seen)

    def verdicts(lead: float) -> CareSet:
        tokens, _ = judge_words(
            tench(), clip, seen, elsewhere, u, reading=Told({**LEADS, "river": lead}, {"carp": 0.8}), seed=3
        )
        return CareSet(concept=tench(), tokens=tuple(tokens))

    leads = [k / 20 for k in range(41)]
    doubtful = [lead for lead in leads if "river" in verdicts(lead).doubtful]
    sure = [lead for lead in leads if "river" in verdicts(lead).words]
    assert doubtful and sure and max(doubtful) < min(sure)
    assert min(doubtful) == pytest.approx(min(sure) / 2, abs=0.06)
    assert not {"boat", "castle", "london"} & {*verdicts(2.0).doubtful, *verdicts(2.0).words}


@pytest.mark.parametrize(("share", "name"), [(0.5, True), (0.49, False)])
def test_a_word_that_says_half_of_what_the_name_says_is_a_name(clip: Any, share: float, name: bool) -> None:
    found = judged(clip, tench(), Told(LEADS, {"carp": share}))
    assert (found["carp"].reason == "names the concept") is name
    assert ("carp" in kept(found)) is not name


def test_an_alias_is_never_guarded(clip: Any) -> None:
    given = tench("object", "carp", "Water")
    for reading in (Told(LEADS, {}), None):
        found = judged(clip, given, reading)
        assert found["carp"].reason == found["water"].reason == "names the concept"
        assert kept(found) and not {"carp", "water"} & set(kept(found))
    published = build_care_set(given, drawn(), clip, CareSetOptions(source="clip"))
    assert not {"carp", "water"} & set(published.words)


def test_no_more_are_kept_than_asked_for(clip: Any) -> None:
    found = judged(clip, tench(), Told(LEADS, {"carp": 0.8}), keep=1)
    (first,) = kept(found)
    rest = {"water", "person", "river"} - {first}
    assert {found[word].reason for word in rest} == {ENOUGH}
    assert kept(judged(clip, tench("identity"), Told(LEADS, {}), keep=2))[0] == "person"
    assert len(kept(judged(clip, tench("identity"), Told(LEADS, {}), keep=2))) == 2


@pytest.mark.parametrize("kind", ["identity", "nsfw"])
def test_a_person_stays_whoever_it_is(clip: Any, kind: str) -> None:
    found = judged(clip, tench(kind), Told({"water": 4.0}, {"person": 0.9}))
    assert next(iter(found)) == "person" and found["person"].reason == KIND_OF
    alone = judged(WordClip(["tench"], ["water"], ["house"], filler=0), tench(kind), None)
    assert "person" in kept(alone)
    # Where "person" is a name of the concept itself, nothing guards it.
    for concept in (tench(kind, "person"), tench(kind, text="person")):
        assert "person" not in kept(judged(clip, concept, Told(LEADS, {})))
        assert "person" not in kept(judged(clip, concept, None))


def test_where_nothing_is_confirmed_the_nearest_two_are_taken(clip: Any) -> None:
    found = judged(clip, tench(), Told({"water": 0.1, "person": 0.2}, {"carp": 0.8}))
    assert set(kept(found)) == {"water", "person"}
    assert any("no word was confirmed" in note for note in found[""])


def test_without_a_base_clip_decides_alone() -> None:
    clip = WordClip(*GROUPS, *([word] for word in PLAIN), filler=0)

    class Bare:
        """What CLIPs are asked for, and no more."""

        id = "bare"
        vocabulary, image_features = staticmethod(clip.vocabulary), staticmethod(clip.image_features)
        text_features = staticmethod(lambda texts, **_: clip.text_features(texts))

    bare: Any = Bare()
    for elsewhere in (others(), []):
        found = build_care_set(tench(), drawn(), bare, others=elsewhere)
        assert "water" in found.words and not {"tench", "gogh", "london"} & set(found.words)
        # Plain words that stand in for pictures speak of a person. One standard error lets a word pass now and then.
        assert not elsewhere or ("person" in found.words and len(set(PLAIN) & set(found.words)) <= 1)
        assert (found.clip, found.images, found.settings.source) == ("bare", 24, "base")
        assert found == build_care_set(tench(), drawn(), bare, others=elsewhere)


def test_few_words_and_few_pictures(clip: Any) -> None:
    tiny: Any = WordClip(["tench"], ["water"], ["house"], filler=0)
    reading = Told({"water": 4.0}, {})
    found = judged(tiny, tench(), reading, images=[["tench", "water"]] * 5)
    assert kept(found) == ["water"] and not reading.asked
    assert any("too few words to tell chance by" in note for note in found[""])
    # A single picture is enough, of the concept and of other things.
    for elsewhere in (others(1), others(), []):
        assert "water" in build_care_set(tench(), [["tench", "water"]], clip, others=elsewhere).words
    assert "water" in build_care_set(tench(), drawn(), clip, others=others(1)).words
    with pytest.raises(CareSetError, match="no whole word"):
        build_care_set(tench(), drawn(), WordClip(filler=0))
    with pytest.raises(CareSetError, match="needs target images"):
        build_care_set(tench(), [], clip)
    with pytest.raises(CareSetError, match="belongs to it"):
        build_care_set(tench(), [["tench"]], WordClip(["tench"], filler=0))


@dataclass
class _Embeds:
    value: Tensor

    def repeat(self, _: int) -> _Embeds:
        return self


class PlainBase:
    """A stand-in for a base that predicts of each prompt what it is said to."""

    num_train_timesteps, device = 1000, torch.device("cpu")

    def __init__(self, says: dict[str, Tensor]) -> None:
        self.says, self.states = says, []

    def encode_prompts(self, prompts: list[str]) -> _Embeds:
        return _Embeds(self.says[prompts[0]])

    def add_noise(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        assert len(set(timesteps.tolist())) == len(timesteps) and timesteps.min() > 0 and timesteps.max() < 1000
        return clean + noise

    def denoise(self, states: Tensor, timesteps: Tensor, embeds: _Embeds) -> Tensor:
        self.states.append(states)
        return embeds.value.expand(len(states), -1)


@pytest.mark.parametrize("pictures", [1, 24])
def test_what_a_word_says_is_measured_against_the_name(pictures: int) -> None:
    plain, name, away = torch.zeros(3), torch.tensor([2.0, 0.0, 0.0]), torch.tensor([0.0, 1.0, 0.0])
    said = {"carp": name, "half": name / 2, "none": plain, "other": away, "near": name + away}
    noise = {f"word{k}": 0.1 * torch.tensor([(-1.0) ** k, 0.2 * k, 1.0]) for k in range(6)}
    texts = {"A photo": plain, "A photo of a tench": name}
    base: Any = PlainBase(texts | {f"A photo of {word}": value for word, value in (said | noise).items()})
    latents = torch.arange(pictures, dtype=torch.float32)[:, None]
    reading = BaseReading(base, latents, tench(), seed=1)
    shares = reading.shares(list(said))
    torch.testing.assert_close(shares, torch.tensor([1.0, 0.75, 0.0, -0.25, 0.75]))
    leads = dict(zip(said, reading.leads(list(said), list(noise)).tolist(), strict=True))
    assert leads["carp"] >= leads["half"] > leads["other"] and leads["near"] > leads["other"]
    # Always at the same states, spread over the pictures.
    assert len(base.states) == 2 + len(said) + len(said) + len(noise)
    assert all(torch.equal(states, base.states[0]) for states in base.states)
    again = BaseReading(base, latents, tench(), seed=1)
    torch.testing.assert_close(again.shares(["half"]), shares[1:2])


@pytest.fixture(scope="module")
def bundled() -> tuple[Any, Clip, list[Any]]:
    """The bundled base, its CLIP, and a few pictures of other things."""
    base = load_base("atelier", device="cpu")
    prompts = [OTHER_PROMPTS[k % len(OTHER_PROMPTS)] for k in range(OTHERS)]
    return base, Clip.load("atelier"), base.decode_latents(_sampled(base, prompts, OTHER_STEPS, 100))


def _sampled(base: Any, prompts: list[str], steps: int, seed: int) -> Tensor:
    with scheduled(base.pipeline, "dpm-solver++"):
        seeds = [seed + k for k in range(len(prompts))]
        latents: Tensor = base.sample_latents(base.encode_prompts(prompts), seeds, steps, 7.5, 8)
    return latents


@pytest.mark.parametrize("concept", KINDS)
def test_few_pictures_of_the_bundled_base_bring_one_wrong_word_at_most(bundled: Any, concept: str) -> None:
    base, clip, elsewhere = bundled
    erased = Concept(text=NAMES[concept], kind=KINDS[concept])  # type: ignore[arg-type]
    latents = _sampled(base, [erased.target_prompt] * 16, 6, 0)
    found: CareSet = build_care_set(
        erased, base.decode_latents(latents), clip, base=base, latents=latents, others=elsewhere
    )
    row = judge(WORLDS["atelier"], found, concept, 0, 0)
    # Words near the bar come and go with the pictures: `python -m benchmarks.care_sets --seeds 4` tells more.
    assert row.kept and len(row.wrong) <= 1 and row.recall > 0 and not found.notes
