"""The demo: a page with the base's picture and the patched one side by side, at any scale.

What is drawn and what is blurred is decided here without gradio, which is an extra and only lays out
the page. ``recare-patch demo`` serves it on this machine, ``app.py`` as a Space.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from PIL import Image
from pydantic import AfterValidator, Field

from recare_patch.core import (
    DemoError,
    IncompatiblePatchError,
    PatchError,
    RecarePatchError,
    Settings,
    blurred,
    unknown_name,
)
from recare_patch.measure import Prompt
from recare_patch.models import BaseModel
from recare_patch.patch import Patch, is_unsafe, plain
from recare_patch.recipe import WEIGHTS_NAME

if TYPE_CHECKING:
    import gradio

logger = logging.getLogger(__name__)

MIN_SCALE, MAX_SCALE = -1.0, 2.0
LOOPBACK = "127.0.0.1"

_MAX_STEPS, _MAX_GUIDANCE = 100, 20.0


class Scene(Settings):
    """What decides the base's picture."""

    error: ClassVar[type[DemoError]] = DemoError
    noun: ClassVar[str] = "this cannot be drawn"

    prompt: Prompt
    seed: int = Field(0, ge=0, le=2**32 - 1)
    steps: int = Field(20, ge=1, le=_MAX_STEPS)
    guidance_scale: float = Field(5.0, ge=0, le=_MAX_GUIDANCE)


_FIELDS = ("prompt", "seed", "steps", "guidance_scale", "scale", "patches")


def _chosen(names: tuple[str, ...]) -> tuple[str, ...]:
    if not names:
        raise ValueError("choose at least one")
    return names


class View(Scene):
    """What decides both pictures: names of patches, and their scale."""

    patches: Annotated[tuple[str, ...], AfterValidator(_chosen)]
    scale: float = Field(1.0, ge=MIN_SCALE, le=MAX_SCALE)

    @property
    def scene(self) -> Scene:
        """The part that the base's picture depends on."""
        return Scene(**self.model_dump(include=set(Scene.model_fields)))


class Comparison:
    """A base and patches that draw the same scenes; pictures are drawn once and remembered.

    Safe to use from several threads: one draws, the others wait. Nothing else may change the base meanwhile.

    Example:
        >>> comparison = Comparison(load_base("atelier"), {"Van Gogh": patch})  # doctest: +SKIP
        >>> view = View(prompt="a house by Van Gogh", patches=["Van Gogh"])  # doctest: +SKIP
        >>> before, after = comparison.before(view.scene), comparison.after(view)  # doctest: +SKIP
    """

    def __init__(self, base: BaseModel, patches: Mapping[str, Patch], *, remembered: int = 64) -> None:
        if not patches:
            raise DemoError("a comparison needs at least one patch, and none was given")
        self.base, self.patches = base, dict(patches)
        self._lock = threading.Lock()
        # The oldest pictures go first.
        self._draw = lru_cache(remembered)(self._drawn)

    def before(self, scene: Scene) -> Image.Image:
        """The base's picture."""
        with self._lock:
            return self._draw(scene, (), 0.0)

    def after(self, view: View) -> Image.Image:
        """The same under the view's patches."""
        self.check(view)
        # At 0 a patch adds exactly nothing.
        names = tuple(name for name in self.patches if name in view.patches) if view.scale else ()
        with self._lock:
            return self._draw(view.scene, names, view.scale)

    def check(self, view: View) -> None:
        """Refuse a view of patches that are not there, with the nearest name."""
        for name in view.patches:
            if name not in self.patches:
                raise unknown_name("patch", name, self.patches)

    def unsafe(self, names: Sequence[str]) -> bool:
        """Whether any of these patches erases unsafe content, or does not say what it erases."""
        told = [self.patches[name].metadata for name in names]
        return any(one is None or is_unsafe(one) for one in told)

    def _drawn(self, scene: Scene, names: tuple[str, ...], scale: float) -> Image.Image:
        with contextlib.ExitStack() as stack:
            for name in names:
                stack.enter_context(self.patches[name].apply(self.base.pipeline, scale))
            options = {"steps": scene.steps, "guidance_scale": scene.guidance_scale, "stage": "demo"}
            return self.base.generate([scene.prompt], [scene.seed], **options)[0]


