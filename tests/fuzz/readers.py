"""Every reader of files that come from elsewhere, with sound files to start from."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from PIL import Image
from safetensors.torch import save

from recare_patch.careset import CareSet
from recare_patch.cli import base_of, several_concepts
from recare_patch.cli import patch as patch_commands
from recare_patch.combine import merging
from recare_patch.combine import stacking as composing
from recare_patch.core import PatchError, bundled, open_tensors, read_picture, read_safetensors_header
from recare_patch.erasure.methods.s_grace import read_words
from recare_patch.measure.attacks import load_about, load_attack
from recare_patch.measure.card import claimed_figures, with_evidence
from recare_patch.measure.evidence import Evidence
from recare_patch.measure.finding import find_eraser
from recare_patch.measure.integrity import check_integrity
from recare_patch.measure.prompts import read_prompts
from recare_patch.measure.report import write_report
from recare_patch.measure.suites import load_suite, parse_suite, subject_of, suites_folder
from recare_patch.measure.weights import Weights
from recare_patch.models import read_layout
from recare_patch.patch import CARD_NAME, EVIDENCE_NAME, Patch, concepts_of, write_kohya
from recare_patch.patch.card import card_text
from recare_patch.patch.kohya import to_kohya
from recare_patch.patch.metadata import Erased, PatchMetadata
from recare_patch.patch.reading import from_any
from recare_patch.recipe import WEIGHTS_NAME, Concept, Recipe, load_recipe, parse_assignment
from recare_patch.share import pulling
from tests.measure.test_evidence import make_evidence
from tests.patch.making import factors, write_patch

RECIPE = Recipe(concept={"text": "Van Gogh", "kind": "style"})  # type: ignore[arg-type]


@dataclass(frozen=True)
class Reader:
    """What is read, and how: ``read`` uses what a file holds as the package does."""

    name: str
    kind: Literal["safetensors", "json", "yaml", "text", "bytes"]
    seeds: tuple[bytes, ...]
    """Sound files."""
    read: Callable[[Path], object]
    place: str = "file"
    """The file's name in its folder."""
    share: float = 1.0
    """Of the mutations, for a slow one."""


CARE = CareSet.of_words(Concept(text="Van Gogh", kind="style"), ["stars", "night"])


def a_patch(concept: str = "Van Gogh", **changes: Any) -> Patch:
    """A patch of a few numbers."""
    values: dict[str, Any] = {
        "base": "atelier", "base_family": "stable-diffusion", "base_denoiser_sha256": "b" * 64,
        "prediction_type": "epsilon", "concept": concept, "kind": "style", "method": "recare",
        "layers": "cross-attention", "rank": 2, "alpha": 2.0, "seed": 0, "versions": {"torch": "2"},
        "recipe": RECIPE.to_yaml(), "care_set": CARE.to_json(),
    }  # fmt: skip
    tensors = factors("unet.mid_block.attentions.0.proj_in") | factors("unet.conv_in", rank=1)
    return Patch(tensors, PatchMetadata(**(values | changes)))


def a_whole_patch(concept: str = "Van Gogh") -> Patch:
    """One whose header, recipe and tensors agree."""
    about = Concept(text=concept, kind="style")
    recipe = Recipe(concept=about, adapter={"rank": 2, "alpha": 2.0})  # type: ignore[arg-type]
    care = CareSet.of_words(about, ["stars", "night"]).to_json()
    made = a_patch(concept, recipe=recipe.to_yaml(), care_set=care, layers=recipe.adapter.layers)
    layers = (f"unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_{part}" for part in "qkv")
    return Patch(factors(*layers), made.metadata)


def a_stack() -> Patch:
    """Two of them stacked."""
    return composing.stack([(a_patch(), 1.0), (a_patch("Monet"), 0.5)], dtype=torch.float16)


def _as_file(patch: Patch) -> bytes:
    assert patch.metadata is not None
    return save(dict(patch.tensors), {"format": "pt", **patch.metadata.to_header()})


def _foreign() -> tuple[bytes, ...]:
    old = factors("unet.mid_block.attentions.0.processor").items()
    text = "text_encoder.text_model.encoder.layers.0.mlp.fc1"
    settings = {"unet.r": 2, "unet.lora_alpha": 4, "unet.alpha_pattern": {"x": 1}}
    return (
        save(factors("base_model.model.mid_block.attentions.0.proj_in")),
        save({k.replace("lora_A", "to_q_lora.down").replace("lora_B", "to_q_lora.up"): t for k, t in old}),
        save(factors(text) | factors("unet.conv_in"), {"lora_adapter_metadata": json.dumps(settings)}),
        save({"lora_unet_conv_in.hada_w1_a": torch.ones(2, 2)}),
    )


