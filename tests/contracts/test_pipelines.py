"""What a base made from any pipeline must do, on tiny random weights of each kind that the installed diffusers has.

A short part runs by default, the whole contract with ``-m slow``. The table of docs/bases.md is written by

    python -m tests.contracts.test_pipelines docs/bases.md [NAME…]
"""

from __future__ import annotations

import functools
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from recare_patch.careset import Clip
from recare_patch.combine import merge, save_stack, stack
from recare_patch.erasure import erase, plan
from recare_patch.measure import evaluate
from recare_patch.measure.suites import Suite
from recare_patch.models import BaseModel, find_layout, load_base, lora, measure
from recare_patch.models.captured import Captured
from recare_patch.patch import Patch
from recare_patch.recipe import WEIGHTS_NAME, MemoryOptions
from tests.erasure.making import Killed, Killer, small_recipe
from tests.measure.making import SUITE
from tests.pipelines import PIPELINES, make_pipeline
from tests.tiny import make_tiny_clip

SIZE = MemoryOptions(resolution="32x32")
CHANGES: dict[str, dict[str, Any]] = {
    "recare": {"search.erase_steps": 2, "search.inversion_steps": 2, "erase.steps": 4, "erase.ends": "steps"},
    "esd": {"erase.steps": 4, "erase.ends": "steps"},
    "closed": {"adapter.layers": "text-input", "closed.words": 40},
}
"""What makes a run of each method short."""

LAYERS = {"Ideogram 4": "attention"}
"""Layer sets of pipelines in which no layer is the text's alone."""

WITHOUT_LOADER = ("PixArt Sigma", "Ovis-Image", "Bria 3.2", "LongCat-Image")

REFUSED = {
    "Ideogram 4": "prompt and picture are one sequence: no layer is the text's alone (train --layers attention)",
    "SD 3.5": "by a class of its own, whose values read no text states; so there is nothing to stack in this trial",
    "Sana Sprint": "its SCMScheduler's states are neither a discrete schedule's nor a straight line's",
    "PRX": "its load_lora_weights looks for a UNet, which it does not have",
    **dict.fromkeys(WITHOUT_LOADER, "its pipeline has no load_lora_weights"),
}
"""Why a pipeline cannot do all that the contract says."""


class Trial:
    """One pipeline's way through the contract; what was made is made once."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.work = name, folder
        self.folder = make_pipeline(name, folder / "base")
        self.clip = make_tiny_clip(folder / "clip")

    @functools.cached_property
    def base(self) -> BaseModel:
        return load_base(self.folder, device="cpu", memory=SIZE)

    def recipe(self, method: str, **changes: Any) -> Any:
        size = {"memory.resolution": SIZE.resolution, "adapter.layers": LAYERS.get(self.name, "text")}
        return small_recipe(self.folder, self.clip, method, **{**size, **CHANGES[method], **changes})

    def erase(self, method: str, folder: str, **how: Any) -> Patch:
        how = {"device": "cpu", "preview": False, "clip": self.clip_model, **how}
        return erase(self.recipe(method), self.work / folder, **how).patch

    @functools.cached_property
    def clip_model(self) -> Clip:
        return Clip.load(str(self.clip))

    @functools.cache  # noqa: B019 - a trial lives as long as its test
    def made(self, method: str) -> Patch:
        counting = Killer(float("inf"))
        found = self.erase(method, method, progress=counting, base=self.base)
        self.reports = counting.seen
        assert all(torch.isfinite(one).all() for one in found.tensors.values())
        assert any(bool(one.any()) for key, one in found.tensors.items() if "lora_B" in key)
        return found

    def predicted(self, base: BaseModel) -> Tensor:
        states = torch.randn((2, *base.latent_shape), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            return base.denoise(states, torch.tensor([300, 700]), base.encode_prompts(["van gogh", "a cat"]))


def draws(trial: Trial) -> None:
    """Target images by the pipeline's own call: in a batch as alone, and as the pipeline itself draws."""
    base, prompts = trial.base, ["a cat", "a photo of a dog by the sea"]
    embeds = base.encode_prompts(prompts)
    together = base.sample_latents(embeds, [3, 4], steps=2, guidance_scale=1.0)
    alone = torch.cat([base.sample_latents(embeds[k], [3 + k], steps=2, guidance_scale=1.0) for k in range(2)])
    torch.testing.assert_close(together, alone, atol=1e-3, rtol=1e-3)
    pictures = base.decode_latents(together)
    assert [one.mode for one in pictures] == ["RGB"] * 2
    assert base.generate(prompts, [3, 4], steps=2, guidance_scale=4.0, batch_size=2)[0].size == pictures[0].size


