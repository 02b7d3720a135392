"""A patch: the LoRA that an erasing run leaves, with everything needed to make it again.

The file is what diffusers itself reads: safetensors, keys ``unet.<module>.lora_A.weight`` and
``….lora_B.weight``, or ``text_encoder.<module>.…``, the scale ``alpha / rank`` multiplied into ``B``.
That scale is baked in because diffusers' files carry no alpha, and other tools ignore one that stands
in the header. Our own entries go into the header under ``recare_patch.…``, where no other reader looks.
"""

from __future__ import annotations

import hashlib
import logging
import re
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from recare_patch.core import (
    IncompatiblePatchError,
    PatchError,
    SafetensorsHeader,
    file_sha256,
    load_tensors,
    read_safetensors_header,
    tensors_hash,
    write_tensors,
)
from recare_patch.models import COMPILED, COMPONENTS, DENOISERS, in_words, named_layers, named_tuner_layers, split_name
from recare_patch.patch.folder import weights_file
from recare_patch.patch.metadata import Named, PatchMetadata, PatchPart
from recare_patch.recipe import WEIGHTS_NAME, slug_of

if TYPE_CHECKING:
    from recare_patch.models import BaseModel as Base
    from recare_patch.patch.apply import AppliedPatch

logger = logging.getLogger(__name__)

SCALES_KEY = "lora_adapter_metadata"
"""Header entry in which diffusers keeps PEFT's settings, and with them a scale."""

FLOATS = ("F16", "BF16", "F32", "F64")
_CONVERT = "`recare-patch convert {} --to diffusers --out FOLDER` makes one of it"
_KEY = re.compile(rf"(?:{'|'.join(COMPONENTS)})\..+\.lora_[AB]\.weight")


def load_numbers(file: Path, header: SafetensorsHeader, source: str) -> dict[str, Tensor]:
    """A LoRA file's tensors: floating-point numbers, alphas maybe whole ones.

    Raises:
        PatchError: there are others, or it cannot be read.
    """
    for key, info in header.tensors.items():
        allowed = (*FLOATS, "I64", "I32", "I16") if key.endswith(".alpha") else FLOATS
        if info.dtype not in allowed:
            raise PatchError(f"{source} has a tensor '{key}' of type {info.dtype}: {', '.join(allowed)} are read")
    return load_tensors(file, header, source)


def check_finite(tensors: Mapping[str, Tensor], source: str) -> None:
    """Refuse NaN and infinity."""
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            what = "NaN" if torch.isnan(tensor).any() else "infinite"
            raise PatchError(f"{source} has {what} values in its tensor '{key}'")


def checked_pair(sides: Mapping[str, Tensor], module: str, source: str) -> tuple[Tensor, Tensor]:
    """A module's factors ``A`` ``[rank, in, …]`` and ``B`` ``[out, rank]`` (``…, 1, 1``).

    Raises:
        PatchError: one is missing, or they make no update.
    """
    for side, what in (("A", "lower"), ("B", "upper")):
        if side not in sides:
            raise PatchError(f"{source} lacks the {what} factor, lora_{side}, of '{module}'")
    a, b = sides["A"], sides["B"]
    convolution = a.ndim == b.ndim == 4 and b.shape[2:] == (1, 1)
    shaped = (a.ndim == b.ndim == 2 or convolution) and a.shape[0] == b.shape[1]
    if not shaped or 0 in (*a.shape, *b.shape):
        raise PatchError(
            f"{source} has misshapen tensors for '{module}': {tuple(a.shape)} and {tuple(b.shape)} do not "
            "make an update"
        )
    return a, b


def concept_name(concept: str) -> str:
    """A file's stem for a patch, by what it erases: "erase-van-gogh"."""
    return f"erase-{slug_of(concept)}"


Mapped = tuple[tuple[int, ...], int]
"""What a layer takes (with its kernel), and what it gives."""


def in_figures(mapped: Mapped) -> str:
    """The same in messages: "768 to 320"."""
    return f"{'x'.join(map(str, mapped[0]))} to {mapped[1]}"