@dataclass(frozen=True)
class Shown:
    """What the page shows: a picture is ``None`` while it is drawn, and where it cannot be."""

    before: Image.Image | None
    after: Image.Image | None
    sentence: str


def show(comparison: Comparison, *fields: Any, sharp: bool = False) -> Iterator[Shown]:
    """The page's answers to its fields: first the left picture alone, then both.

    Where a chosen patch erases unsafe content the left picture is blurred, and so is the right one below
    scale 1, where the patch is not at its strength. Values may be anything: what cannot be drawn is
    answered by a sentence.

    Args:
        comparison: what draws.
        fields: prompt, seed, steps, guidance scale, scale and patches of a :class:`View`.
        sharp: blur nothing.
    """
    try:
        view = View(**dict(zip(_FIELDS, fields, strict=True)))
        comparison.check(view)
        unsafe = comparison.unsafe(view.patches) and not sharp
        before = comparison.before(view.scene)
        left = blurred(before) if unsafe else before
        yield Shown(left, None, f"Left: {comparison.base.id}. Drawing with the patch …")
        after = comparison.after(view)
        right = blurred(after) if unsafe and view.scale < 1 else after
    except RecarePatchError as fault:
        text = str(fault)
        yield Shown(None, None, f"{text[:1].upper()}{text[1:]}.")
        return
    applied = " and ".join(view.patches)
    text = f"Seed {view.seed}. Left: {comparison.base.id}. Right: the same with {applied} at {view.scale:g}."
    if unsafe:
        text += " Blurred, because the patch deals with unsafe content."
    yield Shown(left, right, text)


def find_patches(folder: str | Path = ".") -> list[Path]:
    """Patch folders in a folder, itself among them, by name; at least one."""
    place = Path(folder)
    inside = sorted(place.iterdir()) if place.is_dir() else []
    places = [place, *(one for one in inside if one.is_dir())]
    found = [one for one in places if (one / WEIGHTS_NAME).is_file()]
    if not found:
        raise PatchError(
            f"there is no patch in {'this folder' if place == Path() else place}: make one with "
            "'recare-patch erase --concept \"Van Gogh\"', or name one with --patch"
        )
    return found


def load_patches(paths: Sequence[Path], base: BaseModel, *, skip_others: bool = False) -> dict[str, Patch]:
    """Patches by the names that the page gives them: their concepts, with the folder where two are alike.

    What does not fit the base is refused, or left out with a warning (``skip_others``).
    """
    found: list[tuple[Path, Patch]] = []
    for path in paths:
        patch = Patch.load(path)
        try:
            patch.check_base(base)
        except IncompatiblePatchError as fault:
            if not skip_others:
                raise
            logger.warning("%s is left out: %s", path, fault)
            continue
        found.append((path, patch))
    if not found:
        raise PatchError(f"none of the {len(paths)} patches here fits base '{base.id}': name another --base")
    concepts = [patch.metadata.concept if patch.metadata else path.stem for path, patch in found]
    names: dict[str, Patch] = {}
    for (path, patch), concept in zip(found, concepts, strict=True):
        name = concept if concepts.count(concept) == 1 else f"{concept} ({path.name or path.resolve().name})"
        while name in names:
            name = f"{name} again"
        names[name] = patch
    return names


_CSS = """
#pictures .image-frame { width: min(100%, 512px); }
#pictures img { width: 100% !important; object-fit: contain !important; }
#sentence { overflow-wrap: anywhere; }
footer { display: none !important; }
"""


def require_gradio() -> Any:
    """The package gradio, or the sentence that says how to install it."""
    try:
        import gradio
    except ImportError as fault:
        raise DemoError('the demo needs the package gradio: pip install "recare-patch[demo]"') from fault
    return gradio


def first_prompt(comparison: Comparison) -> str:
    """What stands in the page's prompt box at first: a prompt that names what the first patch erases."""
    told = next(iter(comparison.patches.values())).metadata
    if told is None:
        return ""
    known = [one for one in told.erased if one.kind is not None]
    return known[0].as_concept().target_prompt if known else ""