def predicts(trial: Trial) -> None:
    """One batch is its rows, under prompts of different lengths; a word's vectors stand for it, with a gradient."""
    base, rows = trial.base, ["a cat", "", "a photo of a dog by the sea at night"]
    states = torch.randn((3, *base.latent_shape), generator=torch.Generator().manual_seed(0))
    at, embeds = torch.tensor([1, 400, 999]), base.encode_prompts(rows)
    with torch.no_grad():
        together = base.denoise(states, at, embeds)
        apart = torch.cat([base.denoise(states[k : k + 1], at[k], embeds[k]) for k in range(3)])
    torch.testing.assert_close(together, apart, rtol=1e-3, atol=1e-4)
    vectors = base.word_vector("cat")[None].requires_grad_()
    named = base.encode_with_vectors(["a photo of <*>"], vectors)
    base.denoise(states[:1], at[1], named).square().mean().backward()
    assert vectors.grad is not None and vectors.grad.abs().max() > 0
    if not isinstance(base, Captured):
        return
    side = lora.TEXT_SIDES[base.denoiser]
    if trial.name in LAYERS:
        assert not side.stream
        return
    assert side.entry and set(side.entry) <= side.stream
    assert set(side.stream) <= set(lora.target_modules(base.denoiser, "text"))


def erases(method: str) -> Callable[[Trial], None]:
    def run(trial: Trial) -> None:
        trial.made(method)

    return run


def has_companions(trial: Trial) -> None:
    trial.made("recare")
    assert (trial.work / "recare" / "care_set.json").exists()


def resumes(trial: Trial) -> None:
    """A run that was killed near its end goes on to the same bits."""
    whole = trial.made("recare")
    with pytest.raises(Killed):
        trial.erase("recare", "killed", progress=Killer(max(1, trial.reports - 2)), base=trial.base)
    resumed = trial.erase("recare", "killed", resume=True)
    assert all(torch.equal(whole.tensors[key], one) for key, one in resumed.tensors.items())


def loads(trial: Trial) -> None:
    """The pipeline's own ``load_lora_weights`` reads the patch, and predicts what the patch does."""
    patch = trial.made("esd")
    before = trial.predicted(trial.base)
    with patch.apply(trial.base.pipeline):
        ours = trial.predicted(trial.base)
    assert (ours - before).abs().max() > 1e-6
    plain = load_base(trial.folder, device="cpu", memory=SIZE)
    plain.pipeline.load_lora_weights(str(trial.work / "esd"), weight_name=WEIGHTS_NAME)
    torch.testing.assert_close(trial.predicted(plain), ours, atol=1e-4, rtol=1e-3)


def scales(trial: Trial) -> None:
    """At zero nothing changes, and a negative scale leads another way."""
    patch, before = trial.made("esd"), trial.predicted(trial.base)
    found = []
    for scale in (0.0, -1.0, 1.0):
        with patch.apply(trial.base.pipeline, scale=scale):
            found.append(trial.predicted(trial.base))
    torch.testing.assert_close(found[0], before, atol=1e-6, rtol=1e-5)
    assert not torch.equal(found[1], found[2]) and not torch.equal(found[1], before)


def evaluates(trial: Trial) -> None:
    out = Path(shutil.copytree(trial.work / "esd", trial.work / "judged")) if trial.made("esd") else trial.work
    suite = Suite(**{**SUITE, "base": trial.base.family})
    found = evaluate(out, base=trial.base, suite=suite, clip=str(trial.clip), pictures=2, device="cpu", cache=False)
    assert found.figures and (out / "evidence.json").exists()


def stacks(trial: Trial) -> None:
    parts = [trial.made(name) for name in ("esd", "closed")]
    save_stack(stack([(one, 1.0) for one in parts]), trial.work / "stack")
    with parts[0].apply(trial.base.pipeline), parts[1].apply(trial.base.pipeline):
        separate = trial.predicted(trial.base)
    with Patch.load(trial.work / "stack").apply(trial.base.pipeline):
        torch.testing.assert_close(trial.predicted(trial.base), separate, atol=1e-4, rtol=1e-3)


def merges(trial: Trial) -> None:
    merge([(trial.made("esd"), 1.0)], trial.folder, trial.work / "merged")
    with trial.made("esd").apply(trial.base.pipeline):
        wanted = trial.predicted(trial.base)
    merged = load_base(trial.work / "merged", device="cpu", memory=SIZE)
    torch.testing.assert_close(trial.predicted(merged), wanted, atol=1e-4, rtol=1e-3)


CONTRACT: dict[str, Callable[[Trial], None]] = {
    "pictures": draws,
    "batches": predicts,
    "ESD": erases("esd"),
    "closed form": erases("closed"),
    "ReCARE": erases("recare"),
    "CARE-set": has_companions,
    "resume": resumes,
    "own loader": loads,
    "scales": scales,
    "evaluate": evaluates,
    "stack": stacks,
    "merge": merges,
}
ESSENTIAL = ("pictures", "batches", "ESD", "own loader", "scales")
"""What the default run looks at."""

