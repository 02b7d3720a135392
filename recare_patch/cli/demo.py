"""``recare-patch demo``: a page with pictures before and after."""

from __future__ import annotations

import click

from recare_patch.cli import common


@click.command()
@click.option(
    "--patch",
    "patches",
    multiple=True,
    metavar="DIR",
    help="A patch; repeatable.  [default: those found here]",
)
@common.base_option
@click.option(
    "--port", type=click.IntRange(1, 65535), help="Port on this machine.  [default: the first free from 7860]"
)
@click.option(
    "--share", is_flag=True, help="Let gradio's servers make the page public for a while; off by default."
)
@common.device_option
def demo(patches: tuple[str, ...], base: str | None, port: int | None, share: bool, device: str) -> None:
    """Serve a page that shows pictures before and after, side by side, at any scale.

    \b
    recare-patch demo --patch van-gogh-patch

    It answers on this machine alone (127.0.0.1). Without --patch it shows the patches in the current
    folder that fit the bundled base. It needs the package gradio: pip install "recare-patch[demo]".
    """
    common.quiet_libraries()
    from recare_patch import demo as page
    from recare_patch.models import load_base

    page.require_gradio()
    named = [common.parse_patch(common.short_patch(text)) for text in patches]
    for path, scale in named:
        if scale != 1:
            raise click.UsageError(f"the page sets the scale, so --patch takes {path} without one")
    with common.shown_progress():
        paths = [path for path, _ in named] or page.find_patches()
        model = load_base(base or common.base_of(named), device=device)
        found = page.load_patches(paths, model, skip_others=not named)
        interface = page.build_interface(page.Comparison(model, found))
        page.launch(interface, host=page.LOOPBACK, port=port, share=share)
