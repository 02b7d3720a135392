"""A pipeline folder as its own configuration files describe it, read before anything heavy is loaded."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recare_patch.core import BaseModelError

_SHARD = re.compile(r"-\d+-of-\d+(?=\.|$)")
_CONFIG_NAMES = ("config.json", "scheduler_config.json", "tokenizer_config.json", "preprocessor_config.json")


@dataclass(frozen=True)
class Layout:
    """What a pipeline folder holds.

    Attributes:
        folder: where it is.
        name: how messages call it.
        index: ``model_index.json``.
        configs: component → its configuration; only components whose subfolder is there.
        single_file: the checkpoint that holds all weights, where the folder has configurations alone.
    """

    folder: Path
    name: str
    index: dict[str, Any]
    configs: dict[str, dict[str, Any]]
    single_file: Path | None = None

    @property
    def listed(self) -> tuple[str, ...]:
        """The components that the index names and does not leave out."""
        return tuple(
            key
            for key, value in self.index.items()
            if not key.startswith("_") and isinstance(value, list) and value and value[0] is not None
        )

    def weight_files(self, component: str) -> list[Path]:
        """The safetensors files of a component."""
        return sorted((self.folder / component).glob("*.safetensors"))

    def weight_sets(self, component: str) -> dict[str, list[Path]]:
        """A component's weights: full sets (one a variant, such as ``fp16``) with all their shards.

        The first is the plain one, which diffusers loads where no variant is asked for.
        """
        sets: dict[str, list[Path]] = {}
        for file in self.weight_files(component):
            sets.setdefault(_SHARD.sub("", file.stem), []).append(file)
        return dict(sorted(sets.items(), key=lambda item: len(item[0])))

    def only_in_half(self, component: str) -> bool:
        """Whether all that is there of a component's weights is their fp16 variant."""
        files = self.weight_files(component)
        return bool(files) and all(".fp16." in file.name for file in files)

    def loaded_files(self, component: str) -> list[Path]:
        """The files of a component that diffusers loads: the plain ones, else the variant."""
        return next(iter(self.weight_sets(component).values()), [])

    def require(self, component: str, *, weights: bool = True) -> dict[str, Any]:
        """The configuration of a component that must be there.

        Raises:
            BaseModelError: it is not, or its weights are missing or pickled.
        """
        if component not in self.configs:
            raise BaseModelError(f"base {self.name} lacks its component '{component}'")
        if weights and self.single_file is None and not self.weight_files(component):
            pickled = [p.name for p in (self.folder / component).glob("*.bin")]
            if pickled:
                raise BaseModelError(
                    f"base {self.name} has its {component} only as a pickle ({pickled[0]}); "
                    "pickles can run code, so only safetensors are read"
                )
            raise BaseModelError(f"base {self.name} has no weights for its component '{component}'")
        return self.configs[component]


def _read_json(path: Path, name: str) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as fault:
        raise BaseModelError(f"base {name} has an unreadable {path.parent.name}/{path.name}") from fault
    if not isinstance(found, dict):
        raise BaseModelError(f"base {name} has an unreadable {path.parent.name}/{path.name}")
    return found


def read_layout(folder: Path, name: str) -> Layout:
    """Read a pipeline folder's index and configurations.

    Raises:
        BaseModelError: if it is no diffusers pipeline folder.
    """
    index_file = folder / "model_index.json"
    if not index_file.is_file():
        raise BaseModelError(
            f"base {name} is no diffusers pipeline folder: it has no model_index.json "
            "(a single checkpoint file is named itself, not its folder)"
        )
    configs: dict[str, dict[str, Any]] = {}
    for part in sorted(entry for entry in folder.iterdir() if entry.is_dir()):
        for config_name in _CONFIG_NAMES:
            if (part / config_name).is_file():
                configs[part.name] = _read_json(part / config_name, name)
                break
    return Layout(folder, name, _read_json(index_file, name), configs)
