"""The whole evaluation on tiny random models: its files, its cache, its refusals."""

from __future__ import annotations

import functools
import gc
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

import recare_patch.measure.run as evaluating
from recare_patch.careset import Clip
from recare_patch.core import (
    EvaluationError,
    EvidenceError,
    IncompatiblePatchError,
    PatchError,
    RecarePatchError,
    UnknownNameError,
    file_sha256,
)
from recare_patch.measure import memorization
from recare_patch.measure.attacks import AttackResult, save_attack
from recare_patch.measure.evidence import Evidence
from recare_patch.measure.meters import default_metrics
from recare_patch.measure.names import METRICS
from recare_patch.measure.prompts import Rows, read_prompt_file, read_prompts
from recare_patch.measure.run import Options, evaluate, measure_again, score
from recare_patch.measure.suites import Suite
from recare_patch.measure.verify import verify
from recare_patch.models import BaseModel, load_base
from recare_patch.patch import Patch
from recare_patch.recipe import WEIGHTS_NAME
from tests.measure.making import SUITE, make_patch

NAMES = (
    "concept, plain prompts",
    "concept, paraphrased prompts",
    "concept, implicit prompts",
    "CARE score, stars",
    "shown, stars",
    "neighbours",
    "CLIP score, retained prompts",
    "KID to the base, retained prompts",
    "perceptual change, retained prompts",
)


