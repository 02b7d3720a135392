"""Verification: a patch that was altered, or that claims more than was measured, does not pass."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from recare_patch.core import BaseModelError, EvidenceError, PatchError, UnknownNameError, file_sha256
from recare_patch.erasure.run import erase
from recare_patch.measure import claims, wilson_interval
from recare_patch.measure import verify as verifying
from recare_patch.measure.attacks import AttackResult, save_attack
from recare_patch.measure.card import EVIDENCE_END, with_evidence
from recare_patch.measure.evidence import Check, CheckPoint, Evidence, Part
from recare_patch.measure.integrity import Findings, check_integrity
from recare_patch.measure.run import evaluate
from recare_patch.measure.suites import Suite, load_suite
from recare_patch.measure.verify import Plan, Verification, check_suite, compare, verify
from recare_patch.models import BaseModel
from recare_patch.patch import CARD_NAME, EVIDENCE_NAME, Patch
from recare_patch.recipe import WEIGHTS_NAME
from tests.erasure.making import small_recipe
from tests.measure import making
from tests.measure.test_evidence import make_evidence, make_figure
from tests.tiny import make_tiny_sd

SHOWN = claims.SHOWN
SUITE = Suite(**{**making.SUITE, "paraphrased": (), "implicit": (), "neighbours": (), "steps": 1})


@pytest.fixture(scope="module")
def erased(tiny_sd: Path, tiny_clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A patch as the package writes it, of two steps."""
    short = {"target_images.count": 2, "target_images.steps": 1, "erase.steps": 2, "erase.batch_size": 1}
    recipe = small_recipe(tiny_sd, tiny_clip, "esd", **short)
    folder = tmp_path_factory.mktemp("verify") / "patch"
    erase(recipe, folder, device="cpu")
    return folder


@pytest.fixture
def patch(erased: Path, tmp_path: Path) -> Path:
    """A copy of it with evidence and a card that tells it."""
    folder = tmp_path / "patch"
    shutil.copytree(erased, folder)
    metadata = Patch.load(folder).metadata
    assert metadata is not None
    evidence = make_evidence(
        suite=SUITE.model_dump(mode="json"),
        patch_sha256=file_sha256(folder / WEIGHTS_NAME),
        base=metadata.base,
        base_denoiser_sha256=metadata.base_denoiser_sha256,
        method="esd",
    )
    evidence.save(folder)
    rewrite_card(folder, lambda card: with_evidence(card, evidence))
    return folder


def rewrite_card(folder: Path, change: Callable[[str], str]) -> None:
    card = folder / CARD_NAME
    before = card.read_text(encoding="utf-8")
    card.write_text(change(before), encoding="utf-8")


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[Plan]:
    """What was asked to be measured again; nothing is, and the recorded evidence is given back."""
    asked: list[Plan] = []

    def measured(evidence: Evidence, patch: Patch, base: BaseModel, plan: Plan, how: Any) -> Evidence:
        asked.append(plan)
        return evidence

    monkeypatch.setattr(verifying, "measured_again", measured)
    return asked


def looked_at(folder: Path, base: Path | None = None, **options: Any) -> Verification:
    """A verification of the files, which measures nothing."""
    return verify(folder, base, figures=["none"], device="cpu", **options)


def failed(found: Findings) -> set[str]:
    return {one.about for one in found.failed}


def test_the_run_records_what_it_wrote(erased: Path) -> None:
    record = json.loads((erased / "training.json").read_text())
    assert record["patch_sha256"] == file_sha256(erased / WEIGHTS_NAME)


def test_a_sound_patch_holds(patch: Path, tiny_sd: Path, plans: list[Plan]) -> None:
    found = verify(patch, tiny_sd, device="cpu")
    assert found.holds, found.failed
    assert [one.about for one in found.findings if one.holds] == [
        "weights", "evidence", "counts", "hash", "header", "records", "kohya file", "card", "base", "layers",
        "figure 'concept, plain prompts'", "figure 'CARE score, stars'", "figure 'KID to the base'",
        "attack 'concept-inversion, small' drawn again", "check 'scale'", "check 'spelling'",
    ]  # fmt: skip
    assert plans[0].attacks
    assert plans[0].figures == ("concept, plain prompts", "CARE score, stars", "KID to the base")
    # The same from the weights file itself.
    assert verify(patch / WEIGHTS_NAME, tiny_sd, device="cpu").holds


