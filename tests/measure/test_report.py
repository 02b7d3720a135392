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
from recare_patch.measure.evidence import Check, CheckPoint, Evidence
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


def check_page(file: Path) -> Page:
    """Everything that holds for each report."""
    source = file.read_text(encoding="utf-8")
    page = Page(source)
    assert source.startswith("<!DOCTYPE html>")
    assert page.all("html")[0]["lang"] == "en"
    assert page.all("script") == []
    for tag, attributes in page.found:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "xlink:href", "action", "data", "poster"):
                assert value is not None and value.startswith(("data:", "#")), (tag, value)
    assert "url(" not in source
    assert "@import" not in source
    ids = [attributes["id"] for _, attributes in page.found if "id" in attributes]
    assert len(ids) == len(set(ids))
    for link in page.all("a"):
        assert str(link["href"]).removeprefix("#") in ids
    for box in page.all("label"):
        assert box["for"] in ids
    for image in page.all("img"):
        assert image["alt"]
        assert str(image["src"]).startswith("data:image/webp;base64,")
    assert len(page.all("caption")) == len(page.all("table"))
    assert all(head.get("scope") in ("row", "col") for head in page.all("th"))
    for drawing in page.all("svg"):
        assert drawing.get("aria-label") or drawing.get("aria-hidden") == "true"
    levels = [int(tag[1]) for tag, _ in page.found if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b <= a + 1 for a, b in pairwise(levels))
    for path in [attributes.get("d") for tag, attributes in page.found if tag == "path"]:
        assert path and not re.search("nan|inf|None", path)
    return page


def test_a_full_report(tmp_path: Path) -> None:
    (tmp_path / WEIGHTS_NAME).write_bytes(b"0" * 1_590_000)
    picture = tmp_path / "sheet.png"
    Image.new("RGB", (3000, 20), "teal").save(picture)
    sheets = {"From a file": picture, "From memory": Image.new("L", (40, 30))}
    evidence = make_evidence()
    file = write_report(evidence, tmp_path, sheets, TRAINING)
    assert file == tmp_path / REPORT_NAME
    page = check_page(file)
    for part in (
        "Van Gogh, erased from atelier",
        "of pictures show Van Gogh: plain prompts; base 90.0 %.",
        "of tries bring it back under concept-inversion (small): 3 of 40, and 1 without the attack.",
        "98,760 denoiser evaluations",
        "a patch of 1.59 MB",
        "0.5–5.0 %",
        "At other scales",
        "In other spellings",
        "recare-patch evaluate --patch van-gogh-patch",
        "recare-patch verify FOLDER",
        "recare-patch 0.1.0",
        "a painting by Van Gogh",
        "a" * 64,
    ):
        assert part in page.text, part
    first, second = page.all("img")
    assert (first["width"], second["width"]) == ("2400", "40")
    opened = Image.open(io.BytesIO(base64.b64decode(str(first["src"]).split(",")[1])))
    assert opened.size == (2400, 16)
    assert page.all("input") == []
    # The same evidence gives the same file.
    assert write_report(
        evidence, tmp_path / "again", sheets, TRAINING
    ).read_text() == file.read_text().replace(", a patch of 1.59 MB", "")


def test_a_prompt_stands_over_its_pictures_before_and_after(tmp_path: Path) -> None:
    large, small = Image.new("RGB", (1024, 512), "teal"), Image.new("RGB", (64, 64))
    pictures = {"Plain": [Comparison("a <b> cat", [large], [small]), Comparison("a dog", [small], [small])]}
    page = check_page(write_report(make_evidence(), tmp_path, pictures))
    assert "a <b> cat before after a dog before after" in page.text
    assert [(one["alt"], one["width"], one["height"]) for one in page.all("img")] == [
        ("a <b> cat, before", "320", "160"),
        ("a <b> cat, after", "64", "64"),
        ("a dog, before", "64", "64"),
        ("a dog, after", "64", "64"),
    ]
    unsafe = check_page(write_report(make_evidence(concept="nudity", kind="nsfw"), tmp_path, pictures))
    assert [veil["type"] for veil in unsafe.all("input")] == ["checkbox"]


