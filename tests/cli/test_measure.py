"""``recare-patch evaluate``, ``attack`` and ``verify``: options, lines and refusals, and once for real."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from recare_patch.core import EvaluationError, OutputError, PatchError
from recare_patch.measure import AttackOptions, AttackResult, Evidence, Reading, attack_options
from recare_patch.measure.attacks import run as attacking
from recare_patch.measure.integrity import Finding
from recare_patch.measure.suites import Suite
from recare_patch.measure.verify import TOLERANCE, Verification
from recare_patch.models import load_base
from recare_patch.patch import Patch
from recare_patch.recipe import MemoryOptions
from tests.cli.conftest import Fake, Invoke, one_sentence
from tests.measure import making
from tests.measure.making import make_patch
from tests.measure.test_evidence import make_evidence

Calls = list[dict[str, Any]]


@pytest.fixture
def evaluated(fake: Fake) -> Calls:
    """What ``evaluate`` was called with."""
    made: Calls = []

    def evaluate(patch: str, **options: Any) -> Evidence:
        made.append({"patch": patch, **options})
        if patch == "nowhere":
            raise EvaluationError("there is nothing to evaluate")
        cost = {"pictures_drawn": 1200, "pictures_from_cache": 3, "seconds": 12.3}
        return make_evidence(cost=cost)

    fake("measure", evaluate=evaluate)
    return made


def test_the_least_that_has_to_be_said_to_evaluate(invoke: Invoke, evaluated: Calls) -> None:
    Path("mine").mkdir()
    done = invoke("evaluate --patch mine")
    assert done.exit_code == 0, done.output
    (call,) = evaluated
    assert call.pop("progress") is not None
    unset = "base suite concept metrics out cache detector label clip prompts_file"
    unset += " attacks precision vram batch_size seed pictures calibrate"
    given = {"patch": "mine", "checks": (), "check_pictures": 24, "card": False}
    given |= {"memory": MemoryOptions(), "reading": Reading()}
    assert call == dict.fromkeys(unset.split()) | given | {"device": "auto"}
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["figure", "base", "patched", "95", "%", "interval", "pictures"]
    assert lines[1].split()[3:] == ["90.0", "%", "2.0", "%", "0.8–5.0", "%", "200"]
    assert lines[4] == "concept-inversion: 3 of 40 (2.6–19.9 %)"
    assert lines[5] == "Pictures: 1,200 drawn, 3 from the cache, 12 s"
    assert lines[6:] == [f"Evidence: {Path('mine/evidence.json')}", f"Report: {Path('mine/report.html')}"]


def test_a_table_is_named_with_its_columns(invoke: Invoke, evaluated: Calls) -> None:
    Path("mine").mkdir()
    words = "--suite a.csv --column prompt=caption --column seed=s --rows erased --without b.csv --calibrate 50"
    assert invoke(f"evaluate --patch mine {words}").exit_code == 0
    assert evaluated[0]["reading"] == Reading({"prompt": "caption", "seed": "s"}, "erased", "b.csv")
    assert (evaluated[0]["suite"], evaluated[0]["calibrate"]) == ("a.csv", 50)
    for words, told in (("--column prompt", "takes OURS=THEIRS"), ("--rows erasd", "did you mean 'erased'")):
        one_sentence(invoke(f"evaluate --patch mine {words}"), told)


def test_suites_are_listed_and_say_where_they_go(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECARE_PATCH_SUITES_URL", "http://127.0.0.1:9")
    lines = invoke("suites list").stdout.splitlines()
    assert "  van-gogh-sd" in lines
    row = next(line for line in lines if "erasing/coco_30k" in line)
    assert row.split()[1:] == ["rohitgandikota/erasing", "MIT", "30,000", "no"]
    one_sentence(invoke("suites fetch unlearndiffatk/nudity"), "and --suite unlearndiffatk/nudity finds it")
    one_sentence(invoke("suites fetch erasing/coco30k"), "did you mean 'erasing/coco_30k'")


def test_everything_that_can_be_said_to_evaluate(invoke: Invoke, evaluated: Calls) -> None:
    done = invoke(
        "evaluate --patch p --base b --suite s --metric kid --metric fid --pictures 9 --out o --cache c "
        "--prompts f --attacks a --check scales --check-pictures 7 --card --detector clip:x --label l "
        "--clip k --seed 3 --precision bf16 --batch-size 2 --device cpu"
    )
    assert done.exit_code == 0, done.output
    (call,) = evaluated
    assert (call["metrics"], call["pictures"], call["attacks"]) == (("kid", "fid"), 9, (Path("a"),))
    assert (call["checks"], call["check_pictures"]) == (("scales",), 7)
    assert (call["out"], call["cache"], call["prompts_file"]) == (Path("o"), Path("c"), Path("f"))
    assert (call["detector"], call["seed"], call["precision"], call["card"]) == ("clip:x", 3, "bf16", True)
    assert f"Evidence: {Path('o/evidence.json')}" in done.stdout and "card" in done.stdout
    assert invoke("evaluate --patch p --no-cache").exit_code == 0
    assert evaluated[-1]["cache"] is False


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--patch p --metric fidd", "unknown metric 'fidd': allowed are concept-rate, care-score,"),
        ("--patch p --metric fidd", "did you mean 'fid'?"),
        ("--patch p --check scale", "scales, spellings, all; did you mean 'scales'?"),
        ("--patch p --precision fp8", "unknown precision 'fp8'"),
        ("--patch p --no-cache --cache c", "--no-cache and --cache exclude each other"),
        ("--patch nowhere", "Error: there is nothing to evaluate"),
        ("--patch p --pictures 0", "0 is not in the range"),
        ("", "Missing option '--patch'"),
    ],
)
def test_what_cannot_be_evaluated(invoke: Invoke, evaluated: Calls, words: str, told: str) -> None:
    done = invoke(f"evaluate {words}")
    assert done.exit_code == 2 and told in done.stderr and "Traceback" not in done.output


def test_of_several_processes_one_speaks(invoke: Invoke, evaluated: Calls, fake: Fake) -> None:
    class Second:
        @staticmethod
        def found() -> Any:
            return type("Crew", (), {"main": False})

    fake("core", Crew=Second, launched_together=lambda: True)
    done = invoke("evaluate --patch p")
    assert done.exit_code == 0 and not done.output and evaluated[0]["progress"] is None


def test_evaluate_for_real(invoke: Invoke, tiny_sd: Path, tiny_clip: Path) -> None:
    making.make_patch(load_base(tiny_sd, device="cpu"), Path("mine"), tiny_clip)
    Path("suite.yaml").write_text(Suite(**making.SUITE).to_yaml())
    words = f"evaluate --patch mine --base {tiny_sd} --suite suite.yaml --pictures 4 --cache cache --device cpu"
    done, again = invoke(f"{words} --card"), invoke(words)
    assert done.exit_code == 0, done.output
    assert "Pictures: 48 drawn, 0 from the cache" in done.stdout
    assert {"evidence.json", "report.html", "README.md"} <= {file.name for file in Path("mine").iterdir()}
    assert "Pictures: 0 drawn, 48 from the cache" in again.stdout
    assert again.stdout.splitlines()[:10] == done.stdout.splitlines()[:10]


class Run:
    """Stands in for the attacks and remembers what they were called with."""

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
def attacked(fake: Fake, invoke: Invoke) -> Run:
    made = Run()
    fake("measure", attack_patch=made.attack_patch, run_attacks=made.run_attacks)
    Path("a-patch").mkdir()
    return made


def test_the_shortest_attack(attacked: Run, invoke: Invoke) -> None:
    result = invoke("attack --patch a-patch --attack p4d")
    assert result.exit_code == 0, result.output
    ((patch, name, options),) = attacked.calls
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


def test_every_option_of_an_attack_arrives(attacked: Run, invoke: Invoke) -> None:
    result = invoke(
        "attack --patch a-patch --attack concept-inversion --attack ring-a-bell --budget published "
        "--vectors 4 --steps 7 --pictures 9 --set generations=5 --set batch_size=2 --detector clip "
        "--label it --seed 3 --out here --resume --base some/base --device cuda:1"
    )
    assert result.exit_code == 0, result.output
    (_, first, options), (_, second, others) = attacked.calls
    assert (first, second) == ("concept-inversion", "ring-a-bell")
    known = {"pictures": 9, "batch_size": 2}
    assert options["options"] == attack_options(first, "published", {**known, "vectors": 4, "steps": 7})
    assert others["options"] == attack_options(second, "published", {**known, "generations": 5})
    for given in (options, others):
        assert (given["budget"], given["detector"], given["label"]) == ("published", "clip", "it")
        assert (given["seed"], given["resume"], given["out"]) == (3, True, Path("here"))
        assert (given["base"], given["device"]) == ("some/base", "cuda:1")


def test_a_replay_takes_everything_from_the_saved_attack(attacked: Run, invoke: Invoke) -> None:
    result = invoke("attack --patch a-patch --replay saved --out here")
    assert result.exit_code == 0, result.output
    ((_, name, options),) = attacked.calls
    assert (name, options["replay"], options["out"]) == (None, "saved", Path("here/replay"))
    assert "options" not in options
    assert result.stdout.splitlines()[-1] == "Saved: here/replay"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--patch a-patch", "no attack was named: give --attack NAME (classifier-guidance, completion, co"),
        ("--patch a-patch --attack concept-inverson", "did you mean 'concept-inversion'?"),
        ("--patch a-patch --attack p4d --budget publishd", "did you mean 'published'?"),
        ("--patch a-patch --attack p4d --vectors 2", "vectors is not an option of p4d"),
        ("--patch a-patch --attack p4d --attack ring-a-bell --set genertions=2", "did you mean 'generations'?"),
        ("--patch a-patch --attack p4d --steps 0", "steps must be at least 1, got 0"),
        ("--patch a-patch --attack p4d --set steps", "is not an assignment"),
        ("--patch a-patch --attack p4d --steps 2 --set steps=3", "steps is set twice"),
        ("--patch a-patch --attack p4d --set learning_rate=fast", "learning_rate must be a number"),
        ("--patch nowhere --attack p4d", "there is no patch at nowhere"),
        ("--patch a-patch --replay saved --pictures 3", "leave those out"),
    ],
)
def test_what_cannot_be_attacked(attacked: Run, invoke: Invoke, words: str, sentence: str) -> None:
    one_sentence(invoke(f"attack {words}"), sentence)
    assert not attacked.calls
    attacked.fault = OutputError("here is in use by process 7")
    one_sentence(invoke("attack --patch a-patch --attack p4d"), "here is in use by process 7")


def test_attack_for_real(
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
    words = f"attack --patch {patch} --base {tiny_sd} --device cpu"
    made = f"{words} --out out --pictures 2 --attack concept-inversion --steps 2 --set images=2"
    result = invoke(made)
    assert result.exit_code == 0, result.output
    assert "in 2 of 2 (100%" in result.stdout
    assert Path("out/concept-inversion/attack.json").is_file()
    again = invoke(made)
    assert again.exit_code == 2 and "--resume" in again.stderr
    replayed = invoke(f"{words} --replay out/concept-inversion")
    assert replayed.exit_code == 0, replayed.output
    assert (patch.parent / "one-attacks/replay/attack.json").is_file()
    refused = invoke(f"{words} --replay out")
    assert refused.exit_code == 2
    assert "out holds no saved attack" in refused.stderr.splitlines()[-1]
    assert Patch.load(patch).metadata is not None


@pytest.fixture
def verified(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """What ``verify`` was called with."""
    made: Calls = []
    answers = {
        "good": (Finding("weights", True, "sound"), Finding("card", None, "claims no figures")),
        "bad": (Finding("weights", True, "sound"), Finding("hash", False, "is another")),
    }

    def verify(patch: Path, base: str | None, **options: Any) -> Verification:
        made.append({"patch": patch, "base": base, **options})
        if patch.name not in answers:
            raise PatchError(f"there is no patch at {patch}")
        return Verification(answers[patch.name])

    monkeypatch.setattr("recare_patch.measure.verify.verify", verify)
    return made


@pytest.mark.parametrize(
    ("patch", "code", "lines"),
    [
        ("good", 0, ["ok    weights: sound", "-     card: claims no figures", "good holds: 1 checked."]),
        ("bad", 1, ["ok    weights: sound", "FAIL  hash: is another", "bad does not hold: 1 of 2 failed."]),
    ],
)
def test_verify(invoke: Invoke, verified: Calls, patch: str, code: int, lines: list[str]) -> None:
    done = invoke("verify", patch)
    assert (done.exit_code, done.stdout.splitlines()) == (code, lines)
    (call,) = verified
    del call["progress"]
    unset = dict.fromkeys(("base", "concept", "pictures", "clip", "cache", "precision", "vram"))
    given = {"figures": ("all",), "tolerance": TOLERANCE, "device": "auto", "memory": MemoryOptions()}
    assert call == {"patch": Path(patch)} | unset | given


def test_verify_in_json(invoke: Invoke, verified: Calls) -> None:
    done = invoke("verify bad --json")
    found = json.loads(done.stdout)
    assert (done.exit_code, found["holds"]) == (1, False)
    assert found["findings"][1] == {"about": "hash", "holds": False, "told": "is another"}


def test_options_of_verify_arrive(invoke: Invoke, verified: Calls) -> None:
    words = "--figures a --figures b --pictures 5 --tolerance 0.1 --cache c --clip C --base B --device cpu"
    assert invoke(f"verify good {words}").exit_code == 0
    (call,) = verified
    assert (call["figures"], call["pictures"], call["tolerance"]) == (("a", "b"), 5, 0.1)
    assert (call["cache"], call["clip"], call["base"], call["device"]) == (Path("c"), "C", "B", "cpu")


@pytest.mark.parametrize("command", ["evaluate --patch a-patch", "attack --patch a-patch --attack p4d", "verify good"])
def test_levers_arrive(invoke: Invoke, evaluated: Calls, attacked: Run, verified: Calls, command: str) -> None:
    """The same ones for every command that draws."""
    found = invoke(f"{command} --vram 8 --micro-batch 2 --vae-tiling --precision fp16")
    assert found.exit_code == 0, found.output
    (call,) = evaluated or verified or [attacked.calls[0][2]]
    assert (call["vram"], call["precision"]) == (8, "fp16")
    assert call["memory"] == MemoryOptions(micro_batch=2, vae_tiling=True)
    one_sentence(invoke(f"{command} --offload"), "offload needs checkpointing: true")


@pytest.mark.parametrize("words", ["nothing", "good --pictures 0", "good --tolerance 2", "", "good --no"])
def test_what_cannot_be_verified(invoke: Invoke, verified: Calls, words: str) -> None:
    done = invoke(f"verify {words}")
    assert done.exit_code == 2 and "Error" in done.stderr
