"""What several commands share: options, progress, and quiet libraries."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import click

from recare_patch.core import PatchError, RecipeError, RichProgress, read_safetensors_header
from recare_patch.recipe import BASE_WEIGHTS, PARTS_KEY, WEIGHTS_NAME, load_recipe, parse_assignment

Command = TypeVar("Command", bound=Callable[..., Any])

SD_15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"

HUB_PREFIX = "hub:"
"""As in :mod:`share`, repeated here because its home needs torch."""


def base_option(command: Command) -> Command:
    """Add ``--base``."""
    return click.option(
        "--base",
        metavar="FOLDER|HUB-ID",
        help=f"Base model: a diffusers pipeline folder or a hub id, such as {SD_15}.  [default: bundled]",
    )(command)


def clip_option(command: Command) -> Command:
    """Add ``--clip``."""
    return click.option(
        "--clip",
        metavar="FOLDER|HUB-ID",
        help="A transformers CLIP model with tokenizer and image processor.  [default: what fits the base]",
    )(command)


def concept_option(command: Command) -> Command:
    """Add ``--concept``."""
    return click.option(
        "--concept", metavar="TEXT", help="One of several that the patch erases.  [default: each of them]"
    )(command)


def device_option(command: Command) -> Command:
    """Add ``--device``."""
    return click.option(
        "--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, mps, …"
    )(command)


_LEVERS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("--weights", {"metavar": "FORM", "help": f"The base's linear layers: {' | '.join(BASE_WEIGHTS)}."}),
    ("--encoders-off-device", {"help": "Text encoders are on the device only while they encode."}),
    ("--vae-off-device", {"help": "So is the autoencoder while it works."}),
    ("--vae-tiling", {"help": "It works on one picture at a time, in tiles."}),
    ("--checkpointing", {"help": "Forget activations, and compute them again: less memory, a third slower."}),
    ("--micro-batch", {"type": int, "metavar": "N", "help": "At most N samples in the denoiser at once."}),
    ("--offload", {"help": "Layers wait in the host's memory; needs --checkpointing; slow."}),
    ("--channels-last", {"help": "A pixel's channels side by side in memory; may be faster."}),
    ("--compile", {"help": "Compile the denoiser's transformer blocks; pays on long runs alone."}),
    ("--resolution", {"metavar": "WxH", "help": "Pixels of the pictures.  [default: the base's own]"}),
)


def memory_options(command: Command) -> Command:
    """Add ``--vram`` and a switch for each key of a recipe's ``memory``.

    The command gets ``vram``, and ``levers``: the recipe overrides of the switches that were given.
    """
    keys = [name.removeprefix("--").replace("-", "_") for name, _ in _LEVERS]

    @functools.wraps(command)
    def collected(*args: Any, **given: Any) -> Any:
        found = {key: given.pop(key) for key in keys}
        levers = {f"memory.{key}": value for key, value in found.items() if value is not None}
        return command(*args, levers=levers, **given)

    decorated: Any = collected
    for name, options in reversed(_LEVERS):
        flag: dict[str, Any] = {"is_flag": True, "flag_value": True, "default": None, "type": bool}
        decorated = click.option(name, **({} if "metavar" in options else flag), **options)(decorated)
    wanted = click.option(
        "--vram",
        type=click.FloatRange(min=0, min_open=True),
        metavar="GB",
        help="Choose the switches below for a card of this size, such as 6, 8, 12 or 24.",
    )
    return cast(Command, wanted(decorated))


def set_option(command: Command) -> Command:
    """Add the repeatable ``--set``."""
    return click.option(
        "--set",
        "assignments",
        multiple=True,
        metavar="KEY=VALUE",
        help="Set any recipe key, such as erase.guidance_minus=2; repeatable.",
    )(command)


def overrides_from(assignments: tuple[str, ...], **named: Any) -> dict[str, Any]:
    """Recipe overrides of ``--set`` and of options with names of their own.

    Args:
        assignments: what ``--set`` was given.
        named: dotted key with "__" for "." → value; None where the option was not given.

    Raises:
        RecipeError: an assignment is malformed, or sets a key that an option sets otherwise.
    """
    found = {key.replace("__", "."): value for key, value in named.items() if value is not None}
    for text in assignments:
        key, value = parse_assignment(text)
        if key in found and found[key] != value:
            raise RecipeError(f"{key} is set twice, to {found[key]!r} and to {value!r}")
        found[key] = value
    return found


def parse_patch(text: str) -> tuple[Path, float]:
    """A patch with its scale, "FOLDER" or "FOLDER:scale"; a folder with a colon in its name wins.

    "hub:OWNER/NAME" is fetched from the Hub into the user's cache, where it is not there yet.

    Raises:
        PatchError: no such folder or file, or the scale is no finite number.
        HubError: the Hub cannot be reached, or has no such patch.
    """
    if Path(text).exists():
        return Path(text), 1.0
    if text.startswith(HUB_PREFIX):
        return _fetched(text)
    path, colon, scale = text.rpartition(":")
    if not colon:
        raise PatchError(f"there is no patch at {text}")
    try:
        value = float(scale)
    except ValueError:
        value = math.nan
    if Path(path).exists() and not math.isfinite(value):
        raise PatchError(f"the scale of {path} must be a number such as 0.8, got '{scale}'")
    if not Path(path).exists():
        raise PatchError(f"there is no patch at {path if math.isfinite(value) else text}")
    return Path(path), value


def _fetched(text: str) -> tuple[Path, float]:
    repo, colon, scale = text.removeprefix(HUB_PREFIX).partition(":")
    try:
        value = float(scale) if colon else 1.0
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise PatchError(f"the scale of {HUB_PREFIX}{repo} must be a number such as 0.8, got '{scale}'")
    from recare_patch.share import fetched

    quiet_libraries()
    return fetched(f"{HUB_PREFIX}{repo}"), value


def short_patch(text: str) -> str:
    """A patch folder's short name made whole: "van-gogh:0.5" is "van-gogh-patch:0.5" where that is there."""
    if Path(text).exists() or text.startswith(HUB_PREFIX):
        return text
    path, colon, scale = text.rpartition(":") if ":" in text else (text, "", "")
    whole = f"{path}-patch"
    return f"{whole}{colon}{scale}" if not Path(path).exists() and Path(whole).is_dir() else text


