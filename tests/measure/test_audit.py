"""Audits: erasers of every make on tiny random models, what is refused, and what stands side by side."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from recare_patch.core import EvaluationError, IncompatiblePatchError, RecarePatchError
from recare_patch.measure.attacks import attack_options
from recare_patch.measure.audit import audit, table, verdict, verify_audit
from recare_patch.measure.checks.fine_tuning import FineTuning, FineTuningOptions
from recare_patch.measure.checks.protocol import CheckContext
from recare_patch.measure.erasers import Defence
from recare_patch.measure.evidence import Evidence
from recare_patch.measure.finding import find_eraser
from recare_patch.measure.names import DEFENCES
from recare_patch.measure.pictures import Studio
from recare_patch.measure.suites import Suite
from recare_patch.models import BaseModel, find_layout, load_base
from recare_patch.patch import Patch, write_kohya, write_single_file
from recare_patch.recipe import Concept
from tests.measure.making import SUITE, make_patch
from tests.measure.test_evidence import make_evidence, make_figure, wilson

CONCEPT = Concept(text="Van Gogh", kind="style")
UNET, TEXT = "unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"
Tensors = dict[str, torch.Tensor]


@contextlib.contextmanager
def halved(pipe: Any, concept: Concept, strength: float = 0.5) -> Iterator[None]:
    """A defence that weakens what the denoiser reads."""

    def hook(module: Any, args: Any, kwargs: Any) -> Any:
        return args, {**kwargs, "encoder_hidden_states": strength * kwargs["encoder_hidden_states"]}

    handle = pipe.unet.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


class Anything:
    """Sees everything in every picture that is not dark: of noise no real detector says anything."""

    name = "anything"

    def labels(self) -> tuple[str, ...]:
        return ()

    def rate(self, images: Sequence[Any], label: str) -> list[bool]:
        return [bool(np.asarray(image).mean() > 100) for image in images]


class EveryOther(Anything):
    """Sees everything in every other picture."""

    def rate(self, images: Sequence[Any], label: str) -> list[bool]:
        return [number % 2 == 0 for number in range(len(images))]


def faulty(pipe: Any, concept: Concept) -> Any:
    raise KeyError("its own fault")


@pytest.fixture(autouse=True)
def defences(monkeypatch: pytest.MonkeyPatch, one_thread: None, tmp_path: Path) -> None:
    targets = {"halved": f"{__name__}:halved", "faulty": f"{__name__}:faulty"}
    monkeypatch.setattr(DEFENCES, "targets", targets)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))


def changed(tensors: Tensors, mark: str) -> Tensors:
    """Some weights otherwise, as a training leaves them."""
    generator = torch.Generator().manual_seed(3)
    return {
        key: one + 0.5 * torch.randn(one.shape, generator=generator) if mark in key and one.ndim == 2 else one
        for key, one in tensors.items()
    }


@pytest.fixture(scope="module")
def made(tiny_sd: Path, base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Erasers of every make, in the shapes that releases have."""
    place = tmp_path_factory.mktemp("erasers")
    unet, text = changed(load_file(tiny_sd / UNET), "attn2"), changed(load_file(tiny_sd / TEXT), "mlp")
    save_file(unet, place / "whole.safetensors")
    # As ESD's and UCE's code saves them: the changed ones alone.
    save_file({key: one for key, one in unet.items() if "attn2" in key}, place / "partial.safetensors")
    save_file({f"module.{key}": one for key, one in unet.items()}, place / "wrapped.safetensors")
    plain = {key.removeprefix("text_model."): one for key, one in text.items()}
    save_file({f"text_model.{key}": one for key, one in plain.items()}, place / "text.safetensors")
    shutil.copytree(tiny_sd / "text_encoder", place / "text-folder")
    save_file(plain, place / "text-folder" / "model.safetensors")
    shutil.copytree(tiny_sd / "unet", place / "unet-folder")
    save_file(unet, place / "unet-folder" / "diffusion_pytorch_model.safetensors")
    shutil.copytree(tiny_sd, place / "pipeline")
    save_file(unet, place / "pipeline" / UNET)
    save_file(text, place / "pipeline" / TEXT)
    write_single_file(find_layout(place / "pipeline")[0], place / "original.safetensors", {})
    patch = Patch.load(make_patch(base, place / "patch"))
    write_kohya(Patch(patch.tensors), place / "kohya.safetensors")
    return place