def test_a_patch_without_evidence_holds_as_far_as_it_goes(erased: Path, tiny_sd: Path) -> None:
    found = verify(erased, tiny_sd, device="cpu")
    assert found.holds
    assert {one.about: one.told for one in found.findings if one.holds is None} == {
        "evidence": "there is no evidence.json; recare-patch evaluate makes it",
        "card": "claims no figures",
        "not looked at": "preview.png, the costs in training.json, the words in README.md",
    }


def test_some_figures_or_none(patch: Path, tiny_sd: Path, plans: list[Plan]) -> None:
    assert looked_at(patch, tiny_sd).holds and plans == []
    found = verify(patch, tiny_sd, figures=["care score, STARS"], device="cpu")
    assert found.holds
    assert "2 were not asked for" in found.findings[-1].told
    with pytest.raises(UnknownNameError, match="did you mean 'CARE score, stars'"):
        verify(patch, tiny_sd, figures=["CARE score, star"], device="cpu")


def test_any_altered_byte_of_the_weights_is_found(patch: Path, plans: list[Plan]) -> None:
    weights = patch / WEIGHTS_NAME
    sound = weights.read_bytes()
    header = 8 + int.from_bytes(sound[:8], "little")
    places = {*range(10), *range(10, header, 97), header - 1, *range(header, len(sound), 997), len(sound) - 1}
    for place in sorted(places):
        altered = bytearray(sound)
        altered[place] ^= 1 << (place % 8)
        weights.write_bytes(altered)
        assert "hash" in failed(check_integrity(patch)), place
    for other in (sound[:-1], sound + b"\0", sound[: header + 1], b""):
        weights.write_bytes(other)
        assert {"hash", "weights"} <= failed(check_integrity(patch))
    found = verify(patch, device="cpu")
    assert not found.holds and plans == []
    assert found.findings[-1].told == "not measured again, since the patch or its records do not hold"


def test_an_altered_hash_does_not_help(patch: Path) -> None:
    for name in ("training.json", EVIDENCE_NAME):
        sound = (patch / name).read_text()
        (patch / name).write_text(json.dumps(json.loads(sound) | {"patch_sha256": "0" * 64}))
        assert "hash" in failed(check_integrity(patch))
        for broken in ("{", "[]", "\0"):
            (patch / name).write_text(broken)
            assert not check_integrity(patch).holds
        (patch / name).write_text(sound)


def test_weights_without_any_record_do_not_hold(patch: Path) -> None:
    held = json.loads((patch / "training.json").read_text())
    del held["patch_sha256"]
    (patch / "training.json").write_text(json.dumps(held))
    (patch / EVIDENCE_NAME).unlink()
    assert failed(check_integrity(patch)) == {"hash", "card"}


def test_files_beside_the_weights(patch: Path) -> None:
    recipe = patch / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("seed: 0", "seed: 1"))
    assert failed(check_integrity(patch)) == {"records"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda card: card.replace("value: 0.02", "value: 0.01"), "claims 0.01 for 'concept, plain prompts'"),
        (lambda card: card.replace("name: CARE score, stars", "name: all"), "claims 0.95 for 'all'"),
        (lambda card: card.replace("value: 0.95", "value: a lot"), "claims a lot"),
        (lambda card: card.replace("| 2.0 % |", "| 0.0 % |"), "part on evidence"),
        (lambda card: card.replace("model-index:\n", "model-index: 1\nother:\n"), "model-index"),
        (lambda card: card.replace(EVIDENCE_END, ""), "marks"),
        (lambda card: card.replace("type: text-to-image\n", "type: other\n", 1), "model-index"),
    ],
)  # fmt: skip
def test_a_card_that_claims_other_figures(patch: Path, change: Callable[[str], str], words: str) -> None:
    before = (patch / CARD_NAME).read_text()
    rewrite_card(patch, change)
    assert (patch / CARD_NAME).read_text() != before
    found = check_integrity(patch)
    assert failed(found) == {"card"}
    assert words in found.failed[0].told


def test_a_card_without_its_evidence(patch: Path) -> None:
    (patch / EVIDENCE_NAME).unlink()
    assert failed(check_integrity(patch)) == {"card"}
    (patch / CARD_NAME).unlink()
    assert check_integrity(patch).holds


