"""Patches on the Hub, through huggingface_hub's own client against a stand-in of the Hub on loopback."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from diffusers import StableDiffusionPipeline

from recare_patch import cli as common
from recare_patch import share as sharing
from recare_patch.cli import cli
from recare_patch.combine import save_stack, stack
from recare_patch.core import PatchError, file_sha256
from recare_patch.measure import Evidence
from recare_patch.measure.card import EVIDENCE_START, model_index
from recare_patch.measure.integrity import Finding, Findings
from recare_patch.measure.verified import Remembered, remember, remembered
from recare_patch.patch import PLACE, RECORD_NAME, Patch, split_card
from recare_patch.recipe import WEIGHTS_NAME
from tests.measure.test_evidence import make_evidence
from tests.patch.making import as_another, trained, write_patch
from tests.share.hub_stand_in import READ_TOKEN, TOKEN, HubStandIn, Repo, point_to

KOHYA = "erase-van-gogh.safetensors"
REPO = "me/erase-van-gogh"
ODD_TOKEN = "hf_ATokenThatNobodyKnows"


@pytest.fixture(scope="module")
def patch(tiny_sd: Path) -> Patch:
    return trained(tiny_sd)[1]


@pytest.fixture
def folder(patch: Patch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A patch with evidence, in the folder where commands run."""
    monkeypatch.chdir(tmp_path)
    return write_patch(tmp_path / "van-gogh-patch", patch, make_evidence())


@pytest.fixture(scope="module")
def shelf() -> dict[str, bytes]:
    """What a push of the patch sends, once it was sent."""
    return {}


@pytest.fixture
def there(hub: HubStandIn, folder: Path, shelf: dict[str, bytes]) -> Repo:
    """The patch on the Hub, pushed once for all tests that only fetch it."""
    if not shelf:
        sharing.push(folder)
        shelf.update(hub.repos[REPO].files)
        hub.seen.clear()
    return hub.add(REPO, shelf, private=True)


def run(*words: str | Path) -> Result:
    return CliRunner().invoke(cli, [str(word) for word in words])


def sound(*words: str | Path) -> Result:
    result = run(*words)
    assert result.exit_code == 0, result.output
    return result


def refused(*words: str | Path) -> str:
    """The one sentence that a command ends with."""
    result = run(*words)
    assert result.exit_code == 2, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    lines = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1, result.stderr
    assert TOKEN not in result.output
    return lines[0]


def test_push_pull_and_load(hub: HubStandIn, folder: Path, patch: Patch, tiny_sd: Path) -> None:
    sent = sound("push", folder)
    repo = hub.repos[REPO]
    assert repo.private
    commit, files = repo.commits[-1]
    assert f"(private, commit {commit})" in sent.stdout
    records = {"recipe.yaml", "care_set.json", "evidence.json", "training.json"}
    assert set(files) - {".gitattributes"} == {WEIGHTS_NAME, KOHYA, "README.md", "preview.png", *records}
    front, body = split_card(files["README.md"].decode())
    assert front["model-index"] == [model_index(Evidence.load(folder))]
    assert {"recare-patch", "concept:van-gogh"} <= set(front["tags"])
    assert f'pipe.load_lora_weights("{REPO}"' in body and f"--patch hub:{REPO} " in body
    assert PLACE not in body
    # The folder stays as it was.
    assert PLACE in (folder / "README.md").read_text() and not (folder / KOHYA).exists()

    got = sound("pull", REPO, "--out", "fetched", "--base", tiny_sd)
    assert "the very weights" in got.stdout
    place = Path("fetched")
    for name, data in files.items():
        assert name == ".gitattributes" or (place / name).read_bytes() == data
    record = json.loads((place / RECORD_NAME).read_text())
    assert (record["repo"], record["commit"], record["revision"]) == (REPO, commit, "main")
    assert record["files"][WEIGHTS_NAME]["sha256"] == file_sha256(folder / WEIGHTS_NAME)
    # A page is never taken from others: this one was made here.
    assert "Content-Security-Policy" in (place / "report.html").read_text()
    assert sorted(one.name for one in Path().iterdir() if one.name.startswith(".")) == []

    loaded = Patch.load(place)
    assert all(torch.equal(loaded.tensors[key], patch.tensors[key]) for key in patch.tensors)
    for source, name in ((place, WEIGHTS_NAME), (place, KOHYA), (REPO, WEIGHTS_NAME)):
        pipe = StableDiffusionPipeline.from_pretrained(tiny_sd)
        pipe.load_lora_weights(str(source), weight_name=name, adapter_name="erased")
        assert pipe.get_active_adapters() == ["erased"]


