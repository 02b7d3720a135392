"""Patches that lie, by the thousand: whatever passes is true, as far as files can show it; run with ``-m fuzz``."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save

from recare_patch.core import read_safetensors_header
from recare_patch.measure import wilson_interval
from recare_patch.measure.claims import faults
from recare_patch.measure.evidence import Evidence
from recare_patch.measure.integrity import Integrity, check_integrity
from recare_patch.measure.verify import compare
from recare_patch.patch import EVIDENCE_NAME
from recare_patch.recipe import WEIGHTS_NAME
from tests.fuzz.mutating import as_json, forged, mutated_bytes
from tests.fuzz.readers import FOLDER_FILES, a_folder
from tests.fuzz.watching import LIES, Watch
from tests.measure.test_evidence import make_evidence

pytestmark = [
    pytest.mark.fuzz,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is limited as Linux does it"),
]


def _update(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What a loader makes of either file, in float64: layer → ``alpha / rank · B A``, by no code of the package."""
    found = {}
    for key, down in tensors.items():
        for side, (lower, upper) in {"A": ("lora_A", "lora_B"), "down": ("lora_down", "lora_up")}.items():
            if key.endswith(f"lora_{side}.weight"):
                name = key.removesuffix(f".lora_{side}.weight")
                alpha = tensors.get(f"{name}.alpha", torch.tensor(float(len(down))))
                up = tensors[key.replace(lower, upper)].double().flatten(1)
                short = name if name.startswith("lora_") else f"lora_{name}".replace(".", "_")
                found[short] = float(alpha) / len(down) * (up @ down.double().flatten(1))
    return found


def test_no_kohya_file_of_another_update_passes(watch: Watch, tmp_path: Path) -> None:
    """Values, alphas, ranks and names changed, as well-formed files: what passes is the patch's update."""
    place, rng = a_folder(tmp_path / "place"), random.Random(1)
    file, true = place / "erase-van-gogh.safetensors", _update(load_file(place / WEIGHTS_NAME))
    # Cloned: what safetensors loads is a window on the file, which is written over.
    sound = {key: tensor.clone() for key, tensor in load_file(file).items()}
    header, passed = read_safetensors_header(file).metadata, 0
    for _ in range(LIES):
        made, told = {key: tensor.clone() for key, tensor in sound.items()}, dict(header)
        for _ in range(rng.choice((1, 1, 2))):
            key = rng.choice(sorted(made))
            kind = rng.randrange(9)
            pair = [f"{key.split('.')[0]}.lora_{side}.weight" for side in ("down", "up")]
            if kind in (2, 7) and any(one not in made or made[one].shape != sound[one].shape for one in pair):
                continue  # The lie before took one of them away, or put another in its place.
            if kind == 0:
                made[key] = made[key] * rng.choice((0, -1, 2, 0.5, 1.001))
            elif kind == 1:
                made[key].view(-1)[rng.randrange(made[key].numel())] += rng.choice((1e-6, 0.1, 100))
            elif kind == 2:
                name = key.split(".")[0]
                a, b = made[f"{name}.lora_down.weight"], made[f"{name}.lora_up.weight"]
                made[f"{name}.lora_down.weight"] = torch.cat([a, a])
                made[f"{name}.lora_up.weight"] = torch.cat([b, rng.choice((0.0, -2.0)) * b], 1)
                made[f"{name}.alpha"] = torch.tensor(float(2 * len(a)))
                told["recare_patch_ranks"] = json.dumps({name: rng.choice((1, 2, len(a)))})
            elif kind == 3:
                other = rng.choice(sorted(made))
                made[key], made[other] = made[other], made[key]
            elif kind == 4:
                made[key.replace("lora_unet", rng.choice(("lora_te", "lora_unet_x")))] = made.pop(key)
            elif kind == 5:
                extra = rng.choice(("dora_scale", "scale", "diff", "lora_mid.weight"))
                made[f"{key.split('.')[0]}.{extra}"] = torch.ones(1)
            elif kind == 6:
                del made[key]
            elif kind == 7:
                # Other factors of the same update, which may pass.
                name = key.split(".")[0]
                made[f"{name}.lora_down.weight"] = made[f"{name}.lora_down.weight"] * 2
                made[f"{name}.lora_up.weight"] = made[f"{name}.lora_up.weight"] / 2
            else:
                made = {name: tensor.to(torch.float16) for name, tensor in made.items()}
        data = save({name: tensor.contiguous() for name, tensor in made.items()}, told)
        file.write_bytes(data)
        found: list[Integrity] = []
        watch.attempt("kohya file", data, lambda found=found: found.append(check_integrity(place)))
        if found and not any(one.about == "kohya file" for one in found[0].failed):
            passed += 1
            loaded = _update(load_file(file))
            assert loaded.keys() == true.keys()
            apart = [float((loaded[name] - true[name]).norm() / true[name].norm()) for name in true]
            assert max(apart) < 5e-3, (apart, data)
    assert passed > LIES // 50, "that some pass shows that not all are refused for another reason"


