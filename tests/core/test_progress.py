from __future__ import annotations

import io

from rich.console import Console

from recare_patch.core import NullProgress, Progress, RichProgress


def test_both_keep_the_protocol() -> None:
    assert isinstance(NullProgress(), Progress)
    assert isinstance(RichProgress(Console(file=io.StringIO())), Progress)


def test_a_log_gets_one_line_a_stage() -> None:
    out = io.StringIO()
    with RichProgress(Console(file=out)) as progress:
        for done in range(4):
            progress.update("erase", done, 3, f"loss {done}")
        progress.update("erase", 3, 3)
        progress.update("preview", 1, 2)
    assert out.getvalue() == "erase: 3/3 loss 3\n"


def test_a_terminal_gets_bars_with_the_time_left() -> None:
    out = io.StringIO()
    with RichProgress(Console(file=out, force_terminal=True, width=120)) as progress:
        progress.update("erase", 1, 3, "loss 0.5")
        progress.update("nothing to do", 0, 0)
    assert "erase" in out.getvalue() and "1/3" in out.getvalue() and "left" in out.getvalue()
