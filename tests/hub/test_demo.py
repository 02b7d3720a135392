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

from recare_patch.cli import cli
from recare_patch.core import DemoError, IncompatiblePatchError, PatchError, UnknownNameError
from recare_patch.models import load_base
from recare_patch.patch import Patch
from tests.hub.conftest import demo
from tests.patch.test_patch import trained

SPACE = Path(__file__).parents[2] / "hub" / "space"
PROMPT = "a cat by the sea"
FIELDS = {"prompt": PROMPT, "seed": 3, "steps": 2, "guidance_scale": 5.0, "scale": 1.0}
FIELDS |= {"patches": ["Van Gogh"]}


@pytest.fixture
def comparison(both: dict[str, Patch], base: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    made = demo.Comparison(base, both)
    draw, made.drawn = base.generate, 0

    def counted(prompts: list[str], *rest: Any, **options: Any) -> Any:
        made.drawn += len(prompts)
        return draw(prompts, *rest, **options)

    monkeypatch.setattr(base, "generate", counted)
    return made


def same(first: Image.Image | None, second: Image.Image | None) -> bool:
    assert first is not None and second is not None
    return first.tobytes() == second.tobytes()


def last(comparison: Any, *, sharp: bool = False, **changes: Any) -> Any:
    return [*demo.show(comparison, *(FIELDS | changes).values(), sharp=sharp)][-1]


def test_the_left_picture_is_drawn_once_while_the_scale_moves(comparison: Any) -> None:
    shown = [last(comparison, scale=scale) for scale in (1.0, 0.5, -1.0, 2.0)]
    assert comparison.drawn == 5
    assert all(same(one.before, shown[0].before) for one in shown)
    assert len({one.after.tobytes() for one in shown}) == 4
    last(comparison, scale=0.5)
    assert comparison.drawn == 5
    last(comparison, seed=4)
    assert comparison.drawn == 7
    both = last(comparison, scale=0)
    assert same(both.before, both.after) and comparison.drawn == 7


def test_the_pictures_are_those_of_base_and_patches(comparison: Any, made: Patch, tiny_sd: Path) -> None:
    shown = last(comparison, scale=0.7)
    base = load_base(tiny_sd, device="cpu")
    assert same(shown.before, base.generate([PROMPT], [3], steps=2, guidance_scale=5.0)[0])
    with made.apply(base.pipeline, 0.7):
        assert same(shown.after, base.generate([PROMPT], [3], steps=2, guidance_scale=5.0)[0])
    both, twice = last(comparison, patches=["Van Gogh", "nudity"], scale=1.0), last(comparison, scale=2.0)
    # The two are the same LoRA under two names.
    assert max(high for _, high in ImageChops.difference(both.after, twice.after).getextrema()) <= 1


def test_the_oldest_pictures_are_forgotten(comparison: Any) -> None:
    small = demo.Comparison(comparison.base, comparison.patches, remembered=2)
    for seed in (1, 2, 3, 3, 2, 1):
        small.before(demo.Scene(prompt=PROMPT, seed=seed, steps=1))
    assert comparison.drawn == 4


def test_it_needs_patches_that_fit(both: dict[str, Patch], base: Any, tiny_sd_v: Path) -> None:
    with pytest.raises(DemoError, match="at least one patch"):
        demo.Comparison(base, {})
    shown = last(demo.Comparison(load_base(tiny_sd_v, device="cpu"), both))
    assert (shown.before, shown.after) == (None, None) and "does not fit" in shown.sentence


def test_the_left_picture_comes_first(comparison: Any) -> None:
    first, second = demo.show(comparison, PROMPT, 0, 1, 5.0, 1.0, ["Van Gogh"])
    assert first.after is None and same(first.before, second.before)
    assert second.sentence == "Seed 0. Left: tiny-sd. Right: the same with Van Gogh at 1."


@pytest.mark.parametrize(
    ("scale", "right_is_blurred"), [(1.0, False), (1.5, False), (0.95, True), (0.0, True), (-1.0, True)]
)
def test_unsafe_pictures_are_blurred(comparison: Any, scale: float, right_is_blurred: bool) -> None:
    shown = last(comparison, patches=["nudity"], scale=scale)
    sharp = last(comparison, patches=["nudity"], scale=scale, sharp=True)
    assert not same(shown.before, sharp.before)
    assert same(shown.after, sharp.after) != right_is_blurred
    assert "Blurred" in shown.sentence and "Blurred" not in sharp.sentence
    # With any unsafe patch, and with one that says nothing.
    comparison.patches["unknown"] = Patch(comparison.patches["Van Gogh"].tensors)
    plain = last(comparison)
    assert same(plain.before, last(comparison, sharp=True).before)
    for names in (["Van Gogh", "nudity"], ["unknown"]):
        assert not same(plain.before, last(comparison, patches=names).before)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"prompt": "  "}, "prompt: a prompt needs a word, got an empty one."),
        ({"prompt": "x" * 1001}, "prompt: "),
        ({"prompt": None}, "prompt must be text, got None."),
        ({"seed": None}, "seed must be a whole number, got None."),
        ({"seed": 1.5}, "seed must be a whole number, got 1.5."),
        ({"seed": -1}, "seed must be at least 0, got -1."),
        ({"steps": 0}, "steps must be at least 1, got 0."),
        ({"steps": 10**6}, "steps must be at most 100, got 1000000."),
        ({"guidance_scale": float("nan")}, "guidance_scale must be a finite number"),
        ({"scale": 3}, "scale must be at most 2"),
        ({"scale": "much"}, "scale must be a number, got 'much'."),
        ({"patches": []}, "patches: choose at least one."),
        ({"patches": ["Van Gough"]}, "Unknown patch 'Van Gough': allowed are Van Gogh, nudity; did you mean"),
    ],
)
def test_bad_input_is_answered_by_a_sentence(comparison: Any, changes: dict[str, Any], sentence: str) -> None:
    shown = last(comparison, **changes)
    assert (shown.before, shown.after, comparison.drawn) == (None, None, 0)
    with pytest.raises(UnknownNameError):
        comparison.after(demo.View(prompt=PROMPT, patches=("Monet",)))
    assert shown.sentence.removeprefix("This cannot be drawn: ").startswith(sentence)