def test_what_is_there_already_is_neither_sent_nor_fetched_again(hub: HubStandIn, folder: Path) -> None:
    sound("push", folder)
    sound("pull", REPO)
    before = hub.requests("POST", "/commit/"), hub.requests("GET", "/resolve/")
    again = sound("push", folder).stdout
    assert "Sent:" not in again and f"There already: {WEIGHTS_NAME}" in again
    assert "here already and unchanged" in sound("pull", REPO).stdout
    assert (hub.requests("POST", "/commit/"), hub.requests("GET", "/resolve/")) == before
    # A patch that changed is a new commit, and a file that it no longer has goes.
    (folder / "evidence.json").unlink()
    fresh = sound("push", folder, "--new-card").stdout
    assert "Sent: README.md\n" in fresh and "Removed: evidence.json\n" in fresh
    assert "evidence.json" not in hub.repos[REPO].files
    # The folder here is of the old commit: it is left alone, and by its commit it is still there.
    assert "already holds files" in refused("pull", REPO)
    old = hub.repos[REPO].commits[1][0]
    assert "here already" in sound("pull", f"{REPO}@{old}", "--out", "erase-van-gogh").stdout


def test_a_stack_goes_there_and_back(hub: HubStandIn, folder: Path, patch: Patch, tmp_path: Path) -> None:
    other = write_patch(tmp_path / "tench-patch", as_another(patch, "tench", "object"))
    made = stack([(Patch.load(folder), 1.0), (Patch.load(other), 0.5)])
    save_stack(made, tmp_path / "both")
    about = made.metadata
    assert about is not None
    same = {key: getattr(about, key) for key in ("base", "base_denoiser_sha256")}
    evidence = make_evidence(patch_sha256=file_sha256(tmp_path / "both" / WEIGHTS_NAME), method="stack", **same)
    (tmp_path / "both" / "van-gogh").mkdir()
    evidence.save(tmp_path / "both" / "van-gogh")
    sound("push", "both", "me/both")
    front = hub.repos["me/both"].front
    assert {"concept:van-gogh", "concept:tench", "stack"} <= set(front["tags"])
    sound("pull", "me/both", "--out", "again")
    again = tmp_path / "again"
    assert (again / "stack.yaml").read_bytes() == (tmp_path / "both" / "stack.yaml").read_bytes()
    assert (again / "van-gogh" / "report.html").is_file()
    assert Evidence.load(again / "van-gogh") == evidence
    found = Patch.load(again).metadata
    assert found is not None and found.parts is not None
    assert [part.scale for part in found.parts] == [1.0, 0.5]


def test_commands_take_a_patch_on_the_hub(hub: HubStandIn, folder: Path, there: Repo) -> None:
    assert common.HUB_PREFIX == sharing.PREFIX
    commit = hub.repos[REPO].commits[-1][0]
    place, scale = common.parse_patch(common.short_patch(f"hub:{REPO}:0.5"))
    assert (place.name, scale) == (commit, 0.5)
    assert file_sha256(place / WEIGHTS_NAME) == file_sha256(folder / WEIGHTS_NAME)
    # By its commit it is known for good: nobody is asked.
    hub.seen.clear()
    assert common.parse_patch(f"hub:{REPO}@{commit}") == (place, 1.0)
    assert hub.seen == []
    # A copy that was altered is no use: it is fetched anew.
    (place / "recipe.yaml").write_text("altered")
    assert common.parse_patch(f"hub:{REPO}@{commit}") == (place, 1.0)
    assert (place / "recipe.yaml").read_text() != "altered"
    with pytest.raises(PatchError, match="must be a number"):
        common.parse_patch(f"hub:{REPO}:strong")
    assert "there is no repo me/nothing" in refused("stack", "hub:me/nothing", "--out", "s")


