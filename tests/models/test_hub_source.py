"""Bases on the hub, against a stand-in on loopback: what is fetched, what works without, what is said."""

from __future__ import annotations

import json
import logging
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import snapshot_download

from recare_patch.core import BaseModelError
from recare_patch.models import MOVED, base_folder, family_of, find_layout, load_base, read_layout
from tests.models.test_variants import as_variant, sharded
from tests.share.hub_stand_in import HubStandIn, point_to

NAME = "somebody/tiny"


def files_of(folder: Path) -> dict[str, bytes]:
    return {one.relative_to(folder).as_posix(): one.read_bytes() for one in folder.rglob("*") if one.is_file()}


def said(source: str = NAME) -> str:
    with pytest.raises(BaseModelError) as caught:
        load_base(source)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def fetched(hub: HubStandIn) -> list[str]:
    """The files that were asked for, by their paths in the repository."""
    asked = [path.partition("/resolve/")[2] for method, path in hub.seen if method == "GET"]
    return [path.partition("/")[2] for path in asked if path]


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """A call after which nobody answers at the hub's address."""

    def cut() -> None:
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            port = unused.getsockname()[1]
        point_to(f"http://127.0.0.1:{port}", monkeypatch)

    return cut


def test_what_a_run_reads_is_fetched_once_and_nothing_else(hub: HubStandIn, tiny_sd: Path) -> None:
    files = files_of(tiny_sd)
    unet = files["unet/diffusion_pytorch_model.safetensors"]
    others = {
        "v1-5-pruned.safetensors": b"0" * 1000,
        "unet/diffusion_pytorch_model.bin": b"0" * 1000,
        "unet/diffusion_pytorch_model.fp16.safetensors": unet,
        "unet/diffusion_pytorch_model.non_ema.safetensors": unet,
        "unet/model.onnx": b"0",
        "text_encoder/flax_model.msgpack": b"0",
        "safety_checker/model.safetensors": b"0" * 1000,
        "README.md": b"---\nlicense: mit\n---\n",
    }
    hub.add(NAME, files | others)
    base = load_base(NAME)
    assert base.id == NAME and base.denoiser_hash() == load_base(tiny_sd).denoiser_hash()
    assert sorted(fetched(hub)) == sorted(files)
    hub.seen.clear()
    load_base(NAME)
    assert not fetched(hub) and len(hub.seen) == 1


def _video(files: dict[str, bytes]) -> dict[str, bytes]:
    index = {"_class_name": "WanPipeline", "transformer": ["diffusers", "WanTransformer3DModel"]}
    moved = {name.replace("unet/", "transformer/"): data for name, data in files.items()}
    config = json.dumps({"_class_name": "WanTransformer3DModel"}).encode()
    return moved | {"model_index.json": json.dumps(index).encode(), "transformer/config.json": config}


def _edited(name: str, **changes: Any) -> Callable[[dict[str, bytes]], dict[str, bytes]]:
    return lambda files: files | {name: json.dumps(json.loads(files[name]) | changes).encode()}


def _pickled(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name.replace(".safetensors", ".bin"): data for name, data in files.items()}


@pytest.mark.parametrize(
    ("made", "sentence"),
    [
        (_video, "is a WanPipeline, which draws videos"),
        (_edited("unet/config.json", in_channels=9), "an inpainting model"),
        (_edited("vae/config.json", latent_channels=16), "16 latent channels"),
        (_pickled, r"has its unet only as a pickle \(diffusion_pytorch_model.bin\)"),
        (lambda files: {"one.safetensors": b"0"}, "no model_index.json; fetch a checkpoint of it, `hf download"),
        (lambda files: {k: v for k, v in files.items() if "vae/diff" not in k}, "no weights for its component 'vae'"),
    ],
)
def test_what_cannot_be_patched_is_refused_before_its_weights(
    made: Callable[[dict[str, bytes]], dict[str, bytes]], sentence: str, hub: HubStandIn, tiny_sd: Path
) -> None:
    hub.add(NAME, made(files_of(tiny_sd)))
    with pytest.raises(BaseModelError, match=sentence):
        load_base(NAME)
    assert not [name for name in fetched(hub) if name.endswith((".safetensors", ".bin"))]


