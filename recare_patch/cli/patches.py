"""Patches as a command line names them: folders with scales, short names, and what their headers tell."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from pathlib import Path

from recare_patch import cli
from recare_patch.core import PatchError, RecipeError, read_safetensors_header
from recare_patch.recipe import PARTS_KEY, WEIGHTS_NAME, load_recipe

HUB_PREFIX = "hub:"


def parse_patch(text: str) -> tuple[Path, float]:
    """A patch with its scale, "FOLDER" or "FOLDER:scale"; a folder with a colon in its name wins.

    "hub:OWNER/NAME" is fetched from the Hub into the user's cache, where it is not there yet.

    Raises:
        PatchError: no such folder or file, or the scale is no finite number.
        HubError: the Hub cannot be reached, or has no such patch.
    """
    if Path(text).exists():
        return Path(text), 1.0
    hub = text.startswith(HUB_PREFIX)
    path, colon, scale = text.rpartition(":")
    if not colon or path == "hub":
        path, scale = text, "1"
    try:
        value = float(scale)
    except ValueError:
        value = math.nan
    sound = math.isfinite(value)
    if not hub and not Path(path).exists():
        raise PatchError(f"there is no patch at {path if sound else text}")
    if not sound:
        raise PatchError(f"the scale of {path} must be a number such as 0.8, got '{scale}'")
    if not hub:
        return Path(path), value
    from recare_patch.share import fetched

    cli.quiet_libraries()
    return fetched(path), value


def short_patch(text: str) -> str:
    """A patch folder's short name made whole: "van-gogh:0.5" is "van-gogh-patch:0.5" where that is there."""
    if Path(text).exists() or text.startswith(HUB_PREFIX):
        return text
    path, colon, scale = text.rpartition(":") if ":" in text else (text, "", "")
    whole = f"{path}-patch"
    return f"{whole}{colon}{scale}" if not Path(path).exists() and Path(whole).is_dir() else text


def _header(path: Path) -> dict[str, str]:
    """The header entries of a patch's weights; none where it has no such file."""
    file = path / WEIGHTS_NAME if path.is_dir() else path
    stored = file.is_file() and file.suffix == ".safetensors"
    return read_safetensors_header(file).metadata if stored else {}


def base_of(patches: Sequence[tuple[Path, float]]) -> str:
    """The base that the first patch was made for; the bundled one without patches or records."""
    for path, _ in patches:
        # Files made by other tools carry no recipe: those need --base, or are tried on the bundled one.
        # Damaged ones are refused where they are loaded.
        with contextlib.suppress(PatchError, RecipeError):
            header = _header(path)
            if PARTS_KEY in header:
                return header.get(f"{PARTS_KEY.removesuffix('parts')}base", "atelier")
            return load_recipe(str(path)).base
    return "atelier"


def several_concepts(patch: str) -> tuple[str, ...]:
    """What a stack, or a patch of several concepts, erases; nothing for any other, or a damaged file."""
    from recare_patch.patch import PatchMetadata

    with contextlib.suppress(PatchError):
        told = PatchMetadata.from_header(_header(Path(patch)), patch)
        if told is not None and told.by_concept:
            return tuple(one.concept for one in told.erased)
    return ()