def predicted(base: BaseModel, prompt: str = "a painting by van gogh") -> torch.Tensor:
    latents = torch.randn((1, *base.latent_shape), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return base.denoise(latents, torch.tensor([300]), base.encode_prompts([prompt]))


@pytest.mark.parametrize(
    ("name", "what", "changes"),
    [
        ("whole.safetensors", "weights", ("unet",)),
        ("partial.safetensors", "weights", ("unet",)),
        ("wrapped.safetensors", "weights", ("unet",)),
        ("unet-folder", "weights", ("unet",)),
        ("text.safetensors", "weights", ("text_encoder",)),
        ("text-folder", "weights", ("text_encoder",)),
        ("pipeline", "pipeline", ("unet", "text_encoder")),
        ("original.safetensors", "pipeline", ("unet", "text_encoder")),
    ],
)
def test_weights_stand_in_the_base_s_place(
    made: Path, base: BaseModel, tiny_sd: Path, tmp_path: Path, name: str, what: str, changes: tuple[str, ...]
) -> None:
    found = find_eraser(str(made / name))
    eraser: Any = found.opened(base, CONCEPT)
    assert found.what == what and eraser.check_base(base) is False
    # A pipeline with these very networks draws the same.
    folder = Path(shutil.copytree(tiny_sd, tmp_path / "other"))
    for part in changes:
        file = UNET if part == "unet" else TEXT
        shutil.copy(made / "pipeline" / file, folder / file)
    wanted, plain = predicted(load_base(folder, device="cpu")), predicted(base)
    with eraser.apply(base.pipeline) as applied:
        assert torch.equal(predicted(base), wanted) and not torch.equal(wanted, plain)
        with applied.off():
            assert torch.equal(predicted(base), plain)
        assert torch.equal(predicted(base), wanted)
    assert torch.equal(predicted(base), plain)
    assert eraser.changes == changes
    with eraser.apply(base.pipeline, scale=0):
        assert torch.equal(predicted(base), plain)


def test_a_defence_is_on_for_drawing_and_for_gradients(base: BaseModel) -> None:
    plain = predicted(base)
    eraser = find_eraser("defence:halved:strength=0.25").opened(base, CONCEPT)
    with eraser.apply(base.pipeline) as applied:
        assert not torch.equal(predicted(base), plain)
        with applied.off():
            assert torch.equal(predicted(base), plain)
        assert not torch.equal(predicted(base), plain)
    assert torch.equal(predicted(base), plain)
    other = Defence.named("halved", CONCEPT)
    assert other.sha256() == Defence.named("halved", CONCEPT).sha256() != eraser.sha256()


def test_an_audit_puts_all_side_by_side(
    made: Path, base: BaseModel, tiny_sd: Path, tiny_clip: Path, tmp_path: Path
) -> None:
    names = ("partial.safetensors", "text-folder", "kohya.safetensors", "patch", "pipeline")
    sources = [*(str(made / name) for name in names), "defence:halved", f"untouched={tiny_sd}"]
    how: dict[str, Any] = {"base": base, "clip": str(tiny_clip), "out": tmp_path / "audit", "device": "cpu"}
    options = {"suite": Suite(**SUITE), "pictures": 4, "metrics": ["concept-rate", "kid"]}
    options["detector"] = Anything()
    found = audit(sources, **how, **options)
    told = json.loads((tmp_path / "audit" / "audit.json").read_text())
    assert (told["kind"], len(told["erasers"])) == ("audit", len(sources))
    assert [one["evidence"]["audited"]["what"] for one in told["erasers"]] == [
        *("weights", "weights", "lora", "patch", "pipeline", "defence", "pipeline")
    ]
    last = found.evidence[-1]
    assert last.audited is not None and last.audited.changes == () and "base's own" in last.audited.note
    assert all(one.patched == one.base for one in last.figures if one.unit == "rate")
    rows = table(found)
    assert rows[0][1:] == ["base", "partial", "text-folder", "kohya", "patch", "pipeline", "halved", "untouched"]
    assert all(len(row) == 9 for row in rows) and "(" in rows[2][1]
    page = (tmp_path / "audit" / "audit.html").read_text()
    assert page.count("<tr>") == 9 and 'href="text-folder/report.html"' in page and str(tmp_path) not in page
    report = (tmp_path / "audit" / "partial" / "report.html").read_text()
    assert "Audit of weights" in report and "recare-patch audit FOLDER --verify" in report
    for one in found.evidence:
        assert one.audited is not None
        assert Evidence.load(tmp_path / "audit" / one.audited.name) == one
    short = {"steps": 1, "images": 2, "pictures": 2}
    attacks = {"concept-inversion": attack_options("concept-inversion", "small", short)}
    # An audit that ran once draws nothing the second time, and attacks go on where they are.
    second = audit(sources[:1], **how, **options, attacks=attacks)
    assert second.evidence[0].cost["pictures_drawn"] == 0
    assert second.evidence[0].figures == found.evidence[0].figures
    assert second.evidence[0].attacks[0].trials == 2


def test_an_audit_is_measured_again(made: Path, base: BaseModel, tiny_clip: Path, tmp_path: Path) -> None:
    how: dict[str, Any] = {"base": base, "clip": str(tiny_clip), "out": tmp_path / "audit", "device": "cpu"}
    source = str(made / "partial.safetensors")
    audit([source], **how, suite=Suite(**SUITE), pictures=4, metrics=["concept-rate"])
    assert verify_audit([source], **how).holds
    file = tmp_path / "audit" / "partial" / "evidence.json"
    evidence = Evidence.load(file)
    wrong = evidence.figures[0].model_copy(update={"patched": 0.0, "interval": wilson(0, 4), "base": 1.0,
                                                   "base_interval": wilson(4, 4), "by": ()})  # fmt: skip
    evidence.model_copy(update={"figures": (wrong,)}).save(file)
    assert not verify_audit([source], **how).holds
    # Evidence on another file says nothing of this one.
    (failed,) = verify_audit([f"partial={made / 'whole.safetensors'}"], **how).failed
    assert failed.about == "partial: hash"
    with pytest.raises(RecarePatchError, match="holds no evidence on 'text'"):
        verify_audit([str(made / "text.safetensors")], **how)


@pytest.mark.parametrize(
    ("base_hits", "hits", "word"),
    [(40, 0, "erased"), (40, 2, "erased"), (40, 12, "weakened"), (40, 39, "not erased"), (0, 0, "not known")],
)
def test_the_verdict(base_hits: int, hits: int, word: str) -> None:
    rates = {"base": base_hits / 40, "base_interval": wilson(base_hits, 40)}
    figure = make_figure(patched=hits / 40, interval=wilson(hits, 40), pictures=40, by=(), **rates)
    assert verdict(make_evidence(figures=(figure,))) == word


def _bad_pickle(place: Path) -> str:
    (place / "x.ckpt").write_bytes(b"\x80\x02}q\x00.")
    return str(place / "x.ckpt")


def _bad_folder(place: Path) -> str:
    (place / "te").mkdir()
    (place / "te" / "config.json").write_text("{}")
    (place / "te" / "pytorch_model.bin").write_bytes(b"\x80\x02}q\x00.")
    return str(place / "te")


def _bad_numbers(place: Path) -> str:
    save_file({"conv_in.weight": torch.full((16, 4, 3, 3), torch.nan)}, place / "nan.safetensors")
    return str(place / "nan.safetensors")


def _saved(**tensors: torch.Tensor) -> Callable[[Path], str]:
    def make(place: Path) -> str:
        save_file({key.replace("__", "."): one for key, one in tensors.items()}, place / "x.safetensors")
        return str(place / "x.safetensors")

    return make


def _with_code(place: Path) -> str:
    (place / "p").mkdir()
    (place / "p" / "model_index.json").write_text('{"_class_name": ["pipeline", "Own"]}')
    return str(place / "p")


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (_bad_pickle, "is a pickle.*torch.load.*weights_only=True"),
        (_bad_folder, "pytorch_model.bin is a pickle"),
        (_with_code, "code of its own.*recare_patch.defences"),
        (_saved(a__weight=torch.zeros(2)), "does not fit base '.*': 1 of its 1 tensors"),
        (_saved(conv_in__weight=torch.zeros(8, 4, 5, 5)), "'conv_in.weight' is 8x4x5x5, and there it is"),
        (_saved(conv_in__weight=torch.zeros(8, 4, 3, 3, dtype=torch.int64)), "of type I64"),
        (_bad_numbers, "NaN values in its tensor 'conv_in.weight'"),
        (_saved(mid__hada_w1_a=torch.zeros(2, 2)), "is a LoHa"),
        (lambda place: "nowhere", "there is nothing at 'nowhere'"),
        (lambda place: "nowhere.pt", "there is nothing at nowhere.pt"),
        (lambda place: "defence:halvd", "did you mean 'halved'"),
        (lambda place: "defence:halved:strength", "'strength' is no option of the defence halved"),
        (lambda place: "defence:halved:strenght=2", "the defence halved failed: TypeError"),
        (lambda place: "defence:faulty", "the defence faulty failed: KeyError"),
        (lambda place: "x=", "names nothing to audit"),
    ],
)
def test_what_cannot_be_audited(base: BaseModel, tmp_path: Path, make: Callable[[Path], str], sentence: str) -> None:
    with pytest.raises(RecarePatchError, match=f"(?s){sentence}"):
        audit([make(tmp_path)], base=base, suite=Suite(**SUITE), out=tmp_path / "audit", device="cpu")
    assert not (tmp_path / "audit").exists()


