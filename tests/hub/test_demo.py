"""The demo: what its page draws, remembers, blurs and answers; gradio is needed for the page alone."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result
from PIL import Image, ImageChops

from recare_patch import demo
from recare_patch.cli import cli
from recare_patch.core.errors import DemoError, IncompatiblePatchError, PatchError, UnknownNameError
from recare_patch.demo import Comparison, Scene, Shown, View, find_patches, load_patches, show
from recare_patch.models import BaseModel
from recare_patch.models.loading import load_base
from recare_patch.patch.patch import Patch
from tests.patch.test_patch import trained

SPACE = Path(__file__).parents[2] / "hub" / "space"
PROMPT = "a cat by the sea"


class Counted:
    """A base that counts what it draws."""

    def __init__(self, base: BaseModel) -> None:
        self._base = base
        self.drawn = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._base, name)

    def generate(self, prompts: list[str], seeds: list[int], **options: Any) -> list[Image.Image]:
        self.drawn += len(prompts)
        return self._base.generate(prompts, seeds, **options)


@pytest.fixture(scope="module")
def made(tiny_sd: Path) -> Patch:
    return trained(tiny_sd)[1]


def of_kind(patch: Patch, kind: str, concept: str) -> Patch:
    assert patch.metadata is not None
    told = patch.metadata.model_copy(update={"kind": kind, "concept": concept})
    return Patch(patch.tensors, told, concept)


@pytest.fixture
def comparison(made: Patch, tiny_sd: Path) -> Comparison:
    base: Any = Counted(load_base(tiny_sd, device="cpu"))
    return Comparison(base, {"Van Gogh": made, "nudity": of_kind(made, "nsfw", "nudity")})


def same(first: Image.Image | None, second: Image.Image | None) -> bool:
    assert first is not None
    assert second is not None
    return first.tobytes() == second.tobytes()


def last(comparison: Comparison, **changes: Any) -> Shown:
    values = {
        "prompt": PROMPT,
        "seed": 3,
        "steps": 2,
        "guidance_scale": 5.0,
        "scale": 1.0,
        "patches": ["Van Gogh"],
    }
    return [*show(comparison, **(values | changes))][-1]


class TestComparison:
    def test_the_left_picture_is_drawn_once_while_the_scale_moves(self, comparison: Comparison) -> None:
        base: Any = comparison.base
        shown = [last(comparison, scale=scale) for scale in (1.0, 0.5, -1.0, 2.0)]
        assert base.drawn == 5
        assert all(same(one.before, shown[0].before) for one in shown)
        assert len({one.after.tobytes() for one in shown if one.after}) == 4
        last(comparison, scale=0.5)
        assert base.drawn == 5
        last(comparison, seed=4)
        assert base.drawn == 7

    def test_at_scale_0_both_are_the_base(self, comparison: Comparison) -> None:
        shown = last(comparison, scale=0)
        assert same(shown.before, shown.after)
        assert comparison.base.drawn == 1  # type: ignore[attr-defined]

    def test_the_pictures_are_those_of_base_and_patch(
        self, comparison: Comparison, made: Patch, tiny_sd: Path
    ) -> None:
        shown = last(comparison, scale=0.7)
        base = load_base(tiny_sd, device="cpu")
        assert same(shown.before, base.generate([PROMPT], [3], steps=2, guidance_scale=5.0)[0])
        with made.apply(base.pipeline, 0.7):
            assert same(shown.after, base.generate([PROMPT], [3], steps=2, guidance_scale=5.0)[0])

    def test_several_patches_are_applied_together(self, comparison: Comparison, made: Patch) -> None:
        both = last(comparison, patches=["Van Gogh", "nudity"], scale=1.0)
        twice = last(comparison, scale=2.0)
        assert both.after is not None
        assert twice.after is not None
        # The two are the same LoRA under two names.
        extremes = ImageChops.difference(both.after, twice.after).getextrema()
        assert max(high for _, high in extremes) <= 1

    def test_the_oldest_pictures_are_forgotten(self, made: Patch, tiny_sd: Path) -> None:
        base: Any = Counted(load_base(tiny_sd, device="cpu"))
        small = Comparison(base, {"Van Gogh": made}, remembered=2)
        for seed in (1, 2, 3, 3, 2, 1):
            small.before(Scene(prompt=PROMPT, seed=seed, steps=1))
        assert base.drawn == 4

    def test_it_needs_patches_and_says_which_do_not_fit(
        self, made: Patch, tiny_sd: Path, tiny_sd_v: Path
    ) -> None:
        with pytest.raises(DemoError, match="at least one patch"):
            Comparison(load_base(tiny_sd, device="cpu"), {})
        shown = last(Comparison(load_base(tiny_sd_v, device="cpu"), {"Van Gogh": made}))
        assert (shown.before, shown.after) == (None, None)
        assert "does not fit" in shown.sentence


class TestShow:
    def test_the_left_picture_comes_first(self, comparison: Comparison) -> None:
        first, second = show(comparison, PROMPT, 0, 1, 5.0, 1.0, ["Van Gogh"])
        assert first.before is not None
        assert first.after is None
        assert same(first.before, second.before)
        assert second.sentence == "Seed 0. Left: tiny-sd. Right: the same with Van Gogh at 1."

    @pytest.mark.parametrize(
        ("scale", "right_is_blurred"), [(1.0, False), (1.5, False), (0.95, True), (0.0, True), (-1.0, True)]
    )
    def test_unsafe_pictures_are_blurred(
        self, comparison: Comparison, scale: float, right_is_blurred: bool
    ) -> None:
        shown = last(comparison, patches=["nudity"], scale=scale)
        sharp = last(comparison, patches=["nudity"], scale=scale, sharp=True)
        assert not same(shown.before, sharp.before)
        assert same(shown.after, sharp.after) != right_is_blurred
        assert "Blurred" in shown.sentence
        assert "Blurred" not in sharp.sentence

    def test_blurred_with_any_unsafe_patch_and_with_one_that_says_nothing(
        self, comparison: Comparison, made: Patch
    ) -> None:
        plain = last(comparison)
        assert same(plain.before, last(comparison, sharp=True).before)
        assert not same(plain.before, last(comparison, patches=["Van Gogh", "nudity"]).before)
        comparison.patches["unknown"] = Patch(made.tensors)
        assert not same(plain.before, last(comparison, patches=["unknown"]).before)

    @pytest.mark.parametrize(
        ("changes", "sentence"),
        [
            ({"prompt": "  "}, "This cannot be drawn: prompt: a prompt needs a word, got an empty one."),
            ({"prompt": "x" * 1001}, "This cannot be drawn: prompt: "),
            ({"prompt": None}, "This cannot be drawn: prompt must be text, got None."),
            ({"seed": None}, "This cannot be drawn: seed must be a whole number, got None."),
            ({"seed": 1.5}, "This cannot be drawn: seed must be a whole number, got 1.5."),
            ({"seed": -1}, "This cannot be drawn: seed must be at least 0, got -1."),
            ({"steps": 0}, "This cannot be drawn: steps must be at least 1, got 0."),
            ({"steps": 10**6}, "This cannot be drawn: steps must be at most 100, got 1000000."),
            (
                {"guidance_scale": float("nan")},
                "This cannot be drawn: guidance_scale must be a finite number",
            ),
            ({"scale": 3}, "This cannot be drawn: scale must be at most 2"),
            ({"scale": "much"}, "This cannot be drawn: scale must be a number, got 'much'."),
            ({"patches": []}, "This cannot be drawn: patches: choose at least one."),
            (
                {"patches": ["Van Gough"]},
                "Unknown patch 'Van Gough': allowed are Van Gogh, nudity; did you mean",
            ),
        ],
    )
    def test_bad_input_is_answered_by_a_sentence(
        self, comparison: Comparison, changes: dict[str, Any], sentence: str
    ) -> None:
        shown = last(comparison, **changes)
        assert (shown.before, shown.after) == (None, None)
        assert shown.sentence.startswith(sentence)
        assert comparison.base.drawn == 0  # type: ignore[attr-defined]

    def test_a_view_of_an_unknown_patch_is_refused(self, comparison: Comparison) -> None:
        with pytest.raises(UnknownNameError):
            comparison.after(View(prompt=PROMPT, patches=("Monet",)))


class TestPatches:
    @pytest.fixture
    def folder(self, made: Patch, tmp_path: Path) -> Path:
        made.save(tmp_path / "a-patch")
        made.save(tmp_path / "b-patch")
        of_kind(made, "nsfw", "nudity").save(tmp_path / "c-patch")
        (tmp_path / "other").mkdir()
        return tmp_path

    def test_they_are_found_by_their_weights(self, folder: Path) -> None:
        assert [one.name for one in find_patches(folder)] == ["a-patch", "b-patch", "c-patch"]
        assert find_patches(folder / "a-patch") == [folder / "a-patch"]
        with pytest.raises(PatchError, match="make one with 'recare-patch erase"):
            find_patches(folder / "other")

    def test_their_names_are_their_concepts(self, folder: Path, tiny_sd: Path) -> None:
        found = load_patches(find_patches(folder), load_base(tiny_sd, device="cpu"))
        assert list(found) == ["Van Gogh (a-patch)", "Van Gogh (b-patch)", "nudity"]

    def test_what_does_not_fit_is_left_out_or_refused(
        self, folder: Path, tiny_sd: Path, tiny_sd_v: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        base = load_base(tiny_sd, device="cpu")
        trained(tiny_sd_v)[1].save(folder / "d-patch")
        with pytest.raises(IncompatiblePatchError):
            load_patches(find_patches(folder), base)
        assert len(load_patches(find_patches(folder), base, skip_others=True)) == 3
        assert "d-patch is left out: patch 'Van Gogh'" in caplog.text
        with pytest.raises(PatchError, match="none of the 1 patches here fits base"):
            load_patches([folder / "d-patch"], base, skip_others=True)


class TestCommand:
    @pytest.fixture
    def run(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Result]:
        monkeypatch.chdir(tmp_path)
        return lambda *words: CliRunner().invoke(cli, ["demo", *(str(word) for word in words)])

    @pytest.fixture
    def served(self, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, dict[str, Any]]]:
        """What would be served, without gradio."""
        calls: list[tuple[Any, dict[str, Any]]] = []
        monkeypatch.setattr(demo, "require_gradio", lambda: None)
        monkeypatch.setattr(demo, "build_interface", lambda comparison: comparison)
        monkeypatch.setattr(demo, "launch", lambda page, **options: calls.append((page, options)))
        return calls

    def test_on_this_machine_alone_and_not_shared(
        self, run: Callable[..., Result], served: list[Any], made: Patch, tiny_sd: Path
    ) -> None:
        made.save("van-gogh-patch")
        for words in (["--patch", "van-gogh-patch"], ["--patch", "van-gogh"], []):
            result = run(*words, "--base", tiny_sd)
            assert result.exit_code == 0, result.output
            page, options = served.pop()
            assert list(page.patches) == ["Van Gogh"]
            assert options == {"host": "127.0.0.1", "port": None, "share": False}

    def test_without_a_patch_it_says_how_to_make_one(
        self, run: Callable[..., Result], served: list[Any]
    ) -> None:
        result = run()
        assert result.exit_code == 2
        assert "make one with 'recare-patch erase --concept \"Van Gogh\"'" in result.stderr
        assert not served

    def test_other_bad_input(self, run: Callable[..., Result], served: list[Any], made: Patch) -> None:
        made.save("a-patch")
        for words, sentence in [
            (["--patch", "none"], "there is no patch at none"),
            (["--patch", "a-patch:0.5"], "the page sets the scale"),
            (["--port", "0"], "0 is not in the range"),
            ([], "none of the 1 patches here fits base 'atelier'"),
        ]:
            result = run(*words)
            assert result.exit_code == 2
            assert sentence in result.stderr
        assert not served

    def test_without_gradio_it_says_what_to_install(
        self, run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "gradio", None)
        result = run()
        assert result.exit_code == 2
        assert 'pip install "recare-patch[demo]"' in result.stderr


class TestPage:
    """With gradio: the page is built, and answers as it would a browser."""

    @pytest.fixture(autouse=True)
    def gradio(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
        monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "gradio"))
        return pytest.importorskip("gradio")

    def test_it_answers(self, comparison: Comparison) -> None:
        client = pytest.importorskip("gradio_client")
        page = demo.build_interface(comparison)
        address = demo.launch(page, host=demo.LOOPBACK, wait=False)
        try:
            assert address.startswith("http://127.0.0.1:")
            asked = client.Client(address, verbose=False, analytics_enabled=False)
            found = asked.predict(PROMPT, 3, 2, 5.0, 0.5, ["Van Gogh"], False, api_name="/compare")
            before, after, sentence = found
            expected = last(comparison, scale=0.5)
            for path, picture in ((before, expected.before), (after, expected.after)):
                with Image.open(path) as image:
                    assert same(image.convert("RGB"), picture)
            assert sentence == expected.sentence
            before, after, sentence = asked.predict(
                "", 3, 2, 5.0, 0.5, ["Van Gogh"], False, api_name="/compare"
            )
            assert (before, after) == (None, None)
            assert "needs a word" in sentence
            with pytest.raises(DemoError, match="cannot be had"):
                demo.launch(demo.build_interface(comparison), host=demo.LOOPBACK, port=page.server_port)
        finally:
            page.close()

    @pytest.mark.parametrize(("names", "visible"), [(["Van Gogh"], False), (["Van Gogh", "nudity"], True)])
    def test_the_switch_is_there_where_something_is_blurred(
        self, comparison: Comparison, names: list[str], visible: bool
    ) -> None:
        some = Comparison(comparison.base, {name: comparison.patches[name] for name in names})
        by_id = {one.elem_id: one for one in demo.build_interface(some).blocks.values()}
        assert by_id["sharp"].visible == visible
        assert by_id["sharp"].value is False
        assert by_id["prompt"].value == "A painting in the style of Van Gogh"
        assert (by_id["scale"].minimum, by_id["scale"].maximum) == (-1, 2)


class TestSpace:
    def test_its_card_is_what_spaces_read(self) -> None:
        front = yaml.safe_load((SPACE / "README.md").read_text().split("---")[1])
        assert front["sdk"] == "gradio"
        assert front["app_file"] == "app.py"
        lowest = next(
            line.split(">=")[1].strip('"] ')
            for line in (SPACE.parent.parent / "pyproject.toml").read_text().splitlines()
            if line.startswith("demo = ")
        )
        assert front["sdk_version"].startswith(lowest)

    def test_its_app_builds_the_page(
        self, made: Patch, tiny_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pytest.importorskip("gradio")
        made.save(tmp_path / "patches" / "van-gogh")
        (tmp_path / "app.py").write_text((SPACE / "app.py").read_text())
        monkeypatch.setenv("RECARE_BASE", str(tiny_sd))
        app = runpy.run_path(str(tmp_path / "app.py"))
        assert type(app["page"]).__name__ == "Blocks"
        assert list(app["patches"]) == ["Van Gogh"]
        (tmp_path / "patches" / "van-gogh").rename(tmp_path / "elsewhere")
        with pytest.raises(PatchError, match=r"there is no patch in .*patches"):
            runpy.run_path(str(tmp_path / "app.py"))