def test_a_dry_run_shows_all_and_asks_nobody(hub: HubStandIn, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    (folder / "target_images").mkdir()
    (folder / "notes.txt").write_text("mine")
    told = sound("push", folder, "--dry-run").stdout
    size = f"{WEIGHTS_NAME:<40}{(folder / WEIGHTS_NAME).stat().st_size:>12,} bytes"
    names = [f"  {name} " for name in (WEIGHTS_NAME, KOHYA, "README.md", "evidence.json")]
    names += ["Would send to OWNER/erase-van-gogh (private):", "Left out: notes.txt, target_images\n"]
    assert all(part in told for part in (*names, size))
    front = yaml.safe_load(told.split("Front matter of the card:\n")[1])
    assert front["pipeline_tag"] == "text-to-image"
    assert hub.seen == []


def _finished(hub: HubStandIn, folder: Path) -> None:
    """A push after one that ended between its files: it sends the rest, and no file twice."""
    # A repo without a patch, and files that no commit names yet.
    assert set(hub.repos[REPO].files) == {".gitattributes"}
    there = {file_sha256(folder / WEIGHTS_NAME)}
    assert set(hub.blobs) == there
    hub.fault = lambda method, path: None
    hub.seen.clear()
    sound("push", folder)
    put = set(hub.requests("PUT"))
    assert put and not put & there and not hub.requests("POST", "/repos/create")
    assert WEIGHTS_NAME in hub.repos[REPO].files
    sound("pull", REPO)


def test_an_upload_that_broke_off_is_finished_by_the_next_call(hub: HubStandIn, folder: Path) -> None:
    first = file_sha256(folder / WEIGHTS_NAME)
    hub.fault = lambda method, path: (403, "no") if method == "PUT" and first not in path else None
    assert "no right" in refused("push", folder)
    _finished(hub, folder)


@pytest.mark.slow
def test_a_killed_upload_is_finished_by_the_next_call(hub: HubStandIn, folder: Path) -> None:
    first = file_sha256(folder / WEIGHTS_NAME)

    def fault(method: str, path: str) -> None:
        if method == "PUT" and first not in path:
            while first not in hub.blobs:
                time.sleep(0.01)
            hub.hang()

    hub.fault = fault
    settings = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    killed = subprocess.Popen(
        [sys.executable, "-m", "recare_patch", "push", str(folder)],
        env={**os.environ, **settings, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    assert hub.hanging.wait(120)
    killed.kill()
    killed.wait()
    _finished(hub, folder)


def test_what_is_checked_is_what_is_sent(hub: HubStandIn, folder: Path) -> None:
    data = (folder / WEIGHTS_NAME).read_bytes()

    class Meddler:
        def update(self, stage: str, done: int, total: int, note: str = "") -> None:
            (folder / WEIGHTS_NAME).write_bytes(b"something else")

    sharing.push(folder, progress=Meddler())
    assert hub.repos[REPO].files[WEIGHTS_NAME] == data


def test_a_patch_that_does_not_hold_is_not_sent(hub: HubStandIn, folder: Path) -> None:
    (folder / "recipe.yaml").write_text("concept: something else\n")
    told = refused("push", folder)
    assert "van-gogh-patch does not hold, so nothing is sent: records: recipe.yaml" in told
    assert "no patch" in refused("push", folder.parent / "hf-cache")
    assert "is a file" in refused("push", folder / WEIGHTS_NAME)
    (folder / WEIGHTS_NAME).write_bytes(b"\x80\x04pickle")
    assert f"{folder.name}/{WEIGHTS_NAME} is a pickle" in refused("push", folder)
    assert hub.seen == []


def test_the_card_is_kept_and_its_header_filled_up(
    hub: HubStandIn, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = folder / "README.md"
    card.write_text("---\nlicense: mit\ntags:\n- mine\nmy_key: 1\n---\n\n# My words\n")
    sound("push", folder, "me/kept")
    front, body = split_card(hub.repos["me/kept"].files["README.md"].decode())
    assert "# My words" in body and EVIDENCE_START in body
    assert (front["license"], front["my_key"], front["library_name"]) == ("mit", 1, "diffusers")
    assert front["tags"][0] == "mine" and "recare-patch" in front["tags"]
    sound("push", folder, "me/kept", "--new-card", "--license", "openrail")
    front, body = split_card(hub.repos["me/kept"].files["README.md"].decode())
    assert "# Van Gogh, erased from" in body
    assert front["license"] == "openrail" and "license_name" not in front
    assert "is no licence" in refused("push", folder, "me/kept", "--license", "Apache 2.0!")
    # The Hub reads the card before it makes a repo: none is left behind.
    assert "one of a long list" in refused("push", folder, "me/bad", "--license", "no-such-license")
    assert "me/bad" not in hub.repos
    # Nobody knows the licence of a folder, and a path tells where its owner lives.
    monkeypatch.setenv("HOME", str(folder.parent))
    card.unlink()
    told = sound("push", folder, "me/kept").stderr
    assert "name it with --license" in told and "your home folder is named in" not in told
    card.write_text(f"my pictures are in {folder.parent}/pictures")
    assert "your home folder is named in README.md" in sound("push", folder, "me/kept").stderr


@pytest.mark.parametrize("name", ["README.md", "preview.png", KOHYA, "report.html"])
def test_links_that_lead_out_are_not_sent(hub: HubStandIn, folder: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "secret").write_text("-----BEGIN OPENSSH PRIVATE KEY-----")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(tmp_path / "secret")
    assert "is a link that leads out of its folder" in refused("push", folder, "--dry-run")
    # One that stays is the sender's own affair.
    (folder / name).unlink()
    if name == "README.md":
        (folder / "card.md").write_text("# Mine\n")
        (folder / name).symlink_to("card.md")
        sound("push", folder, "--dry-run")


def test_unsafe_pictures_stay_blurred(hub: HubStandIn, patch: Patch, tmp_path: Path) -> None:
    evidence = make_evidence(kind="nsfw", concept="nudity")
    folder = write_patch(tmp_path / "nudity-patch", as_another(patch, "nudity", "nsfw"), evidence)
    (folder / "report.html").write_text("<img src='sharp'>")
    sharing.push(folder)
    repo = hub.repos["me/erase-nudity"]
    assert b"sharp'" not in repo.files["report.html"]
    assert "not-for-all-audiences" in repo.front["tags"] and "widget" not in repo.front


def test_a_name_that_is_taken(hub: HubStandIn, folder: Path, patch: Patch, tmp_path: Path) -> None:
    repo = hub.add(REPO, {"README.md": b"---\ntags:\n- something\n---\n", "model.bin": b"x"}, private=True)
    assert "taken by something that is no patch" in refused("push", folder)
    assert len(repo.commits) == 1
    sound("push", folder, "--overwrite")
    # What is not a patch's stays, and from now on the repo is this patch's.
    assert repo.files["model.bin"] == b"x"
    other = write_patch(tmp_path / "other", as_another(patch, "tench", "object"))
    assert "taken by another patch (concept:van-gogh, tiny-sd)" in refused("push", other, REPO)
    repo.private = False
    assert "can be seen by everybody" in refused("push", folder)
    sound("push", folder, "--public")
    assert not sharing.push(folder, "me/open", public=True).private
    sharing.push(folder, "me/shut")
    again = sharing.push(folder, "me/shut", public=True)
    assert again.private
    assert any("was private already and stays so" in note for note in again.notes)


def test_logins_and_rights(
    hub: HubStandIn, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    assert "no right to do that with you/there" in refused("push", folder, "you/there")
    hub.add("you/open", {".gitattributes": b""})
    assert "no right" in refused("push", folder, "you/open", "--public")
    hub.add("you/shut", {}, private=True)
    assert "there is no repo you/shut" in refused("pull", "you/shut")
    refusals = {READ_TOKEN: "the token of reader may only read", ODD_TOKEN: "does not accept this login"}
    for token, told in refusals.items():
        monkeypatch.setenv("HF_TOKEN", token)
        assert told in refused("push", folder)
    # A server that says the token aloud.
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.fault = lambda method, path: (403, f"the token {TOKEN} may not do this")
    assert "the token hf_… may not do this" in refused("push", folder)
    monkeypatch.delenv("HF_TOKEN")
    hub.fault = lambda method, path: None
    assert "you are not logged in" in refused("push", folder)
    shown = [record.getMessage() for record in caplog.records]
    assert len(shown) > 10
    assert not [line for line in shown for token in (TOKEN, READ_TOKEN, ODD_TOKEN) if token in line]


@pytest.mark.parametrize("repo", ["", "me/a/b", "me/a--b", "../x", "me/..", "me/a b", "a/\x1b[31m", "x" * 120])
def test_names_that_no_repo_has(hub: HubStandIn, folder: Path, repo: str) -> None:
    assert "is no repo of the Hub" in refused("pull", repo)
    assert "\x1b" not in refused("push", folder, repo or "/")
    assert not hub.repos


def test_no_connection(folder: Path, hub: HubStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")

    def waits(seconds: float) -> None:
        raise AssertionError("the client tries again, for half a minute, what cannot be reached")

    monkeypatch.setattr("time.sleep", waits)
    for words in (("push", folder), ("pull", REPO), ("search",)):
        assert "cannot reach the Hub at http://127.0.0.1:9" in refused(*words)
    assert not Path("erase-van-gogh").exists()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in refused("pull", REPO)


def test_a_server_that_refuses(hub: HubStandIn, there: Repo) -> None:
    for answer, words, part in (
        ((403, "no", "GatedRepo"), f"{REPO} is gated: ask for access on its page, {hub.endpoint}/{REPO}", ""),
        ((404, "gone"), f"the Hub has no {REPO}, or this login may not see it (gone)", ""),
        ((404, "no", "EntryNotFound"), f"{REPO} lists a file and does not have it", "recipe.yaml"),
        ((409, "no"), "is taken (no)", ""),
        ((418, "a teapot"), "status 418 (a teapot)", ""),
        ((429, "too many"), "asks for a pause", ""),
        ((500, "on fire"), "out of order (status 500 (on fire))", ""),
    ):
        hub.fault = lambda method, path, a=answer, p=part: a if path.endswith(p) else None  # type: ignore
        assert words in refused("pull", REPO)
    assert not Path("erase-van-gogh").exists()


def test_a_repo_that_was_changed_meanwhile(hub: HubStandIn, folder: Path, there: Repo) -> None:
    def fault(method: str, path: str) -> None:
        if "/preupload/" in path and "mine.txt" not in there.files:
            there.commit({**there.files, "mine.txt": b"x"})

    hub.fault = fault
    (folder / "recipe.yaml").unlink()
    (folder / "evidence.json").unlink()
    assert "was changed by somebody else" in refused("push", folder, "--new-card")
    sound("push", folder, "--new-card")
    assert "mine.txt" in there.files


@pytest.mark.parametrize(
    "name", ["../out.txt", "a/../../out.txt", "/etc/out", "C:\\out", "a\\..\\..\\out", "a//b", "./x", "x\x1b[2Jy"]
)
def test_names_that_lead_out_of_the_folder(hub: HubStandIn, folder: Path, there: Repo, name: str) -> None:
    there.listed = [{"type": "file", "path": name, "size": 1, "oid": "0" * 40}]
    told = refused("pull", REPO, "--out", "got")
    assert "leads out of its folder" in told and "\x1b" not in told
    assert {one.name for one in folder.parent.iterdir()} <= {"hf-cache", "van-gogh-patch"}
    assert not hub.requests("GET", "/resolve/")


def test_only_files_of_a_patch_are_taken(hub: HubStandIn, there: Repo) -> None:
    more = {
        "model.bin": b"\x80\x04", "run.py": b"import os", "other.safetensors": b"x", "hub.json": b"{}",
        "report.html": b"<script>", "van-gogh/evidence.json": b"{}", "sub/README.md": b"x",
    }  # fmt: skip
    there.commit({**there.files, **more})
    got = sharing.pull(REPO, "got")
    assert set(got.left) == set(more)
    asked = hub.requests("GET", "/resolve/")
    assert not set(asked) & {"model.bin", "run.py", "other.safetensors", "report.html", "hub.json"}
    assert "<script>" not in Path("got/report.html").read_text()
    assert {one.name for one in got.files} <= {one.name for one in Path("got").iterdir()}
    assert not any(one.is_symlink() for one in Path("got").rglob("*"))


def _flipped(data: bytes) -> bytes:
    return data[:-2] + bytes([data[-2] ^ 1]) + data[-1:]


def _saying(**more: Any) -> Callable[[bytes], bytes]:
    """Evidence that says something more, or else."""
    return lambda data: json.dumps(json.loads(data) | more).encode()


def _deep(depth: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for _ in range(depth):
        found = {"a": found}
    return found


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        (WEIGHTS_NAME, lambda data: struct.pack("<Q", 10**12) + data[8:], "is not a safetensors file"),
        (WEIGHTS_NAME, lambda data: struct.pack("<Q", 8) + b"[" * 8 + data[8:], "is not a safetensors file"),
        (WEIGHTS_NAME, lambda data: data[:-10], "damaged"),
        (WEIGHTS_NAME, _flipped, "hash: the weights have SHA-256"),
        (KOHYA, _flipped, "kohya file"),
        (WEIGHTS_NAME, lambda data: None, "its pickle pytorch_lora_weights.bin is never opened"),
        ("README.md", lambda data: data.replace(b"value: 0.02", b"value: 0.0"), "claims 0.0 for 'concept, "),
        # A link in git is a file whose content is its target; the Hub serves that text.
        ("preview.png", lambda data: b"../../../../etc/passwd", "it is no picture"),
        ("recipe.yaml", lambda data: b"a: [\n", "recipe.yaml is not the recipe"),
        ("evidence.json", lambda data: b"{" * 10_000, "not readable as JSON"),
        ("evidence.json", _saying(suite={"name": "\ud800"}), "half a character"),
        ("evidence.json", _saying(cost=_deep(800)), "nested too deeply"),
        ("evidence.json", _saying(self=1), "self is not a key"),
        ("evidence.json", _saying(created="2999-01-01"), "yet to come"),
        ("evidence.json", lambda data: data.replace(b'"patched": 0.02', b'"patched": 1e308', 1), "at most"),
        ("preview.png", lambda data: data.replace(b"IDAT", b"ID\0T"), "it is no picture"),
        ("recipe.yaml", lambda data: data + b"self: 1\n", "recipe.yaml is not the recipe"),
        ("training.json", lambda data: b"[]", "not readable as JSON"),
        ("README.md", lambda data: b"\xff\xfe", "UTF-8"),
    ],
)
def test_a_patch_that_does_not_hold_is_not_kept(
    hub: HubStandIn, there: Repo, name: str, change: Callable[[bytes], bytes | None], words: str
) -> None:
    made = change(there.files[name])
    there.commit({**there.files, name: made} if made else {"pytorch_lora_weights.bin": b"\x80\x04"})
    told = refused("pull", REPO, "--out", "got")
    assert words in told and ".part" not in told
    assert {one.name for one in Path().iterdir()} <= {"hf-cache", "van-gogh-patch"}


def test_files_that_are_not_what_was_listed(hub: HubStandIn, there: Repo) -> None:
    other = {WEIGHTS_NAME: b"x" * len(there.files[WEIGHTS_NAME]), "recipe.yaml": b"concept: x\n"}
    for name, data in other.items():
        there.served = {name: data}
        assert f"what came as {name} is not what {REPO} lists" in refused("pull", REPO, "--out", "got")
    there.served = {}
    huge = {"path": WEIGHTS_NAME, "size": 10**13, "oid": "0" * 40}
    for listed, told in ((huge, "bytes, and at most"), ({"path": "x"}, "cannot be read (KeyError")):
        there.listed = [{"type": "file", **listed}]
        assert told in refused("pull", REPO, "--out", "got")
    assert not Path("got").exists()
    there.listed = []
    sound("pull", REPO, "--out", "got")


def test_an_interrupted_fetch_goes_on(hub: HubStandIn, there: Repo) -> None:
    hub.fault = lambda method, path: (403, "no more") if path.endswith("evidence.json") else None
    assert "no right" in refused("pull", REPO)
    assert not Path("erase-van-gogh").exists()
    fetched = set(hub.requests("GET", "/resolve/"))
    hub.fault = lambda method, path: None
    hub.seen.clear()
    sound("pull", REPO)
    again = set(hub.requests("GET", "/resolve/"))
    assert fetched and again and (fetched - {"evidence.json"}).isdisjoint(again)


def test_revisions_places_and_bases(hub: HubStandIn, there: Repo, tiny_sd_v: Path, tmp_path: Path) -> None:
    assert "has no such revision" in refused("pull", REPO, "--revision", "v9")
    assert "two revisions" in refused("pull", f"{REPO}@main", "--revision", "main")
    assert "is no revision" in refused("pull", f"{REPO}@a b")
    assert "does not fit" in refused("pull", REPO, "--out", "got", "--base", tiny_sd_v)
    Path("taken").mkdir()
    Path("taken/mine.txt").write_text("mine")
    assert "already holds files" in refused("pull", REPO, "--out", "taken")
    Path("link").symlink_to(tmp_path / "elsewhere")
    assert "a link of that name" in refused("pull", REPO, "--out", "link")
    assert not Path("got").exists() and not (tmp_path / "elsewhere").exists()
    Path("empty").mkdir()
    sound("pull", REPO, "--out", "empty")
    assert Patch.load("empty").metadata is not None


def _publish(hub: HubStandIn, name: str, **front: Any) -> None:
    hub.add(name, {"README.md": f"---\n{yaml.safe_dump(front)}---\n".encode()})


def test_search(hub: HubStandIn, there: Repo, monkeypatch: pytest.MonkeyPatch) -> None:
    base = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    _publish(hub, "you/tench", base_model=base, tags=["recare-patch", "concept:tench", "esd"], license="mit")
    _publish(hub, "you/something", base_model=base, tags=["lora"])
    monkeypatch.setenv("COLUMNS", "200")
    told = sound("search").stdout
    assert f"{REPO} (private)" in told and "2.0 %" in told and "you/something" not in told
    assert [one.repo for one in sharing.search(base=base)] == ["you/tench"]
    assert [one.repo for one in sharing.search(concept="Van Gogh")] == [REPO]
    assert [one.repo for one in sharing.search(base="tiny-sd", tags=["recare"])] == [REPO]
    assert [one.repo for one in sharing.search("ten", owner="you")] == ["you/tench"]
    found = json.loads(sound("search", "--concept", "tench", "--json").stdout)
    assert [(one["repo"], one["base"], one["license"]) for one in found] == [("you/tench", base, "mit")]
    assert "Nothing was found." in sound("search", "no such thing").stdout
    page = sound("search", "--markdown").stdout
    assert f"[hub:{REPO}]({hub.endpoint}/{REPO})" in page
    assert "ways to show the same" in refused("search", "--json", "--markdown")


def test_cards_of_strangers_are_shown_as_text(hub: HubStandIn) -> None:
    _publish(
        hub,
        "you/odd",
        base_model=["\x1b[31mred", 3],
        tags=["recare-patch", "concept:\x1b[2Jx", "[bold]loud[/bold]"],
        license={"a": 1},
        **{"model-index": [{"results": [{"metrics": [{"type": "concept-rate", "value": "x"}, 7]}, None]}]},
    )
    for words in (("search",), ("search", "--json"), ("search", "--markdown")):
        assert "\x1b" not in sound(*words).stdout


def test_an_index_of_folders(folder: Path, patch: Patch, tmp_path: Path) -> None:
    write_patch(tmp_path / "tench-patch", as_another(patch, "tench", "object"))
    sound("index", "van-gogh", "tench-patch", "--out", "README.md", "--title", "Mine")
    page = Path("README.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| Van Gogh") or line.startswith("| tench")]
    assert "2.0 % (base 90.0 %)" in rows[0] and "CARE score, stars" in rows[0]
    assert "[tench-patch](tench-patch)" in rows[1]
    assert "there already" in refused("index", "van-gogh-patch", "--out", "README.md")
    assert "there is no patch" in refused("index", "nothing")


def test_a_ledger_of_patches(folder: Path, patch: Patch, hub: HubStandIn, tmp_path: Path) -> None:
    write_patch(tmp_path / "many" / "tench-patch", as_another(patch, "tench", "object"))
    shutil.copytree(folder, tmp_path / "many" / folder.name)
    assert "(2 patches)" in sound("index", "many", "--out", "ledger.html").stdout
    page = Path("ledger.html").read_text().replace("\N{NO-BREAK SPACE}", " ")
    assert "2.0 %" in page and "0.8–5.0 %" in page and page.count("not here") == 2
    assert "200 pictures a figure" in page and "van-gogh-atelier" in page and "not measured" in page
    # What verify found here is told, until the evidence is another.
    place = tmp_path / "many" / folder.name
    remember(place, Findings((Finding("figure 'concept, plain prompts'", True, "holds"),)))
    assert remembered(place) == Remembered(True, 1, remembered(place).date, True)  # type: ignore[union-attr]
    sound("index", "many", "--out", "ledger.html", "--force")
    assert "the same" in (page := Path("ledger.html").read_text()) and page.count("not here") == 1
    (place / "evidence.json").write_text((place / "evidence.json").read_text() + " ")
    sound("index", "many", "--out", "ledger.html", "--force")
    assert "other evidence" in Path("ledger.html").read_text()
    assert "there already" in refused("index", "many", "--out", "ledger.html")
    # Of the Hub the cards' claims.
    _publish(hub, "you/odd", tags=["recare-patch", "concept:<b>x</b>"])
    sound("search", "--out", "hub.html")
    assert "hub:you/odd" in (page := Path("hub.html").read_text()) and "<b>x" not in page
    assert "a page is written as .html" in refused("search", "--out", "hub.txt")


def test_a_run_for_eval_unlearn(folder: Path) -> None:
    told = sound("index", folder, "--eval-unlearn", "run").stdout
    run = json.loads(Path("run/free_run.json").read_text())
    assert run["technique"]["name"] == "free_run" and run["technique"]["config"]["model_id"] == "run/model"
    assert f"recare-patch merge --patch {folder} --out run/model" in told
    metrics = {one["name"]: one.get("config", {}) for one in run["metrics"]}
    assert metrics["ua_ira"]["target_concept"] == "van gogh" and "asr_i2p" not in metrics
    assert Path(metrics["ua_ira"]["retain_prompts_path"]).read_text().startswith("prompt\n")
    assert "is not empty" in refused("index", folder, "--eval-unlearn", "run")
    assert "the run of one patch" in refused("index", folder, folder, "--eval-unlearn", "other")


@contextlib.contextmanager
def _olah(place: Path, upstream: str) -> Iterator[str]:
    """Olah, a maintained pull-through server of the Hub; in an environment of its own, named by OLAH_CLI."""
    program = os.environ.get("OLAH_CLI") or shutil.which("olah-cli")
    if program is None:
        pytest.skip("olah is not installed: pip install olah in an environment of its own, and set OLAH_CLI")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port, netloc = free.getsockname()[1], upstream.removeprefix("http://")
    command = [program, "--host", "127.0.0.1", "--port", str(port), "--repos-path", str(place / "repos")]
    command += ["--hf-scheme", "http", "--hf-netloc", netloc, "--hf-lfs-netloc", netloc]
    command += ["--mirror-netloc", f"127.0.0.1:{port}", "--log-path", str(place / "logs")]
    place.mkdir()
    server = subprocess.Popen(command, cwd=place, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(300):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            assert server.poll() is None
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(20)


@pytest.mark.slow
def test_pull_through_a_maintained_server(
    hub: HubStandIn, folder: Path, tiny_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sound("push", folder, "--public")
    commit, files = hub.repos[REPO].commits[-1]
    with _olah(tmp_path / "olah", hub.endpoint) as endpoint:
        point_to(endpoint, monkeypatch)
        got = sharing.pull(REPO, "got", base=tiny_sd)
        assert (got.commit, got.same_base) == (commit, True)
        assert all(files[one.name] == Path("got", one.name).read_bytes() for one in got.files)
        pipe = StableDiffusionPipeline.from_pretrained(tiny_sd)
        pipe.load_lora_weights(REPO, weight_name=WEIGHTS_NAME)
        assert pipe.get_list_adapters() == {"unet": ["default_0"]}
        # It only serves: a push ends in a sentence.
        assert "status 405" in refused("push", folder, "me/another", "--public")
