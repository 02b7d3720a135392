"""The whole run on tiny random models: files, cost, resume after a kill, bad input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from recare_patch.careset import MOST_ASKED, OTHERS, CareSet
from recare_patch.core import (
    ClipError,
    NoMatchingModuleError,
    OutputError,
    RecarePatchError,
    ResumeError,
    keep_json,
    kept_json,
)
from recare_patch.erasure import EraseResult, erase, stages
from recare_patch.erasure.gauge import STATES, WORD_STATES
from recare_patch.erasure.run import RUN_FOLDER
from recare_patch.models import BaseModel, lora
from recare_patch.patch import Patch, from_any, generate_pictures
from recare_patch.recipe import Recipe, load_recipe
from tests.erasure.making import Killed, Killer, small_recipe

Small = Callable[..., Recipe]
Runs = Callable[..., EraseResult]
WEIGHTS, KOHYA = "pytorch_lora_weights.safetensors", "erase-van-gogh.safetensors"


def _same(one: Path | Patch, other: Path | Patch) -> bool:
    first, second = (p.tensors if isinstance(p, Patch) else Patch.load(p).tensors for p in (one, other))
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.fixture(scope="module")
def finished(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return erase(small(**{"erase.steps": 6}), tmp_path_factory.mktemp("erase") / "patch", device="cpu").folder


def test_a_run_leaves_a_whole_patch_and_nothing_else(finished: Path) -> None:
    names = {"README.md", "care_set.json", "preview.png", "recipe.yaml", "training.json", WEIGHTS, KOHYA}
    assert {file.name for file in finished.iterdir()} == names
    cost = json.loads((finished / "training.json").read_text())
    counted = {stage: one["evaluations"] for stage, one in cost["stages"].items()}
    assert cost["denoiser_evaluations"] == sum(counted.values()) and cost["peak_memory_bytes"] > 0
    # How many words the base is asked about depends on what CLIP proposes.
    assert 0 < counted.pop("CARE-set") <= MOST_ASKED
    care_set = CareSet.load(finished / "care_set.json")
    held = len(care_set.words) + len(care_set.doubtful)
    assert counted == {
        # 4 pictures of 2 steps, both halves of the guidance; and 3.
        "target images": 16,
        "retained images": 12,
        "other pictures": OTHERS * 2 * 2,
        # 3 steps of 2 states: one frozen sample, and a trained one that counts three times.
        "search 1 erase": 3 * 2 * (1 + 3),
        "search 1 inversion": 3 * 2 * 3,
        "search 1 check": 3 * 4,
        # Erased rows: ∅, anchor, one name, and a trained sample; retained rows: one frozen, one trained.
        # What the frozen model says at the gauge's states and words, and one look after the last step.
        "erase": 6 * (2 * (3 + 3) + 2 * (1 + 3)) + (4 + 2) * STATES + (2 + 1) * WORD_STATES * held,
    }
    assert len(cost["losses"]["erase"]) == 6 and len(cost["measured"]["looks"]) == 1
    assert [one["role"] for one in cost["seen"]].count("erased") == 1
    # Two files: the patch's own hash is the recorded one, and the other says the same.
    patch, other = Patch.load(finished), from_any(finished / KOHYA)
    assert _same(patch, other) and other.metadata == patch.metadata
    assert cost["patch_sha256"] == patch.sha256()


def test_the_patch_carries_its_recipe_and_makes_itself_again(finished: Path, run: Runs) -> None:
    recipe = load_recipe(str(finished))
    assert recipe.to_yaml() == (finished / "recipe.yaml").read_text()
    again = run(recipe, file_formats=["diffusers"])
    assert [file.name for file in again.folder.glob("*.safetensors")] == [WEIGHTS]
    assert _same(finished, again.patch) and load_recipe(str(again.folder)) == recipe
    assert not _same(finished, run(recipe.with_overrides({"seed": 1}), "other").patch)


@pytest.mark.parametrize(
    ("formats", "told"), [(["kohya"], "always has the diffusers file"), (["diffuser"], "did you mean 'diffusers'")]
)
def test_file_formats_are_checked_first(formats: list[str], told: str, small: Small, run: Runs, tmp_path: Path) -> None:
    with pytest.raises(RecarePatchError, match=told):
        run(small(), file_formats=formats)
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize("states", ["rollout", "shared-rollout"])
def test_other_states_and_layers(small: Small, run: Runs, states: str) -> None:
    short = {"erase.steps": 2, "search.rounds": 0, "adapter.layers": "outside-cross-attention"}
    assert run(small(**short, **{"erase.states": states})).patch.tensors


def test_a_care_set_of_ones_own_is_used(small: Small, run: Runs, finished: Path) -> None:
    own = CareSet.load(finished / "care_set.json")
    own = own.with_removed(list(own.words[1:]))
    result = run(small(**{"erase.steps": 2}), care_set=own)
    assert result.care_set is not None and result.care_set.words == own.words


def test_unsafe_target_images_never_touch_the_disk(small: Small, run: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    write = stages.keep_tensors

    def watch(path: Path, *rest: Any) -> None:
        seen.append(Path(path).name)
        write(path, *rest)

    monkeypatch.setattr(stages, "keep_tensors", watch)
    run(small("esd", **{"concept.kind": "nsfw"}))
    assert not [name for name in seen if "images" in name]
    result = run(small("esd", **{"concept.kind": "nsfw"}), "q", save_target_images=True)
    assert len(list((result.folder / "target_images").glob("*.png"))) == 4
    assert [name for name in seen if "images" in name]


def test_killed_runs_resume_to_the_same_bits(small: Small, run: Runs, tmp_path: Path) -> None:
    """SIGKILL as soon as the last stage begins to checkpoint, then ``--resume``."""
    recipe = small(**{"erase.steps": 60, "search.rounds": 0})
    whole, out, file = run(recipe, "whole"), tmp_path / "killed", tmp_path / "recipe.yaml"
    file.write_text(recipe.to_yaml())
    command = [sys.executable, *f"-m recare_patch erase --recipe {file} --out {out} --device cpu".split()]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(command, env=environment, **quiet)  # type: ignore[call-overload]
    deadline = time.monotonic() + 180
    while not (out / RUN_FOLDER / "erase.checkpoint.safetensors").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / WEIGHTS).exists()
    subprocess.run([*command, "--resume"], env=environment, check=True, **quiet)
    assert _same(whole.patch, out)
    cost = json.loads((out / "training.json").read_text())
    assert all(cost[key] == whole.cost[key] for key in ("denoiser_evaluations", "losses"))


def test_what_a_kill_kept_from_being_booked_is_counted(small: Small, run: Runs, tmp_path: Path) -> None:
    """Between a stage's result and the line that books its cost there is room for a kill."""
    recipe, counting = small(), Killer(float("inf"))
    whole = erase(recipe, tmp_path / "whole", device="cpu", progress=counting)
    with pytest.raises(Killed):
        erase(recipe, tmp_path / "killed", device="cpu", progress=Killer(counting.seen - 1))
    work = tmp_path / "killed" / RUN_FOLDER
    assert kept_json(work / "cost.json")
    keep_json(work / "cost.json", {})
    resumed = erase(recipe, tmp_path / "killed", device="cpu", resume=True)
    counts = [{name: one["evaluations"] for name, one in each.cost["stages"].items()} for each in (whole, resumed)]
    assert counts[0] == counts[1]


