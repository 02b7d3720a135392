from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable

import pytest
from click.testing import Result

from recare_patch import __version__
from tests.cli.conftest import Stage

COMMANDS = ("atelier", "careset", "erase", "generate", "inspect", "recipes")


def test_help_lists_every_command(invoke: Callable[..., Result]) -> None:
    result = invoke("--help")
    assert result.exit_code == 0
    assert all(f"\n  {name} " in result.output for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(invoke: Callable[..., Result], name: str) -> None:
    result = invoke(name, "-h")
    assert result.exit_code == 0 and "Usage:" in result.output


def test_version(invoke: Callable[..., Result]) -> None:
    assert __version__ in invoke("--version").output


def test_an_unknown_command_offers_the_nearest(invoke: Callable[..., Result]) -> None:
    result = invoke("earse")
    assert result.exit_code == 2
    assert "unknown command 'earse'" in result.output and "did you mean 'erase'?" in result.output


def test_the_module_runs_as_a_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "recare_patch", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"recare-patch, version {__version__}\n"


def test_ctrl_c_is_130(stage: Stage) -> None:
    stage.fault = KeyboardInterrupt()
    result = stage.run("erase", "--concept", "tench")
    assert result.exit_code == 130
    assert "Error: interrupted" in result.stderr and "--resume" in result.stderr


def test_a_full_disk_in_a_library_is_one_sentence(stage: Stage) -> None:
    stage.fault = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "weights.bin")
    result = stage.run("erase", "--concept", "tench")
    assert result.exit_code == 2
    assert "Error: cannot write weights.bin: the disk is full" in result.stderr


def test_an_accelerator_without_memory_is_one_sentence(stage: Stage) -> None:
    class OutOfMemoryError(RuntimeError):
        pass

    stage.fault = OutOfMemoryError("CUDA out of memory")
    result = stage.run("erase", "--concept", "tench")
    assert result.exit_code == 2
    assert "memory is full" in result.stderr


@pytest.mark.parametrize("fault", [RuntimeError("bug"), OSError(errno.EIO, "bug"), ZeroDivisionError("bug")])
def test_a_bug_is_not_dressed_up(stage: Stage, fault: Exception) -> None:
    stage.fault = fault
    result = stage.run("erase", "--concept", "tench")
    assert result.exception is fault
