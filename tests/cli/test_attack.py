"""``recare-patch attack``: its options against a stand-in for the run, and once for real."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from PIL import Image

from recare_patch.core.errors import OutputError
from recare_patch.measure.attacks import ATTACKS, BUDGETS, AttackOptions, AttackResult, attack_options
from recare_patch.measure.attacks import run as attacking
from recare_patch.models.loading import load_base
from recare_patch.patch.patch import Patch
from tests.measure.test_attacks import make_patch
from tests.test_imports import heavy_after

Invoke = Callable[..., Result]


class Run:
    """Stands in for the run and remembers what it was called with."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, Any, dict[str, Any]]] = []
        self.fault: Exception | None = None

    def attack_patch(self, patch: Any, attack: Any, **options: Any) -> AttackResult:
        self.calls.append((patch, attack, options))
        if self.fault:
            raise self.fault
        return AttackResult("p4d", 3, 24, (0.0434, 0.31), 1, 12_000, 80.4, {}, [], {}, [])

    def run_attacks(
        self, patch: Any, attacks: Mapping[str, AttackOptions], **options: Any
    ) -> Iterator[tuple[str, AttackResult]]:
        for name, chosen in attacks.items():
            yield name, self.attack_patch(patch, name, options=chosen, **options)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, invoke: Invoke) -> Run:
    made = Run()
    monkeypatch.setattr(attacking, "attack_patch", made.attack_patch)
    monkeypatch.setattr(attacking, "run_attacks", made.run_attacks)
    Path("a-patch").mkdir()
    return made


def test_help_imports_nothing_heavy() -> None:
    code = "from recare_patch.cli import cli\ncli(['attack', '--help'], standalone_mode=False)"
    assert heavy_after(code) == []


def test_a_misspelt_attack_is_found_before_torch_is() -> None:
    code = (
        "from recare_patch.cli import cli\n"
        "try:\n    cli(['attack', '--patch', '.', '--attack', 'p4'], standalone_mode=False)\n"
        "except BaseException as fault: pass"
    )
    assert heavy_after(code) == []


def test_the_names_in_the_help_are_the_registered_ones() -> None:
    # The package's attribute of that name is the command, not its file.
    command = import_module("recare_patch.cli.attack")
    assert ATTACKS.names() == command.ATTACKS
    assert command.BUDGETS == BUDGETS


def test_the_shortest_command(fake: Run, invoke: Invoke) -> None:
    result = invoke("attack", "--patch", "a-patch", "--attack", "p4d")
    assert result.exit_code == 0, result.output
    ((patch, name, options),) = fake.calls
    assert (patch, name) == ("a-patch", "p4d")
    assert options["options"] == attack_options("p4d")
    assert options["out"] == Path("a-patch-attacks")
    assert options["base"] is options["detector"] is options["label"] is None
    assert (options["seed"], options["resume"], options["device"]) == (0, False, "auto")
    assert result.stdout.splitlines() == [
        "p4d: the concept came back in 3 of 24 (12%, 95 % interval 4% to 31%), without the attack in 1; "
        "12,000 denoiser evaluations, 80 s",
        "Saved: a-patch-attacks/p4d",
    ]


def test_every_option_arrives(fake: Run, invoke: Invoke) -> None:
    words = (
        "attack --patch a-patch --attack concept-inversion --attack ring-a-bell --budget published "
        "--vectors 4 --steps 7 --pictures 9 --set generations=5 --set batch_size=2 --detector clip "
        "--label it --seed 3 --out here --resume --base some/base --device cuda:1"
    )
    result = invoke(*words.split())
    assert result.exit_code == 0, result.output
    (_, first, options), (_, second, others) = fake.calls
    assert (first, second) == ("concept-inversion", "ring-a-bell")
    known = {"pictures": 9, "batch_size": 2}
    assert options["options"] == attack_options(first, "published", {**known, "vectors": 4, "steps": 7})
    assert others["options"] == attack_options(second, "published", {**known, "generations": 5})
    for given in (options, others):
        assert (given["budget"], given["detector"], given["label"]) == ("published", "clip", "it")
        assert (given["seed"], given["resume"], given["out"]) == (3, True, Path("here"))
        assert (given["base"], given["device"]) == ("some/base", "cuda:1")