def _patch(file: Path) -> None:
    patch = Patch.load(file)
    repr(patch), patch.ranks, patch.dtype, patch.sha256()
    if patch.metadata is not None:
        patch.metadata.to_header()
        for concept in concepts_of(patch):
            subject_of(patch, concept)
        card_text(patch.metadata, {})
    to_kohya(patch)


def _lora(file: Path) -> None:
    to_kohya(from_any(file))
    from_any(file, ["conv_in", "mid_block.attentions.0.proj_in"])


def _inspect(file: Path) -> None:
    header = read_safetensors_header(file)
    facts = patch_commands.described(file, header)
    json.dumps(facts)
    [patch_commands._in_words(value) for value in facts.values()]
    several_concepts(file)
    base_of([(file, 1.0)])
    load_recipe(str(file))


def _recipe(file: Path) -> None:
    recipe = load_recipe(str(file))
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    assert recipe.concept.slug and recipe.concept.name_prompts


def _suite(file: Path) -> None:
    suite = load_suite(file, concept="Monet", kind="style")
    assert parse_suite(suite.to_yaml()) == suite
    for which in ("plain", "retained", "neighbours"):
        suite.drawing(which, 5)


def _care(file: Path) -> None:
    found = CareSet.load(file)
    assert CareSet.from_json(found.to_json()) == found
    found.retain_prompts(), found.anchors()


def _evidence(file: Path) -> None:
    found = Evidence.load(file)
    assert Evidence.from_json(found.to_json()) == found
    with_evidence("", found)


def _card(file: Path) -> None:
    text = file.read_text(encoding="utf-8", errors="replace")
    claimed_figures(text)
    made = with_evidence(text, make_evidence())
    assert with_evidence(made, make_evidence()) == made


def _assignments(file: Path) -> None:
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        key, value = parse_assignment(line)
        RECIPE.with_overrides({key: value})


def _attack(file: Path) -> None:
    load_attack(file.parent)
    load_about(file.parent)


def _picture() -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((48, 32), 60).convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


def _base(file: Path) -> None:
    layout = read_layout(file.parent, "'it'")
    for part in layout.listed:
        assert (file.parent / part).resolve().parent == file.parent.resolve()
        layout.weight_sets(part)


def _there(file: Path) -> object:
    return pulling._there(file.parent, "me/x", "a" * 40)


def attack_file() -> bytes:
    """A saved attack without tensors."""
    about = {"concept": "Van Gogh", "patch_sha256": "a" * 64}
    trial = {"prompt": "a cat", "attacked": "a cat", "seed": 3}
    note = {
        "version": 1, "about": about, "attack": "ring-a-bell", "successes": 0, "trials": 1,
        "interval": [0.0, 0.8], "without": 0, "evaluations": 10, "seconds": 1.5, "budget": {"steps": 3},
        "details": [trial], "prompts": ["a cat"], "base": 0.9, "tensors": [],
    }  # fmt: skip
    return json.dumps(note).encode()


def _merge_record() -> bytes:
    part = a_patch().as_part(1.0)
    record = merging.MergeRecord(
        version="0", base="atelier", base_denoiser_sha256="b" * 64, merged_denoiser_sha256="c" * 64,
        patches=(part,), parts=(part,), rounding=1e-7,
    )  # fmt: skip
    return record.model_dump_json(exclude_none=True).encode()


