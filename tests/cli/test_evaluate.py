"""``recare-patch evaluate``: its options, its lines and its refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from recare_patch.cli.evaluate import CHECKS, METRICS
from recare_patch.core.errors import EvaluationError
from recare_patch.measure import checks
from recare_patch.measure import run as evaluating
from recare_patch.measure.evidence import AttackFigure, Evidence, Figure
from tests.test_imports import heavy_after

Invoke = Callable[..., Result]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What ``evaluate`` was called with."""
    made: list[dict[str, Any]] = []

    def evaluate(patch: str, **options: Any) -> Evidence:
        made.append({"patch": patch, **options})
        if patch == "nowhere":
            raise EvaluationError("there is nothing to evaluate")
        figures = (
            Figure(
                name="concept, plain prompts",
                group="erased",
                metric="concept rate",
                base=0.98,
                patched=0.02,
                interval=(0.005, 0.05),
                pictures=200,
                better="lower",
                unit="rate",
            ),
            Figure(
                name="KID to the base, retained prompts",
                group="kept",
                metric="KID",
                patched=0.0123,
                pictures=200,
                better="lower",
            ),
        )
        attack = AttackFigure(attack="p4d", successes=1, trials=4, interval=(0.05, 0.7), without=0)
        return Evidence(
            patch_sha256="0" * 64,
            base="atelier",
            base_denoiser_sha256="1" * 64,
            concept="Van Gogh",
            kind="style",
            method="recare",
            created="2026-01-31",
            figures=figures,
            attacks=(attack,),
            cost={"pictures_drawn": 1200, "pictures_from_cache": 3, "seconds": 12.3},
        )

    monkeypatch.setattr(evaluating, "evaluate", evaluate)
    return made


def test_the_names_are_those_that_there_are() -> None:
    assert METRICS == evaluating.METRICS
    assert checks.CHECKS.names() == CHECKS
    assert checks.PICTURES == 24


def test_the_least_that_has_to_be_said(invoke: Invoke, calls: list[dict[str, Any]]) -> None:
    Path("mine").mkdir()
    done = invoke("evaluate", "--patch", "mine")
    assert done.exit_code == 0, done.output
    call = calls[0]
    assert call.pop("progress") is not None
    assert call == {
        "patch": "mine",
        "base": None,
        "suite": None,
        "concept": None,
        "metrics": None,
        "pictures": 200,
        "out": None,
        "cache": None,
        "detector": None,
        "label": None,
        "clip": None,
        "prompts_file": None,
        "attacks": None,
        "checks": (),
        "check_pictures": 24,
        "card": False,
        "precision": None,
        "batch_size": None,
        "seed": None,
        "device": "auto",
    }
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["figure", "base", "patched", "95", "%", "interval", "pictures"]
    assert lines[1].split()[3:] == ["98.0", "%", "2.0", "%", "0.5–5.0", "%", "200"]
    assert lines[3] == "p4d: 1 of 4 (5.0–70.0 %)"
    assert lines[4] == "Pictures: 1,200 drawn, 3 from the cache, 12 s"
    assert lines[5:] == [f"Evidence: {Path('mine/evidence.json')}", f"Report: {Path('mine/report.html')}"]


def test_everything_that_can_be_said(invoke: Invoke, calls: list[dict[str, Any]]) -> None:
    words = (
        "--patch p --base b --suite s --metric kid --metric fid --pictures 9 --out o --cache c --prompts f"
    )
    words += " --attacks a --check scales --check-pictures 7 --card --detector clip:x --label l --clip k"
    words += " --seed 3 --precision bf16 --batch-size 2"
    done = invoke("evaluate", *words.split(), "--device", "cpu")
    assert done.exit_code == 0, done.output
    call = calls[0]
    assert (call["metrics"], call["pictures"], call["attacks"]) == (("kid", "fid"), 9, (Path("a"),))
    assert (call["checks"], call["check_pictures"]) == (("scales",), 7)
    assert (call["out"], call["cache"], call["prompts_file"]) == (Path("o"), Path("c"), Path("f"))
    assert (call["detector"], call["seed"], call["precision"], call["card"]) == ("clip:x", 3, "bf16", True)
    assert f"Evidence: {Path('o/evidence.json')}" in done.stdout and "card" in done.stdout


def test_no_cache_is_said_by_false(invoke: Invoke, calls: list[dict[str, Any]]) -> None:
    assert invoke("evaluate", "--patch", "p", "--no-cache").exit_code == 0
    assert calls[0]["cache"] is False


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--patch", "p", "--metric", "fidd"], "unknown metric 'fidd': allowed are"),
        (["--patch", "p", "--metric", "fidd"], "did you mean 'fid'?"),
        (["--patch", "p", "--check", "scale"], "did you mean 'scales'?"),
        (["--patch", "p", "--precision", "fp8"], "unknown precision 'fp8'"),
        (["--patch", "p", "--no-cache", "--cache", "c"], "--no-cache and --cache exclude each other"),
        (["--patch", "nowhere"], "Error: there is nothing to evaluate"),
        (["--patch", "p", "--pictures", "0"], "0 is not in the range"),
        ([], "Missing option '--patch'"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(
    invoke: Invoke, calls: list[dict[str, Any]], words: list[str], told: str
) -> None:
    done = invoke("evaluate", *words)
    assert done.exit_code == 2 and told in done.stderr
    assert "Traceback" not in done.output


def test_of_several_processes_one_speaks(
    invoke: Invoke, calls: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluating, "is_first_process", lambda: False)
    done = invoke("evaluate", "--patch", "p")
    assert done.exit_code == 0 and not done.output and calls[0]["progress"] is None


def test_help_and_misspelt_names_come_without_torch() -> None:
    code = "from recare_patch.cli import cli\ncli(['evaluate', '--help'], standalone_mode=False)"
    assert heavy_after(code) == []
    code = (
        "from recare_patch.cli import cli\n"
        "try:\n    cli(['evaluate', '--patch', 'p', '--metric', 'kidd'], standalone_mode=False)\n"
        "except BaseException as fault: pass"
    )
    assert heavy_after(code) == []


def test_for_real(invoke: Invoke, tiny_sd: Path, tiny_clip: Path, tmp_path: Path) -> None:
    from recare_patch.models.loading import load_base
    from tests.measure.making import SUITE, make_patch

    make_patch(load_base(tiny_sd, device="cpu"), tmp_path / "mine", tiny_clip)
    from recare_patch.measure.suites import Suite

    Path("suite.yaml").write_text(Suite(**SUITE).to_yaml())
    options = ("--base", tiny_sd, "--suite", "suite.yaml", "--pictures", 4, "--cache", "cache")
    done = invoke("evaluate", "--patch", "mine", *options, "--device", "cpu", "--card")
    assert done.exit_code == 0, done.output
    assert "Pictures: 48 drawn, 0 from the cache" in done.stdout
    assert {"evidence.json", "report.html", "README.md"} <= {file.name for file in Path("mine").iterdir()}
    again = invoke("evaluate", "--patch", "mine", *options, "--device", "cpu")
    assert "Pictures: 0 drawn, 48 from the cache" in again.stdout
    table = slice(0, 10)
    assert again.stdout.splitlines()[table] == done.stdout.splitlines()[table]
