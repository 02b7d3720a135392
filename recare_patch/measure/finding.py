"""What lies at a place that is to be audited: a patch, somebody's LoRA, weights, a pipeline, the name of a defence.

It is told by the names of files and tensors. Nothing that can run code is opened, but defences, which are installed
packages of the user's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recare_patch.core import (
    BaseModelError,
    EvaluationError,
    PatchError,
    inside,
    read_json,
    read_safetensors_header,
    unknown_name,
)
from recare_patch.measure.erasers import Defence, Eraser
from recare_patch.measure.evidence import What
from recare_patch.measure.names import DEFENCES
from recare_patch.measure.weights import VAE, Weights
from recare_patch.models import COMPONENTS, Layout, base_layers, find_layout, in_words
from recare_patch.patch import PICKLES, Patch, from_any, weights_file

if TYPE_CHECKING:
    from recare_patch.models import BaseModel
    from recare_patch.recipe import Concept

PREFIX = "defence:"
"""What marks the name of a defence where a path could stand."""

_LORA = ("lora_", ".lora.", "_lora.", "hada_", "lokr_", "dora_scale", "oft_")
_CONVERT = (
    "python -c \"import torch; from safetensors.torch import save_file; found = torch.load('{}', map_location='cpu', "
    "weights_only=True); found = found.get('state_dict', found); save_file({{k: v.contiguous() for k, v in "
    "found.items() if isinstance(v, torch.Tensor)}}, '{}.safetensors')\""
)


@dataclass(frozen=True)
class Found:
    """What is to be audited, before any of its tensors is read.

    Attributes:
        title: what tables call it.
        opened: makes the eraser, for a base and a concept.
    """

    title: str
    what: What
    opened: Callable[[BaseModel, Concept], Eraser]


def find_eraser(text: str) -> Found:
    """What a path, a hub id or ``defence:NAME`` stands for; ``TITLE=`` before it gives it another title.

    Raises:
        RecarePatchError: there is no such thing, or it is a pickle, or of a kind that is not read.
    """
    title, equals, rest = text.partition("=")
    if equals and not Path(text).expanduser().exists() and not text.startswith(PREFIX):
        if not title.strip() or not rest.strip():
            raise EvaluationError(f"'{text}' names nothing to audit: write TITLE=PLACE, or the place alone")
        found = find_eraser(rest.strip())
        return Found(title.strip(), found.what, found.opened)
    if text.startswith(PREFIX):
        told = text.removeprefix(PREFIX)
        if (name := told.partition(":")[0]) not in DEFENCES:
            known = DEFENCES.names()
            if not known:
                raise EvaluationError(
                    f"there is no defence '{name}': installed packages bring them, by entry points of the group "
                    f"{DEFENCES.group}, and none does"
                )
            raise unknown_name("defence", name, known)
        return Found(told, "defence", lambda _, concept: Defence.named(told, concept))
    path = Path(text).expanduser()
    if path.suffix.lower() in PICKLES and not path.is_dir():
        raise PatchError(_pickled(path))
    if path.is_file():
        return _file(path, text)
    if path.is_dir():
        return _folder(path, text)
    if path.exists():
        raise PatchError(f"{text} is no plain file and no folder")
    try:
        layout, title = find_layout(text)
    except BaseModelError as fault:
        told = "a path, a hub id (owner/name) or defence:NAME is audited"
        raise EvaluationError(f"there is nothing at '{text}': {told} ({fault})") from None
    return _pipeline(layout, title.rpartition("/")[2])


def _pickled(path: Path) -> str:
    if not path.exists():
        return f"there is nothing at {path}"
    return (
        f"{path} is a pickle, which can run code when it is opened: only safetensors is read; where you trust it, this "
        f"makes one of it: {_CONVERT.format(path, path.with_suffix(''))}"
    )


def _file(path: Path, source: str) -> Found:
    keys = read_safetensors_header(path).tensors
    if _is_lora(keys):
        return _lora(path, path.stem)
    # A checkpoint of a whole model has its autoencoder in it.
    whole = any(key.startswith("first_stage_model.") for key in keys)
    return _weights(source, path.stem, {None: [path]}, "pipeline" if whole else "weights")


def _is_lora(keys: Iterable[str]) -> bool:
    return any(mark in key for key in keys for mark in _LORA)


def _weights(source: str, title: str, files: dict[str | None, list[Path]], what: What = "weights") -> Found:
    return Found(title, what, lambda *_: Weights(source, files))


def _lora(path: Path, title: str) -> Found:
    file = weights_file(path, of_any_tool=True)
    if any(key.startswith("recare_patch") for key in read_safetensors_header(file).metadata):
        return Found(title, "patch", lambda *_: Patch.load(path))
    return Found(title, "lora", lambda base, _: from_any(path, [name for name, _ in base_layers(base.denoiser)]))


def _folder(path: Path, source: str) -> Found:
    title = path.resolve().name
    if (path / "model_index.json").is_file():
        return _pipeline(find_layout(path)[0], title)
    if (path / "config.json").is_file():
        return _weights(source, title, {_component(path): _stored(path)})
    parts = [name for name in (*COMPONENTS, VAE) if (path / name / "config.json").is_file()]
    if parts:
        return _weights(source, title, {name: _stored(path / name) for name in parts})
    pickles = sorted(one for one in path.iterdir() if one.suffix in PICKLES)
    if pickles and not any(path.glob("*.safetensors")):
        raise PatchError(_pickled(pickles[0]))
    file = weights_file(path, of_any_tool=True)
    # A LoRA's folder may hold settings beside its file.
    return (
        _lora(path, title)
        if _is_lora(read_safetensors_header(file).tensors)
        else _weights(source, title, {None: [file]})
    )


def _component(path: Path) -> str | None:
    """Which network a folder by itself is; None where its tensors must tell."""
    config = read_json(path / "config.json", f"{path}/config.json", PatchError, within=path)
    told = str(config.get("_class_name") or config.get("architectures") or "") if isinstance(config, dict) else ""
    for mark, component in (("UNet", "unet"), ("Transformer2D", "transformer"), ("AutoencoderKL", VAE)):
        if mark in told:
            return component
    return None


def _stored(path: Path) -> list[Path]:
    """The safetensors files that a network's folder is loaded from."""
    layout = Layout(path.resolve().parent, f"'{path.name}'", {}, {path.resolve().name: {}})
    sets = layout.weight_sets(path.resolve().name)
    pickles = sorted(one for one in path.iterdir() if one.suffix in PICKLES)
    if not sets and pickles:
        raise PatchError(_pickled(pickles[0]))
    files = next(iter(sets.values()), [])
    if not files:
        raise PatchError(f"{path} has no weights in safetensors, named as diffusers or transformers name them")
    for file in files:
        if not inside(file, path):
            raise PatchError(f"{file} is a link that leads out of its folder: name the file itself")
    return files


