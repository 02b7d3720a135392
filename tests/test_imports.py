"""What must not be imported, and when."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("torch", "diffusers", "transformers", "peft", "sklearn", "matplotlib", "numpy", "huggingface_hub", "PIL")


def heavy_after(code: str) -> list[str]:
    script = f"import sys\n{code}\nprint(*[m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-1].split()


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["erase"],
        ["careset", "build"],
        ["generate"],
        ["atelier", "info"],
        ["inspect"],
        ["push"],
        ["pull"],
        ["search"],
        ["index"],
    ],
)
def test_help_imports_nothing_heavy(command: list[str]) -> None:
    code = f"from recare_patch.cli import cli\ncli({[*command, '--help']!r}, standalone_mode=False)"
    assert heavy_after(code) == []


def test_names_and_recipes_are_read_without_torch() -> None:
    code = "import recare_patch as r\nr.load_recipe('van-gogh'); r.Concept; r.RecarePatchError; dir(r)"
    assert heavy_after(code) == []


def test_the_public_names_are_listed_and_others_refused() -> None:
    import recare_patch

    assert {"erase", "Patch", "CareSet", "Recipe", "load_base"} <= set(recare_patch.__all__) <= set(dir(recare_patch))
    with pytest.raises(AttributeError, match=r"attribute.*eraze"):
        recare_patch.eraze  # noqa: B018


@pytest.mark.parametrize(
    "name",
    [
        "erase",
        "attack",
        "evaluate",
        "stack",
        "merge",
        "push",
        "pull",
        "generate",
        "Patch",
        "CareSet",
        "build_care_set",
        "load_base",
        "EraseResult",
    ],
)
def test_every_public_name_is_there(name: str) -> None:
    import recare_patch

    assert callable(getattr(recare_patch, name))


def test_what_windows_lacks_is_imported_where_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    # Before the module is hidden: here, psutil itself is Linux's, which needs it.
    import psutil  # noqa: F401
    import torch

    import recare_patch
    from recare_patch.models import peak_memory

    for file in Path(recare_patch.__file__).parent.rglob("*.py"):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            names = [one.name for one in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", "")]
            assert not {"resource", "fcntl", "pwd", "grp", "termios"} & set(names), file
    monkeypatch.setitem(sys.modules, "resource", None)
    assert peak_memory(torch.device("cpu")) > 2**20
