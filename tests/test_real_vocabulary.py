"""The life of patches, by the commands, on bases of the hub's shape with CLIP's real vocabulary.

The weights are random and narrow, all else is as a first user meets it: tokenizers in the files of 2022, padding with
"!", SD 2's velocity, SDXL's two encoders, native pictures of full size, a CLIP whose lexicon is the language's.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from recare_patch.careset import CareSet, Clip, known_words
from recare_patch.cli import cli
from recare_patch.models import load_base
from recare_patch.recipe import Concept, MemoryOptions
from tests.cli.test_end_to_end import SMALL
from tests.measure.making import SUITE
from tests.tiny import make_tiny_clip, make_tiny_sd, make_tiny_sdxl

FEW = SMALL | {"memory.resolution": "64x64"}

_EVALUATE = ("--suite", "suite.yaml", "--metric", "concept-rate", "--pictures", 2, "--no-cache", "--device", "cpu")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Bases whose native side is 256 pixels, and a CLIP."""
    place = tmp_path_factory.mktemp("real")
    v = {"prediction_type": "v_prediction", "linear_projection": True, "open_clip": True, "width": 48}
    return {
        "sd-1.5": make_tiny_sd(place / "sd15", latent_size=32, real=True),
        "sd-2.1": make_tiny_sd(place / "sd21", latent_size=32, real=True, seed=1, **v),  # type: ignore[arg-type]
        "sdxl": make_tiny_sdxl(place / "sdxl", latent_size=32, real=True),
        "clip": make_tiny_clip(place / "clip", real=True),
    }


@pytest.fixture
def invoke(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Result]:
    monkeypatch.chdir(tmp_path)

    def run(*words: object) -> Result:
        result = CliRunner().invoke(cli, [*map(str, words)])
        assert result.exit_code == 0, result.output
        return result

    return run


@pytest.mark.parametrize("name", ["sd-1.5", "sd-2.1", "sdxl"])
def test_erase_evaluate_stack_and_merge(folders: dict[str, Path], name: str, invoke: Callable[..., Result]) -> None:
    base, more = folders[name], [word for key, value in FEW.items() for word in ("--set", f"{key}={value}")]
    models = ["--base", base, "--clip", folders["clip"], "--device", "cpu"]
    CareSet.of_words(Concept(text="Greg Rutkowski", kind="style"), ["castle", "wizard"]).save("care.json")
    words = ["--concept", "Greg Rutkowski", "--kind", "style", "--care-set", "care.json", "--out", "rutkowski"]
    assert "castle, wizard" in invoke("erase", *words, *models, *more).output
    assert Path("rutkowski", "preview.png").is_file()
    invoke("erase", "--concept", "tench", "--kind", "object", "--method", "uce", "--out", "tench", *models, *more)
    recipe = Path("rutkowski", "recipe.yaml").read_text()
    assert "guidance_scale: 5.0" in recipe if name == "sdxl" else "guidance_scale: 7.5" in recipe
    invoke("stack", "rutkowski", "tench", "--out", "both")
    suite = {**SUITE, "concept": "tench", "kind": "object", "label": "tench", "plain": ["A photo of a tench!"]}
    Path("suite.yaml").write_text(json.dumps(suite))
    invoke("evaluate", "--patch", "tench", "--base", base, *_EVALUATE, "--clip", folders["clip"])
    assert json.loads(Path("tench", "evidence.json").read_text())["suite"]["name"] == "tiny"
    merged = invoke("merge", "--patch", "both", "--base", base, "--out", "merged")
    assert "merged" in merged.output
    whole = load_base("merged", device="cpu", memory=MemoryOptions(resolution="64x64"))
    assert len(whole.generate(["a castle"], [0], steps=2)) == 1


def test_the_vocabulary_is_that_of_the_language(folders: dict[str, Path]) -> None:
    clip = Clip.load(str(folders["clip"]))
    words = known_words(clip)
    assert len(words) > 10_000 and {"sunflower", "wizard"} <= set(words)
    for name in ("sd-1.5", "sd-2.1", "sdxl"):
        base = load_base(str(folders[name]), device="cpu", memory=MemoryOptions(resolution="64x64"))
        assert base.token_text(base.token_ids("Greg Rutkowski")) == "greg rutkowski"
        assert len(base.token_table()) == 49_408
    assert json.loads((folders["clip"] / "config.json").read_text())["text_config"]["eos_token_id"] == 2