def test_bad_input_is_one_sentence_and_leaves_nothing(
    tiny_sd: Path, tiny_clip: Path, tmp_path: Path, small: Small, finished: Path
) -> None:
    stopped = tmp_path / "c" / RUN_FOLDER
    stopped.mkdir(parents=True)
    (stopped / "recipe.yaml").write_text(small(seed=9).to_yaml())
    for recipe, folder, options, error, sentence in (
        (small_recipe(tiny_sd, tmp_path / "no-clip"), tmp_path / "a", {}, ClipError, "no-clip"),
        (small_recipe(tmp_path / "no-base", tiny_clip), tmp_path / "b", {}, RecarePatchError, "no-base"),
        (small(), finished, {}, OutputError, "patch"),
        (small(), finished, {"resume": True}, OutputError, "finished"),
        (small(), tmp_path / "c", {"resume": True}, ResumeError, "another recipe"),
    ):
        with pytest.raises(error, match=sentence):
            erase(recipe, folder, device="cpu", **options)
    assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists()


def test_a_layer_set_that_matches_nothing_fails_before_anything_is_drawn(
    base: BaseModel, small: Small, run: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing(denoiser: object, layers: str) -> list[str]:
        raise NoMatchingModuleError("no module matches")

    monkeypatch.setattr(lora, "target_modules", nothing)
    with pytest.raises(NoMatchingModuleError):
        run(small(), base=base)
    assert base.counter.total == 0 and not (tmp_path / "p").exists()


def test_generated_pairs_show_the_patch(finished: Path, tiny_sd: Path) -> None:
    prompts, shared = ["a cat", "stars"], {"steps": 2, "device": "cpu"}
    pairs = generate_pictures(str(tiny_sd), [(finished, 1.0)], prompts, [1, 2], **shared)  # type: ignore[arg-type]
    assert [(p.prompt, p.seed) for p in pairs] == [(text, seed) for text in prompts for seed in (1, 2)]
    alone = generate_pictures(str(tiny_sd), [], ["a cat"], [1], **shared)  # type: ignore[arg-type]
    # The batch size moves the last digits of a sum, and nothing else.
    one, other = np.asarray(alone[0].before, int), np.asarray(pairs[0].before, int)
    assert np.abs(one - other).max() <= 1