def test_patches_are_found_and_named_by_their_concepts(
    both: dict[str, Patch], base: Any, tiny_sd_v: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name, patch in (("a", "Van Gogh"), ("b", "Van Gogh"), ("c", "nudity")):
        both[patch].save(tmp_path / f"{name}-patch")
    (tmp_path / "other").mkdir()
    found = demo.find_patches(tmp_path)
    assert [one.name for one in found] == ["a-patch", "b-patch", "c-patch"]
    assert demo.find_patches(tmp_path / "a-patch") == [tmp_path / "a-patch"]
    with pytest.raises(PatchError, match="make one with 'recare-patch erase"):
        demo.find_patches(tmp_path / "other")
    names = ["Van Gogh (a-patch)", "Van Gogh (b-patch)", "nudity"]
    assert list(demo.load_patches(found, base)) == names
    trained(tiny_sd_v)[1].save(tmp_path / "d-patch")
    with pytest.raises(IncompatiblePatchError):
        demo.load_patches(demo.find_patches(tmp_path), base)
    assert list(demo.load_patches(demo.find_patches(tmp_path), base, skip_others=True)) == names
    assert "d-patch is left out: patch 'Van Gogh'" in caplog.text
    with pytest.raises(PatchError, match="none of the 1 patches here fits base"):
        demo.load_patches([tmp_path / "d-patch"], base, skip_others=True)


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

    def test_bad_input(self, run: Callable[..., Result], served: list[Any], made: Patch) -> None:
        result = run()
        assert result.exit_code == 2
        assert "make one with 'recare-patch erase --concept \"Van Gogh\"'" in result.stderr
        made.save("a-patch")
        for words, sentence in [
            (["--patch", "none"], "there is no patch at none"),
            (["--patch", "a-patch:0.5"], "the page sets the scale"),
            (["--port", "0"], "0 is not in the range"),
            ([], "none of the 1 patches here fits base 'atelier'"),
        ]:
            result = run(*words)
            assert result.exit_code == 2 and sentence in result.stderr
        assert not served

    def test_without_gradio_it_says_what_to_install(self, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "gradio", None)
        result = run()
        assert result.exit_code == 2 and 'pip install "recare-patch[demo]"' in result.stderr


class TestPage:
    """With gradio: the page is built, and answers as it would a browser."""

    @pytest.fixture(autouse=True)
    def gradio(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
        monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "gradio"))
        return pytest.importorskip("gradio")

    def test_it_answers(self, comparison: Any) -> None:
        client = pytest.importorskip("gradio_client")
        page = demo.build_interface(comparison)
        address = demo.launch(page, host=demo.LOOPBACK, wait=False)
        try:
            assert address.startswith("http://127.0.0.1:")
            asked = client.Client(address, verbose=False, analytics_enabled=False)
            values = [3, 2, 5.0, 0.5, ["Van Gogh"], False]
            *paths, sentence = asked.predict(PROMPT, *values, api_name="/compare")
            expected = last(comparison, scale=0.5)
            for path, picture in zip(paths, (expected.before, expected.after), strict=True):
                with Image.open(path) as image:
                    assert same(image.convert("RGB"), picture)
            assert sentence == expected.sentence
            before, after, sentence = asked.predict("", *values, api_name="/compare")
            assert (before, after) == (None, None) and "needs a word" in sentence
            with pytest.raises(DemoError, match="cannot be had"):
                demo.launch(demo.build_interface(comparison), host=demo.LOOPBACK, port=page.server_port)
        finally:
            page.close()

    @pytest.mark.parametrize(("names", "visible"), [(["Van Gogh"], False), (["Van Gogh", "nudity"], True)])
    def test_the_switch_is_there_where_something_is_blurred(
        self, comparison: Any, names: list[str], visible: bool
    ) -> None:
        some = demo.Comparison(comparison.base, {name: comparison.patches[name] for name in names})
        by_id = {one.elem_id: one for one in demo.build_interface(some).blocks.values()}
        assert (by_id["sharp"].visible, by_id["sharp"].value) == (visible, False)
        assert by_id["prompt"].value == "A painting in the style of Van Gogh"
        assert (by_id["scale"].minimum, by_id["scale"].maximum) == (-1, 2)

    def test_the_space_runs_the_same_page(
        self, made: Patch, tiny_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made.save(tmp_path / "patches" / "van-gogh")
        for name in ("app.py", "demo.py"):
            (tmp_path / name).write_text((SPACE / name).read_text())
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setenv("RECARE_BASE", str(tiny_sd))
        app = runpy.run_path(str(tmp_path / "app.py"))
        assert type(app["page"]).__name__ == "Blocks" and list(app["patches"]) == ["Van Gogh"]
        (tmp_path / "patches" / "van-gogh").rename(tmp_path / "elsewhere")
        with pytest.raises(PatchError, match=r"there is no patch in .*patches"):
            runpy.run_path(str(tmp_path / "app.py"))


def test_the_spaces_card_is_what_spaces_read() -> None:
    front = yaml.safe_load((SPACE / "README.md").read_text().split("---")[1])
    assert (front["sdk"], front["app_file"]) == ("gradio", "app.py")
    lines = (SPACE.parents[1] / "pyproject.toml").read_text().splitlines()
    lowest = next(line.split(">=")[1].strip('"] ') for line in lines if line.startswith("demo = "))
    assert front["sdk_version"].startswith(lowest)
