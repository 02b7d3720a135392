"""Patches that change the text encoder: everywhere a patch of the denoiser goes, they go as well."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from recare_patch.cli import cli
from recare_patch.combine import merging
from recare_patch.core import EvaluationError, IncompatiblePatchError
from recare_patch.measure.checks.fine_tuning import changed, merge_into
from recare_patch.measure.pictures import Studio
from recare_patch.models import load_base
from recare_patch.models import lora as adapters
from recare_patch.patch import Patch
from tests.patch.making import PROMPTS, SEEDS, difference, trained
from tests.tiny import make_tiny_sd


def test_off_is_the_teacher(tiny_sd: Path) -> None:
    before = load_base(tiny_sd, device="cpu").encode_prompts(PROMPTS).prompt_embeds
    base, _ = trained(tiny_sd, layers="text-encoder")
    networks = tuple(base.components.values())
    embeds = base.encode_prompts(PROMPTS).prompt_embeds
    assert (embeds - before).abs().max() > 0.1
    with adapters.off(*networks):
        assert torch.equal(base.encode_prompts(PROMPTS).prompt_embeds, before)
    assert torch.equal(base.encode_prompts(PROMPTS).prompt_embeds, embeds)
    with adapters.frozen(*networks):
        assert not any(p.requires_grad for network in networks for p in network.parameters())
    adapters.detach(base.components["text_encoder"])
    assert torch.equal(base.encode_prompts(PROMPTS).prompt_embeds, before)


def test_merged_and_taken_out_again(text_patch: Patch, patch: Patch, tiny_sd: Path, tmp_path: Path) -> None:
    patches = [(text_patch, 1.0), (patch, 0.5)]
    record = merging.merge(patches, tiny_sd, tmp_path / "m")
    assert record.base_text_encoders_sha256 != record.merged_text_encoders_sha256
    assert merging.compare(patches, tiny_sd, tmp_path / "m", steps=2) <= 1
    assert merging.MergeRecord.load(tmp_path / "m") == record
    back = merging.unmerge(tmp_path / "m", [text_patch, patch], tmp_path / "u", base=tiny_sd)
    assert back.max_difference is not None and back.max_difference < 1e-6
    # Another denoiser behind the same text encoder.
    sibling = make_tiny_sd(tmp_path / "tiny-sibling", seed=7)
    shutil.copytree(tiny_sd / "text_encoder", sibling / "text_encoder", dirs_exist_ok=True)
    merging.merge([(text_patch, 1.0)], sibling, tmp_path / "s")
    with pytest.raises(IncompatiblePatchError, match=r"'Van Gogh' .* the denoiser of base 'tiny-sibling'"):
        merging.merge(patches, sibling, tmp_path / "t")


def test_merged_in_memory_and_inspected(text_patch: Patch, tiny_sd: Path, tmp_path: Path) -> None:
    base = load_base(tiny_sd, device="cpu")
    before = base.encode_prompts(PROMPTS).prompt_embeds
    with text_patch.apply(base.pipeline, scale=0.5):
        applied = base.encode_prompts(PROMPTS).prompt_embeds
    with changed(base.components["text_encoder"]):
        merge_into(base.components, text_patch, 0.5)
        torch.testing.assert_close(base.encode_prompts(PROMPTS).prompt_embeds, applied)
    assert torch.equal(base.encode_prompts(PROMPTS).prompt_embeds, before)
    text_patch.save(tmp_path / "p")
    facts = json.loads(CliRunner().invoke(cli, ["inspect", str(tmp_path / "p"), "--json"]).stdout)
    assert facts["parts"] == {"text_encoder": 12} and facts["layers"] == "text-encoder"


def test_pictures_of_a_patched_encoder_are_told_from_the_base(text_patch: Patch, tiny_sd: Path) -> None:
    base = load_base(tiny_sd, device="cpu")
    with text_patch.apply(base.pipeline), pytest.raises(EvaluationError, match="is switched on"):
        Studio(base)
    studio = Studio(base)
    first, second = (studio.draw(PROMPTS, SEEDS, steps=2, patches=p) for p in ([], [(text_patch, 1.0)]))
    assert difference(first, second) > 20