def build_interface(comparison: Comparison) -> gradio.Blocks:
    """The page; :func:`launch` serves it."""
    gr = require_gradio()
    names = list(comparison.patches)

    def answer(*fields: Any) -> Iterator[tuple[Any, Any, str]]:
        for shown in show(comparison, *fields[:-1], sharp=fields[-1]):
            waiting = shown.before is not None and shown.after is None
            yield shown.before, gr.update() if waiting else shown.after, plain(shown.sentence)

    def field(kind: Any, label: str, *values: Any, **options: Any) -> Any:
        return kind(*values, label=label, elem_id=label.split()[0].lower(), **options)

    with gr.Blocks(title="recare-patch", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.Markdown(
            "# Before and after\n"
            f"The same prompt and seed, drawn by {plain(comparison.base.id)} on the left and with the patch "
            "on the right. At scale 0 a patch does nothing, at 1 it erases as trained, above 1 more, and "
            "below 0 it does the opposite."
        )
        with gr.Row(equal_height=True):
            prompt = field(gr.Textbox, "Prompt", first_prompt(comparison), max_lines=3, scale=4, min_width=280)
            button = gr.Button("Draw", variant="primary", scale=1, min_width=120, elem_id="draw")
        with gr.Row():
            chosen = field(gr.CheckboxGroup, "Patches", names, value=names[:1], scale=1)
            ends = (MIN_SCALE, MAX_SCALE)
            scale = field(gr.Slider, "Scale", *ends, value=1.0, step=0.05, scale=2, min_width=280)
        with gr.Row(elem_id="pictures"):
            plainly = {"format": "png", "interactive": False, "buttons": ["download", "fullscreen"]}
            before = field(gr.Image, "Before", alt_text="without the patch", **plainly)
            after = field(gr.Image, "After", alt_text="with the patch", **plainly)
        sentence = gr.Markdown(elem_id="sentence")
        sharp = gr.Checkbox(
            False, label="Show unsafe pictures unblurred", visible=comparison.unsafe(names), elem_id="sharp"
        )
        with gr.Accordion("Sampling", open=False), gr.Row():
            seed = field(gr.Number, "Seed", 0, precision=0)
            steps = field(gr.Slider, "Steps", 1, _MAX_STEPS, value=20, step=1)
            guidance = field(gr.Slider, "Guidance scale", 0, _MAX_GUIDANCE, value=5.0, step=0.5)
        # One at a time: they share the model. What moves while a picture is drawn is drawn once, at its last
        # place.
        common = {
            "inputs": [prompt, seed, steps, guidance, scale, chosen, sharp],
            "outputs": [before, after, sentence],
            "concurrency_id": "draw",
            "concurrency_limit": 1,
        }
        gr.on([button.click, prompt.submit], answer, api_name="compare", **common)
        moved = [scale.change, chosen.change, sharp.change]
        gr.on(moved, answer, trigger_mode="always_last", api_visibility="private", **common)
    return page


def launch(
    page: gradio.Blocks, *, host: str | None = None, port: int | None = None, share: bool = False, wait: bool = True
) -> str:
    """Serve a page, until it is interrupted where it is to ``wait``, and tell where.

    The host is gradio's own choice by default: this machine alone unless its environment variables say
    otherwise, as they do in a Space. The port is the first free one from 7860.
    """
    gr = require_gradio()
    # Fonts of the system: the default theme asks Google for its own.
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    try:
        _, address, public = page.launch(
            server_name=host,
            server_port=port,
            share=share,
            theme=theme,
            css=_CSS,
            quiet=True,
            ssr_mode=False,
            footer_links=[],
            prevent_thread_lock=True,
        )
    except OSError as fault:
        raise DemoError(
            f"port {port} cannot be had (another program may be using it): name another with --port"
            if port is not None
            else "no port from 7860 on is free: name one with --port"
        ) from fault
    where: str = public or address
    if wait:
        logger.info("Demo: %s (Ctrl-C ends it)", where)
        page.block_thread()
    return where