def test_what_was_erased_must_be_told(made: Path, base: BaseModel, tmp_path: Path) -> None:
    how: dict[str, Any] = {"base": base, "out": tmp_path / "audit", "device": "cpu"}
    source = str(made / "partial.safetensors")
    with pytest.raises(EvaluationError, match="none of these says what it erases"):
        audit([source], **how)
    with pytest.raises(EvaluationError, match=r"no bundled suite is for 'a thing'.*--kind"):
        audit([source], concept="a thing", **how)
    with pytest.raises(EvaluationError, match="'styel' is no kind of concept"):
        audit([source], concept="a thing", kind="styel", **how)
    with pytest.raises(IncompatiblePatchError):
        audit([source], suite=Suite(**SUITE), **{**how, "base": load_base_xl(tmp_path)})


def load_base_xl(place: Path) -> BaseModel:
    from tests.tiny import make_tiny_sdxl

    return load_base(make_tiny_sdxl(place / "xl"), device="cpu")


@pytest.mark.parametrize("name", ["partial.safetensors", "defence:halved"])
def test_others_are_fine_tuned_where_they_stand(made: Path, base: BaseModel, name: str) -> None:
    source = name if name.startswith("defence:") else str(made / name)
    eraser: Any = find_eraser(source).opened(base, CONCEPT)
    plain, studio = predicted(base), Studio(base, batch_size=4)
    context = CheckContext(base, eraser, Suite(**SUITE), EveryOther(), studio, pictures=4)
    options = FineTuningOptions(at=(0, 2), images=4, batch_size=2)
    check = FineTuning().run(context, options)
    assert [one.x for one in check.points] == [0, 2] and set(check.points[0].values) > {"concept", "base"}
    assert torch.equal(predicted(base), plain)


def test_a_defence_has_no_scale(base: BaseModel, tmp_path: Path) -> None:
    how: dict[str, Any] = {"base": base, "suite": Suite(**SUITE), "out": tmp_path / "audit", "device": "cpu"}
    with pytest.raises(EvaluationError, match="has no scale"):
        audit(["defence:halved"], checks=["all"], **how)
