from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from recare_patch import __version__
from recare_patch.cli import _PLACES, COMMANDS, cli
from recare_patch.core import noted
from recare_patch.recipe import Recipe
from tests.cli.conftest import Fake, Invoke, Stage
from tests.test_imports import heavy_after


def test_help_lists_every_command(invoke: Invoke) -> None:
    result = invoke("--help")
    assert result.exit_code == 0
    assert all(f"\n  {name} " in result.output for name in COMMANDS.names())


@pytest.mark.parametrize("name", COMMANDS.names())
def test_every_command_has_help(invoke: Invoke, name: str) -> None:
    result = invoke(name, "-h")
    assert result.exit_code == 0 and "Usage:" in result.output
    assert isinstance(COMMANDS.get(name), click.Command) and COMMANDS.get(name).name == name


def test_no_command_is_imported_for_another() -> None:
    code = "from recare_patch.cli import cli\ncli(['methods', '--help'], standalone_mode=False)"
    shown = "print(*[m for m in sys.modules if m.startswith('recare_patch.cli.')])"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}\n{shown}"], capture_output=True, text=True, check=True
    )
    # What patches are called belongs to all of them.
    assert done.stdout.splitlines()[-1] == "recare_patch.cli.patches recare_patch.cli.lists"


def test_a_misspelt_value_is_found_before_torch_is() -> None:
    code = (
        "from recare_patch.cli import cli\n"
        "try:\n    cli(['erase', '--concept', 'tench', '--optimizer', 'adam8'], standalone_mode=False)\n"
        "except BaseException as fault: pass"
    )
    assert heavy_after(code) == []


def test_an_unknown_command_offers_the_nearest(invoke: Invoke) -> None:
    result = invoke("earse")
    assert result.exit_code == 2
    assert "unknown command 'earse'" in result.output and "did you mean 'erase'?" in result.output


def test_the_module_runs_as_a_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "recare_patch", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"recare-patch, version {__version__}\n"


def _options(group: click.Group) -> Iterator[tuple[str, click.Parameter]]:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        if isinstance(command, click.Group):
            yield from _options(command)
        yield from ((name, one) for one in command.params if _PLACES.search(one.make_metavar(context)))


def test_home_is_found_in_every_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.chdir(tmp_path)
    found = [*_options(cli)]
    assert len({name for name, _ in found}) > 12
    for name, one in found:
        # A detector's name goes before its folder, which whoever loads it expands.
        if one.name != "detector":
            assert str(one.type.convert("~/x", one, None)) == "/home/me/x", (name, one.name)
        with pytest.raises(click.BadParameter, match="no home folder for '~no-one-9'"):
            one.type.convert("~no-one-9/x", one, None)


def test_a_terminal_that_cannot_show_a_name_shows_escapes(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(Recipe(concept={"text": "葛飾北斎", "kind": "style"}).to_yaml(), "utf-8")  # type: ignore[arg-type]
    for words in (["recipes", "show", str(file)], ["erase", "--help"]):
        result = CliRunner(charset="latin-1").invoke(cli, words)
        assert result.exit_code == 0 and r"\u" in result.stdout
    result = CliRunner().invoke(cli, ["erase", "--concept", "caf\udce9"])
    assert result.exit_code == 2 and "is not text in this locale's encoding" in result.stderr


class OutOfMemoryError(RuntimeError):
    pass


@pytest.mark.parametrize(
    ("fault", "code", "sentence"),
    [
        (KeyboardInterrupt(), 130, "interrupted; a run that was under way goes on with --resume"),
        (
            OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "weights.bin"),
            2,
            "cannot write weights.bin: the disk is full",
        ),
        (OutOfMemoryError("CUDA out of memory"), 2, "the accelerator's memory is full; try --vram"),
    ],
)
def test_a_fault_of_the_system_is_one_sentence(stage: Stage, fault: BaseException, code: int, sentence: str) -> None:
    stage.fault = fault
    result = stage.run("erase --concept tench --base b")
    assert result.exit_code == code
    assert result.stderr.splitlines()[-1].startswith(f"Error: {sentence}")


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        (
            "erase --concept tench --base b",
            "try --vram with less than it has (`recare-patch plan` tells what it takes)",
        ),
        ("generate --prompt x --vram 12", "try a smaller --vram than 12"),
        ("careset build --concept tench --vram 8", "try a smaller --vram than 8"),
        ("unmerge merged --patch a-patch --out again", "try --device cpu"),
    ],
)
def test_full_memory_names_the_stage_and_an_option_that_there_is(
    stage: Stage, fake: Fake, monkeypatch: pytest.MonkeyPatch, words: str, remedy: str
) -> None:
    def full(*_: object, **__: object) -> None:
        with noted("target images"), noted("decoding pictures"):
            raise OutOfMemoryError("CUDA out of memory")

    fake("erasure", erase_concept=full, resolve_recipe=full)
    fake("patch", generate_pictures=full)
    fake("combine", unmerge=full)
    Path("a-patch").mkdir()
    monkeypatch.setattr("recare_patch.patch.Patch.load", lambda path: path)
    result = stage.run(words)
    told = f"Error: the accelerator's memory is full at target images, decoding pictures; {remedy}"
    assert (result.exit_code, result.stderr.splitlines()[-1]) == (2, told)


def test_only_what_resumes_is_promised(stage: Stage) -> None:
    stage.fault = KeyboardInterrupt()
    result = stage.run("generate --prompt x")
    assert (result.exit_code, result.stderr.splitlines()[-1]) == (130, "Error: interrupted")


@pytest.mark.parametrize("fault", [RuntimeError("bug"), OSError(errno.EIO, "bug"), ZeroDivisionError("bug")])
def test_a_bug_is_not_dressed_up(stage: Stage, fault: Exception) -> None:
    stage.fault = fault
    assert stage.run("erase --concept tench").exception is fault