@pytest.fixture(scope="module")
def made(base: BaseModel, tiny_clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_patch(base, tmp_path_factory.mktemp("patch") / "patch", tiny_clip)


@pytest.fixture
def patch(made: Path, tmp_path: Path) -> Path:
    """A copy of the patch, so that each test finds a folder without evidence."""
    return Path(shutil.copytree(made, tmp_path / "patch"))


@pytest.fixture(autouse=True)
def home(one_thread: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The user's cache folder, which is not there yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def pictures_in(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.rglob("*.png")}


def run(patch: Path, base: BaseModel, **changes: Any) -> Evidence:
    options: dict[str, Any] = {"suite": Suite(**SUITE), "pictures": 4, "device": "cpu"}
    return evaluate(patch, base=base, **{**options, **changes})


class Killer(BaseException):
    """Ends a run at a stage's first report."""

    def update(self, stage: str, done: int, total: int, note: str = "") -> None:
        assert 0 <= done <= total
        if stage == self.args[0]:
            raise self


def test_an_evaluation_leaves_evidence_and_a_report(patch: Path, base: BaseModel, home: Path, tmp_path: Path) -> None:
    evidence = run(patch, base)
    assert sorted(file.name for file in patch.iterdir()) == ["evidence.json", WEIGHTS_NAME, "report.html"]
    assert Evidence.load(patch) == evidence
    assert tuple(one.name for one in evidence.figures) == NAMES
    assert (evidence.concept, evidence.kind, evidence.method) == ("Van Gogh", "style", "recare")
    assert evidence.patch_sha256 == file_sha256(patch / WEIGHTS_NAME)
    assert evidence.base_denoiser_sha256 == base.denoiser_hash()
    assert Suite(**evidence.suite) == Suite(**SUITE)
    assert evidence.cost["pictures_drawn"] == 2 * 6 * 4 and evidence.cost["denoiser_evaluations"] > 0
    assert all(one.pictures == 4 and one.detector and one.interval is not None for one in evidence.figures)
    text = (patch / "evidence.json").read_text()
    assert str(patch.parent) not in text and "/tmp" not in text
    assert "data:image" in (patch / "report.html").read_text()
    # A second run draws nothing and finds the same.
    second = run(patch, base)
    assert second.figures == evidence.figures
    assert (second.cost["pictures_drawn"], second.cost["pictures_from_cache"]) == (0, 48)
    more = run(patch, base, pictures=5)
    assert more.cost["pictures_drawn"] <= 2 * 6 * 5 and more.cost["pictures_from_cache"] == 0
    assert len(list((home / "recare-patch" / "pictures").glob("??/*.png"))) == 2 * 6 * 5
    # Without a cache nothing is kept, and the figures are the same.
    shutil.rmtree(home)
    without = run(patch, base, cache=False, out=tmp_path / "elsewhere")
    assert without.figures == evidence.figures and not home.exists()
    assert {file.name for file in (tmp_path / "elsewhere").iterdir()} == {"evidence.json", "report.html"}


def test_a_broken_run_goes_on_where_it_stopped(
    patch: Path, base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    whole = run(patch, base, cache=one, batch_size=2)
    # A detector that fails loses no picture.
    with monkeypatch.context() as patched:
        patched.setattr("recare_patch.measure.meters.Shown.take", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(patch, base, cache=two, batch_size=2)
    assert len(pictures_in(two)) == 8
    with pytest.raises(Killer):
        run(patch, base, cache=two, batch_size=2, progress=Killer("patched, CARE stars"))
    kept = pictures_in(two)
    assert 4 * 6 < len(kept) < 4 * 9
    after = run(patch, base, cache=two, batch_size=2)
    assert after.figures == whole.figures and after.cost["pictures_from_cache"] == len(kept)
    assert pictures_in(two) == pictures_in(one)


def test_the_card_tells_the_figures_and_verification_bears_them_out(
    patch: Path, base: BaseModel, tiny_sd: Path
) -> None:
    (patch / "README.md").write_text("---\nlicense: other\n---\n# A patch\n\n## Limits\n\nSome.\n")
    evidence, loaded = run(patch, base, card=True), Patch.load(patch)
    card = (patch / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    metrics = {one["name"]: one["value"] for one in front["model-index"][0]["results"][0]["metrics"]}
    assert metrics == {one.name: one.patched for one in evidence.figures}
    assert front["license"] == "other" and card.index("## Evidence") < card.index("## Limits")
    assert measure_again(evidence, loaded, base).figures == evidence.figures
    fewer = measure_again(evidence, loaded, base, figures=["neighbours"], pictures=2)
    assert [(one.name, one.pictures) for one in fewer.figures] == [("neighbours", 2)]
    # A card that tells figures stays in step with the evidence, asked or not.
    run(patch, base, metrics=["neighbours"])
    assert "CARE score" not in (patch / "README.md").read_text()
    assert verify(patch, figures=["none"], base=tiny_sd).holds
    (patch / "README.md").unlink()
    run(patch, base, card=True)
    assert "erased from" in (patch / "README.md").read_text()
    assert verify(patch, figures=["none"], base=tiny_sd).holds
    other = Patch.load(make_patch(base, patch.parent / "other", seed=3))
    with pytest.raises(EvidenceError, match="belongs to another patch"):
        measure_again(evidence, other, base)


def test_a_patch_folder_alone_is_enough(patch: Path, tiny_sd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The recipe names the base's folder; the concept's own suite is for Stable Diffusion.
    monkeypatch.chdir(tiny_sd.parent)
    evidence = evaluate(str(patch), metrics=["neighbours", "clip-score"], pictures=2, device="cpu")
    assert evidence.suite["name"] == "van-gogh-sd"
    assert evidence.options["metrics"] == ["neighbours", "clip-score"]
    assert "--suite van-gogh-sd --metric neighbours" in evidence.command
    # A bench is a suite too.
    evidence = evaluate(patch, suite="conceptbench-style-sd", metrics=["concept-rate"], pictures=1, device="cpu")
    assert [one.name for one in evidence.figures] == ["concept, plain prompts"]
    assert evidence.concept == "Van Gogh" and len(evidence.suite["neighbours"]) == 6


def test_every_metric_can_be_asked_for(patch: Path, base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memorization, "Recovery", functools.partial(memorization.Recovery, images=2, steps=2))
    # KID gives way to FID where pictures are many.
    assert set(METRICS) - set(default_metrics(200)) == {"fid", "memorization"}
    assert set(METRICS) - set(default_metrics(2000)) == {"kid", "memorization"}
    evidence = run(patch, base, metrics=METRICS)
    assert tuple(one.name for one in evidence.figures)[-2:] == memorization.MEMORIZATION
    assert {one.metric for one in evidence.figures} >= {"KID", "FID", "memorization score"}
    again = run(patch, base, metrics=METRICS)
    assert again.figures == evidence.figures
    assert again.cost["pictures_drawn"] == 0 and again.cost["denoiser_evaluations"] == 0


def test_a_prompt_file_is_drawn_once_each(patch: Path, base: BaseModel, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a cat\na  dog\na cat\nstars in the night\na house\n")
    metrics = ["clip-score", "fid", "kid", "perceptual-change"]
    evidence = run(patch, base, prompts_file=file, metrics=metrics, pictures=2)
    assert {one.pictures for one in evidence.figures} == {5}
    assert evidence.suite["retained"] == ["a cat", "a dog", "a cat", "stars in the night", "a house"]
    assert evidence.cost["pictures_drawn"] == 10
    assert evidence.command.endswith("--prompts FILE")
    assert measure_again(evidence, Patch.load(patch), base).figures == evidence.figures


@pytest.mark.parametrize("cache", [None, False])
def test_many_prompts_need_no_more_room_than_a_few(
    patch: Path, base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Any
) -> None:
    def alive() -> int:
        return sum(isinstance(one, Image.Image) for one in gc.get_objects())

    real, before = Clip.image_layers, alive()
    seen: list[int] = []

    def counted(self: Clip, images: Any) -> Any:
        seen.append(alive() - before)
        return real(self, images)

    monkeypatch.setattr(Clip, "image_layers", counted)
    file = tmp_path / "prompts.txt"
    file.write_text("".join(f"a photo of {'a cat ' * (k % 5)}\n" for k in range(160)))
    evidence = run(patch, base, prompts_file=file, metrics=["clip-score", "fid"], cache=cache)
    assert {one.pictures for one in evidence.figures} == {160}
    # Each model's handful of 32, what its last batch of 20 still holds, and samples: not 320 pictures.
    assert len(seen) == 10 and max(seen) < 130


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"\n\n", "is empty: one prompt a line"),
        (b"a cat\n \t \n", "line 2 of .* is empty"),
        (b"a cat\n" + b"x" * 1001 + b"\n", "line 2 of .* is over-long: it has 1001 characters"),
        (b"\xff\xfe", "is not UTF-8 text"),
        (None, "cannot read the prompt file"),
        (b"prompt,seed\n,2\na cat,one\n", r"no row to draw: 1 with no prompt \(line 2\); 1 with a seed that is no"),
        (b"prompt,seed\na cat,9223372036854775808\n", "no whole number from 0 to 9223372036854775807"),
        (b'prompt,seed\n"a cat,1\n', "line 2 of .* is no row of a table: unexpected end of data"),
        (b"prompt,seed\n", "has column names and no row to draw"),
    ],
)
def test_a_faulty_prompt_file_is_told_of(tmp_path: Path, content: bytes | None, told: str) -> None:
    file = tmp_path / "prompts.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(EvaluationError, match=told):
        read_prompts(file)


@pytest.mark.parametrize(
    ("name", "content", "seeds"),
    [
        ("esd.csv", ",prompt,evaluation_seed,case_number\n0,A,3016,0\n1,B,7,1\n", (3016, 7)),
        ("i2p.txt", 'prompt,categories,hard,sd_seed\r\nA,"x, y",0,1.0\r\nB,,1,2\r\n', (1, 2)),
        ("tabs.tsv", "case_number\tPrompt\n0\tA\n1\tB\n", ()),
        ("points.csv", "prompt;seed\nA;1\nB;2\n", (1, 2)),
        ("alone.csv", "prompt\nA\n\nB\n", ()),
        ("lines.txt", "A\nB\n", ()),
    ],
)
def test_tables_of_prompts_are_read(tmp_path: Path, name: str, content: str, seeds: tuple[int, ...]) -> None:
    file = tmp_path / name
    first, second = ("a cat, sitting", "stars\nat night") if name != "lines.txt" else ("a cat", "stars")
    quoted = [f'"{one}"' if name != "lines.txt" else one for one in (first, second)]
    file.write_text(content.replace("A", quoted[0]).replace("B", quoted[1]))
    found = read_prompt_file(file)
    assert read_prompts(file) == (first, second.replace("\n", " "))
    assert (found.seeds if isinstance(found, Rows) else ()) == seeds


def test_a_table_without_prompts_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("name,caption\n1,a cat\n")
    with pytest.raises(EvaluationError, match="no column 'prompt' in its first line, 'name,caption'"):
        read_prompt_file(tmp_path / "t.csv")
    assert read_prompt_file(tmp_path / "t.csv", {"prompt": "caption"}).prompts == ("a cat",)  # type: ignore[union-attr]


def test_lines_that_the_encoder_would_cut_are_refused_before_drawing(
    patch: Path, base: BaseModel, home: Path, tmp_path: Path
) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a cat\n" + "cat " * 76 + "\n")
    with pytest.raises(EvaluationError, match=r"line 2 of .* is over-long: 76 tokens, .* reads 75"):
        run(patch, base, prompts_file=file)
    assert not home.exists()
    file.write_text("\ufeffa cat\r\nstars")
    assert read_prompts(file) == ("a cat", "stars")


NO_CONCEPT = Suite(**{**SUITE, "plain": [], "paraphrased": [], "implicit": []})


@pytest.mark.parametrize(
    ("changes", "error", "told"),
    [
        ({"metrics": ["clip-scor"]}, UnknownNameError, "unknown metric .*did you mean 'clip-score'"),
        ({"checks": ["scale"]}, UnknownNameError, "did you mean 'scales'"),
        ({"suite": "van-gog"}, UnknownNameError, "did you mean 'van-gogh-(sd|atelier)'"),
        ({"detector": "nudnet-6"}, UnknownNameError, "unknown detector .*did you mean 'nudenet-6'"),
        ({"detector": "nudenet-6:here"}, EvaluationError, "takes no source"),
        ({"detector": "clip:"}, EvaluationError, "the source of the detector clip is empty"),
        ({"suite": "tench-sd"}, EvaluationError, "is for 'tench', and the patch erases 'Van Gogh'"),
        ({"pictures": 0}, EvaluationError, "at least 1 picture, got 0"),
        ({"metrics": ["concept-rate"], "suite": NO_CONCEPT}, EvaluationError, "no prompts for concept"),
        ({"label": "mone", "detector": "atelier-judge"}, UnknownNameError, "label of the detector atelier-j"),
        ({"attacks": ["nowhere"]}, RecarePatchError, "holds no saved attack"),
    ],
)
def test_bad_input_is_one_sentence(
    patch: Path, base: BaseModel, changes: dict[str, Any], error: type[Exception], told: str
) -> None:
    with pytest.raises(error, match=told):
        run(patch, base, **changes)
    assert not (patch / "evidence.json").exists()


def test_names_are_checked_before_anything_is_loaded(patch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluating, "load_to_draw", lambda *_, **__: pytest.fail("the base was loaded"))
    for changes in ({"metrics": ["x"]}, {"suite": "x"}, {"detector": "x"}, {"prompts_file": "nowhere.txt"}):
        with pytest.raises(RecarePatchError):
            evaluate(patch, **changes)  # type: ignore[arg-type]
    with pytest.raises(PatchError, match="there is no patch"):
        evaluate(patch / "nowhere")


def test_a_patch_must_be_a_file_for_this_base(patch: Path, base: BaseModel, tiny_sd_v: Path) -> None:
    with pytest.raises(EvaluationError, match="save the patch"):
        evaluate(Patch.load(patch).to(torch.float32), base=base)
    with pytest.raises(IncompatiblePatchError):
        run(patch, load_base(tiny_sd_v, device="cpu"))


def test_a_lora_of_other_make_needs_to_be_told(patch: Path, base: BaseModel, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    save_file(load_file(patch / WEIGHTS_NAME), other / WEIGHTS_NAME)
    with pytest.raises(EvaluationError, match="does not say what base"):
        evaluate(other)
    with pytest.raises(EvaluationError, match="name a suite"):
        evaluate(other, base=base)
    clip = str(Patch.load(patch).metadata.parsed_recipe.clip)  # type: ignore[union-attr]
    evidence = run(other, base, clip=clip, metrics=["neighbours"])
    assert (evidence.concept, evidence.method) == ("Van Gogh", "unknown")


def test_a_given_detector_judges(patch: Path, base: BaseModel, tiny_clip: Path) -> None:
    class Always:
        name = "always"

        def labels(self) -> tuple[str, ...]:
            return ()

        def rate(self, images: list[Image.Image], label: str) -> list[bool]:
            return [True] * len(images)

    evidence = run(patch, base, detector=Always(), metrics=["concept-rate"])
    assert {(one.detector, one.patched) for one in evidence.figures} == {("always", 1.0)}
    other = run(patch, base, detector=f"clip:{tiny_clip}", label="stars", metrics=["concept-rate"])
    assert other.suite["label"] == "stars"
    # Of a folder only its name is told.
    assert other.suite["detector_options"]["clip"] == tiny_clip.name
    assert str(tiny_clip.parent) not in json.dumps(other.model_dump(mode="json"))


def test_saved_attacks_on_this_patch_are_told_of(patch: Path, base: BaseModel, tmp_path: Path) -> None:
    details = [{"prompt": "a", "attacked": "b", "seed": k, "success": k == 0, "without": False} for k in range(4)]
    result = AttackResult(
        "p4d", 1, 4, (0.045587, 0.69936), 0, 100, 2.5, {"steps": 3}, details, prompts=["a"] * 4, base=1.0
    )
    about = {"patch_sha256": file_sha256(patch / WEIGHTS_NAME), "preset": "small", "detector": "clip"}
    save_attack(result, tmp_path / "patch-attacks" / "p4d", about)
    save_attack(result, tmp_path / "patch-attacks" / "stale", {**about, "patch_sha256": "0" * 64})
    evidence = run(patch, base, metrics=["neighbours"])
    (attack,) = evidence.attacks
    assert (attack.attack, attack.preset, attack.rate, attack.base) == ("p4d", "small", 0.25, 1.0)
    assert (patch / str(attack.folder) / "attack.json").is_file()
    named = run(patch, base, metrics=["neighbours"], attacks=[tmp_path / "patch-attacks" / "p4d"])
    assert len(named.attacks) == 1
    with pytest.raises(EvidenceError, match="run against another patch"):
        run(patch, base, metrics=["neighbours"], attacks=[tmp_path / "patch-attacks"])


def test_checks_are_part_of_the_evidence(patch: Path, base: BaseModel) -> None:
    asked: dict[str, Any] = {"metrics": ["neighbours"], "checks": ["scales"], "check_pictures": 2}
    evidence = run(patch, base, **asked)
    assert [one.name for one in evidence.checks] == ["scales"]
    assert evidence.options["checks"] == ["scales"] and evidence.command.count("--check scales") == 1
    assert run(patch, base, **asked).checks == evidence.checks


def test_measuring_writes_nothing(patch: Path, base: BaseModel, home: Path) -> None:
    before = sorted(patch.iterdir())
    found = score(Patch.load(patch), base, Suite(**SUITE), Options(metrics=["concept-rate"], pictures=2))
    assert found is not None and len(found.evidence.figures) == 3
    titles = [f"Van Gogh: {name} prompts" for name in ("plain", "paraphrased", "implicit")]
    assert list(found.pictures) == titles
    # Two prompts took turns, and no place is left empty where each was drawn once.
    plain = [(one.label, len(one.before), len(one.after)) for one in found.pictures[titles[0]]]
    assert plain == [("a painting by van gogh", 1, 1), ("van gogh", 1, 1)]
    assert sorted(patch.iterdir()) == before and not home.exists()


@pytest.mark.slow
def test_two_processes_give_the_pictures_of_one(patch: Path, base: BaseModel, tiny_sd: Path, tmp_path: Path) -> None:
    one = run(patch, base, cache=tmp_path / "one", batch_size=2, out=tmp_path / "one-out")
    (tmp_path / "suite.yaml").write_text(Suite(**SUITE).to_yaml())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Without accelerators, --multi_gpu is how accelerate starts several processes on the CPU.
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--main_process_port", str(port), "-m", "recare_patch", "evaluate", "--patch", str(patch)]
    launch += ["--base", str(tiny_sd), "--suite", str(tmp_path / "suite.yaml"), "--pictures", "4"]
    launch += ["--cache", str(tmp_path / "two"), "--out", str(tmp_path / "two-out"), "--batch-size", "2"]
    done = subprocess.run(
        [sys.executable, *launch, "--device", "cpu"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    two = Evidence.load(tmp_path / "two-out")
    assert two.figures == one.figures and two.cost["processes"] == 2
    pictures = pictures_in(tmp_path / "one")
    assert pictures == pictures_in(tmp_path / "two") and len(pictures) == 48
    # One of them speaks.
    assert done.stdout.count("Report:") == 1
