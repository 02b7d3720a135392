"""A NaN put in on purpose at each stage: one sentence that says where and what helps, and nothing good is lost."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from recare_patch.core import NonFiniteError, NullProgress
from recare_patch.erasure import Checkpoint, EraseResult, Loop, erase, fit
from recare_patch.erasure.gauge import Gauge
from recare_patch.erasure.methods.adversaries import Adversaries
from recare_patch.erasure.methods.uce import UCE
from recare_patch.erasure.run import RUN_FOLDER
from recare_patch.erasure.stages import Ledger
from recare_patch.measure.pictures import Studio
from recare_patch.models import BaseModel, load_base
from recare_patch.recipe import Recipe

Small = Callable[..., Recipe]
Runs = Callable[..., EraseResult]
WEIGHTS = "pytorch_lora_weights.safetensors"


def _spoil(network: nn.Module, when: Callable[[], bool]) -> Any:
    """What a network returns is NaN at such times."""

    def hook(module: nn.Module, args: Any, made: Any) -> Any:
        if not when():
            return made
        return (made[0] * torch.nan,) if isinstance(made, tuple) else made * torch.nan

    return network.register_forward_hook(hook)


class _Where(NullProgress):
    """Where a run is: its stage, and the steps done of what reports them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.stages, self.reported, plain = [""], ("", 0), Ledger.stage

        @contextlib.contextmanager
        def stage(ledger: Ledger, name: str) -> Iterator[None]:
            self.stages.append(name)
            try:
                with plain(ledger, name):
                    yield
            finally:
                self.stages.pop()

        monkeypatch.setattr(Ledger, "stage", stage)

    def update(self, stage: str, done: int, total: int, note: str = "") -> None:
        self.reported = (stage, done)


DRAWN, LOSS = "the latents that base tiny-sd draws hold NaN", "the loss is NaN: try a lower learning rate"
TABLE = {
    "target images": (f"target images: {DRAWN}", {}),
    "other pictures": (f"other pictures: {DRAWN}", {"erase.ends": "measured"}),
    "retained images": (f"retained images: {DRAWN}", {}),
    "search 1 erase": (f"search 1 erase, step 1: {LOSS}", {}),
    "search 1 inversion": (f"search 1 inversion, step 1: {LOSS}", {}),
    "erase": (f"erase, step 1: {LOSS}", {}),
    "attack 1": ("attack 1: the loss of step 1 is NaN: try a lower learning rate", {"method": "s-grace"}),
    "preview": (f"preview: {DRAWN}", {"method": "esd"}),
}


@pytest.mark.parametrize("stage", TABLE)
def test_predictions_that_are_no_numbers(
    stage: str, base: BaseModel, small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (told, changes), where = TABLE[stage], _Where(monkeypatch)
    _spoil(base.denoiser, lambda: stage in (where.stages[-1], where.reported[0]) and where.reported != (stage, 4))
    with pytest.raises(NonFiniteError, match=f"^{re.escape(told)}") as caught:
        erase(small(**changes), tmp_path / "p", device="cpu", base=base, progress=where)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "p" / WEIGHTS).exists() and (tmp_path / "p" / RUN_FOLDER).exists()