def base_of(patches: Sequence[tuple[Path, float]]) -> str:
    """The base that the first patch was made for; the bundled one without patches or records."""
    for path, _ in patches:
        file = path / WEIGHTS_NAME if path.is_dir() else path
        try:
            stored = file.is_file() and file.suffix == ".safetensors"
            header = read_safetensors_header(file).metadata if stored else {}
            if PARTS_KEY in header:
                return header.get(f"{PARTS_KEY.removesuffix('parts')}base", "atelier")
            return load_recipe(str(path)).base
        except (PatchError, RecipeError):
            # Files made by other tools carry no recipe: those need --base, or are tried on the bundled one.
            # Damaged ones are refused where they are loaded.
            continue
    return "atelier"


def several_concepts(patch: Path | str) -> tuple[str, ...]:
    """What a stack, or a patch of several concepts, erases; nothing for any other."""
    from recare_patch.patch import PatchMetadata

    path = Path(patch)
    file = path / WEIGHTS_NAME if path.is_dir() else path
    try:
        header = read_safetensors_header(file).metadata if file.is_file() else {}
        told = PatchMetadata.from_header(header, str(patch))
    except PatchError:
        # Damaged files are refused where they are loaded.
        return ()
    return tuple(one.concept for one in told.erased) if told is not None and told.by_concept else ()


@contextlib.contextmanager
def shown_progress() -> Iterator[RichProgress]:
    """Progress bars on standard error, the package's log lines above them, other libraries quiet."""
    quiet_libraries()
    log = logging.getLogger("recare_patch")
    handler = _EchoHandler()
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        with RichProgress() as progress:
            yield progress
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


class _EchoHandler(logging.Handler):
    """Log records as plain lines on standard error; warnings say that they are warnings."""

    def emit(self, record: logging.LogRecord) -> None:
        prefix = "Warning: " if record.levelno >= logging.WARNING else ""
        click.echo(prefix + record.getMessage(), err=True)


def quiet_libraries() -> None:
    """Keep the model libraries' own bars and notices off the terminal; their errors still come."""
    for name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY", "HF_HUB_VERBOSITY"):
        os.environ.setdefault(name, "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # It warns of a 4-bit kernel that it misses on CPUs, and nothing here computes in 4 bits.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