GONE = "runwayml/stable-diffusion-v1-5"


@pytest.mark.parametrize(
    ("source", "answer", "sentence"),
    [
        (NAME, (403, "restricted", "GatedRepo"), "accept its licence at http.*/somebody/tiny, .*hf auth login"),
        (NAME, (401, "no", "RepoNotFound"), "no such repository, or it is private"),
        (GONE, (401, "no", "RepoNotFound"), "gone from the hub: its files are now at stable-diffusion-v1-5/stable"),
        (NAME, (404, "no", "RevisionNotFound"), "no such revision"),
        (NAME, (401, "Invalid credentials in Authorization header"), "log in anew"),
        (NAME, (400, "odd"), "answers with error 400"),
    ],
)
def test_refusals_of_the_hub(
    source: str, answer: tuple[Any, ...], sentence: str, hub: HubStandIn, tiny_sd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.fault = lambda method, path: answer
    hub.add(source, files_of(tiny_sd))
    with pytest.raises(BaseModelError, match=f"{source} is not in the hub's cache, and .*{sentence}"):
        load_base(source)
    # What is in the cache works all the same.
    hub.fault = lambda method, path: None
    load_base(source)
    hub.fault = lambda method, path: answer
    assert load_base(source).id == source


def test_gated_files_of_a_listed_repository(hub: HubStandIn, tiny_sd: Path) -> None:
    hub.add(NAME, files_of(tiny_sd))
    hub.fault = lambda method, path: (403, "restricted", "GatedRepo") if "/resolve/" in path else None
    assert "accept its licence" in said()


@pytest.mark.parametrize("offline", [True, False])
def test_without_a_network(
    offline: bool, hub: HubStandIn, tiny_sd: Path, no_network: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(NAME, files_of(tiny_sd))
    hub.add(MOVED[GONE], files_of(tiny_sd))
    for source in (NAME, MOVED[GONE]):
        load_base(source)
    hub.seen.clear()
    assert load_base(GONE).id == GONE and not hub.seen  # nothing is fetched twice
    if offline:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    else:
        no_network()
    began = time.monotonic()
    assert load_base(NAME).id == NAME
    # Under its old name too.
    assert load_base(GONE).id == GONE
    reason = "HF_HUB_OFFLINE forbids" if offline else "cannot be reached"
    assert said("nobody/nothing").startswith("base nobody/nothing is not in the hub's cache") and reason in said("a/b")
    shutil.rmtree(read_layout(find_layout(NAME)[0].folder, NAME).folder / "vae")
    assert "lacks its component 'vae' in the hub's cache, and" in said() and reason in said()
    assert time.monotonic() - began < 20


def test_a_hub_that_never_answers_is_not_waited_for(hub: HubStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recare_patch.models.hub_source.PATIENCE", 0.3)
    hub.fault = lambda method, path: hub.hang()
    began = time.monotonic()
    assert "cannot be reached" in said()
    assert time.monotonic() - began < 5


def test_a_fetch_that_broke_off_goes_on(hub: HubStandIn, tiny_sd: Path, no_network: Callable[[], None]) -> None:
    hub.add(NAME, files_of(tiny_sd))
    hub.fault = lambda method, path: (400, "odd") if "unet/diffusion" in path else None
    assert "no weights for its component 'unet' in the hub's cache" in said()
    hub.fault = lambda method, path: None
    hub.seen.clear()
    load_base(NAME)
    assert "unet/diffusion_pytorch_model.safetensors" in fetched(hub)
    assert "unet/config.json" not in fetched(hub)


def test_a_full_disk_is_told_before_the_fetch(hub: HubStandIn, tiny_sd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add(NAME, files_of(tiny_sd))
    monkeypatch.setattr("shutil.disk_usage", lambda place: shutil._ntuple_diskusage(10, 9, 1))  # type: ignore[attr-defined]
    assert "0.0 GB are free" in said() and not fetched(hub)


def test_a_variant_that_is_here_is_taken(
    hub: HubStandIn, tiny_sd: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    half = as_variant(tiny_sd, tmp_path / "half", "fp16", torch.float16)
    hub.add(NAME, files_of(half) | files_of(tiny_sd))
    snapshot_download(NAME, allow_patterns=["unet/*.fp16.safetensors"])
    hub.seen.clear()
    with caplog.at_level(logging.INFO):
        load_base(NAME)
    assert "the fp16 weights of its unet are taken, which are here already" in caplog.text
    weights = [name for name in fetched(hub) if name.endswith(".safetensors")]
    assert sorted(weights) == ["text_encoder/model.safetensors", "vae/diffusion_pytorch_model.safetensors"]


def test_shards_are_fetched_with_their_index(hub: HubStandIn, tiny_sd: Path, tmp_path: Path) -> None:
    hub.add(NAME, files_of(sharded(tiny_sd, tmp_path / "shards", "fp16", late=True)))
    assert load_base(NAME).denoiser_hash() == load_base(tiny_sd).denoiser_hash()


def test_a_whole_pipeline_is_fetched_to_merge_into(hub: HubStandIn, tiny_sd3: Path) -> None:
    index = json.loads((tiny_sd3 / "model_index.json").read_text())
    index |= {"text_encoder_3": ["transformers", "T5EncoderModel"], "tokenizer_3": ["transformers", "T5TokenizerFast"]}
    more = {"model_index.json": json.dumps(index).encode(), "text_encoder_3/config.json": b"{}"}
    hub.add(NAME, files_of(tiny_sd3) | more | {"text_encoder_3/model.safetensors": b"0" * 9})
    load_base(NAME)
    assert "text_encoder_3/model.safetensors" not in fetched(hub)
    assert (base_folder(NAME)[0] / "text_encoder_3" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("name", "family", "steps"),
    [
        ("CompVis/stable-diffusion-v1-4", "stable-diffusion", None),
        ("runwayml/stable-diffusion-v1-5", "stable-diffusion", None),
        ("stabilityai/stable-diffusion-2-1", "stable-diffusion", None),
        ("stabilityai/stable-diffusion-2-1-base", "stable-diffusion", None),
        ("stabilityai/sd-turbo", "stable-diffusion", 4),
        ("stabilityai/stable-diffusion-xl-base-1.0", "stable-diffusion-xl", None),
        ("stabilityai/sdxl-turbo", "stable-diffusion-xl", 4),
        ("stabilityai/stable-diffusion-3-medium-diffusers", "stable-diffusion-3", None),
        ("stabilityai/stable-diffusion-3.5-medium", "stable-diffusion-3", None),
        ("stabilityai/stable-diffusion-3.5-large", "stable-diffusion-3", None),
    ],
)
def test_well_known_bases_are_described_without_the_hub(
    name: str, family: str, steps: int | None, hub: HubStandIn
) -> None:
    layout, base_id = find_layout(name, weights=False)
    assert base_id == name and layout.name == f"'{name}'" and not hub.seen
    found = family_of(layout)
    found.check(layout, weights=False)
    assert found.family == family and (layout.few_steps and layout.few_steps.steps) == steps


def test_configurations_in_the_cache_come_before_the_published_ones(hub: HubStandIn, tiny_sd: Path) -> None:
    hub.add(MOVED[GONE], files_of(tiny_sd))
    load_base(MOVED[GONE])
    hub.seen.clear()
    assert find_layout(GONE, weights=False)[0].configs["unet"]["block_out_channels"] == [16, 32]
    assert not hub.seen
