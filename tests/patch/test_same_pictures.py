"""One patch, every way to use it, the same pictures: on the bundled base, in fp32."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

from recare_patch.combine import merging
from recare_patch.models import base_folder
from recare_patch.patch import Patch, write_kohya
from tests.patch.making import difference, draw, plain, trained

PROMPTS = ["A painting in the style of Van Gogh", "a photo of a cat at night"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_every_way_draws_the_same(tmp_path: Path) -> None:
    atelier = base_folder("atelier")[0]
    base, made = trained(atelier, rank=4, alpha=1.0)
    exact = Patch.from_adapter(base, "recare", 4, 1.0, made.metadata, dtype=torch.float32)
    folder = exact.save(tmp_path / "patch", torch.float32).parent
    pipe, patch = plain(atelier), Patch.load(folder)
    untouched = draw(pipe, PROMPTS)
    with patch.apply(pipe):
        applied = draw(pipe, PROMPTS)
    assert difference(untouched, applied) > 60
    drawn = []
    kohya = write_kohya(patch, tmp_path / "kohya", dtype=torch.float32)
    for place, name in ((folder, None), (kohya.parent, kohya.name)):
        pipe.load_lora_weights(place, weight_name=name)
        drawn.append(draw(pipe, PROMPTS))
        pipe.unload_lora_weights()
    assert difference(draw(pipe, PROMPTS), untouched) == 0
    file = tmp_path / "merged.safetensors"
    merging.merge([(patch, 1.0)], atelier, tmp_path / "merged", single_file=file)
    single = StableDiffusionPipeline.from_single_file(
        str(file), config=str(tmp_path / "merged"), local_files_only=True, safety_checker=None
    )
    drawn += [draw(plain(tmp_path / "merged"), PROMPTS), draw(single, PROMPTS)]
    assert max(difference(applied, other) for other in drawn) <= 2
    merging.unmerge(tmp_path / "merged", [patch], tmp_path / "again")
    assert difference(draw(plain(tmp_path / "again"), PROMPTS), untouched) <= 2