def _pipeline(layout: Layout, title: str) -> Found:
    """A whole pipeline: its networks in the base's place, drawn with the base's tokenizers and scheduler."""
    kind = layout.index.get("_class_name")
    if not isinstance(kind, str) or any(layout.folder.glob("*.py")):
        raise EvaluationError(
            f"{layout.name} is a pipeline with code of its own, which is not run: install it as a package with an "
            f"entry point of the group {DEFENCES.group}, and audit defence:NAME"
        )
    names = [name for name in (*COMPONENTS, VAE) if name in layout.configs]
    files: dict[str | None, list[Path]] = {}
    for name in names:
        try:
            files[name] = layout.weights(name)
        except BaseModelError as fault:
            pickles = [one for one in layout.files(name) if one.suffix in PICKLES]
            raise PatchError(_pickled(pickles[0])) if pickles else fault from None

    def opened(base: BaseModel, _: Any) -> Eraser:
        told = layout.configs.get("scheduler", {}).get("prediction_type", "epsilon")
        if told != base.prediction_type and base.prediction_type != "flow":
            raise EvaluationError(
                f"{layout.name} predicts '{told}', and base '{base.id}' '{base.prediction_type}': give the base that "
                "it was made from"
            )
        return Weights(layout.name, files)

    return Found(title, "pipeline", opened)


def in_kind(what: What, changes: tuple[str, ...]) -> str:
    """What it is, as people read it: "weights of the UNet"."""
    names = " and ".join(map(in_words, changes))
    if what == "defence":
        return "a component at sampling time"
    if what in ("patch", "lora"):
        return f"a {'patch' if what == 'patch' else 'LoRA'} for the {names}"
    article = "a pipeline" if what == "pipeline" else "weights"
    return f"{article}, {names} changed" if changes else f"{article} equal to the base's"