def test_no_forged_figure_passes(watch: Watch) -> None:
    """Against what measuring again gives: what passes lies within the verifier's own interval, counts too."""
    rng, passed = random.Random(2), 0
    true = make_evidence(suite={"name": "x", "concept": "Van Gogh", "kind": "style"}, checks=())
    sound = json.loads(true.to_json())
    for _ in range(LIES * 2):
        data = as_json(forged(rng, sound, wilson_interval))
        found: list[Evidence] = []
        watch.attempt("figures", data, lambda data=data, found=found: found.append(Evidence.from_json(data.decode())))
        if not found or faults(found[0]):
            continue
        names = [one.name for one in found[0].figures]
        if any(one.holds is False for one in compare(found[0], true, names)):
            continue
        passed += 1
        for one in found[0].figures:
            own = true.figure(one.name)
            same = ("group", "metric", "detector", "better", "unit", "pictures")
            assert all(getattr(one, key) == getattr(own, key) for key in same), data
            for value, mean in ((one.patched, own.patched), (one.base, own.base)):
                low, high = (
                    (mean, mean) if mean is None or own.unit != "rate" else wilson_interval(round(200 * mean), 200)
                )
                assert value == mean or (low is not None and low <= value <= high) or abs(value - mean) < 2e-4, data
        for attack in found[0].attacks:
            low, high = wilson_interval(3, 40)
            assert attack.trials == 40 and low <= attack.rate <= high, data
    assert passed > LIES // 50


def test_no_header_of_another_recipe_passes(watch: Watch, tmp_path: Path) -> None:
    """The header changed, with all hashes put right: what passes says what its own recipe and the tensors say."""
    place, rng = a_folder(tmp_path / "place"), random.Random(3)
    weights = place / WEIGHTS_NAME
    tensors = {key: tensor.clone() for key, tensor in load_file(weights).items()}
    header = read_safetensors_header(weights).metadata
    for name in ("erase-van-gogh.safetensors", "README.md", "evidence.json"):
        (place / name).unlink()
    ours = sorted(key for key in header if key.startswith("recare_patch."))
    odd = (
        "Monet",
        "nudity",
        "style",
        "nsfw",
        "uce",
        "esd",
        "all",
        "7",
        "2",
        "128",
        "2.0",
        "0",
        "-1",
        "atelier",
        "x/y",
        "[]",
        "null",
    )
    for _ in range(LIES):
        told = dict(header)
        for _ in range(rng.choice((1, 1, 2, 4))):
            key = rng.choice(ours)
            text = told[key]
            told[key] = (
                rng.choice(odd)
                if rng.random() < 0.7
                else mutated_bytes(rng, text.encode(), [b"x"]).decode("utf-8", "replace")
            )
        if rng.random() < 0.5:
            # A recipe of its own, which is sound as well.
            word, other = rng.choice(
                (("Van Gogh", "Monet"), ("style", "object"), ("seed: 0", "seed: 7"), ("rank: 4", "rank: 2"))
            )
            told["recare_patch.recipe"] = header["recare_patch.recipe"].replace(word, other)
        data = save(tensors, told)
        weights.write_bytes(data)
        (place / "training.json").write_text(json.dumps({"patch_sha256": hashlib.sha256(data).hexdigest()}))
        (place / "recipe.yaml").write_text(told["recare_patch.recipe"], newline="")
        found: list[Integrity] = []
        watch.attempt("header", data, lambda found=found: found.append(check_integrity(place)))
        if found and found[0].holds:
            patch = found[0].patch
            assert patch is not None and patch.metadata is not None
            about, recipe = patch.metadata, patch.metadata.parsed_recipe
            pairs = [
                (about.concept, recipe.title), (about.kind, recipe.concept.kind), (about.method, recipe.method),
                (about.layers, recipe.adapter.layers), (about.seed, recipe.seed), (about.alpha, recipe.adapter.alpha),
                (about.rank, recipe.adapter.rank), ({about.rank}, set(patch.ranks.values())), (about.base, recipe.base),
            ]  # fmt: skip
            assert all(one == other for one, other in pairs), pairs


def test_files_that_are_swapped(watch: Watch, tmp_path: Path) -> None:
    """Every file of a folder in the place of every other, and those of another patch: none passes as it was."""
    sound, other = a_folder(tmp_path / "sound"), a_folder(tmp_path / "other", concept="Monet")
    place = shutil.copytree(sound, tmp_path / "place")
    names = [name for name in FOLDER_FILES if "/" not in name]
    for name in names:
        for source in (*(sound / one for one in names if one != name), *(other / one for one in names)):
            if not source.exists() or source.read_bytes() == (sound / name).read_bytes():
                continue
            if name == "training.json" and source == sound / EVIDENCE_NAME:
                # It records the same hash, and nobody can check what a run is said to have cost.
                continue
            shutil.copyfile(source, place / name)
            found: list[Integrity] = []
            watch.attempt("swapped", name.encode(), lambda found=found: found.append(check_integrity(place)))
            # A card of other words claims no figures, which is no lie.
            about = {one.about: one.told for one in found[0].findings} if found else {}
            assert not found or not found[0].holds or about["card"] == "claims no figures", (name, source)
        shutil.copyfile(sound / name, place / name)
    assert check_integrity(place).holds