def test_each_cell_of_a_wide_table_can_name_its_column(tmp_path: Path) -> None:
    page = check_page(write_report(make_evidence(), tmp_path))
    named = {cell["data-column"] for cell in page.all("td") if "data-column" in cell}
    assert {"base", "patched", "pictures", "success", "without attack"} <= named


def test_pictures_of_unsafe_concepts_are_veiled(tmp_path: Path) -> None:
    evidence = make_evidence(concept="nudity", kind="nsfw")
    sheets = {name: Image.new("RGB", (8, 8)) for name in "ab"}
    page = check_page(write_report(evidence, tmp_path, sheets))
    veils = page.all("input")
    assert [veil["type"] for veil in veils] == ["checkbox"] * 2
    assert all("checked" not in veil for veil in veils)
    assert page.text.count("Show these pictures unblurred") == 2


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
    attack = (
        make_evidence()
        .attacks[0]
        .model_copy(
            update={
                "attack": NASTY,
                "preset": NASTY,
                "note": NASTY,
                "detector": NASTY,
                "budget": {NASTY: NASTY},
            }
        )
    )
    evidence = make_evidence(
        concept=NASTY[:90], base=NASTY, method=NASTY, command=NASTY, figures=(figure, *care),
        checks=(check, words), attacks=(attack,), suite={"name": NASTY}, options={NASTY: NASTY},
        versions={NASTY: NASTY}, cost={NASTY: NASTY},
    )  # fmt: skip
    training = TRAINING | {"device": NASTY, "stages": {NASTY: {"seconds": 1}}, "losses": {NASTY: [1, 2]}}
    page = check_page(write_report(evidence, tmp_path, {NASTY: Image.new("RGB", (4, 4))}, training))
    assert len(page.all("img")) == 1
    assert page.text.count("<script>") > 20


@pytest.mark.parametrize(
    "evidence",
    [
        make_evidence(figures=(), attacks=(), checks=(), cost={}, suite={}, versions={}, command=""),
        make_evidence(figures=(make_figure(base=None, base_interval=None, interval=None, by=()),)),
        make_evidence(figures=(make_figure(group="care", better="higher", base=None),)),
        make_evidence(
            figures=tuple(
                make_figure(name=f"CARE score, {w}", group="care", better="higher", base=b)
                for w, b in (("stars", 0.9), ("night", None), ("東京タワー" * 20, 0.87))
            )
        ),
        make_evidence(checks=(Check(name="none", title="None", points=()),)),
        make_evidence(
            checks=(Check(name="gap", title="Gap", points=(CheckPoint(x=1, values={"a": None}),)),)
        ),
        make_evidence(
            checks=(Check(name="one", title="One", unit="", points=(CheckPoint(x=1, values={"a": -3.5}),)),)
        ),
        make_evidence(
            checks=(
                Check(
                    name="flat",
                    title="Flat",
                    unit="",
                    points=tuple(CheckPoint(x=3, values={str(k): 0.0 for k in range(9)}) for _ in range(3)),
                ),
            )
        ),
    ],
)
def test_whatever_is_missing_is_left_out(evidence: Evidence, tmp_path: Path) -> None:
    page = check_page(write_report(evidence, tmp_path))
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
    check_page(write_report(make_evidence(), tmp_path, {}, training))


def test_a_broken_sheet_is_one_sentence(tmp_path: Path) -> None:
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no picture")
    for file in (bad, tmp_path / "missing.png"):
        with pytest.raises(OutputError, match="the sheet 'Before' cannot be put into the report"):
            write_report(make_evidence(), tmp_path, {"Before": file})
    assert not (tmp_path / REPORT_NAME).exists()


def test_the_suite_is_there_to_be_read(tmp_path: Path) -> None:
    suite = {"name": "mine", "plain": ["one <b>", "two"], "care": [{"label": "stars"}]}
    page = check_page(write_report(make_evidence(suite=suite), tmp_path))
    shown = next(word for word in page.words if '"plain"' in word)
    assert json.loads(shown) == suite
