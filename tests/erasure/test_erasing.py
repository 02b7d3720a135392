"""The whole run on tiny random models: files, cost, resume after a kill, bad input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from recare_patch.careset import CareSet
from recare_patch.core.errors import (
    ClipError,
    NoMatchingModuleError,
    OutputError,
    RecarePatchError,
    ResumeError,
)
from recare_patch.erasure.run import RUN_FOLDER, erase, generate_pictures, resolve_recipe
from recare_patch.models.loading import load_base
from recare_patch.patch.patch import Patch
from recare_patch.patch.reading import from_any
from recare_patch.recipe.concept import Concept
from recare_patch.recipe.recipe import Recipe, load_recipe

SMALL = {
    "target_images.count": 4,
    "target_images.steps": 2,
    "target_images.batch_size": 2,
    "search.rounds": 1,
    "search.erase_steps": 3,
    "search.inversion_steps": 3,
    "search.batch_size": 2,
    "erase.steps": 6,
    "erase.batch_size": 2,
    "erase.retain_batch_size": 2,
    "erase.retained_pairs": 1,
    "erase.retained_images": 3,
    "erase.retained_vocabulary": 4,
    "adapter.rank": 2,
    "adapter.alpha": 1.0,
}


def _recipe(base: Path, clip: Path, *, kind: str = "style", **changes: object) -> Recipe:
    plain = Recipe(concept=Concept(text="Van Gogh", kind=kind), base=str(base), clip=str(clip))  # type: ignore[arg-type]
    return plain.with_overrides(
        {**SMALL, "care_set.clustering": False, "care_set.refinement": False, **changes}
    )


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "pytorch_lora_weights.safetensors")


@pytest.fixture(scope="module")
def finished(tiny_sd: Path, tiny_clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("erase") / "patch"
    erase(_recipe(tiny_sd, tiny_clip), out, device="cpu")
    return out


def test_a_run_leaves_a_whole_patch_and_nothing_else(finished: Path) -> None:
    names = sorted(p.name for p in finished.iterdir())
    assert names == [
        "README.md",
        "care_set.json",
        "erase-van-gogh.safetensors",
        "preview.png",
        "pytorch_lora_weights.safetensors",
        "recipe.yaml",
        "training.json",
    ]
    cost = json.loads((finished / "training.json").read_text())
    assert set(cost["stages"]) == {
        "target images",
        "CARE-set",
        "search 1 erase",
        "search 1 inversion",
        "search 1 check",
        "retained images",
        "erase",
    }
    # 4 pictures of 2 steps, both halves of the guidance.
    assert cost["stages"]["target images"]["evaluations"] == 16
    # 3 steps of 2 states: one frozen sample, and a trained one that counts three times.
    assert cost["stages"]["search 1 erase"]["evaluations"] == 3 * 2 * (1 + 3)
    assert cost["stages"]["search 1 inversion"]["evaluations"] == 3 * 2 * 3
    # Erased rows: ∅, anchor, one name, and a trained sample; retained rows: one frozen, one trained.
    assert cost["stages"]["erase"]["evaluations"] == 6 * (2 * (3 + 3) + 2 * (1 + 3))
    assert cost["denoiser_evaluations"] == sum(s["evaluations"] for s in cost["stages"].values())
    assert len(cost["losses"]["erase"]) == 6
    assert cost["peak_memory_bytes"] > 0


def test_the_patch_carries_its_recipe_and_makes_itself_again(finished: Path, tmp_path: Path) -> None:
    recipe = load_recipe(str(finished))
    assert recipe.to_yaml() == (finished / "recipe.yaml").read_text()
    erase(recipe, tmp_path / "again", device="cpu")
    first, second = _tensors(finished), _tensors(tmp_path / "again")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_the_file_for_other_tools_holds_the_same(finished: Path, tiny_sd: Path, tiny_clip: Path) -> None:
    """One run, two files: the patch's own hash is the recorded one, and the other says the same."""
    patch, other = Patch.load(finished), from_any(finished / "erase-van-gogh.safetensors")
    assert patch.tensors.keys() == other.tensors.keys()
    assert all(torch.equal(tensor, other.tensors[key]) for key, tensor in patch.tensors.items())
    assert other.metadata == patch.metadata
    assert json.loads((finished / "training.json").read_text())["patch_sha256"] == patch.sha256()


