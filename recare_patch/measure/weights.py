"""Other people's weights in a base's place: a denoiser's, a text encoder's, those of a whole pipeline.

They come as the releases have them: a folder of diffusers or transformers, one safetensors file in diffusers' names,
whole or with the changed tensors alone (as ESD's and UCE's code saves them), or in the names of the original
checkpoints. While they are applied they stand in the place of the base's own; tensors that are equal to those are left.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from recare_patch.core import (
    BaseModelError,
    EvaluationError,
    IncompatiblePatchError,
    PatchError,
    TensorInfo,
    file_sha256,
    nearest,
    open_tensors,
    read_safetensors_header,
)
from recare_patch.models import COMPILED, COMPONENTS, TEXT_ENCODERS, Layout, in_words, networks
from recare_patch.patch import FLOATS, check_finite, entries

if TYPE_CHECKING:
    from recare_patch.models import BaseModel

VAE = "vae"
_ORIGINAL = ("model.diffusion_model.", "first_stage_model.", "cond_stage_model.")
_WRAPPERS = ("module.", COMPILED)
_OLD_VAE = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
"""What diffusers called an autoencoder's attention before version 0.15."""

Place = tuple[str, str]
"""A component, and a parameter's name in it."""


@dataclass(frozen=True)
class Stored:
    """Where a parameter lies: a tensor of a file, or some of its rows."""

    file: Path
    key: str
    shape: tuple[int, ...]
    rows: tuple[int, int] | None = None

    def read(self, handle: Any) -> Tensor:
        """The parameter, in its own shape."""
        found: Tensor = handle.get_tensor(self.key)
        part = found if self.rows is None else found[slice(*self.rows)]
        return part.reshape(self.shape)


def parts_of(pipe: Any) -> dict[str, nn.Module]:
    """The networks that may be replaced: those that a patch may change, and the autoencoder."""
    return {**networks(pipe), VAE: pipe.vae}


def parameters_of(component: str, network: nn.Module) -> dict[str, nn.Parameter]:
    """A network's parameters by names that do not depend on adapters or on the version of transformers."""
    found = {}
    for name, one in network.named_parameters():
        if ".lora_A." not in name and ".lora_B." not in name:
            found[_plain(component, name.replace(".base_layer.", "."))] = one
    return found


def _plain(component: str, name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "") if wrapper == COMPILED else name.removeprefix(wrapper)
    if component in TEXT_ENCODERS:
        name = name.removeprefix("text_model.")
    if component == VAE:
        for old, new in _OLD_VAE.items():
            name = name.replace(old, new)
    return name