def test_a_replay_takes_everything_from_the_saved_attack(fake: Run, invoke: Invoke) -> None:
    result = invoke("attack", "--patch", "a-patch", "--replay", "saved", "--out", "here")
    assert result.exit_code == 0, result.output
    ((_, name, options),) = fake.calls
    assert name is None
    assert (options["replay"], options["out"]) == ("saved", Path("here/replay"))
    assert "options" not in options
    assert result.stdout.splitlines()[-1] == "Saved: here/replay"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--patch a-patch", "no attack was named"),
        ("--patch a-patch --attack concept-inverson", "did you mean 'concept-inversion'?"),
        ("--patch a-patch --attack p4d --budget publishd", "did you mean 'published'?"),
        ("--patch a-patch --attack p4d --vectors 2", "vectors is not an option of p4d"),
        (
            "--patch a-patch --attack p4d --attack ring-a-bell --set genertions=2",
            "did you mean 'generations'?",
        ),
        ("--patch a-patch --attack p4d --steps 0", "steps must be at least 1, got 0"),
        ("--patch a-patch --attack p4d --set steps", "is not an assignment"),
        ("--patch a-patch --attack p4d --steps 2 --set steps=3", "steps is set twice"),
        ("--patch a-patch --attack p4d --set learning_rate=fast", "learning_rate must be a number"),
        ("--patch nowhere --attack p4d", "there is no patch at nowhere"),
        ("--patch a-patch --replay saved --pictures 3", "leave those out"),
    ],
)
def test_bad_input_is_one_sentence(fake: Run, invoke: Invoke, words: str, sentence: str) -> None:
    result = invoke("attack", *words.split())
    assert result.exit_code == 2
    assert not fake.calls
    (line,) = result.stderr.splitlines()
    assert line.startswith("Error: ") and sentence in line


def test_a_fault_of_the_run_is_one_sentence(fake: Run, invoke: Invoke) -> None:
    fake.fault = OutputError("here is in use by process 7")
    result = invoke("attack", "--patch", "a-patch", "--attack", "p4d")
    assert (result.exit_code, result.stderr) == (2, "Error: here is in use by process 7\n")


def test_for_real(
    invoke: Invoke, monkeypatch: pytest.MonkeyPatch, tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    class Bright:
        name = "bright"

        def labels(self) -> tuple[str, ...]:
            return ()

        def rate(self, images: Sequence[Image.Image], label: str) -> list[bool]:
            return [bool(np.asarray(image).mean() > 0) for image in images]

    monkeypatch.setattr(attacking, "_detector", lambda *_: (Bright(), "it"))
    patch = make_patch(load_base(tiny_sd, device="cpu"), tmp_path_factory.mktemp("patch") / "one")
    words = (
        "attack",
        "--patch",
        patch,
        "--base",
        tiny_sd,
        "--device",
        "cpu",
        "--out",
        "out",
        "--pictures",
        2,
    )
    result = invoke(*words, "--attack", "concept-inversion", "--steps", 2, "--set", "images=2")
    assert result.exit_code == 0, result.output
    assert "in 2 of 2 (100%" in result.stdout
    assert Path("out/concept-inversion/attack.json").is_file()
    again = invoke(*words, "--attack", "concept-inversion", "--steps", 2, "--set", "images=2")
    assert again.exit_code == 2 and "--resume" in again.stderr
    replayed = invoke("attack", "--patch", patch, "--base", tiny_sd, "--replay", "out/concept-inversion")
    assert replayed.exit_code == 0, replayed.output
    assert (patch.parent / "one-attacks/replay/attack.json").is_file()
    refused = invoke("attack", "--patch", patch, "--base", tiny_sd, "--replay", "out")
    assert refused.exit_code == 2
    assert "out holds no saved attack" in refused.stderr.splitlines()[-1]
    assert Patch.load(patch).metadata is not None
