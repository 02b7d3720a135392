"""One patch on several models, and the page that a table becomes."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from recare_patch.core import EvaluationError, IncompatiblePatchError
from recare_patch.measure.board import EMPTY, Cell, write_board
from recare_patch.measure.suites import Suite
from recare_patch.measure.transfer import table, transfer
from recare_patch.models import BaseModel
from tests.measure.making import SUITE, make_patch
from tests.tiny import make_tiny_sd


@pytest.fixture(scope="module")
def patch(base: BaseModel, tiny_clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_patch(base, tmp_path_factory.mktemp("patch") / "patch", tiny_clip)


def test_a_patch_on_several_models(
    patch: Path, tiny_sd: Path, tiny_sd_v: Path, tmp_path: Path, one_thread: None, caplog: pytest.LogCaptureFixture
) -> None:
    tuned = make_tiny_sd(tmp_path / "tuned", seed=5)
    how: dict[str, Any] = {"suite": Suite(**SUITE), "pictures": 4, "metrics": ["concept-rate", "kid"], "device": "cpu"}
    how["cache"] = False
    found = transfer(patch, [tiny_sd, tuned, tiny_sd_v, "nowhere"], out=tmp_path / "out", **how)
    assert list(found.evidence) == ["tiny-sd", "tuned"] and list(found.faults) == [str(tiny_sd_v), "nowhere"]
    # Said before anything was drawn.
    assert "does not fit" in caplog.messages[0] and "nowhere" in caplog.messages[1]
    one, other = found.evidence.values()
    assert one.patch_sha256 == other.patch_sha256 and one.base_denoiser_sha256 != other.base_denoiser_sha256
    rows = table(found)
    assert rows[0] == ["", "tiny-sd base", "tiny-sd patched", "tuned base", "tuned patched"]
    told = json.loads((tmp_path / "out" / "transfer.json").read_text())
    assert told["kind"] == "transfer" and [("fault" in one) for one in told["models"]] == [False, False, True, True]
    page = (tmp_path / "out" / "transfer.html").read_text()
    assert 'href="tuned/report.html"' in page and "does not fit" in page
    assert (tmp_path / "out" / "tuned" / "evidence.json").is_file()


def test_what_cannot_be_transferred(patch: Path, tiny_sd_v: Path, tmp_path: Path) -> None:
    with pytest.raises(IncompatiblePatchError, match="does not fit base 'tiny-sd-v'"):
        transfer(patch, [tiny_sd_v], out=tmp_path / "out")
    with pytest.raises(EvaluationError, match="no model to evaluate on"):
        transfer(patch, [], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def board(tmp_path: Path) -> Path:
    """Three rows, of which one was not measured; what strangers wrote is in them."""
    rows = [
        [Cell("b", link="b/report.html"), Cell("10.0 %", "3.0–20.0 %", 0.1)],
        [Cell("<script>alert(1)</script>", link="javascript:alert(1)"), EMPTY],
        [Cell("a"), Cell("2.0 %", order=0.02)],
    ]
    return write_board(tmp_path / "board.html", "<b>Title</b>", ["patch", "worst"], rows, eyebrow="Ledger")


def test_a_board_is_safe_and_stands_alone(board: Path) -> None:
    page = board.read_text()
    assert page.count("<script>") == 1 and "javascript:" not in page and "<b>" not in page
    assert "script-src 'sha256-" in page and "http" not in page.replace("http-equiv", "")
    assert page.count("<button") == 2 and page.count("<tr>") == 4
    assert re.search(r'data-order="Infinity"', page)


_DOM = """
const cell = (text, order) => ({ textContent: text, dataset: order === undefined ? {} : { order } });
const rows = [["b", "0.1"], ["c", "Infinity"], ["a", "0.02"]].map(([t, o]) => ({ cells: [cell(t), cell("x", o)] }));
const heads = [0, 1].map((k) => ({ cellIndex: k, state: null, getAttribute() { return this.state; },
  setAttribute(_, s) { this.state = s; }, removeAttribute() { this.state = null; },
  querySelector() { return { addEventListener: (_, f) => { this.click = f; } }; } }));
const body = { rows, append: (...sorted) => { body.rows = sorted; } };
globalThis.document = { querySelector: () => ({ tBodies: [body], tHead: { rows: [{ cells: heads }] } }) };
"""
_CLICKS = """
const told = () => body.rows.map((row) => row.cells[0].textContent).join("");
const seen = [0, 0, 1, 1].map((k) => { heads[k].click(); return told(); });
console.log(JSON.stringify([seen, heads.map((h) => h.state)]));
"""


def test_a_board_sorts_itself() -> None:
    """Its own script, on a stand-in for a page; the test below opens a browser."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("no JavaScript here: node is not installed")
    script = (Path(write_board.__code__.co_filename).parent / "board.js").read_text()
    program = f"{_DOM}(() => {{ {script} }})();{_CLICKS}"
    done = subprocess.run([node, "-e", program], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [["abc", "cba", "abc", "bac"], [None, "descending"]]


@pytest.mark.slow
def test_a_board_in_a_browser(board: Path, browser: Any) -> None:
    page = browser.new_page()
    faults: list[str] = []
    page.on("console", lambda said: faults.append(said.text) if said.type == "error" else None)
    page.on("pageerror", lambda fault: faults.append(str(fault)))
    page.goto(board.as_uri())
    names = "tbody th"
    page.click("thead button >> nth=1")
    assert page.locator(names).all_text_contents() == ["a", "b", "<script>alert(1)</script>"]
    page.click("thead button >> nth=1")
    assert page.locator(names).all_text_contents()[:2] == ["b", "a"]
    assert page.locator("thead th >> nth=1").get_attribute("aria-sort") == "descending"
    page.close()
    assert faults == []
