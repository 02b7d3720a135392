"""The cache and the studio: pictures are drawn once, and are the same however they come to be."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from recare_patch.core.crew import process_device, processes
from recare_patch.core.errors import EvaluationError, UnknownNameError
from recare_patch.measure.pictures import (
    PictureCache,
    Studio,
    default_cache,
    tensors_hash,
)
from recare_patch.models import lora as adapters
from recare_patch.models.embeds import PLACEHOLDER, BaseModel
from recare_patch.models.loading import load_base
from recare_patch.patch.patch import Patch
from recare_patch.recipe.samplers import SCHEDULERS
from tests.measure.making import make_patch

PROMPTS = ["a cat", "a dog", "stars", "a house", "a boat"]
SEEDS = [1, 2, 3, 4, 5]


@pytest.fixture(scope="module")
def base(tiny_sd: Path) -> BaseModel:
    return load_base(tiny_sd, device="cpu")


@pytest.fixture(scope="module")
def patch(base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Patch:
    return Patch.load(make_patch(base, tmp_path_factory.mktemp("patch") / "one"))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The number of threads chooses the last bits of a picture."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def same(one: list[Image.Image], other: list[Image.Image]) -> bool:
    return len(one) == len(other) and all(
        np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(one, other, strict=True)
    )


# ------------------------------------------------------------------------ the cache


def test_what_is_put_comes_back(tmp_path: Path) -> None:
    cache = PictureCache(tmp_path)
    key = cache.key({"prompt": "a cat", "seed": 1})
    assert key == cache.key({"seed": 1, "prompt": "a cat"}) != cache.key({"prompt": "a cat", "seed": 2})
    assert len(key) == 64 and cache.get(key) is None
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8))
    cache.put(key, image)
    assert cache.path(key) == tmp_path / key[:2] / f"{key}.png"
    found = cache.get(key)
    assert found is not None and same([found], [image])
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == [f"{key}.png"]


@pytest.mark.parametrize("damage", [b"", b"not a picture", b"\x89PNG\r\n\x1a\n"])
def test_an_unreadable_file_counts_as_absent(tmp_path: Path, damage: bytes) -> None:
    cache = PictureCache(tmp_path)
    cache.put("a" * 64, Image.new("RGB", (8, 8), "red"))
    whole = cache.path("a" * 64).read_bytes()
    cache.path("a" * 64).write_bytes(damage or whole[: len(whole) // 2])
    assert cache.get("a" * 64) is None


def test_the_default_cache_is_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "recare-patch" / "pictures"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache() == tmp_path / ".cache" / "recare-patch" / "pictures"


def test_tensors_hash_tells_values_shapes_and_types_apart() -> None:
    one = {"a": torch.arange(4.0)}
    found = {
        tensors_hash(tensors)
        for tensors in (
            one,
            {"b": one["a"]},
            {"a": one["a"].reshape(2, 2)},
            {"a": one["a"].double()},
            {"a": one["a"] + 1e-6},
        )
    }
    assert len(found) == 5
    assert tensors_hash(one) == tensors_hash({"a": torch.arange(4.0)})


# ------------------------------------------------------------------------ drawing


def test_a_studio_draws_what_the_base_draws(base: BaseModel, patch: Patch, tmp_path: Path) -> None:
    for cache in (None, PictureCache(tmp_path)):
        studio = Studio(base, cache=cache, batch_size=2)
        assert same(
            studio.draw(PROMPTS, SEEDS, steps=2), base.generate(PROMPTS, SEEDS, steps=2, batch_size=2)
        )
        with patch.apply(base.pipeline, scale=0.5):
            wanted = base.generate(PROMPTS, SEEDS, steps=2, batch_size=2)
        assert same(studio.draw(PROMPTS, SEEDS, patches=[(patch, 0.5)], steps=2), wanted)
        assert (studio.drawn, studio.from_cache) == (10, 0)
    # The patch is out again.
    assert same(base.generate(PROMPTS[:1], [1], steps=2), Studio(base).draw(PROMPTS[:1], [1], steps=2))


def test_nothing_is_drawn_twice(base: BaseModel, patch: Patch, tmp_path: Path) -> None:
    first = Studio(base, cache=PictureCache(tmp_path), batch_size=2)
    drawn = first.draw(PROMPTS, SEEDS, steps=2)
    again = Studio(base, cache=PictureCache(tmp_path), batch_size=2)
    assert same(again.draw(PROMPTS, SEEDS, steps=2), drawn)
    assert (again.drawn, again.from_cache) == (0, 5)
    # Everything that decides a picture is in its name.
    for changed in (
        {"steps": 3},
        {"steps": 2, "guidance_scale": 2.0},
        {"steps": 2, "scheduler": "euler"},
        {"steps": 2, "patches": [(patch, 1.0)]},
        {"steps": 2, "patches": [(patch, 0.9)]},
        {"steps": 2, "patches": [(patch, 1.0), (patch, 0.9)]},
    ):
        before = again.drawn
        again.draw(PROMPTS[:2], SEEDS[:2], **changed)  # type: ignore[arg-type]
        assert again.drawn == before + 2, changed


def test_other_weights_have_other_pictures(
    base: BaseModel, tiny_sd: Path, tiny_sd_v: Path, tmp_path: Path
) -> None:
    cache = PictureCache(tmp_path)
    Studio(base, cache=cache).draw(["a cat"], [1], steps=1)
    half = Studio(load_base(tiny_sd, device="cpu", precision="bf16"), cache=cache)
    other = Studio(load_base(tiny_sd_v, device="cpu"), cache=cache)
    for studio in (half, other):
        studio.draw(["a cat"], [1], steps=1)
        assert studio.drawn == 1


def test_a_broken_run_goes_on_by_whole_batches(base: BaseModel, tmp_path: Path) -> None:
    cache = PictureCache(tmp_path)
    whole = Studio(base, cache=cache, batch_size=2).draw(PROMPTS, SEEDS, steps=2)
    files = {path: path.read_bytes() for path in tmp_path.rglob("*.png")}
    studio = Studio(base, cache=cache, batch_size=2)
    gone = sorted(files)[0]
    gone.unlink()
    assert same(studio.draw(PROMPTS, SEEDS, steps=2), whole)
    assert studio.drawn + studio.from_cache == 5 and studio.drawn in (1, 2)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.png")} == files


def test_a_damaged_picture_is_drawn_again(base: BaseModel, tmp_path: Path) -> None:
    cache = PictureCache(tmp_path)
    whole = Studio(base, cache=cache, batch_size=2).draw(PROMPTS, SEEDS, steps=2)
    files = {path: path.read_bytes() for path in tmp_path.rglob("*.png")}
    for path in files:
        path.write_bytes(b"damaged")
    studio = Studio(base, cache=cache, batch_size=2)
    assert same(studio.draw(PROMPTS, SEEDS, steps=2), whole)
    assert studio.drawn == 5
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.png")} == files


def test_streams_may_be_drawn_side_by_side(base: BaseModel, patch: Patch) -> None:
    studio = Studio(base, batch_size=2)
    plain = studio.draw(PROMPTS, SEEDS, steps=2)
    patched = studio.draw(PROMPTS, SEEDS, steps=2, patches=[(patch, 1.0)])
    assert not same(plain, patched)
    streams = (
        studio.stream(PROMPTS, SEEDS, steps=2),
        studio.stream(PROMPTS, SEEDS, steps=2, patches=[(patch, 1.0)]),
    )
    pairs = list(zip(*streams, strict=True))
    assert [row for (row, _), _ in pairs] == [0, 1, 2, 3, 4]
    assert same([one for (_, one), _ in pairs], plain)
    assert same([one for _, (_, one) in pairs], patched)


@pytest.mark.parametrize("count", [2, 3, 8])
def test_shards_draw_the_pictures_of_one(base: BaseModel, tmp_path: Path, count: int) -> None:
    single, shared = PictureCache(tmp_path / "one"), PictureCache(tmp_path / "many")
    whole = Studio(base, cache=single, batch_size=2).draw(PROMPTS, SEEDS, steps=2)
    studios = [Studio(base, cache=shared, batch_size=2, shard=(k, count)) for k in range(count)]
    for studio in studios:
        studio.fill(PROMPTS, SEEDS, steps=2)
    assert sum(studio.drawn for studio in studios) == 5
    assert [studio.drawn for studio in studios[:3]] == ([3, 2] if count == 2 else [2, 2, 1])
    assert same(studios[-1].draw(PROMPTS, SEEDS, steps=2), whole)
    files = {p.relative_to(tmp_path / "one"): p.read_bytes() for p in (tmp_path / "one").rglob("*.png")}
    assert files == {
        p.relative_to(tmp_path / "many"): p.read_bytes() for p in (tmp_path / "many").rglob("*.png")
    }


@pytest.mark.parametrize("name", SCHEDULERS.names())
def test_every_scheduler_draws_and_the_own_one_returns(base: BaseModel, name: str) -> None:
    own = base.pipeline.scheduler
    images = Studio(base).draw(["a cat"], [1], steps=3, scheduler=name)
    assert len(images) == 1 and base.pipeline.scheduler is own


def test_token_vectors_stand_in_prompts(base: BaseModel, tmp_path: Path) -> None:
    studio = Studio(base, cache=PictureCache(tmp_path))
    prompt = f"a photo of {PLACEHOLDER}"
    cat = base.word_vector("cat")[None]
    assert same(
        studio.draw([prompt], [1], steps=2, vectors=cat), base.generate(["a photo of cat"], [1], steps=2)
    )
    studio.draw([prompt], [1], steps=2, vectors=2 * cat)
    assert studio.drawn == 2


def test_stages_are_counted_and_told(base: BaseModel) -> None:
    told: list[tuple[str, int, int]] = []

    class Listener:
        def update(self, stage: str, done: int, total: int, note: str = "") -> None:
            told.append((stage, done, total))

    before = base.counter.by_stage.get("portraits", 0)
    Studio(base, batch_size=2, progress=Listener()).draw(PROMPTS, SEEDS, steps=2, stage="portraits")
    assert told == [("portraits", 2, 5), ("portraits", 4, 5), ("portraits", 5, 5)]
    assert base.counter.by_stage["portraits"] - before == 5 * 2 * 2


# ------------------------------------------------------------------------ refusals


def test_what_cannot_be_drawn_is_refused_at_once(base: BaseModel, tmp_path: Path) -> None:
    studio = Studio(base)
    with pytest.raises(EvaluationError, match="2 prompts were given with 1 seeds"):
        studio.stream(["a", "b"], [1])
    with pytest.raises(UnknownNameError, match="did you mean 'euler'"):
        studio.stream(["a"], [1], scheduler="eulr")
    with pytest.raises(EvaluationError, match="no cache to draw into"):
        studio.fill(["a"], [1])
    with pytest.raises(EvaluationError, match="2 processes need a cache"):
        Studio(base, shard=(0, 2))
    with pytest.raises(EvaluationError, match="there is no process 2 of 2"):
        Studio(base, shard=(2, 2), cache=PictureCache(tmp_path))
    with pytest.raises(EvaluationError, match="at least 1 picture"):
        Studio(base, batch_size=0)


def test_a_lora_that_is_on_is_refused(base: BaseModel, patch: Patch) -> None:
    studio = Studio(base)
    with patch.apply(base.pipeline):
        with pytest.raises(EvaluationError, match="erase-van-gogh"):
            studio.draw(["a cat"], [1], steps=1)
        with adapters.off(base.denoiser):
            studio.draw(["a cat"], [1], steps=1)


def test_one_process_has_nobody_to_wait_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert processes() is None and process_device("auto") == "auto" and process_device("cpu") == "cpu"