@pytest.fixture(scope="module")
def measured(erased: Path, tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The patch as ``evaluate`` leaves it."""
    folder = tmp_path_factory.mktemp("measured") / "patch"
    shutil.copytree(erased, folder)
    metrics = ("concept-rate", "care-score", "perceptual-change")
    evaluate(folder, base=tiny_sd, suite=SUITE, metrics=metrics, pictures=8, cache=False, card=True, device="cpu")
    return folder


def test_what_was_measured_is_measured_again(
    measured: Path, tiny_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What a random base draws shows nothing, and a figure of nothing does not hold.
    with monkeypatch.context() as as_it_is:
        as_it_is.setattr(claims, "SHOWN", SHOWN)
        empty = verify(measured, tiny_sd, figures=["concept, plain prompts"], device="cpu")
    assert "means nothing, since the base itself shows it in 0 of 8" in empty.failed[0].told
    found = verify(measured, tiny_sd, device="cpu")
    assert found.holds, found.failed
    recorded = Evidence.load(measured)
    assert found.measured is not None
    assert found.measured.figures == recorded.figures
    assert {one.about for one in found.findings if one.holds is None} == {"suite", "not looked at"}
    # Fewer pictures, and with a cache: figures without an interval cannot be held against others.
    fewer = verify(measured, tiny_sd, pictures=4, cache=tmp_path / "cache", device="cpu")
    assert fewer.holds, fewer.failed
    assert any((tmp_path / "cache").rglob("*.png"))


def test_a_card_and_evidence_that_lie_are_found_out(measured: Path, tiny_sd: Path, tmp_path: Path) -> None:
    folder = tmp_path / "patch"
    shutil.copytree(measured, folder)
    true = Evidence.load(folder)
    plain = true.figure("concept, plain prompts")
    rate = 0.0 if plain.patched > 0.5 else 1.0
    low, high = wilson_interval(round(8 * rate), 8)
    claimed = plain.model_copy(update={"patched": rate, "interval": (low, high), "by": ()})
    lying = true.model_copy(update={"figures": tuple(claimed if one is plain else one for one in true.figures)})
    lying.save(folder)
    rewrite_card(folder, lambda card: with_evidence(card, lying))
    found = verify(folder, tiny_sd, figures=[plain.name], device="cpu")
    assert failed(found) == {f"figure '{plain.name}'"}
    # Options that were altered into nonsense are told of in a sentence.
    true.model_copy(update={"options": {**true.options, "pictures": "many"}}).save(folder)
    (folder / CARD_NAME).unlink()
    with pytest.raises(EvidenceError, match="options"):
        verify(folder, tiny_sd, device="cpu")


def test_a_suite_that_was_altered() -> None:
    true = make_evidence()
    bundled = load_suite("van-gogh-atelier").model_dump(mode="json")
    for suite, holds, words in (
        (bundled, True, "as bundled"),
        ({**bundled, "plain": ["a cat"], "first_seed": 1}, None, "with first_seed, plain of its own"),
        ({**bundled, "steps": 0}, False, "no sound suite"),
    ):
        found = check_suite(true.model_copy(update={"suite": suite}))
        assert found.holds is holds
        assert words in found.told


def test_saved_attacks(patch: Path, tiny_sd: Path) -> None:
    recorded = Evidence.load(patch)
    attack = recorded.attacks[0].model_copy(update={"folder": "attacks/one"})
    recorded.model_copy(update={"attacks": (attack,)}).save(patch)
    (patch / CARD_NAME).unlink()
    trial = {"prompt": "a", "attacked": "b", "seed": 1, "success": True, "without": False}

    def saved(successes: int, sha256: str) -> Verification:
        result = AttackResult(
            attack=attack.attack, successes=successes, trials=40, interval=(0.0, 1.0), without=1, base=None,
            evaluations=1, seconds=1.0, budget={}, details=[trial] * 40, tensors={}, prompts=["b"] * 40,
            pictures=[],
        )  # fmt: skip
        save_attack(result, patch / "attacks" / "one", {"patch_sha256": sha256})
        return looked_at(patch, tiny_sd)

    assert saved(3, recorded.patch_sha256).holds
    for wrong in (saved(4, recorded.patch_sha256), saved(3, "0" * 64)):
        assert failed(wrong) == {"attack 'concept-inversion, small'"}
    (patch / "attacks" / "one" / "attack.json").write_text("{}")
    assert not looked_at(patch, tiny_sd).holds


def test_another_base_or_none(patch: Path, tmp_path: Path, plans: list[Plan]) -> None:
    found = verify(patch, make_tiny_sd(tmp_path / "other", seed=9), device="cpu")
    assert failed(found) == {"base"} and plans == []
    assert "other weights" in found.failed[0].told
    for missing in (tmp_path / "nothing", tmp_path):
        with pytest.raises(PatchError, match="no patch"):
            verify(missing)
    with pytest.raises(BaseModelError):
        verify(patch, tmp_path / "no-base")


def _compare(recorded: dict[str, Any], measured: dict[str, Any]) -> bool | None:
    old, new = (make_evidence(figures=(make_figure(**one),), options={"pictures": 100}) for one in (recorded, measured))
    other = recorded.get("pictures") != measured.get("pictures")
    return compare(old, new, ["concept, plain prompts"], other_count=other)[0].holds


RATE = {"by": (), "pictures": 100}


@pytest.mark.parametrize(
    ("recorded", "measured", "holds"),
    [
        ({}, {}, True),
        # A little off, but each within the other's interval.
        ({**RATE}, {**RATE, "patched": 0.03, "interval": (0.01, 0.08)}, True),
        ({**RATE}, {**RATE, "patched": 0.2, "interval": (0.1, 0.3)}, False),
        # Better than recorded is not as recorded either.
        ({**RATE, "patched": 0.3, "interval": (0.2, 0.4)}, {**RATE, "interval": (0, 0.17)}, False),
        # A base that looks worse than it is makes a patch look better.
        ({**RATE, "base": 0.99, "base_interval": (0.95, 1)}, {**RATE}, False),
        # A wide interval proves nothing.
        ({**RATE, "interval": (0, 1)}, {**RATE, "patched": 0.5, "interval": (0.4, 0.6)}, False),
        ({**RATE}, {**RATE, "better": "higher"}, False),
        ({**RATE}, {**RATE, "detector": "clip"}, False),
        ({**RATE}, {**RATE, "base": None}, False),
        # Fewer pictures: only the new interval counts.
        ({**RATE}, {**RATE, "pictures": 10, "patched": 0.1, "interval": (0.0179, 0.404)}, True),
        ({**RATE}, {**RATE, "pictures": 10, "patched": 0.5, "interval": (0.237, 0.763)}, False),
        # Parts count as well.
        ({}, {"by": (Part(label="a painting by Van Gogh", base=0.9, patched=0.3, pictures=200),)}, False),
        ({}, {"by": (Part(label="a painting by Van Gogh", base=0.9, patched=0.02, pictures=20),)}, False),
        ({}, {"by": ()}, False),
    ],
)  # fmt: skip
def test_rates(recorded: dict[str, Any], measured: dict[str, Any], holds: bool) -> None:
    assert _compare(recorded, measured) is holds


@pytest.mark.parametrize(
    ("old", "new", "holds"),
    [(1.0, 1.05, True), (1.0, 1.06, False), (1.0, 0.94, False), (0.0, 0.00009, True), (0.0, 0.001, False)],
)
def test_figures_without_an_interval(old: float, new: float, holds: bool) -> None:
    plain = {"unit": "", "base": None, "base_interval": None, "interval": None, "by": (), "pictures": 100}
    assert _compare(plain | {"patched": old}, plain | {"patched": new}) is holds
    assert _compare(plain | {"patched": old}, plain | {"patched": new, "pictures": 3}) is None


def test_a_distance_with_an_interval_that_allows_everything() -> None:
    """An FID of .0001 between 0 and a thousand million, where 212 is measured."""
    distance = {"unit": "", "metric": "FID", "by": (), "pictures": 200, "base": 0.5}
    lie = distance | {"patched": 1e-4, "interval": (0, 1e9), "base_interval": (0, 1e9)}
    measured = distance | {"patched": 212.0, "interval": None, "base_interval": None}
    assert _compare(lie, measured) is False
    assert _compare(measured, measured) is True


def test_what_is_recorded_must_be_measured() -> None:
    assert compare(make_evidence(), make_evidence(figures=()), ["KID to the base"])[0].holds is False


def test_attacks_and_checks_are_compared_where_they_were_measured() -> None:
    old = make_evidence()
    left_out = compare(old, make_evidence(attacks=(), checks=()), [])
    assert [one.holds for one in left_out] == [None, None, None]
    stronger = old.attacks[0].model_copy(update={"successes": 20, "interval": (0.35, 0.65)})
    weaker_base = old.attacks[0].model_copy(update={"without": 30})
    for attack in (stronger, weaker_base):
        assert compare(old, make_evidence(attacks=(attack,)), [])[0].holds is False
    points = (CheckPoint(x=0.25, values={"Van Gogh": 0.1, "stars": 0.95}), *old.checks[0].points[1:])
    moved = Check(name="scale", title="At other scales", points=points)
    found = compare(old, make_evidence(checks=(moved, old.checks[1])), [])
    assert [one.holds for one in found] == [True, False, True]
    assert "Van Gogh at 0.25" in found[1].told