@dataclass(frozen=True, repr=False, eq=False)
class Patch:
    """An erasing LoRA: tensors and what they are.

    Attributes:
        tensors: ``<component>.<module>.lora_A.weight`` ``[rank, in]`` and ``….lora_B.weight``
            ``[out, rank]`` (convolutions have two more axes), on the CPU, to be applied at scale 1.
            Components are those of :data:`COMPONENTS`.
        metadata: of the run that made it; ``None`` for a LoRA file of other make.
        source: where it was loaded from, for messages.
        file_sha256: of the weights file that was read; ``None`` for other patches.
        format: of that file: "diffusers", "peft" or "kohya".
        foreign: what another tool said of its training in a file's header, where there is no metadata.

    Example:
        >>> patch = Patch.load("van-gogh-patch")  # doctest: +SKIP
        >>> with patch.apply(pipe):  # doctest: +SKIP
        ...     pipe("A painting in the style of Van Gogh")
    """

    tensors: Mapping[str, Tensor]
    metadata: PatchMetadata | None = None
    source: str = "the patch"
    file_sha256: str | None = None
    format: str = "diffusers"
    foreign: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # diffusers would only warn of what is not a complete, well-shaped set of pairs.
        if not self.tensors:
            raise PatchError(f"{self.source} holds no tensors")
        for key in self.tensors:
            if not _KEY.fullmatch(key):
                raise PatchError(
                    f"{self.source} has a tensor '{key}' that does not belong in a patch: only "
                    f"'<component>.<module>.lora_A.weight' and '….lora_B.weight' do, for the components "
                    f"{', '.join(COMPONENTS)}"
                )
        for module in self.modules:
            keys = {side: f"{module}.lora_{side}.weight" for side in "AB"}
            sides = {side: self.tensors[key] for side, key in keys.items() if key in self.tensors}
            checked_pair(sides, module, self.source)
        check_finite(self.tensors, self.source)
        object.__setattr__(self, "tensors", types.MappingProxyType(dict(self.tensors)))

    def __repr__(self) -> str:
        return f"Patch({self.name}: {len(self.modules)} modules, {self.parameters:,} parameters)"

    @property
    def name(self) -> str:
        """How messages call it: the concept's quoted name, or the file."""
        return f"'{self.metadata.concept}'" if self.metadata else self.source

    @property
    def modules(self) -> tuple[str, ...]:
        """The layers it changes, by their full names: ``unet.mid_block.attentions.0.proj_in``."""
        return tuple(dict.fromkeys(key.rsplit(".lora_", 1)[0] for key in self.tensors))

    @property
    def components(self) -> tuple[str, ...]:
        """The networks it changes, in the order of :data:`COMPONENTS`."""
        found = {split_name(module)[0] for module in self.modules}
        return tuple(part for part in COMPONENTS if part in found)

    @property
    def ranks(self) -> dict[str, int]:
        """Rank of each module."""
        return {module: self.factors(module)[0].shape[0] for module in self.modules}

    @property
    def names(self) -> tuple[Named, ...]:
        """The names that its first rows belong to, one each; empty where names have no rows of their own."""
        found = (self.metadata.names if self.metadata is not None else None) or ()
        return found if len(found) <= min(self.ranks.values()) else ()

    @property
    def parameters(self) -> int:
        """Number of values in all tensors."""
        return sum(tensor.numel() for tensor in self.tensors.values())

    @property
    def dtype(self) -> torch.dtype:
        """Of its first tensor; patches that this package makes have one dtype throughout."""
        return next(iter(self.tensors.values())).dtype

    def factors(self, module: str) -> tuple[Tensor, Tensor]:
        """``A`` and ``B`` of a layer as they are stored; the update of its weight is ``B A``."""
        return self.tensors[f"{module}.lora_A.weight"], self.tensors[f"{module}.lora_B.weight"]

    def mapping(self, module: str) -> Mapped:
        """What its change of a layer takes and gives."""
        a, b = self.factors(module)
        return tuple(a.shape[1:]), b.shape[0]

    def update(self, module: str, device: torch.device | str = "cpu") -> Tensor:
        """What is added to a layer's weight at scale 1: ``B A``, fp32, in the weight's own shape."""
        a, b = (factor.to(device, torch.float32) for factor in self.factors(module))
        return (b.flatten(1) @ a.flatten(1)).reshape(b.shape[0], *a.shape[1:])

    def sha256(self) -> str:
        """SHA-256 of the weights file it was read from; of its tensors where it was never a file."""
        if self.file_sha256 is not None:
            # Of these very tensors: what lies at that place now may be another patch.
            return self.file_sha256
        digest = hashlib.sha256()
        for key, tensor in self.tensors.items():
            digest.update(f"{key}{tensor.dtype}{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def fingerprint(self) -> str:
        """SHA-256 of its tensors alone, which decide what is drawn under it."""
        return tensors_hash(self.tensors)

    def as_part(self, scale: float) -> PatchPart:
        """What a stack, or a base that it is merged into, records about it."""
        told = self.metadata
        if told is None:
            return PatchPart(name=Path(self.source).name, sha256=self.sha256(), scale=scale)
        return PatchPart(
            name=told.concept,
            concept=told.concept,
            kind=told.kind,
            sha256=self.sha256(),
            scale=scale,
            care_words=told.care_words,
            method=told.method,
            concepts=told.erased if len(told.erased) > 1 else None,
        )

    @classmethod
    def from_adapter(
        cls,
        base: Base,
        adapter_name: str,
        rank: int,
        alpha: float,
        metadata: PatchMetadata | None = None,
        *,
        dtype: torch.dtype = torch.float16,
    ) -> Patch:
        """The patch of a trained adapter, rounded at once, so that what is previewed is what is saved.

        Raises:
            PatchError: there is no such adapter, or its training has diverged.
        """
        tensors: dict[str, Tensor] = {}
        for full, layer in named_tuner_layers(base.components):
            if adapter_name not in layer.lora_A:
                continue
            down, up = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
            tensors[f"{full}.lora_A.weight"] = down.detach().float().cpu().clone()
            tensors[f"{full}.lora_B.weight"] = up.detach().float().cpu() * (alpha / rank)
        if not tensors:
            raise PatchError(f"base '{base.id}' holds no adapter named '{adapter_name}'")
        return cls(tensors, metadata, f"the adapter '{adapter_name}'").to(dtype)

    def to(self, dtype: torch.dtype) -> Patch:
        """Rounded to another dtype.

        Raises:
            PatchError: a value does not fit into it.
        """
        cast = {key: tensor.to(dtype) for key, tensor in self.tensors.items()}
        return Patch(cast, self.metadata, f"{self.source} as {str(dtype).removeprefix('torch.')}")

    @classmethod
    def load(cls, path: str | Path) -> Patch:
        """Read a patch, or any diffusers LoRA file for a UNet, its text encoders, or both.

        Args:
            path: the patch's folder, or its safetensors file.

        Raises:
            PatchError: it is missing, a pickle, damaged, or its tensors are not a complete set of finite
                LoRA pairs with their scale in them.
        """
        from recare_patch.patch.reading import header_scales, shape_of

        file, source = weights_file(Path(path).expanduser()), str(path)
        header = read_safetensors_header(file)
        shape = shape_of(header, source)
        if shape != "diffusers":
            raise PatchError(f"{source} is a {shape} file, and a patch has diffusers' shape: {_CONVERT.format(source)}")
        stored = load_numbers(file, header, source)
        tensors = {key.replace(COMPILED, ""): tensor for key, tensor in stored.items()}
        if len(tensors) < len(stored):
            raise PatchError(f"{source} holds a layer twice, as it is and compiled ('{COMPILED[:-1]}')")
        made = cls(tensors, PatchMetadata.from_header(header.metadata, source), source, file_sha256(file))
        scales = header_scales(header.metadata, made.ranks, source) or {}
        if any(scale != 1 for scale in scales.values()):
            raise PatchError(
                f"{source} keeps a scale of its own in its header, and a patch has its scale in the tensors: "
                f"{_CONVERT.format(source)}"
            )
        return made

    def save(self, folder: str | Path, dtype: torch.dtype = torch.float16) -> Path:
        """Write the weights file into a folder, where ``pipe.load_lora_weights(folder)`` finds it by itself.

        Returns:
            The file.

        Raises:
            PatchError, OutputError: see :meth:`write`.
        """
        return self.write(Path(folder) / WEIGHTS_NAME, dtype)

    def write(self, file: Path, dtype: torch.dtype = torch.float16) -> Path:
        """Write a weights file as diffusers names it, whole or not at all.

        Raises:
            PatchError: a value does not fit into the dtype.
            OutputError: it cannot be written.
        """
        training = {key: text for key, text in self.foreign.items() if key.startswith("ss_")}
        told = self.metadata.to_header() if self.metadata else training
        write_tensors(file, self.to(dtype).tensors, {"format": "pt"} | told)
        return file

    def check_base(self, base: Base, *, strict: bool = False) -> bool:
        """Whether a base model has the very networks that the patch changes.

        On others of the same shape, a fine-tune for example, a patch loads and works to a degree that
        nobody has measured. A patch for a text encoder does not ask for the denoiser it was made with.

        Raises:
            IncompatiblePatchError: the shapes differ, or the weights do and ``strict`` is set.
        """
        self.check_shapes(base.components, f"base '{base.id}'")
        if self.metadata is None:
            return False
        made_for = self.metadata.component_hash
        others = [part for part in self.components if base.component_hash(part) != made_for(part)]
        if not others:
            return True
        what = "denoiser" if others[0] in DENOISERS else in_words(others[0])
        message = (
            f"patch {self.name} was made for base '{self.metadata.base}', and the {what} of base "
            f"'{base.id}' has other weights"
        )
        if strict:
            raise IncompatiblePatchError(message)
        logger.warning("%s: how well it erases there is unknown", message)
        return False

    def check_shapes(self, parts: Mapping[str, nn.Module], target: str) -> None:
        """Refuse networks, by component, that lack a layer of the patch or have one of another shape.

        Raises:
            IncompatiblePatchError: they do; ``target`` is what the message calls them.
        """
        made_for = f", which was made for base '{self.metadata.base}'," if self.metadata else ""
        found = named_layers(parts)
        missing = [name for name in self.modules if not isinstance(found.get(name), nn.Linear | nn.Conv2d)]
        if missing:
            raise IncompatiblePatchError(
                f"patch {self.name}{made_for} does not fit {target}: {len(missing)} of its "
                f"{len(self.modules)} modules are not in it, first '{missing[0]}'"
            )
        for name in self.modules:
            layer = found[name]
            if isinstance(layer, nn.Linear):
                there: Mapped = (layer.in_features,), layer.out_features
            else:
                assert isinstance(layer, nn.Conv2d)
                there = (layer.in_channels // layer.groups, *layer.kernel_size), layer.out_channels
            own = self.mapping(name)
            if own != there:
                raise IncompatiblePatchError(
                    f"patch {self.name}{made_for} does not fit {target}: its module '{name}' maps "
                    f"{in_figures(own)}, and there it maps {in_figures(there)}"
                )

    def apply(self, pipe: Any, scale: float = 1.0, adapter_name: str | None = None) -> AppliedPatch:
        """Put the patch into a diffusers pipeline; LoRAs that are on stay on, at the weights they have.

        Everything is checked before the pipeline is touched.

        Args:
            pipe: a diffusers pipeline with networks of the shapes the patch was made for.
            scale: 1 erases as trained, 0 not at all.
            adapter_name: how the pipeline calls it; made from the concept by default.

        Returns:
            A handle with ``remove()``, usable as a context manager that removes the patch at its end.

        Raises:
            IncompatiblePatchError: the pipeline lacks a network that the patch changes, or has one of
                another shape.
            PatchError: the scale is no finite number, or the adapter's name is taken or unusable.
        """
        from recare_patch.patch.apply import AppliedPatch

        return AppliedPatch(self, pipe, scale, adapter_name)


class Described(Protocol):
    """What may say what it is."""

    @property
    def metadata(self) -> PatchMetadata | None:
        """None where it does not."""
        ...


def concepts_of(patch: Described) -> tuple[str, ...]:
    """What a patch erases; none for a LoRA that does not say."""
    return tuple(one.concept for one in patch.metadata.erased) if patch.metadata is not None else ()


def names_of(patch: Patch) -> tuple[Named, ...]:
    """The names that have a row each in a patch.

    Raises:
        PatchError: it has none.
    """
    if not patch.names:
        raise PatchError(
            f"patch {patch.name} has no row for each name: only closed forms (--method closed) and stacks of them have"
        )
    return patch.names
