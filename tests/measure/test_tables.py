"""Tables of prompts as the field's public repositories have them: what is read, drawn, left out and fetched."""

from __future__ import annotations

import hashlib
import shutil
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from recare_patch.core import EvaluationError, RecarePatchError, UnknownNameError
from recare_patch.measure import Reading, evaluate, fetch_suite, published, with_table
from recare_patch.measure.evidence import Evidence
from recare_patch.measure.prompts import MAX_ROW, read_table
from recare_patch.measure.run import measure_again
from recare_patch.measure.suites import Suite
from recare_patch.models import BaseModel
from recare_patch.patch import Patch
from tests.measure.making import SUITE, make_patch

SHAPES: dict[str, tuple[str, dict[str, int]]] = {
    "esd.csv": (
        ",prompt,evaluation_seed,case_number\n0,van gogh,3016,0\n1,a cat,3016,1\n",
        {"plain": 1, "retained": 1},
    ),
    "unlearndiffatk.csv": (
        "Unnamed: 0,case_number,prompt,evaluation_seed,artist,evaluation_guidance\n"
        '0,0,"A house, with stars by van gogh",2219,Vincent van Gogh,7.5\n1,1,a cat by van gogh,5,Vincent van Gogh,3\n',
        {"plain": 2},
    ),
    "i2p.csv": (
        "prompt,categories,hard,nudity_percentage,lexica_url,sd_seed,sd_guidance_scale,sd_image_width,sd_model\n"
        'van gogh,"sexual, shocking",0,1.5,x,4284,7,512,sd\na dog,hate,1,0,x,1.0,8.5,640,sd\n',
        {"plain": 1, "retained": 1},
    ),
    "imagenet.csv": (
        ",case_number,prompt,evaluation_seed,class\n"
        "0,0,image of van gogh,40,van gogh\n1,1,a tench,7,tench\n2,2,a cat,8,cat\n",
        {"plain": 1, "neighbours": 2},
    ),
    "six-cd.csv": ('case_number,evaluation_seed,target,prompt\n0,27,van gogh,"van gogh, house"\n', {"plain": 1}),
    "p4d.csv": (
        ",case_number,source,prompt,evaluation_seed,evaluation_guidance\n4,103,coco-30k,A gray cat. ,57,7.5\n",
        {"retained": 1},
    ),
    "ring-a-bell.csv": ("case_number,prompt,evaluation_seed\n0,a van gogh house,7\n", {"plain": 1}),
    "spm.csv": (",case_number,prompt,evaluation_seed,artist\n40,40,Van Gogh's house,27,Van Gogh\n", {"plain": 1}),
    "speed.tsv": ("id\tconcept\tprompt\n0\tpicasso\ta house by picasso\n", {"neighbours": 1}),
}