class Weights:
    """An eraser that is weights: files of some components, or of components that their tensors' names tell."""

    metadata = None

    def __init__(self, source: str, files: Mapping[str | None, Sequence[Path]]) -> None:
        """``files`` by component; those under None are sorted by what is in them."""
        self.name = self.source = source
        self.files = {component: tuple(some) for component, some in files.items()}
        self._infos = {
            (component, file, key): info
            for component, some in self.files.items()
            for file in some
            for key, info in read_safetensors_header(file).tensors.items()
            # A buffer that counts up, which newer classes do not store.
            if not key.endswith("position_ids")
        }
        if not self._infos:
            raise PatchError(f"{source} holds no tensors")
        for (_, _, key), info in self._infos.items():
            if info.dtype not in FLOATS:
                told = f"of type {info.dtype}: {', '.join(FLOATS)} are read"
                raise PatchError(f"{source} has a tensor '{key}' {told}")
        self._loaded: dict[Place, Tensor] | None = None
        self._unread = tuple(dict.fromkeys(file for _, file, _ in self._infos))
        self._hashes: dict[str, str] = {}

    def hashes(self) -> dict[str, str]:
        """File → SHA-256."""
        named = ((part, file) for part, some in self.files.items() for file in some)
        files = {f"{part}/{file.name}" if part else file.name: file for part, file in named}
        if not self._hashes:
            self._hashes = {name: file_sha256(file) for name, file in sorted(files.items())}
        return self._hashes

    def sha256(self) -> str:
        """Of its only file; of several, of their names and hashes."""
        hashes = self.hashes()
        return next(iter(hashes.values())) if len(hashes) == 1 else hashlib.sha256(repr(hashes).encode()).hexdigest()

    def fingerprint(self) -> str:
        """Of its files."""
        return self.sha256()

    @property
    def changes(self) -> tuple[str, ...]:
        """The components in which it differs from the base, once it was applied."""
        found = {component for component, _ in self._loaded or ()}
        return tuple(one for one in (*COMPONENTS, VAE) if one in found)

    def check_base(self, base: BaseModel, *, strict: bool = False) -> bool:
        """Whether every tensor has its place in a base; nobody knows whether it was made from these very weights.

        Raises:
            IncompatiblePatchError: one has none.
            PatchError: one holds what is no finite number.
            EvaluationError: the base's own weights are quantized or wait elsewhere, so that none can be exchanged.
        """
        if base.memory.weights != "full" or base.memory.offload:
            told = "weights are exchanged in a base that holds its own in full: leave --weights and --offload out"
            raise EvaluationError(f"{self.source}: {told}")
        self._places(parts_of(base.pipeline), f"base '{base.id}'")
        for file in self._unread:
            with open_tensors(file) as handle:
                for key in (key for _, other, key in self._infos if other == file):
                    check_finite({key: handle.get_tensor(key)}, self.source)
        self._unread = ()
        return False

    def apply(self, pipe: Any, scale: float = 1.0) -> AppliedWeights:
        """See :class:`Eraser`: at scale s, ``W + s (W' − W)``."""
        own = {part: parameters_of(part, network) for part, network in parts_of(pipe).items()}
        if self._loaded is None:
            self._loaded = self._read(pipe, own)
        swaps = []
        for (part, name), new in self._loaded.items():
            parameter = own[part][name]
            new = new.to(parameter.device)
            swaps.append((parameter, new if scale == 1 else torch.lerp(parameter.data, new, scale)))
        return AppliedWeights(swaps)

    @torch.no_grad()
    def _read(self, pipe: Any, own: Mapping[str, Mapping[str, nn.Parameter]]) -> dict[Place, Tensor]:
        """What differs from the pipeline's own, in its dtypes and on its devices."""
        by_file: dict[Path, list[tuple[Place, Stored]]] = {}
        for place, stored in self._places(parts_of(pipe), f"this {type(pipe).__name__}").items():
            by_file.setdefault(stored.file, []).append((place, stored))
        found: dict[Place, Tensor] = {}
        for file, some in by_file.items():
            with open_tensors(file) as handle:
                for (part, name), stored in some:
                    there = own[part][name]
                    tensor = stored.read(handle).to(there.device, there.dtype)
                    if not torch.equal(tensor, there):
                        found[part, name] = tensor
        return found

    def _places(self, parts: Mapping[str, nn.Module], target: str) -> dict[Place, Stored]:
        """Every tensor's place; see :meth:`check_base` for what it raises."""
        own = {part: parameters_of(part, network) for part, network in parts.items()}
        shapes = {(part, name): tuple(one.shape) for part, some in own.items() for name, one in some.items()}
        found: dict[Place, Stored] = {}
        for component in self.files:
            infos = {(file, key): info for (part, file, key), info in self._infos.items() if part == component}
            if component is None and any(key.startswith(_ORIGINAL) for _, key in infos):
                found |= self._original(infos, parts, target)
                continue
            if component is not None and component not in parts:
                raise IncompatiblePatchError(f"{self.source} does not fit {target}, which has no {in_words(component)}")
            named = self._named(infos, [component] if component else list(parts), own)
            for (file, key), place in named.items():
                if place not in shapes:
                    self._refuse(named, shapes, target)
                found[place] = Stored(file, key, infos[file, key].shape)
        for place, stored in found.items():
            if stored.shape != shapes[place]:
                raise IncompatiblePatchError(
                    f"{self.source} does not fit {target}: its tensor '{stored.key}' is {_in_figures(stored.shape)}, "
                    f"and there it is {_in_figures(shapes[place])}"
                )
        return found

    @staticmethod
    def _named(
        infos: Mapping[tuple[Path, str], TensorInfo],
        components: Sequence[str],
        own: Mapping[str, Mapping[str, nn.Parameter]],
    ) -> dict[tuple[Path, str], Place]:
        """Each tensor's place by its name: as it tells the component, or in the one that knows most of the others."""
        told: dict[tuple[Path, str], Place] = {}
        for file, key in infos:
            part, _, rest = _plain("", key).partition(".")
            if len(components) > 1 and part in components:
                told[file, key] = part, _plain(part, rest)
        bare = [one for one in infos if one not in told]

        def known(part: str) -> tuple[int, int]:
            """How many have a place there, and how many of these have its shape: SDXL's encoders share names."""
            places = [(own[part].get(_plain(part, key)), infos[file, key].shape) for file, key in bare]
            there = [(one, shape) for one, shape in places if one is not None]
            return len(there), sum(tuple(one.shape) == shape for one, shape in there)

        best = max(components, key=known)
        return told | {(file, key): (best, _plain(best, key)) for file, key in bare}

    def _refuse(self, named: Mapping[tuple[Path, str], Place], shapes: Mapping[Place, Any], target: str) -> None:
        missing = [(key, place) for (_, key), place in named.items() if place not in shapes]
        key, (part, name) = missing[0]
        most, count = Counter(part for part, _ in named.values()).most_common(1)[0]
        guess = nearest(name, [own for there, own in shapes if there == part]) if count > len(missing) else None
        hint = f"; the nearest there is '{guess}'" if guess else ""
        raise IncompatiblePatchError(
            f"{self.source} does not fit {target}: {len(missing)} of its {len(named)} tensors are not in the "
            f"{in_words(most)}, first '{key}'{hint}"
        )

    def _original(
        self, infos: Mapping[tuple[Path, str], TensorInfo], parts: Mapping[str, nn.Module], target: str
    ) -> dict[Place, Stored]:
        """The same of a checkpoint in the original names of Stable Diffusion 1.x and 2.x."""
        configs = {part: _config(network) for part, network in parts.items()}
        raw = {part: dict(network.named_parameters()) for part, network in parts.items() if part not in TEXT_ENCODERS}
        raw |= {part: parameters_of(part, parts[part]) for part in TEXT_ENCODERS if part in parts}
        tensors = {
            part: {name: TensorInfo("F32", tuple(one.shape), 0) for name, one in some.items()}
            for part, some in raw.items()
        }
        try:
            layout = Layout(Path(), target, {}, configs, single_file=Path())
            known = {one.name: one for one in entries(layout, tensors)}
        except BaseModelError:
            told = "is in the original checkpoints' names, which are read for Stable Diffusion 1.x and 2.x"
            raise IncompatiblePatchError(f"{self.source} {told}: give a diffusers folder of it") from None
        found: dict[Place, Stored] = {}
        for (file, key), info in infos.items():
            entry = known.get(key)
            if entry is None:
                # Averages and schedules lie beside the networks in such files; all of the denoiser must be known.
                if key.startswith(_ORIGINAL[0]):
                    raise IncompatiblePatchError(f"{self.source} does not fit {target}: it has no place for '{key}'")
                continue
            start = 0
            for name in entry.keys:
                shape = tensors[entry.component][name].shape
                rows = (start, start + shape[0])
                whole = (sum(tensors[entry.component][one].shape[0] for one in entry.keys), *shape[1:])
                if info.shape != whole + (1, 1) * entry.convolution and info.shape != whole:
                    raise IncompatiblePatchError(
                        f"{self.source} does not fit {target}: its tensor '{key}' is {_in_figures(info.shape)}, "
                        f"and there it is {_in_figures(whole)}"
                    )
                place = entry.component, _plain(entry.component, name)
                found[place] = Stored(file, key, shape, None if len(entry.keys) == 1 else rows)
                start = rows[1]
        return found


def _config(network: nn.Module) -> dict[str, Any]:
    config: Any = network.config
    return dict(config.to_dict() if hasattr(config, "to_dict") else config)


def _in_figures(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "a number"


class AppliedWeights:
    """Weights that stand in the place of a pipeline's own."""

    def __init__(self, swaps: Sequence[tuple[nn.Parameter, Tensor]]) -> None:
        self._swaps, self._here = list(swaps), True
        self._exchange()

    def _exchange(self) -> None:
        others = [(one, one.data) for one, _ in self._swaps]
        for one, other in self._swaps:
            one.data = other.to(one.device)
        self._swaps = others

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """Inside, the pipeline's own are back."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._here:
            self._here = False
            self._exchange()
