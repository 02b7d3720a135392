"""A stack has no recipe: it is evaluated, attacked and verified by each concept that its parts name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result

from recare_patch.combine import stacking as composing
from recare_patch.core import EvaluationError
from recare_patch.measure import attack_options, attack_patch
from recare_patch.measure import stack as stack_evidence
from recare_patch.measure import verify as verifying
from recare_patch.measure.evidence import Evidence
from recare_patch.measure.run import evaluate
from recare_patch.measure.stack import CHANGE_NAME, FigureChange, change_in_evidence
from recare_patch.measure.suites import Suite, resolve_suite, subject_of
from recare_patch.models import BaseModel, load_base
from recare_patch.patch import Patch, concepts_of, write_kohya
from tests.cli.conftest import invoke
from tests.measure.making import SUITE, make_patch

__all__ = ["invoke"]
SUITES = [Suite(**{**SUITE, "concept": concept, "label": concept.lower()}) for concept in ("Van Gogh", "Monet")]


@pytest.fixture(scope="module")
def base(tiny_sd: Path) -> BaseModel:
    return load_base(tiny_sd, device="cpu")


@pytest.fixture(scope="module")
def parts(base: BaseModel, tiny_clip: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Patch]:
    folder = tmp_path_factory.mktemp("parts")
    return [
        Patch.load(make_patch(base, folder / suite.concept, tiny_clip, seed=seed, concept=suite.concept))
        for seed, suite in enumerate(SUITES)
    ]


@pytest.fixture(scope="module")
def made(parts: list[Patch], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stack") / "both"
    composing.save_stack(composing.stack([(part, 1.0) for part in parts]), folder)
    return folder


@pytest.fixture
def stack(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "both"))


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_parts_name_what_is_judged(stack: Path, parts: list[Patch]) -> None:
    whole = Patch.load(stack)
    assert concepts_of(whole) == ("Van Gogh", "Monet")
    found = subject_of(whole, "van-gogh")
    assert (found.concept.text, found.concept.kind, found.method) == ("Van Gogh", "style", "stack")
    assert found.care_words == ("stars", "night")
    # The same prompts as for the part, wherever no suite was written for the concept; else the suite's own.
    alone = resolve_suite(parts[1], None, "tiny-sd")
    assert resolve_suite(whole, None, "tiny-sd", concept="Monet") == alone
    assert resolve_suite(whole, SUITES[1], "tiny-sd").concept == "Monet"
    assert subject_of(parts[0]).recipe == parts[0].metadata.parsed_recipe  # type: ignore[union-attr]
    for patch, concept, told in (
        (whole, None, "erases several concepts: choose one of Van Gogh, Monet"),
        (whole, "Mone", r"erases Van Gogh and Monet, not 'Mone'; did you mean 'Monet'\?"),
        (parts[0], "Monet", "erases Van Gogh, not 'Monet'"),
    ):
        with pytest.raises(EvaluationError, match=told):
            subject_of(patch, concept)


def test_evaluate_and_verify(stack: Path, base: BaseModel, tiny_sd: Path, tiny_clip: Path) -> None:
    options: dict[str, Any] = {"metrics": ["concept-rate"], "pictures": 2, "clip": str(tiny_clip)}
    options["device"] = "cpu"
    for suite in SUITES:
        found = evaluate(stack, base=base, suite=suite, **options)
        assert (found.concept, found.method) == (suite.concept, "stack")
    assert sorted(file.parent.name for file in stack.rglob("evidence.json")) == ["monet", "van-gogh"]
    with pytest.raises(EvaluationError, match="its card tells no figures"):
        evaluate(stack, base=base, suite=SUITES[0], card=True, **options)

    done = verifying.verify(stack, tiny_sd, clip=str(tiny_clip), device="cpu")
    assert done.holds, done.failed
    told = {one.about: one.holds for one in done.findings}
    for concept in ("Van Gogh", "Monet"):
        assert told[f"{concept}: evidence"] and told[f"{concept}: figure 'concept, plain prompts'"]
    assert told["hash"] and told["records"] and told["kohya file"]
    one = verifying.verify(stack, tiny_sd, concept="monet", figures=["none"], device="cpu")
    assert not [finding for finding in one.findings if finding.about.startswith("Van Gogh")]

    # Evidence of one concept under the name of another.
    (stack / "monet" / "evidence.json").unlink()
    (stack / "van-gogh" / "evidence.json").rename(stack / "monet" / "evidence.json")
    (fault,) = verifying.verify(stack, tiny_sd, figures=["none"], device="cpu").failed
    assert fault.told == "monet/evidence.json says concept 'Van Gogh', the weights 'Monet'"


def test_another_kohya_file_does_not_pass(stack: Path, parts: list[Patch], tiny_sd: Path, base: BaseModel) -> None:
    (file,) = stack.glob("erase-*.safetensors")
    file.unlink()
    other = composing.stack([(parts[0], 0.5), (parts[1], 1.0)], dtype=torch.float16)
    write_kohya(other, file)
    (fault,) = verifying.verify(stack, tiny_sd, figures=["none"], device="cpu").failed
    assert fault.about == "kohya file" and "another update than the patch" in fault.told


class Everything:
    """Sees the concept in every picture."""

    name = "everything"

    def labels(self) -> tuple[str, ...]:
        return ("it",)

    def rate(self, images: Any, label: str) -> Any:
        return np.ones(len(images), dtype=bool)


def test_attack(stack: Path, base: BaseModel, tiny_clip: Path, tmp_path: Path) -> None:
    small = attack_options("ring-a-bell", overrides={"pictures": 1, "population": 4, "generations": 1})
    shared: dict[str, Any] = {"base": base, "detector": Everything(), "label": "it", "steps": 1}
    common = {**shared, "options": small}
    with pytest.raises(EvaluationError, match="choose one of Van Gogh, Monet"):
        attack_patch(stack, "ring-a-bell", **common)
    out = stack.with_name("both-attacks") / "monet" / "ring-a-bell"
    result = attack_patch(stack, "ring-a-bell", concept="Monet", out=out, **common)
    assert result.trials == 1
    about = json.loads((out / "attack.json").read_text())["about"]
    assert (about["concept"], about["method"]) == ("Monet", "stack")
    again = attack_patch(stack, replay=out, **shared)
    assert again.trials == 1
    # Evidence on this concept tells of it, that on the other does not.
    for suite, attacks in ((SUITES[1], 1), (SUITES[0], 0)):
        found = evaluate(
            stack, base=base, suite=suite, metrics=["concept-rate"], pictures=1, detector=Everything(),
            label="it", clip=str(tiny_clip), device="cpu",
        )  # fmt: skip
        assert len(found.attacks) == attacks


def test_change_in_evidence(stack: Path, parts: list[Patch], base: BaseModel, tiny_clip: Path, tmp_path: Path) -> None:
    how: dict[str, Any] = {"base": base, "suites": SUITES, "clip": str(tiny_clip), "device": "cpu"}
    metrics, cache = ["concept-rate", "neighbours"], tmp_path / "cache"
    changes = change_in_evidence(parts, stack, pictures=2, metrics=metrics, cache=cache, **how)
    assert list(dict.fromkeys(one.concept for one in changes)) == ["Van Gogh", "Monet"]
    written = json.loads((stack / CHANGE_NAME).read_text())
    assert len(written["figures"]) == len(changes)
    for one in changes:
        figure = Evidence.load(stack / one.concept.lower().replace(" ", "-")).figure(one.name)
        assert (one.base, one.stacked) == (figure.base, figure.patched)
        part = parts[[suite.concept for suite in SUITES].index(one.concept)]
        assert part.metadata is not None and one.pictures == figure.pictures
    with pytest.raises(EvaluationError, match="none of the given patches erases 'Monet'"):
        change_in_evidence(parts[:1], stack, pictures=1, metrics=["concept-rate"], **how)


def test_the_command(
    invoke: Callable[..., Result], parts: list[Patch], tiny_sd: Path, tiny_clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []

    def measured(given: list[Patch], stack: Path, **options: Any) -> tuple[FigureChange, ...]:
        asked.append(options | {"stack": stack, "parts": [part.name for part in given]})
        row = ("concept, plain prompts", "rate", "lower", 100, 0.98, 0.02, 0.035, None, None)
        return tuple(FigureChange(concept, *row) for concept in ("Van Gogh", "Monet"))

    monkeypatch.setattr(stack_evidence, "change_in_evidence", measured)
    models, sources = f"--base {tiny_sd} --clip {tiny_clip} --device cpu", [part.source for part in parts]
    places = ("--base", tiny_sd, "--device", "cpu")
    done = invoke("stack", *sources, "--out", "both", "--evidence", "--pictures", 100, *places)
    assert done.exit_code == 0, done.output
    assert [line.split() for line in done.stdout.splitlines()[3:-1]] == [
        ["figure", "base", "alone", "stacked"],
        ["Van", "Gogh:"],
        ["concept,", "plain", "prompts", "98.0", "%", "2.0", "%", "3.5", "%"],
        ["Monet:"],
        ["concept,", "plain", "prompts", "98.0", "%", "2.0", "%", "3.5", "%"],
    ]
    (call,) = asked
    assert (call["stack"], call["pictures"], call["base"]) == (Path("both"), 100, str(tiny_sd))
    assert call["parts"] == ["'Van Gogh'", "'Monet'"]
    names = "README.md erase-van-gogh-monet.safetensors pytorch_lora_weights.safetensors stack.yaml"
    assert {path.name for path in Path("both").iterdir()} == set(names.split())
    # The file for other tools is known as ours, and as a stack.
    facts = json.loads(invoke("inspect", "both/erase-van-gogh-monet.safetensors", "--json").stdout)
    assert (facts["format"], facts["made_by"], facts["checked"]) == ("kohya", "recare-patch", True)
    assert [part["name"] for part in facts["stack_of"]] == ["Van Gogh", "Monet"]

    # Without a choice each concept is evaluated, and has a folder of its own.
    found = invoke(f"evaluate --patch both --metric concept-rate --pictures 1 {models}")
    assert found.exit_code == 0, found.output
    told = found.stdout.splitlines()
    for concept in ("van-gogh", "monet"):
        assert f"Evidence: {Path('both', concept, 'evidence.json')}" in told
    again = invoke(f"verify both --concept monet {models}")
    assert again.exit_code == 0, again.output
    assert "ok    Monet: figure 'concept, plain prompts'" in again.stdout
