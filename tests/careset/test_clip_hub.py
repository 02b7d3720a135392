"""The default CLIP from the hub at its pinned commit, without a network, and features kept between runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from recare_patch.careset import DEFAULT_HUB_CLIP, Clip
from recare_patch.core import ClipError
from tests.share.hub_stand_in import HubStandIn
from tests.tiny import make_tiny_clip

PINNED, MAIN = "c237dc49a33fc61debc9276459120b7eac67e7ef", "3d74acf9a28c67741b2f4f2ea7635f0aaf6f0268"


def _commits(folder: Path) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """What the pull request's commit and the main revision hold: the second has its weights as a pickle."""
    files = {one.name: one.read_bytes() for one in folder.iterdir()}
    old = {name: data for name, data in files.items() if name != "model.safetensors"}
    return {**files, "pytorch_model.bin": b"pickle"}, {**old, "pytorch_model.bin": b"pickle"}


def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_the_default_is_fetched_at_its_commit(
    hub: HubStandIn, tiny_clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned, main = _commits(tiny_clip)
    hub.add(DEFAULT_HUB_CLIP, main).commits[:] = [(PINNED, pinned), (MAIN, main)]
    wanted = Clip.load(str(tiny_clip)).text_features(["a cat"])
    found = Clip.load(DEFAULT_HUB_CLIP)
    assert found.id == DEFAULT_HUB_CLIP and torch.equal(found.text_features(["a cat"]), wanted)
    assert not [path for _, path in hub.seen if MAIN in path or path.endswith(".bin")]
    hub.seen.clear()
    _offline(monkeypatch)
    assert torch.equal(Clip.load(DEFAULT_HUB_CLIP).text_features(["a cat"]), wanted) and not hub.seen


def test_the_cache_of_an_earlier_first_run(hub: HubStandIn, tiny_clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers takes weights from the pull request, and all the rest from main."""
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE) / f"models--{DEFAULT_HUB_CLIP.replace('/', '--')}"
    for commit, ref in ((PINNED, "refs/pr/66"), (MAIN, "main")):
        (cache / "snapshots" / commit).mkdir(parents=True)
        (cache / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
        (cache / "refs" / ref).write_text(commit)
    for name, data in _commits(tiny_clip)[1].items():
        (cache / "snapshots" / MAIN / name).write_bytes(data)
    _offline(monkeypatch)
    with pytest.raises(ClipError, match="has no weights in the hub's cache, and HF_HUB_OFFLINE forbids") as caught:
        Clip.load(DEFAULT_HUB_CLIP)
    assert "\n" not in str(caught.value)
    shutil.copy(tiny_clip / "model.safetensors", cache / "snapshots" / PINNED)
    assert Clip.load(DEFAULT_HUB_CLIP).id == DEFAULT_HUB_CLIP and not hub.seen


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [((403, "no", "GatedRepo"), "accept its licence at"), ((404, "no", "RepoNotFound"), "no such repository")],
)
def test_refusals_of_the_hub(answer: tuple[int, str, str], sentence: str, hub: HubStandIn) -> None:
    hub.fault = lambda method, path: answer
    for name in (DEFAULT_HUB_CLIP, "somebody/clip"):
        with pytest.raises(ClipError, match=f"CLIP {name} is not in the hub's cache, and .*{sentence}"):
            Clip.load(name)


def test_a_downloaded_folder_has_a_pickle_alone(tiny_clip: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_clip, tmp_path / "clip")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ClipError, match=f"only as a pickle .* --revision {PINNED}"):
        Clip.load(str(folder))


def test_configurations_of_2021_read_right(tiny_clip: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_clip, tmp_path / "old")
    config, images = (json.loads((folder / name).read_text()) for name in ("config.json", "preprocessor_config.json"))
    # The end of the text was a wrong number, and an image's size a single one.
    config["text_config"] |= {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
    config |= {"text_config_dict": None, "vision_config_dict": None}
    kept = {name: images[name] for name in ("do_center_crop", "do_normalize", "image_mean", "image_std", "resample")}
    old = kept | {"feature_extractor_type": "CLIPFeatureExtractor", "size": 32, "crop_size": 32, "do_resize": True}
    for name, content in (("config.json", config), ("preprocessor_config.json", old)):
        (folder / name).write_text(json.dumps(content))
    texts = ["a cat", "a photo of a red boat at night", ""]
    picture = Image.effect_noise((32, 32), 90)
    found, wanted = (
        torch.cat([clip.text_features(texts), clip.image_features([picture])])
        for clip in map(Clip.load, (str(folder), str(tiny_clip)))
    )
    assert torch.equal(found, wanted)


class Counted:
    """Progress that counts what is computed."""

    def __init__(self) -> None:
        self.count = 0

    def update(self, stage: str, done: int, total: int) -> None:
        self.count = done


def test_a_lexicon_is_read_once_for_all_runs(tiny_clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recare_patch.careset.clip._LARGE", 0)
    monkeypatch.setenv("RECARE_PATCH_CLIP_CACHE", str(tmp_path / "kept"))
    words = [f"cat {number}" for number in range(1000)]

    def read(source: Path = tiny_clip) -> tuple[torch.Tensor, int]:
        counted = Counted()
        return Clip.load(str(source)).text_features(words, progress=counted), counted.count

    first, computed = read()
    assert computed == 1000
    again, computed = read()
    assert computed == 0 and torch.equal(again, first)
    assert (first[:9] - Clip.load(str(tiny_clip)).text_features(words[:9])).abs().max() < 1e-3
    (file,) = (tmp_path / "kept").iterdir()
    whole = file.read_bytes()
    for damaged in (whole[:-10], b"", whole[:-2] + b"\xff\x7f"):  # the last two are no finite number
        file.write_bytes(damaged)
        again, computed = read()
        assert computed == 1000 and torch.equal(again, first) and file.read_bytes() == whole
    assert read(make_tiny_clip(tmp_path / "other", seed=1))[1] == 1000
    monkeypatch.setenv("RECARE_PATCH_CLIP_CACHE", "")
    assert read()[1] == 1000
    monkeypatch.setenv("RECARE_PATCH_CLIP_CACHE", str(file))
    assert read()[1] == 1000