_INDEX = json.dumps(
    {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"], "vae": [None, None]}
).encode()
_RECORD = json.dumps(
    {"repo": "me/x", "commit": "a" * 40, "files": {"model_index.json": {"bytes": 2, "sha256": "b" * 64}}}
).encode()


def _weights() -> tuple[bytes, ...]:
    """Whole, and the changed tensors alone."""
    whole = {"conv_in.weight": torch.ones(8, 4, 3, 3), "conv_in.bias": torch.ones(8), "to_k.weight": torch.ones(4, 8)}
    return save(whole), save({"unet.to_k.weight": torch.ones(4, 8)})


def _bundled(folder: Path) -> tuple[bytes, ...]:
    return tuple(path.read_bytes() for path in sorted(folder.glob("*.yaml")))[:6]


def _eraser(file: Path) -> None:
    """A stranger's weights, as far as a file can lie: what it is, where its tensors belong, what they hold."""
    found = find_eraser(str(file))
    if found.what in ("patch", "lora"):
        from_any(file)
        return
    network = torch.nn.Sequential()
    network.add_module("conv_in", torch.nn.Conv2d(4, 8, 3))
    network.add_module("to_k", torch.nn.Linear(8, 4, bias=False))
    eraser = Weights(str(file), {None: [file]})
    places = eraser._places({"unet": network}, "it")
    with open_tensors(file) as handle:
        assert all(stored.read(handle).shape == stored.shape for stored in places.values())


def readers() -> list[Reader]:
    """All of them."""
    patch, stack, foreign = a_patch(), a_stack(), _foreign()
    told = (Erased(concept="Van Gogh", kind="style", care_words=("stars",)), Erased(concept="Monet", kind="style"))
    ours = _as_file(patch), _as_file(stack), _as_file(a_patch(concepts=told))
    kohya = tuple(save(*to_kohya(one)) for one in (patch, stack))
    words = {"related": ["Van Gogh", "Vincent"], "unrelated": ["cat", "dog", "stars"]}
    recipes = (RECIPE.to_yaml().encode(), *_bundled(bundled("recipes"))[:3])
    card = with_evidence(card_text(patch.metadata, {}), make_evidence())
    assignments = b"erase.steps=50\nconcept.text=Van Gogh\nadapter={rank: 2}\nseed=1e-4\nnotes=\n"
    return [
        Reader("patch", "safetensors", (*ours, *foreign[:3]), _patch, "x.safetensors"),
        Reader("lora", "safetensors", (*kohya, *foreign), _lora, "x.safetensors"),
        Reader("eraser", "safetensors", (*kohya[:1], *_weights()), _eraser, "x.safetensors"),
        Reader("inspect", "safetensors", (*ours, *kohya), _inspect, "x.safetensors"),
        Reader("recipe", "yaml", recipes, _recipe, "x.yaml"),
        Reader("care-set", "json", (CARE.to_json().encode(),), _care),
        Reader("suite", "yaml", _bundled(suites_folder()), _suite, "x.yaml"),
        Reader("evidence", "json", (make_evidence().to_json().encode(),), _evidence),
        Reader("card", "text", (card.encode(), b"# A card without front matter\n"), _card, "README.md"),
        Reader("prompts", "text", (b"a cat\na dog\n",), read_prompts),
        Reader("words", "yaml", (yaml.safe_dump(words).encode(),), lambda file: read_words(str(file))),
        Reader("attack", "json", (attack_file(),), _attack, "attack.json"),
        Reader("merge record", "json", (_merge_record(),), lambda file: merging.MergeRecord.load(file.parent),
               merging.RECORD_NAME),
        Reader("peft settings", "json", (b'{"r": 2, "lora_alpha": 4, "alpha_pattern": {"x": 1}}',),
               lambda file: from_any(file.parent), "adapter_config.json"),
        Reader("assignment", "text", (assignments,), _assignments),
        Reader("report", "json", (make_evidence().to_json().encode(),),
               lambda file: write_report(Evidence.load(file), file.parent / "out"), share=0.05),
        Reader("picture", "bytes", (_picture(),), lambda file: read_picture(file, "it", PatchError), "x.png"),
        Reader("base", "json", (_INDEX,), _base, "model_index.json"),
        Reader("hub record", "json", (_RECORD,), _there, "hub.json"),
    ]  # fmt: skip


FOLDER_FILES = {
    EVIDENCE_NAME: "json", "training.json": "json", "recipe.yaml": "yaml", "care_set.json": "json",
    CARD_NAME: "text", "erase-van-gogh.safetensors": "safetensors", WEIGHTS_NAME: "safetensors",
    "stack/stack.yaml": "yaml", "stack/monet/evidence.json": "json",
}  # fmt: skip
"""What lies in a patch's folder, and in a stack's, as ``verify`` reads it."""


def a_folder(place: Path, concept: str = "Van Gogh") -> Path:
    """A whole patch folder with evidence, a stack's in it."""
    write_patch(place, a_whole_patch(concept), make_evidence(attacks=()))
    write_kohya(Patch.load(place), place)
    composing.save_stack(a_stack(), place / "stack")
    sha256 = Patch.load(place / "stack").sha256()
    of_stack = make_evidence(patch_sha256=sha256, concept="Monet", method="stack", attacks=())
    of_stack.save(place / "stack" / "monet" / EVIDENCE_NAME)
    return place


def read_folder(place: Path) -> None:
    """Both integrity checks."""
    check_integrity(place)
    check_integrity(place / "stack")