NOT_THERE = {name: {"own loader"} for name in ("PRX", *WITHOUT_LOADER)} | {
    "Sana Sprint": set(CONTRACT),
    "SD 3.5": {"closed form", "stack"},
    "Ideogram 4": {"closed form", "stack"},
}
"""Parts of the contract that a pipeline cannot pass, see :data:`REFUSED`."""


@pytest.fixture
def trial(request: pytest.FixtureRequest, tmp_path: Path) -> Trial:
    return Trial(request.param, tmp_path)


@pytest.mark.parametrize("trial", [one for one in PIPELINES if one != "Sana Sprint"], indirect=True)
def test_the_essential_part(trial: Trial) -> None:
    for part in ESSENTIAL:
        if part not in NOT_THERE.get(trial.name, ()):
            CONTRACT[part](trial)


@pytest.mark.parametrize(("trial", "space"), [("FLUX.1 dev", "embeddings"), ("Z-Image", "words")], indirect=["trial"])
def test_adversaries_train_beside_a_patch(trial: Trial, space: str) -> None:
    """They are found in changed embeddings as in word vectors, and a stopped run goes on to the same bits."""
    hunt = {"count": 2, "space": space, "steps": 1, "life": 2, "batch_size": 1, "vectors": 2}
    changes = {f"adversary.{key}": one for key, one in hunt.items()} | {"search.rounds": 0}
    recipe = trial.recipe("recare", **changes)
    counting, common = Killer(float("inf")), {"device": "cpu", "preview": False, "clip": trial.clip_model}
    whole = erase(recipe, trial.work / "whole", progress=counting, base=trial.base, **common).patch
    with pytest.raises(Killed):
        erase(recipe, trial.work / "killed", progress=Killer(max(1, counting.seen - 2)), base=trial.base, **common)
    resumed = erase(recipe, trial.work / "killed", resume=True, **common).patch
    assert all(torch.equal(whole.tensors[key], one) for key, one in resumed.tensors.items())


@pytest.mark.parametrize("name", ["FLUX.1 dev", "Z-Image", "Qwen-Image", "FLUX.2 Klein"])
def test_what_a_base_takes_is_counted_by_a_run_without_values(name: str, tmp_path: Path) -> None:
    """Its weights, and the layers that its patch would change, are those of the loaded base."""
    trial = Trial(name, tmp_path)
    recipe = trial.recipe("esd")
    found = measure(find_layout(trial.folder)[0], recipe)
    base = trial.base
    assert found.denoiser == sum(one.nbytes for one in base.denoiser.parameters())
    assert found.encoders == sum(one.nbytes for encoder in base._encoders for one in encoder.parameters())
    options = recipe.adapter
    mine = lora.attach(
        base.denoiser, layers=options.layers, rank=options.rank, alpha=options.alpha, generator=torch.Generator()
    )
    assert found.adapter == sum(one.numel() for one in mine)
    assert plan(recipe, speed=1e9, footprint=found).peak > found.denoiser


@pytest.mark.slow
@pytest.mark.parametrize("trial", list(PIPELINES), indirect=True)
def test_the_whole_contract(trial: Trial) -> None:
    assert {part for part, why in outcomes(trial).items() if why} == NOT_THERE.get(trial.name, set())


def outcomes(trial: Trial) -> dict[str, str]:
    """Part of the contract → why it failed; empty where it holds."""
    found = {}
    for part, check in CONTRACT.items():
        try:
            check(trial)
            found[part] = ""
        except (Exception, pytest.fail.Exception) as fault:
            found[part] = (str(fault).strip() or type(fault).__name__).splitlines()[0]
    return found


def write_table(page: Path, names: Sequence[str]) -> None:
    """Run the whole contract for some pipelines, or all, and write their rows into a page, each when it is known."""
    begin, end = "<!-- contract -->\n", "<!-- /contract -->"
    for name in names or PIPELINES:
        with tempfile.TemporaryDirectory() as folder:
            found = outcomes(Trial(name, Path(folder)))
        print(name, {part: why for part, why in found.items() if why} or "all", flush=True)
        why = REFUSED.get(name) or next((why for why in found.values() if why), "")
        marks = ["no" if one else "yes" for one in found.values()]
        row = f"| {name} | `{PIPELINES[name][0]}` | {' | '.join(marks)} | {why if 'no' in marks else ''} |"
        text = page.read_text(encoding="utf-8")
        head, rest = text.split(begin)
        rows = {line.split("|")[1].strip(): line for line in rest.split(end)[0].splitlines()[2:]} | {name: row}
        lines = [f"| pipeline | class | {' | '.join(CONTRACT)} | why not |", "|---" * (len(CONTRACT) + 3) + "|"]
        lines += [rows[one] for one in PIPELINES if one in rows]
        page.write_text(head + begin + "\n".join(lines) + "\n" + end + rest.split(end)[1], encoding="utf-8")


if __name__ == "__main__":
    write_table(Path(sys.argv[1]), sys.argv[2:])
