"""The report: well-formed, self-contained, and safe whatever its texts say."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from recare_patch.core import Comparison, OutputError
from recare_patch.measure.evidence import Check, CheckPoint, Evidence, Figure
from recare_patch.measure.report import write_report
from recare_patch.patch import REPORT_NAME
from recare_patch.recipe import WEIGHTS_NAME
from tests.measure.test_evidence import make_evidence, make_figure

VOID = {"meta", "link", "img", "input", "br", "hr"}
TRAINING: dict[str, Any] = {
    "seconds": 312.4,
    "denoiser_evaluations": 98760,
    "peak_memory_bytes": 2**30,
    "device": "cpu",
    "stages": {"target images": {"seconds": 60.0, "evaluations": 1920}, "erase": {"seconds": 9}},
    "losses": {"erase": [1.0 / (k + 1) for k in range(500)], "search": [0.5], "odd": "text"},
}


class Page(HTMLParser):
    """What a page holds; fails on tags that do not close in their order."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), (tag, attrs)
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert self.open and "svg" in self.open, f"<{tag}/> outside of a drawing"
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, (tag, self.open)
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def page_of(evidence: Evidence, folder: Path, *more: Any) -> Page:
    """A report, after a look at everything that holds for each."""
    source = write_report(evidence, folder, *more).read_text(encoding="utf-8")
    page = Page(source)
    assert source.startswith("<!DOCTYPE html>")
    assert page.all("html")[0]["lang"] == "en"
    assert page.all("script") == []
    for tag, attributes in page.found:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "xlink:href", "action", "data", "poster"):
                assert value is not None and value.startswith(("data:", "#")), (tag, value)
    assert "url(" not in source and "@import" not in source
    ids = [attributes["id"] for _, attributes in page.found if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {str(link["href"]).removeprefix("#") for link in page.all("a")} <= set(ids)
    assert {box["for"] for box in page.all("label")} <= set(ids)
    for image in page.all("img"):
        assert image["alt"] and str(image["src"]).startswith("data:image/webp;base64,")
    assert len(page.all("caption")) == len(page.all("table"))
    assert all(head.get("scope") in ("row", "col") for head in page.all("th"))
    for drawing in page.all("svg"):
        assert drawing.get("aria-label") or drawing.get("aria-hidden") == "true"
    levels = [int(tag[1]) for tag, _ in page.found if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 == levels.count(1)
    assert all(b <= a + 1 for a, b in pairwise(levels))
    for path in [attributes.get("d") for tag, attributes in page.found if tag == "path"]:
        assert path and not re.search("nan|inf|None", path)
    return page


def test_a_full_report(tmp_path: Path) -> None:
    (tmp_path / WEIGHTS_NAME).write_bytes(b"0" * 1_590_000)
    picture = tmp_path / "sheet.png"
    Image.new("RGB", (3000, 20), "teal").save(picture)
    sheets = {"From a file": picture, "From memory": Image.new("L", (40, 30))}
    suite = {"name": "mine", "plain": ["one <b>", "two"], "care": [{"label": "stars"}]}
    evidence = make_evidence(suite=suite)
    page = page_of(evidence, tmp_path, sheets, TRAINING)
    for part in (
        "Van Gogh, erased from atelier", "of pictures show Van Gogh: plain prompts; base 90.0 %.",
        "of tries bring it back under concept-inversion (small): 3 of 40, and 1 without the attack.",
        "98,760 denoiser evaluations", "a patch of 1.59 MB", "0.8–5.0 %", "At other scales", "a" * 64,
        "In other spellings", "recare-patch evaluate --patch van-gogh-patch", "recare-patch verify FOLDER",
        "recare-patch 0.1.0", "a painting by Van Gogh",
    ):  # fmt: skip
        assert part in page.text, part
    assert [json.loads(word) for word in page.words if '"plain"' in word] == [suite]
    first, second = page.all("img")
    assert (first["width"], second["width"]) == ("2400", "40")
    opened = Image.open(io.BytesIO(base64.b64decode(str(first["src"]).split(",")[1])))
    assert opened.size == (2400, 16)
    assert page.all("input") == []
    named = {cell["data-column"] for cell in page.all("td") if "data-column" in cell}
    assert {"base", "patched", "pictures", "success", "without attack"} <= named
    # The same evidence gives the same file.
    again = write_report(evidence, tmp_path / "again", sheets, TRAINING).read_text()
    assert again == (tmp_path / REPORT_NAME).read_text().replace(", a patch of 1.59 MB", "")


def test_a_prompt_stands_over_its_pictures_before_and_after(tmp_path: Path) -> None:
    large, small = Image.new("RGB", (1024, 512), "teal"), Image.new("RGB", (64, 64))
    pictures = {"Plain": [Comparison("a <b> cat", [large], [small]), Comparison("a dog", [small], [small])]}
    page = page_of(make_evidence(), tmp_path, pictures)
    assert "a <b> cat before after a dog before after" in page.text
    assert [(one["alt"], one["width"], one["height"]) for one in page.all("img")] == [
        ("a <b> cat, before", "320", "160"),
        ("a <b> cat, after", "64", "64"),
        ("a dog, before", "64", "64"),
        ("a dog, after", "64", "64"),
    ]
    unsafe = page_of(make_evidence(concept="nudity", kind="nsfw"), tmp_path, pictures)
    assert [veil["type"] for veil in unsafe.all("input")] == ["checkbox"]


NASTY = '</style></script><script>alert(1)</script><img src=x onerror="a()">"\'>&amp; javascript:'


def test_no_text_gets_out_of_its_place(tmp_path: Path) -> None:
    figure = make_figure(
        name=NASTY, metric=NASTY, detector=NASTY, note=NASTY,
        by=({"label": NASTY, "patched": 0, "pictures": 1},),
    )  # fmt: skip
    care = [make_figure(name=f"{NASTY}{k}", group="care", metric=NASTY, better="higher") for k in range(3)]
    check = Check(
        name="c", title=NASTY, what=NASTY, note=NASTY, x_label=NASTY, y_label=NASTY,
        points=tuple(CheckPoint(x=x, values={NASTY: 0.5, "b": 1 - x or None}) for x in (0, 1)),
    )  # fmt: skip
    words = Check(name="w", title=NASTY, points=(CheckPoint(x=NASTY, values={NASTY: 0.5}),))
    texts = dict.fromkeys(("attack", "preset", "note", "detector", "folder"), NASTY)
    attack = make_evidence().attacks[0].model_copy(update={**texts, "budget": {NASTY: NASTY}})
    evidence = make_evidence(
        concept=NASTY[:90], base=NASTY, method=NASTY, command=NASTY, figures=(figure, *care),
        checks=(check, words), attacks=(attack,), suite={"name": NASTY}, options={NASTY: NASTY},
        versions={NASTY: NASTY}, cost={NASTY: NASTY},
    )  # fmt: skip
    training = TRAINING | {"device": NASTY, "stages": {NASTY: {"seconds": 1}}, "losses": {NASTY: [1, 2]}}
    page = page_of(evidence, tmp_path, {NASTY: Image.new("RGB", (4, 4))}, training)
    assert len(page.all("img")) == 1
    assert page.text.count("<script>") > 20


def companion(word: str, base: float | None, patched: float) -> Figure:
    around = {"base_interval": None if base is None else (base - 0.01, base), "interval": (patched, 1)}
    return make_figure(name=f"CARE score, {word}", group="care", better="higher", base=base, patched=patched, **around)


@pytest.mark.parametrize(
    ("figures", "told"),
    [
        ([("stars", 0.5, 0.9)], "CARE score, stars; base 50.0 %. No loss."),
        ([("stars", 0.5, 0.9), ("moon", 0.5, 0.6)], "CARE score, moon; base 50.0 %. No loss among 2."),
        ([("stars", 0.9, 0.4)], "CARE score, stars; base 90.0 %, no clear change."),
        ([("stars", 0.9, 0.4), ("moon", 0.5, 0.1)], "CARE score, stars, the largest loss of 2; base 90.0 %"),
    ],
)
def test_the_worst_figure_stands_for_the_others(
    figures: list[tuple[str, float, float]], told: str, tmp_path: Path
) -> None:
    shown = tuple(companion(*one) for one in figures)
    bare = dict.fromkeys(("base", "base_interval", "interval"))
    worse = make_figure(name="concept, other prompts", patched=0.3, **bare)
    page = page_of(make_evidence(figures=(make_figure(), worse, *shown)), tmp_path)
    assert told in page.text
    assert "30.0 % of pictures show Van Gogh: other prompts, the worst of 2." in page.text


def of_points(*points: tuple[float | str, dict[str, float | None]], unit: str = "rate") -> Evidence:
    found = tuple(CheckPoint(x=x, values=values) for x, values in points)
    return make_evidence(checks=(Check(name="c", title="Check", unit=unit, points=found),))


@pytest.mark.parametrize(
    "evidence",
    [
        make_evidence(figures=(), attacks=(), checks=(), cost={}, suite={}, versions={}, command=""),
        make_evidence(figures=(make_figure(base=None, base_interval=None, interval=None, by=()),)),
        make_evidence(figures=(companion("stars", None, 0.5),)),
        make_evidence(
            figures=(
                companion("stars", 0.9, 0.5), companion("night", None, 0.5), companion("東京" * 60, 0.8, 0.5),
            )
        ),
        of_points(),
        of_points((1, {"a": None})),
        of_points((1, {"a": -3.5}), unit=""),
        of_points(*[(3, {str(k): 0.0 for k in range(9)})] * 3, unit=""),
    ],
)  # fmt: skip
def test_whatever_is_missing_is_left_out(evidence: Evidence, tmp_path: Path) -> None:
    page = page_of(evidence, tmp_path)
    assert "Measure it again" in page.text
    assert "Before and after" not in page.text


@pytest.mark.parametrize(
    "training",
    [
        {"seconds": "soon", "stages": [], "losses": 3},
        {"stages": {"a": 3}, "losses": {"a": [float("nan"), None, "x", True]}},
        {"seconds": 1e6, "peak_memory_bytes": 0, "stages": {"a": {}}},
    ],
)
def test_a_training_record_of_any_shape(training: dict[str, Any], tmp_path: Path) -> None:
    page_of(make_evidence(), tmp_path, {}, training)


def test_a_broken_sheet_is_one_sentence(tmp_path: Path) -> None:
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no picture")
    for file in (bad, tmp_path / "missing.png"):
        with pytest.raises(OutputError, match="the sheet 'Before' cannot be put into the report"):
            write_report(make_evidence(), tmp_path, {"Before": file})
    assert not (tmp_path / REPORT_NAME).exists()
