"""``recare-patch verify``: its lines and its exit codes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from recare_patch.core.errors import PatchError
from recare_patch.measure import verify as verifying
from recare_patch.measure.verify import Finding, Verification
from tests.test_imports import heavy_after

Invoke = Callable[..., Result]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What ``verify`` was called with; its findings are those of ``answer`` in the first call."""
    made: list[dict[str, Any]] = []
    answers = {
        "good": (Finding("weights", True, "sound"), Finding("card", None, "claims no figures")),
        "bad": (Finding("weights", True, "sound"), Finding("hash", False, "is another")),
    }

    def verify(patch: Path, base: str | None, **options: Any) -> Verification:
        made.append({"patch": patch, "base": base, **options})
        if patch.name not in answers:
            raise PatchError(f"there is no patch at {patch}")
        return Verification(answers[patch.name])

    monkeypatch.setattr(verifying, "verify", verify)
    return made


def test_a_patch_that_holds(invoke: Invoke, calls: list[dict[str, Any]]) -> None:
    done = invoke("verify", "good")
    assert done.exit_code == 0
    assert done.stdout.splitlines() == [
        "ok    weights: sound",
        "-     card: claims no figures",
        "good holds: 1 checked.",
    ]
    call = calls[0]
    del call["progress"]
    assert call == {
        "patch": Path("good"),
        "base": None,
        "concept": None,
        "figures": ("all",),
        "pictures": None,
        "tolerance": verifying.TOLERANCE,
        "clip": None,
        "cache": None,
        "device": "auto",
    }


def test_a_patch_that_does_not(invoke: Invoke, calls: list[dict[str, Any]]) -> None:
    done = invoke("verify", "bad")
    assert done.exit_code == 1
    assert done.stdout.splitlines()[1:] == [
        "FAIL  hash: is another",
        "bad does not hold: 1 of 2 failed.",
    ]


def test_json(invoke: Invoke, calls: list[dict[str, Any]]) -> None:
    done = invoke("verify", "bad", "--json")
    assert done.exit_code == 1
    found = json.loads(done.stdout)
    assert found["holds"] is False
    assert found["findings"][1] == {"about": "hash", "holds": False, "told": "is another"}


def test_options_arrive(invoke: Invoke, calls: list[dict[str, Any]]) -> None:
    words = "--figures a --figures b --pictures 5 --tolerance 0.1 --cache c --clip C --base B --device cpu"
    assert invoke("verify", "good", *words.split()).exit_code == 0
    call = calls[0]
    assert (call["figures"], call["pictures"], call["tolerance"]) == (("a", "b"), 5, 0.1)
    assert (call["cache"], call["clip"], call["base"], call["device"]) == (Path("c"), "C", "B", "cpu")


@pytest.mark.parametrize(
    "words", [("nothing",), ("good", "--pictures", "0"), ("good", "--tolerance", "2"), (), ("good", "--no")]
)
def test_bad_input(invoke: Invoke, calls: list[dict[str, Any]], words: tuple[str, ...]) -> None:
    done = invoke("verify", *words)
    assert done.exit_code == 2
    assert "Error" in done.stderr


def test_help_imports_nothing_heavy() -> None:
    code = "from recare_patch.cli import cli\ncli(['verify', '--help'], standalone_mode=False)"
    assert heavy_after(code) == []
