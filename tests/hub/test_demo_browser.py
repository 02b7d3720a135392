"""The demo's page in a real browser, headless; needs playwright and a Chromium: python -m pytest -m slow."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from recare_patch.models import load_base
from recare_patch.patch import Patch
from tests.hub.conftest import demo

pytestmark = pytest.mark.slow

WAIT = 120_000
"""Milliseconds for a picture on a busy machine."""


@pytest.fixture(scope="module")
def address(tiny_sd: Path, both: dict[str, Patch], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    pytest.importorskip("gradio")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("gradio")))
        page = demo.build_interface(demo.Comparison(load_base(tiny_sd, device="cpu"), both))
        yield demo.launch(page, host=demo.LOOPBACK, wait=False)
        page.close()


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    """The page, opened; at its end nothing has gone wrong in it and nothing was asked of other machines."""
    opened = browser.new_page(viewport={"width": 1280, "height": 900})
    faults: list[str] = []
    opened.on("console", lambda said: faults.append(said.text) if said.type == "error" else None)
    opened.on("pageerror", lambda fault: faults.append(str(fault)))
    local = (address, "data:", "blob:")
    opened.on("request", lambda asked: None if asked.url.startswith(local) else faults.append(asked.url))
    opened.set_default_timeout(WAIT)
    opened.goto(address)
    opened.wait_for_selector("#draw")
    yield opened
    opened.close()
    assert faults == []


def pixels(page: Any, side: str) -> str:
    """A picture as the browser decoded it."""
    drawn: str = page.eval_on_selector(
        f"#{side} img",
        """async image => {
            await image.decode();
            const canvas = document.createElement("canvas");
            [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
            canvas.getContext("2d").drawImage(image, 0, 0);
            return canvas.toDataURL();
        }""",
    )
    return drawn


def wait_for_sentence(page: Any, text: str) -> None:
    page.wait_for_function(
        "text => document.querySelector('#sentence')?.innerText.includes(text)", arg=text, timeout=WAIT
    )


def draw(page: Any, prompt: str, sentence: str) -> None:
    page.fill("#prompt textarea", prompt)
    page.click("#draw")
    wait_for_sentence(page, sentence)


def move_scale(page: Any, value: float) -> None:
    page.fill("#scale input[type=number]", str(value))
    page.press("#scale input[type=number]", "Enter")
    wait_for_sentence(page, f"with Van Gogh at {value:g}.")


def test_a_prompt_is_drawn_and_the_scale_moves_the_right_picture(page: Any) -> None:
    draw(page, "a house by Van Gogh", "Right: the same with Van Gogh at 1.")
    left, right = pixels(page, "before"), pixels(page, "after")
    assert left != right
    move_scale(page, 0.5)
    assert pixels(page, "before") == left
    assert pixels(page, "after") not in (left, right)
    page.focus("#scale input[type=range]")
    page.keyboard.press("Home")
    wait_for_sentence(page, "with Van Gogh at -1.")
    move_scale(page, 0)
    assert pixels(page, "after") == left
    # Bad input is answered by a sentence.
    draw(page, "  ", "a prompt needs a word")


def test_unsafe_pictures_stay_blurred_until_the_switch_is_set(page: Any) -> None:
    draw(page, "a cat by the sea", "Right: the same with Van Gogh at 1.")
    sharp = pixels(page, "before")
    page.check("#patches label:has-text('nudity') input")
    wait_for_sentence(page, "Blurred")
    assert pixels(page, "before") != sharp
    page.check("#sharp input")
    page.wait_for_function("() => !document.querySelector('#sentence').innerText.includes('Blurred')")
    wait_for_sentence(page, "with Van Gogh and nudity at 1.")
    assert pixels(page, "before") == sharp


@pytest.mark.parametrize("width", [390, 768, 1280])
def test_nothing_overflows(page: Any, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 844})
    draw(page, "a house by Van Gogh, " + "w" * 200, "Right: the same with")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for side in ("before", "after"):
        box = page.locator(f"#{side} img").bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= width and box["width"] >= 250
