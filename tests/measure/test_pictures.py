"""The cache and the studio: pictures are drawn once, and are the same however they come to be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from recare_patch.core import EvaluationError, UnknownNameError, process_device, processes, tensors_hash
from recare_patch.measure.pictures import PictureCache, Studio, default_cache
from recare_patch.models import PLACEHOLDER, BaseModel, load_base
from recare_patch.models import lora as adapters
from recare_patch.patch import Patch
from recare_patch.recipe import SCHEDULERS
from tests.measure.making import make_patch, noise

PROMPTS = ["a cat", "a dog", "stars", "a house", "a boat"]
SEEDS = [1, 2, 3, 4, 5]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def patch(base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Patch:
    return Patch.load(make_patch(base, tmp_path_factory.mktemp("patch") / "one"))


def draw(studio: Studio, **changes: Any) -> list[Image.Image]:
    return studio.draw(PROMPTS, SEEDS, **{"steps": 2, **changes})


def same(one: list[Image.Image], other: list[Image.Image]) -> bool:
    return len(one) == len(other) and all(
        np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(one, other, strict=True)
    )


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def overwrite(paths: list[Path]) -> None:
    for path in paths:
        path.write_bytes(b"damaged")


def test_what_is_put_comes_back(tmp_path: Path) -> None:
    cache = PictureCache(tmp_path)
    key = cache.key({"prompt": "a cat", "seed": 1})
    assert key == cache.key({"seed": 1, "prompt": "a cat"}) != cache.key({"prompt": "a cat", "seed": 2})
    assert len(key) == 64 and cache.get(key) is None
    (image,) = noise(1)
    cache.put(key, image)
    assert cache.path(key) == tmp_path / key[:2] / f"{key}.png"
    found = cache.get(key)
    assert found is not None and same([found], [image])
    assert list(files_in(tmp_path)) == [f"{key}.png"]
    whole = cache.path(key).read_bytes()
    for damaged in (whole[: len(whole) // 2], b"not a picture", b"\x89PNG\r\n\x1a\n"):
        cache.path(key).write_bytes(damaged)
        assert cache.get(key) is None


def test_the_default_cache_is_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "recare-patch" / "pictures"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache() == tmp_path / ".cache" / "recare-patch" / "pictures"


def test_tensors_hash_tells_names_values_shapes_and_types_apart() -> None:
    one = torch.arange(4.0)
    others = ({"a": one}, {"b": one}, {"a": one.reshape(2, 2)}, {"a": one.double()}, {"a": one + 1e-6})
    assert len(set(map(tensors_hash, others))) == 5
    assert tensors_hash({"a": one}) == tensors_hash({"a": torch.arange(4.0)})


def test_a_studio_draws_what_the_base_draws(base: BaseModel, patch: Patch, tmp_path: Path) -> None:
    for cache in (None, PictureCache(tmp_path)):
        studio = Studio(base, cache=cache, batch_size=2)
        assert same(draw(studio), base.generate(PROMPTS, SEEDS, steps=2, batch_size=2))
        with patch.apply(base.pipeline, scale=0.5):
            wanted = base.generate(PROMPTS, SEEDS, steps=2, batch_size=2)
        assert same(draw(studio, patches=[(patch, 0.5)]), wanted)
        assert (studio.drawn, studio.from_cache) == (10, 0)
    # The patch is out again.
    assert same(base.generate(PROMPTS[:1], [1], steps=2), Studio(base).draw(PROMPTS[:1], [1], steps=2))


def test_nothing_is_drawn_twice(base: BaseModel, patch: Patch, tmp_path: Path) -> None:
    cache = PictureCache(tmp_path)
    drawn, again = draw(Studio(base, cache=cache, batch_size=2)), Studio(base, cache=cache, batch_size=2)
    assert same(draw(again), drawn)
    assert (again.drawn, again.from_cache) == (0, 5)
    # Everything that decides a picture is in its name.
    changes: tuple[dict[str, Any], ...] = (
        {"steps": 3},
        {"guidance_scale": 2.0},
        {"scheduler": "euler"},
        {"patches": [(patch, 1.0)]},
        {"patches": [(patch, 0.9)]},
        {"patches": [(patch, 1.0), (patch, 0.9)]},
    )
    for number, changed in enumerate(changes, 1):
        draw(again, **changed)
        assert again.drawn == 5 * number, changed


def test_other_weights_have_other_pictures(base: BaseModel, tiny_sd: Path, tiny_sd_v: Path, tmp_path: Path) -> None:
    others = (load_base(tiny_sd, device="cpu", precision="bf16"), load_base(tiny_sd_v, device="cpu"))
    for model in (base, *others):
        studio = Studio(model, cache=PictureCache(tmp_path))
        studio.draw(["a cat"], [1], steps=1)
        assert studio.drawn == 1


def test_what_is_missing_or_damaged_is_drawn_again_by_whole_batches(base: BaseModel, tmp_path: Path) -> None:
    cache = PictureCache(tmp_path)
    whole = draw(Studio(base, cache=cache, batch_size=2))
    files = files_in(tmp_path)
    for damage, drawn in ((lambda paths: paths[0].unlink(), (1, 2)), (overwrite, (5,))):
        damage(sorted(tmp_path.rglob("*.png")))
        studio = Studio(base, cache=cache, batch_size=2)
        assert same(draw(studio), whole)
        assert studio.drawn in drawn and files_in(tmp_path) == files


def test_streams_may_be_drawn_side_by_side(base: BaseModel, patch: Patch) -> None:
    studio = Studio(base, batch_size=2)
    plain, patched = draw(studio), draw(studio, patches=[(patch, 1.0)])
    assert not same(plain, patched)
    streams = [studio.stream(PROMPTS, SEEDS, steps=2, patches=some) for some in ([], [(patch, 1.0)])]
    pairs = list(zip(*streams, strict=True))
    assert [row for (row, _), _ in pairs] == [0, 1, 2, 3, 4]
    assert same([one for (_, one), _ in pairs], plain)
    assert same([one for _, (_, one) in pairs], patched)


@pytest.mark.parametrize("count", [2, 3, 8])
def test_shards_draw_the_pictures_of_one(base: BaseModel, tmp_path: Path, count: int) -> None:
    single, shared = PictureCache(tmp_path / "one"), PictureCache(tmp_path / "many")
    whole = draw(Studio(base, cache=single, batch_size=2))
    studios = [Studio(base, cache=shared, batch_size=2, shard=(k, count)) for k in range(count)]
    for studio in studios:
        studio.fill(PROMPTS, SEEDS, steps=2)
    assert sum(studio.drawn for studio in studios) == 5
    assert [studio.drawn for studio in studios[:3]] == ([3, 2] if count == 2 else [2, 2, 1])
    assert same(draw(studios[-1]), whole)
    assert files_in(tmp_path / "one") == files_in(tmp_path / "many")


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_draws_and_the_own_one_returns(base: BaseModel, name: str) -> None:
    own = base.pipeline.scheduler
    images = Studio(base).draw(["a cat"], [1], steps=3, scheduler=name)
    assert len(images) == 1 and base.pipeline.scheduler is own


def test_token_vectors_stand_in_prompts(base: BaseModel, tmp_path: Path) -> None:
    studio = Studio(base, cache=PictureCache(tmp_path))
    prompt, cat = f"a photo of {PLACEHOLDER}", base.word_vector("cat")[None]
    found = studio.draw([prompt], [1], steps=2, vectors=cat)
    assert same(found, base.generate(["a photo of cat"], [1], steps=2))
    studio.draw([prompt], [1], steps=2, vectors=2 * cat)
    assert studio.drawn == 2


def test_stages_are_counted_and_told(base: BaseModel) -> None:
    told: list[tuple[str, int, int]] = []

    class Listener:
        def update(self, stage: str, done: int, total: int, note: str = "") -> None:
            told.append((stage, done, total))

    before = base.counter.by_stage.get("portraits", 0)
    draw(Studio(base, batch_size=2, progress=Listener()), stage="portraits")
    assert told == [("portraits", 2, 5), ("portraits", 4, 5), ("portraits", 5, 5)]
    assert base.counter.by_stage["portraits"] - before == 5 * 2 * 2


REFUSED: list[tuple[Callable[[Studio, Path], Any], str]] = [
    (lambda studio, _: studio.stream(["a", "b"], [1]), "2 prompts were given with 1 seeds"),
    (lambda studio, _: studio.stream(["a"], [1], scheduler="eulr"), "did you mean 'euler'"),
    (lambda studio, _: studio.fill(["a"], [1]), "no cache to draw into"),
    (lambda studio, _: studio.key([], {}), "no cache to name anything in"),
    (lambda studio, _: Studio(studio.base, shard=(0, 2)), "2 processes need a cache"),
    (lambda studio, path: Studio(studio.base, shard=(2, 2), cache=PictureCache(path)), "no process 2 of 2"),
    (lambda studio, _: Studio(studio.base, batch_size=0), "at least 1 picture"),
]


@pytest.mark.parametrize(("ask", "told"), REFUSED)
def test_what_cannot_be_drawn_is_refused_at_once(
    base: BaseModel, tmp_path: Path, ask: Callable[[Studio, Path], Any], told: str
) -> None:
    with pytest.raises((EvaluationError, UnknownNameError), match=told):
        ask(Studio(base), tmp_path)


def test_a_lora_that_is_on_would_be_drawn_with_and_not_be_named(base: BaseModel, patch: Patch) -> None:
    studio = Studio(base)
    with patch.apply(base.pipeline):
        with pytest.raises(EvaluationError, match="erase-van-gogh"):
            studio.draw(["a cat"], [1], steps=1)
        with adapters.off(base.denoiser):
            studio.draw(["a cat"], [1], steps=1)


def test_one_process_has_nobody_to_wait_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert processes() is None and process_device("auto") == "auto" and process_device("cpu") == "cpu"
