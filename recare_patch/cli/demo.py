"""``recare-patch demo``: a page with pictures before and after."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

from click import IntRange, UsageError, command

from recare_patch import cli
from recare_patch.cli import flag, option
from recare_patch.core import bundled

_PAGE = "recare_patch_demo"


def page() -> ModuleType:
    """The page's code: the file that a Space runs too."""
    if _PAGE not in sys.modules:
        spec = importlib.util.spec_from_file_location(_PAGE, bundled("hub") / "space" / "demo.py")
        assert spec is not None and spec.loader is not None
        sys.modules[_PAGE] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[_PAGE])
    return sys.modules[_PAGE]


@command()
@option("--patch DIR", "A patch; repeatable.  [default: those found here]", into="patches", multiple=True)
@cli.base_option
@option("--port", "Port on this machine.  [default: the first free from 7860]", IntRange(1, 65535))
@flag("--share", "Let gradio's servers make the page public for a while; off by default.")
@cli.device_option
def demo(patches: tuple[str, ...], base: str | None, port: int | None, share: bool, device: str) -> None:
    """Serve a page that shows pictures before and after, side by side, at any scale.

    \b
    recare-patch demo --patch van-gogh-patch

    It answers on this machine alone (127.0.0.1). Without --patch it shows the patches in the current
    folder that fit the bundled base. It needs the package gradio: pip install "recare-patch[demo]".
    """
    cli.quiet_libraries()
    made = page()
    from recare_patch.models import load_base

    made.require_gradio()
    named = [cli.parse_patch(cli.short_patch(text)) for text in patches]
    for path, scale in named:
        if scale != 1:
            raise UsageError(f"the page sets the scale, so --patch takes {path} without one")
    with cli.shown_progress():
        paths = [path for path, _ in named] or made.find_patches()
        model = load_base(base or cli.base_of(named), device=device)
        found = made.load_patches(paths, model, skip_others=not named)
        interface = made.build_interface(made.Comparison(model, found))
        made.launch(interface, host=made.LOOPBACK, port=port, share=share)