def test_other_parts_that_give_no_numbers(
    base: BaseModel, small: Small, run: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    always, names = (lambda: True), iter("abcdef")

    def refused(told: str, method: str = "esd", **changes: Any) -> None:
        with pytest.raises(NonFiniteError, match=f"^{re.escape(told)}"):
            run(small(method, **changes), next(names), base=base)

    handle = _spoil(base.pipeline.vae.decoder, always)
    refused("target images: the pixels that the autoencoder of base tiny-sd makes hold NaN: the weights of the base")
    handle.remove()
    with monkeypatch.context() as patch:
        patch.setattr(base.pipeline, "encode_prompt", lambda texts, **more: (torch.full((1, 2), torch.nan), None))
        refused("target images: the prompt embeddings that base tiny-sd makes hold NaN")
    with monkeypatch.context() as patch:
        patch.setattr(UCE, "moments", lambda self: (torch.full((32, 32), torch.nan).double(),) * 2)
        refused("solve: the numbers that the closed form gives hold NaN", "uce")
    with monkeypatch.context() as patch:
        said = Adversaries._said
        patch.setattr(Adversaries, "_said", lambda self, *how: said(self, *how)._map(lambda rows: rows * torch.nan))
        refused("erase, step 1: the loss of an adversarial name is NaN", "recare", **{"adversary.count": 1})
    with monkeypatch.context() as patch:
        patch.setattr(Gauge, "_noised", lambda self, clean, generator: (clean * torch.nan, torch.zeros(8).long()))
        refused("erase, step 10: the predictions at a look are NaN", "recare", **{"erase.ends": "measured"})
    _spoil(base.denoiser, always)
    with pytest.raises(NonFiniteError, match=f"^base, plain: {DRAWN}"):
        Studio(base).draw(["a cat"], [1], steps=2, stage="base, plain")


def test_the_last_good_checkpoint_is_kept_and_gone_on_from(small: Small, tiny_sd: Path, tmp_path: Path) -> None:
    """Also in another precision, which the record says."""
    recipe = small("esd", **{"erase.steps": 24})
    options: dict[str, Any] = {"device": "cpu", "preview": False}
    whole = erase(recipe, tmp_path / "whole", **options)
    for name, precision in (("same", "fp32"), ("other", "bf16")):

        class Counting(NullProgress):
            done = 0

            def update(self, stage: str, done: int, total: int, note: str = "") -> None:
                self.done = done if stage == "erase" else 0

        base, progress = load_base(tiny_sd, device="cpu"), Counting()
        _spoil(base.denoiser, lambda progress=progress: progress.done == 21)
        with pytest.raises(NonFiniteError, match=r"^erase, step 22: the loss is NaN: .*; the checkpoint of step 20 is"):
            erase(recipe, tmp_path / name, base=base, progress=progress, **options)
        again = recipe.with_overrides({"precision": precision})
        found = erase(again, tmp_path / name, resume=True, **options)
        same = all(torch.equal(found.patch.tensors[key], one) for key, one in whole.patch.tensors.items())
        assert same == (name == "same") and found.cost["precision"] == precision
        assert ("it was begun in fp32, and gone on with in bf16" in found.warnings) != same


@pytest.mark.parametrize("rate", [1e-3, float("inf")])
def test_no_checkpoint_is_overwritten_with_what_is_no_number(tmp_path: Path, rate: float) -> None:
    weight, checkpoint = nn.Parameter(torch.ones(2)), Checkpoint(tmp_path / "c.safetensors")

    def loss_at(step: int, generator: torch.Generator) -> Tensor:
        return weight.sum() if step < 3 or rate > 1 else (weight - weight).sqrt().sum()

    def loop(steps: int, rate: float) -> Loop:
        return Loop("t", steps, rate, 0, "adamw", "constant", checkpoint=checkpoint, save_every=2)

    fit([weight], loss_at, loop(2, 1e-3))
    before = checkpoint.path.read_bytes()
    last, what = (3, "what was trained is") if rate > 1 else (4, "a gradient of the loss is")
    with pytest.raises(NonFiniteError, match=rf"^t, step {last}: {what} .*; the checkpoint of step 2 is kept$"):
        fit([weight], loss_at, loop(last, rate))
    assert checkpoint.path.read_bytes() == before


@pytest.mark.parametrize("given", [True, False])
def test_the_record_says_the_precision_really_used(
    given: bool, small: Small, run: Runs, tiny_sd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = load_base(tiny_sd, precision="fp16", device="cpu") if given else None
    monkeypatch.setattr("recare_patch.models.loading._has_bf16", lambda device: False)
    found = run(small("esd", **{"erase.steps": 2, "precision": "bf16"}), "p", base=base)
    assert found.cost["precision"] == "fp16"
    assert found.patch.metadata is not None and "precision: fp16" in str(found.patch.metadata.recipe)
    assert "precision: fp16" in (found.folder / "recipe.yaml").read_text()