@pytest.fixture(scope="module")
def patch(base: BaseModel, tiny_clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_patch(base, tmp_path_factory.mktemp("tables") / "patch", tiny_clip)


@pytest.fixture(autouse=True)
def home(one_thread: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def written(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_text(text)
    return folder / name


def run(patch: Path, base: BaseModel, tmp_path: Path, suite: Any, **changes: Any) -> Evidence:
    copy = shutil.copytree(patch, tmp_path / "copy", dirs_exist_ok=True)
    return evaluate(copy, base=base, suite=suite, **{"device": "cpu", **changes})


@pytest.mark.parametrize("name", SHAPES)
def test_each_shape_of_the_field_is_evaluated(patch: Path, base: BaseModel, tmp_path: Path, name: str) -> None:
    text, sets = SHAPES[name]
    file = written(tmp_path, name, text)
    rows = read_table(file)
    evidence = run(patch, base, tmp_path, str(file), metrics=["concept-rate", "neighbours", "clip-score"])
    assert {which: len(one["prompts"]) for which, one in evidence.suite["tables"].items()} == sets
    named = {"plain": "concept, plain prompts", "neighbours": "neighbours", "retained": "CLIP score, retained prompts"}
    assert {one.name: one.pictures for one in evidence.figures} == {named[key]: count for key, count in sets.items()}
    assert sum(sets.values()) == len(rows.prompts) and evidence.suite["name"] == name
    assert f"--suite {name}" in evidence.command


def test_each_row_has_its_own_seed_and_guidance(patch: Path, base: BaseModel, tmp_path: Path) -> None:
    rows = [("van gogh house", 11, 7.5), ("van gogh cat", 12, 1.0), ("van gogh dog", 11, 7.5), ("van gogh", 9, 3.0)]
    text = "".join(f"{prompt},{seed},{guidance}\n" for prompt, seed, guidance in rows)
    file = written(tmp_path, "t.csv", "prompt,evaluation_seed,evaluation_guidance\n" + text)
    asked: list[tuple[str, int, float]] = []
    real = base.generate

    def generate(prompts: Any, seeds: Any, **how: Any) -> Any:
        asked.extend((prompt, seed, how["guidance_scale"]) for prompt, seed in zip(prompts, seeds, strict=True))
        return real(prompts, seeds, **how)

    base.generate = generate  # type: ignore[method-assign]
    try:
        evidence = run(patch, base, tmp_path, file, metrics=["concept-rate"], batch_size=3)
        assert sorted(asked) == sorted(rows * 2)
        # The evidence holds the rows, and measuring again, from its own text, draws them alike.
        read = Evidence.from_json(evidence.to_json())
        again = measure_again(read, Patch.load(tmp_path / "copy"), base)
        assert again.figures == evidence.figures and sorted(asked) == sorted(rows * 4)
        # Fewer pictures are the first rows.
        asked.clear()
        run(patch, base, tmp_path, file, metrics=["concept-rate"], cache=False, pictures=2)
        assert sorted(asked) == sorted(rows[:2] * 2)
    finally:
        del base.generate


def test_pairs_give_a_companion_figure(patch: Path, base: BaseModel, tmp_path: Path) -> None:
    rows = ("0,5,van gogh,van gogh house", "1,6,van gogh,van gogh cat", "2,7,van gogh,van gogh")
    file = written(tmp_path, "malicious.csv", "\n".join(["case_number,evaluation_seed,target,prompt", *rows]))
    other = written(tmp_path, "clean.csv", "case_number,evaluation_seed,prompt\n1,6,cat\n0,5,house\n")
    evidence = run(patch, base, tmp_path, file, reading=Reading(without=other), metrics=["care-score"])
    assert evidence.suite["tables"]["plain"]["without"] == ["house", "cat"]
    (figure,) = evidence.figures
    assert (figure.name, figure.metric, figure.pictures) == ("companions, paired prompts", "in-prompt CLIP score", 2)
    # Random features may all be at right angles.
    assert figure.base is not None and 0 <= figure.patched <= 1 and figure.interval is not None
    column = written(tmp_path, "one.csv", "prompt,clean\nvan gogh house,house\n")
    suite = with_table(Suite(**SUITE), column, Reading({"without": "clean"}))
    assert suite.drawing("plain", 9).without == ("house",)
    for text, told in (
        ("prompt\ncat\n", "3 prompts cannot be paired with the 1"),
        ("case,prompt\n9,cat\n", "no case of theirs"),
    ):
        with pytest.raises(EvaluationError, match=told):
            with_table(Suite(**SUITE), file, Reading(without=written(tmp_path, "short.csv", text)))


def test_what_rows_are_can_be_said(tmp_path: Path) -> None:
    file = written(tmp_path, "t.csv", "caption;seed\na cat;1\na van gogh;2\n")
    said: dict[str, Any] = {"erased": {"plain": 2}, "retained": {"retained": 2}, None: {"plain": 1, "retained": 1}}
    for role, sets in said.items():
        suite = with_table(Suite(**SUITE), file, Reading({"prompt": "Caption"}, role))
        assert {which: len(rows.prompts) for which, rows in suite.tables.items()} == sets
    unsafe = with_table(Suite(**{**SUITE, "concept": "nudity", "kind": "nsfw"}), file, Reading({"prompt": "caption"}))
    assert len(unsafe.tables["plain"].prompts) == 2 and not unsafe.plain and not unsafe.care


def test_rows_that_are_left_out_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bad = f"prompt,seed,guidance,class\n,1,7,a\na,,7,a\na,x,7,a\na,{2**63},7,a\na,1,,a\na,1,101,a\na,1,7\na,1,7,a,b\n"
    file = written(tmp_path, "t.csv", bad + f"{'x' * (MAX_ROW + 1)},1,7,a\na,1,7,a\n\n,2,7,a\n")
    assert read_table(file).prompts == ("a",)
    (told,) = caplog.messages
    assert told.startswith(
        "10 of 11 rows of t.csv are left out: 2 with no prompt (lines 2 and 13)".replace(" and ", ", ")
    )
    for why in ("no seed (line 3)", "no whole number from 0 to", "no guidance (line 6)", "no number from 0 to 100"):
        assert why in told
    for why in ("nothing in its column 'class'", "more cells than the 4 columns", "more than 10,000 characters"):
        assert why in told


@pytest.mark.parametrize(
    ("text", "columns", "told"),
    [
        (
            "id,concept\n0,taylor_swift\n",
            {},
            "no column 'prompt' in its first line, 'id,concept': name it with --column",
        ),
        ("promt,seed\na,1\n", {}, r"did you mean --column prompt=promt\?"),
        ("prompt\na\n", {"prompts": "prompt"}, r"unknown column 'prompts': .*did you mean 'prompt'"),
        ("prompt\na\n", {"seed": "sed"}, "unknown column of .*t.csv 'sed'"),
        ("prompt\n\n", {}, "column names and no row to draw"),
    ],
)
def test_faulty_tables_are_one_sentence(tmp_path: Path, text: str, columns: dict[str, str], told: str) -> None:
    with pytest.raises(RecarePatchError, match=told) as caught:
        read_table(written(tmp_path, "t.csv", text), columns)
    assert "\n" not in str(caught.value)


def test_what_is_for_tables_is_refused_elsewhere(patch: Path, base: BaseModel, tmp_path: Path) -> None:
    for reading in (Reading(role="erased"), Reading(without="x.csv")):
        with pytest.raises(EvaluationError, match=r"is for the rows of a table: give one by --suite FILE.csv"):
            run(patch, base, tmp_path, Suite(**SUITE), reading=reading)
    with pytest.raises(EvaluationError, match="cannot read the prompt file"):
        run(patch, base, tmp_path, "nowhere.csv")
    file = written(tmp_path, "other.csv", "prompt,artist,without\na,monet,b\n")
    with pytest.raises(EvaluationError, match=r"no row of .* is one of 'Van Gogh', so that there is nothing to pair"):
        run(patch, base, tmp_path, file)


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A mirror of the repositories on this machine."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    folder = tmp_path / "mirror"
    folder.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("RECARE_PATCH_SUITES_URL", f"http://127.0.0.1:{server.server_port}/")
    yield folder
    server.shutdown()
    server.server_close()


def test_published_tables_are_fetched_once_and_held_to_their_hash(
    patch: Path, base: BaseModel, tmp_path: Path, mirror: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "spm/rembrandt_prompts"
    one = published()[name]
    with pytest.raises(EvaluationError, match=f"not on this machine: fetch it by `recare-patch suites fetch {name}`"):
        run(patch, base, tmp_path, name)
    with pytest.raises(EvaluationError, match=r"cannot be fetched from .* \(HTTP 404\): put the file at .*rembrandt"):
        fetch_suite(name)
    with pytest.raises(UnknownNameError, match=f"did you mean '{name}'"):
        fetch_suite("spm/rembrant_prompts")
    place = mirror / one.repository / one.commit / one.path
    place.parent.mkdir(parents=True)
    place.write_text("case_number,prompt,evaluation_seed,artist\n0,a house,1,Van Gogh\n")
    assert fetch_suite(name.upper()).file.read_bytes() == place.read_bytes()
    evidence = run(patch, base, tmp_path, name, metrics=["concept-rate"])
    assert evidence.figures[0].pictures == 1
    # Nothing is asked of the network any more; what was changed is told of.
    monkeypatch.setenv("RECARE_PATCH_SUITES_URL", "http://127.0.0.1:9/")
    fetch_suite(name)
    one.file.write_text("prompt\nanother\n")
    with pytest.raises(EvaluationError, match=r"is not the prompt file spm/rem.*: it has SHA-256 .* delete it"):
        run(patch, base, tmp_path, name)
    pinned = published()["unlearndiffatk/vangogh"]
    with pytest.raises(EvaluationError, match="put the file at"):
        fetch_suite(pinned.name)
    pinned.file.parent.mkdir(parents=True, exist_ok=True)
    pinned.file.write_text("prompt\na cat\n")
    with pytest.raises(EvaluationError, match="9d0b141b6674… was pinned"):
        pinned.check()


def test_published_tables_are_pinned() -> None:
    for name, one in published().items():
        assert name == name.casefold() and one.licence in ("MIT", "Apache-2.0")
        assert one.url.startswith(f"https://raw.githubusercontent.com/{one.repository}/{one.commit}/")
    assert len({one.file for one in published().values()}) == len(published())
    assert hashlib.sha256(b"").hexdigest() not in {one.sha256 for one in published().values()}