def test_one_file_alone_is_the_same_patch(
    finished: Path, tiny_sd: Path, tiny_clip: Path, tmp_path: Path
) -> None:
    erase(_recipe(tiny_sd, tiny_clip), tmp_path / "p", device="cpu", file_formats=["diffusers"])
    assert [file.name for file in (tmp_path / "p").glob("*.safetensors")] == [
        "pytorch_lora_weights.safetensors"
    ]
    alone, both = _tensors(tmp_path / "p"), _tensors(finished)
    assert alone.keys() == both.keys() and all(torch.equal(alone[key], both[key]) for key in both)
    assert load_recipe(str(tmp_path / "p")).hash == load_recipe(str(finished)).hash
    for wrong, told in (
        (["kohya"], "always has the diffusers file"),
        (["diffuser"], "did you mean 'diffusers'"),
    ):
        with pytest.raises(RecarePatchError, match=told):
            erase(_recipe(tiny_sd, tiny_clip), tmp_path / "q", device="cpu", file_formats=wrong)
    assert not (tmp_path / "q").exists()


def test_another_seed_makes_another_patch(finished: Path, tmp_path: Path) -> None:
    recipe = load_recipe(str(finished)).with_overrides({"seed": 1})
    erase(recipe, tmp_path / "other", device="cpu")
    first, second = _tensors(finished), _tensors(tmp_path / "other")
    assert any(not torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize("states", ["rollout", "shared-rollout"])
def test_other_states_and_layers(tiny_sd: Path, tiny_clip: Path, tmp_path: Path, states: str) -> None:
    changes = {
        "erase.states": states,
        "adapter.layers": "outside-cross-attention",
        "erase.steps": 2,
        "search.rounds": 0,
    }
    result = erase(_recipe(tiny_sd, tiny_clip, **changes), tmp_path / "p", device="cpu")
    assert result.patch.tensors


def test_esd_needs_no_care_set(tiny_sd: Path, tiny_clip: Path, tmp_path: Path) -> None:
    result = erase(_recipe(tiny_sd, tiny_clip, method="esd"), tmp_path / "p", device="cpu")
    assert result.care_set is None
    assert not (tmp_path / "p" / "care_set.json").exists()


def test_v_prediction_and_other_sizes_run_unchanged(tiny_sd_v: Path, tiny_clip: Path, tmp_path: Path) -> None:
    result = erase(_recipe(tiny_sd_v, tiny_clip), tmp_path / "p", device="cpu")
    base = load_base(str(tiny_sd_v), device="cpu")
    with Patch.load(tmp_path / "p").apply(base.pipeline):
        pass
    assert all(torch.isfinite(t).all() for t in result.patch.tensors.values())


def test_a_care_set_of_ones_own_is_used(
    tiny_sd: Path, tiny_clip: Path, tmp_path: Path, finished: Path
) -> None:
    own = CareSet.load(finished / "care_set.json")
    own = own.with_removed(list(own.words[1:]))
    result = erase(_recipe(tiny_sd, tiny_clip), tmp_path / "p", device="cpu", care_set=own)
    assert result.care_set is not None and result.care_set.words == own.words


def test_unsafe_target_images_never_touch_the_disk(
    tiny_sd: Path, tiny_clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from recare_patch.erasure import run as erasing
    from recare_patch.erasure import stages as run

    seen: list[str] = []
    write = run.write_tensors

    def watch(path: Path, tensors: object, metadata: object) -> None:
        seen.append(Path(path).name)
        write(path, tensors, metadata)  # type: ignore[arg-type]

    for module in (erasing, run):
        monkeypatch.setattr(module, "write_tensors", watch)
    erase(_recipe(tiny_sd, tiny_clip, kind="nsfw"), tmp_path / "p", device="cpu")
    assert not [name for name in seen if "images" in name]
    erase(_recipe(tiny_sd, tiny_clip, kind="nsfw"), tmp_path / "q", device="cpu", save_target_images=True)
    assert len(list((tmp_path / "q" / "target_images").glob("*.png"))) == 4


def test_killed_runs_resume_to_the_same_bits(
    finished: Path, tiny_sd: Path, tiny_clip: Path, tmp_path: Path
) -> None:
    """SIGKILL as soon as the last stage begins to checkpoint, then ``--resume``."""
    recipe = _recipe(tiny_sd, tiny_clip, **{"erase.steps": 120})
    erase(recipe, tmp_path / "whole", device="cpu")
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe.to_yaml())
    out = tmp_path / "killed"
    command = [
        sys.executable,
        "-m",
        "recare_patch",
        "erase",
        "--recipe",
        str(file),
        "--out",
        str(out),
        "--device",
        "cpu",
    ]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 180
    while not (out / RUN_FOLDER / "erase.checkpoint.safetensors").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "pytorch_lora_weights.safetensors").exists()
    done = subprocess.run(
        [*command, "--resume"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    whole, resumed = _tensors(tmp_path / "whole"), _tensors(out)
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)
    a, b = (json.loads((p / "training.json").read_text()) for p in (tmp_path / "whole", out))
    assert a["denoiser_evaluations"] == b["denoiser_evaluations"]
    assert a["losses"] == b["losses"]


def test_bad_input_is_one_sentence_and_leaves_nothing(
    tiny_sd: Path, tiny_clip: Path, tmp_path: Path, finished: Path
) -> None:
    with pytest.raises(ClipError):
        erase(_recipe(tiny_sd, tmp_path / "no-clip"), tmp_path / "a", device="cpu")
    assert not (tmp_path / "a" / "pytorch_lora_weights.safetensors").exists()
    with pytest.raises(OutputError):
        erase(_recipe(tiny_sd, tiny_clip), finished, device="cpu")
    with pytest.raises(OutputError, match="finished"):
        erase(_recipe(tiny_sd, tiny_clip), finished, device="cpu", resume=True)
    with pytest.raises(RecarePatchError):
        erase(_recipe(tmp_path / "no-base", tiny_clip), tmp_path / "b", device="cpu")
    assert not (tmp_path / "b").exists()
    work = tmp_path / "c" / RUN_FOLDER
    work.mkdir(parents=True)
    (work / "recipe.yaml").write_text(_recipe(tiny_sd, tiny_clip, seed=9).to_yaml())
    with pytest.raises(ResumeError, match="another recipe"):
        erase(_recipe(tiny_sd, tiny_clip), tmp_path / "c", device="cpu", resume=True)


def test_a_layer_set_that_matches_nothing_fails_before_anything_is_drawn(
    tiny_sd: Path, tiny_clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = load_base(str(tiny_sd), device="cpu")
    from recare_patch.models import lora as adapters

    def nothing(denoiser: object, layers: str) -> list[str]:
        raise NoMatchingModuleError("no module matches")

    monkeypatch.setattr(adapters, "target_modules", nothing)
    with pytest.raises(NoMatchingModuleError):
        erase(_recipe(tiny_sd, tiny_clip), tmp_path / "d", base=base, device="cpu")
    assert base.counter.total == 0 and not (tmp_path / "d").exists()


def test_generated_pairs_show_the_patch(finished: Path, tiny_sd: Path) -> None:
    pairs = generate_pictures(
        str(tiny_sd), [(finished, 1.0)], ["a cat", "stars"], [1, 2], steps=2, device="cpu"
    )
    assert [(p.prompt, p.seed) for p in pairs] == [("a cat", 1), ("a cat", 2), ("stars", 1), ("stars", 2)]
    alone = generate_pictures(str(tiny_sd), [], ["a cat"], [1], steps=2, device="cpu")
    # The batch size moves the last digits of a sum, and nothing else.
    one, other = np.asarray(alone[0].before, int), np.asarray(pairs[0].before, int)
    assert np.abs(one - other).max() <= 1


def test_recipes_are_found_in_any_case() -> None:
    assert resolve_recipe("van GOGH").concept.kind == "style"
    assert resolve_recipe("Tench").concept.kind == "object"
    assert resolve_recipe("nudity").concept.kind == "nsfw"
