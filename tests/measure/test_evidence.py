"""Evidence: what it refuses, that it survives a round trip, and that its schema is current."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from recare_patch.core import EvidenceError, RecarePatchError, UnknownNameError, file_sha256
from recare_patch.measure.evidence import (
    AttackFigure,
    Check,
    CheckPoint,
    Evidence,
    Figure,
    Part,
    schema_text,
    show_interval,
    show_value,
)
from recare_patch.measure.meters import wilson_interval
from recare_patch.patch import EVIDENCE_NAME

SCHEMA = Path(__file__).parents[2] / "docs" / "evidence.schema.json"


def wilson(hits: int, pictures: int) -> tuple[float, float]:
    """As evidence has it: six digits."""
    low, high = wilson_interval(hits, pictures)
    return round(low, 6), round(high, 6)


def make_figure(**changes: Any) -> Figure:
    fields: dict[str, Any] = {
        "name": "concept, plain prompts",
        "group": "erased",
        "metric": "concept rate",
        "detector": "atelier-judge",
        "base": 0.9,
        "patched": 0.02,
        "base_interval": wilson(180, 200),
        "interval": wilson(4, 200),
        "pictures": 200,
        "better": "lower",
        "unit": "rate",
        "by": (Part(label="a painting by Van Gogh", base=0.9, patched=0.02, pictures=200),),
    }
    return Figure(**(fields | changes))


def make_evidence(**changes: Any) -> Evidence:
    fields: dict[str, Any] = {
        "patch_sha256": "a" * 64,
        "base": "atelier",
        "base_denoiser_sha256": "b" * 64,
        "concept": "Van Gogh",
        "kind": "style",
        "method": "recare",
        "suite": {"name": "van-gogh-atelier", "guidance_scale": 5.0, "plain": ["a painting by Van Gogh"]},
        "options": {"pictures": 200},
        "created": "2026-01-31",
        "versions": {"recare-patch": "0.1.0"},
        "command": "recare-patch evaluate --patch van-gogh-patch",
        "figures": (
            make_figure(),
            make_figure(
                name="CARE score, stars", group="care", metric="CARE score", better="higher",
                base=0.97, patched=0.95, base_interval=wilson(194, 200), interval=wilson(190, 200),
                by=(Part(label="stars", base=0.97, patched=0.95, pictures=200),),
            ),
            make_figure(
                name="KID to the base", group="kept", metric="KID", detector=None, base=None, by=(),
                base_interval=None, interval=None, patched=0.0031, unit="",
            ),
        ),
        "attacks": (
            AttackFigure(
                attack="concept-inversion", preset="small", successes=3, trials=40, interval=wilson(3, 40),
                without=1, base=0.9, evaluations=12_000, seconds=80.5, budget={"steps": 400},
            ),
        ),
        "checks": (
            Check(
                name="scale", title="At other scales", x_label="scale", y_label="rate",
                points=(
                    CheckPoint(x=0.25, values={"Van Gogh": 0.6, "stars": 0.95}),
                    CheckPoint(x=1, values={"Van Gogh": 0.02, "stars": None},
                               intervals={"Van Gogh": wilson(4, 200)}, pictures=200),
                ),
            ),
            Check(
                name="spelling", title="In other spellings",
                points=(CheckPoint(x="VAN GOGH", values={"Van Gogh": 0.01}),),
            ),
        ),
        "cost": {"seconds": 412.5, "pictures": 2400},
    }  # fmt: skip
    return Evidence(**(fields | changes))


def test_it_survives_a_round_trip(tmp_path: Path) -> None:
    made = make_evidence()
    file = made.save(tmp_path)
    assert file.name == EVIDENCE_NAME
    assert Evidence.load(tmp_path) == Evidence.load(file) == made
    assert Evidence.load(file).to_json() == made.to_json() == file.read_text(encoding="utf-8")
    assert isinstance(made.checks[0].points[1].x, float)
    assert made.checks[1].points[0].x == "VAN GOGH"
    assert made.checks[0].series == ("Van Gogh", "stars")
    # A text that looks like a number stays text.
    made = make_evidence(checks=(Check(name="c", title="c", points=(CheckPoint(x="1", values={"a": 1}),)),))
    assert Evidence.from_json(made.to_json()).checks[0].points[0].x == "1"


def test_the_published_schema_is_current() -> None:
    assert SCHEMA.read_text(encoding="utf-8") == schema_text(), (
        "run: python -m recare_patch.measure.evidence > docs/evidence.schema.json"
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"patched": 1.2}, "rate, 0 to 1"),
        ({"base": -0.1}, "rate, 0 to 1"),
        ({"interval": (0.5, 0.1)}, "low to high"),
        ({"patched": 0.5}, "outside of its own interval"),
        ({"group": "eraced"}, "group"),
        ({"pictures": -1}, "pictures must be at least 0"),
        ({"pictures": 1.5}, "pictures must be a whole number"),
        ({"patched": math.nan}, "patched must be a finite number"),
        ({"better": "more"}, "better"),
        ({"peatched": 1}, "did you mean 'patched'"),
        ({"name": ""}, "name"),
    ],
)
def test_wrong_figures_are_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(EvidenceError, match=words):
        make_figure(**change)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"patch_sha256": "xyz"}, "patch_sha256"),
        ({"kind": "music"}, "kind"),
        ({"created": "yesterday"}, "created: a date is written like"),
        ({"figures": (make_figure(), make_figure())}, "there twice"),
        ({"cost": {"seconds": math.inf}}, "cost holds a number that is not finite"),
        ({"suite": {"a": [{"b": math.nan}]}}, "suite holds"),
        ({"attacks": ({"attack": "p4d", "successes": 3, "trials": 4, "interval": [0, 1], "without": 0,
                       "budget": {"steps": math.inf}},)}, "budget holds"),
        ({"suit": {}}, "did you mean 'suite'"),
        ({"attacks": ({"attack": "p4d", "successes": 3, "trials": 2, "interval": [0, 1], "without": 0},)},
         "at most the 2 trials"),
    ],
)  # fmt: skip
def test_wrong_evidence_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(EvidenceError, match=words):
        make_evidence(**change)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "there is no evidence"),
        (b"\xff\xfe\x00", "not UTF-8"),
        (b"", "not readable as JSON"),
        (b"[1]", "not a mapping"),
        (b"[" * 100_000, "not readable as JSON"),
        (b'{"version": 2}', "newer than the 1"),
        (b"{}", "patch_sha256 is missing"),
    ],
)
def test_wrong_files_are_refused(tmp_path: Path, content: bytes | None, words: str) -> None:
    if content is not None:
        (tmp_path / EVIDENCE_NAME).write_bytes(content)
    with pytest.raises(EvidenceError, match=words):
        Evidence.load(tmp_path)


def test_every_fault_is_told_at_once() -> None:
    found = json.loads(make_evidence().to_json())
    found["figures"][0]["pictures"] = -1
    found["attacks"][0]["trials"] = 0
    with pytest.raises(EvidenceError) as caught:
        Evidence.from_json(json.dumps(found), "e.json")
    for told in ("e.json", "figures.0.pictures", "attacks.0.trials"):
        assert told in str(caught.value)


def test_evidence_of_another_patch(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"weights")
    mine = make_evidence(patch_sha256=file_sha256(file))
    mine.check_patch(file_sha256(file))
    file.write_bytes(b"weighty")
    with pytest.raises(EvidenceError, match=r"belongs to another patch.*my-patch"):
        mine.check_patch(file_sha256(file), "my-patch")
    with pytest.raises(RecarePatchError, match="cannot read"):
        file_sha256(tmp_path)


def test_figures_are_found_by_name() -> None:
    made = make_evidence()
    assert made.figure("care SCORE, stars").patched == 0.95
    assert made.check_names(["care SCORE, stars", "CARE score, stars"]) == ("CARE score, stars",)
    groups = [one.name for one in made.in_group("erased", "kept")]
    assert groups == ["concept, plain prompts", "KID to the base"]
    for look in (made.figure, lambda name: made.check_names([name])):
        with pytest.raises(UnknownNameError, match="did you mean 'CARE score, stars'"):
            look("CARE score, star")


def test_values_are_shown_as_people_read_them() -> None:
    shown = [show_value(value, unit) for value, unit in ((0.025, "rate"), (0.00314159, ""), (7, "s"), (None, ""))]
    assert shown == ["2.5 %", "0.003142", "7 s", "–"]
    assert show_interval((0.005, 0.05), "rate") == "0.5–5.0 %" and show_interval((1, 2), "") == "1 to 2"
    assert show_interval(None, "rate") == ""
