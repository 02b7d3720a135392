"""A patch: the LoRA that an erasing run leaves, with everything needed to make it again.

The file is what diffusers itself reads: safetensors, keys ``unet.<module>.lora_A.weight`` and
``….lora_B.weight``, or ``text_encoder.<module>.…``, the scale ``alpha / rank`` multiplied into ``B``.
That scale is baked in because diffusers' files carry no alpha, and other tools ignore one that stands
in the header. Our own entries go into the header under ``recare_patch.…``, where no other reader looks.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import numbers
import re
import sys
import types
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from torch import Tensor, nn

from recare_patch.core import (
    IncompatiblePatchError,
    PatchError,
    RecipeError,
    file_sha256,
    load_tensors,
    read_safetensors_header,
    write_tensors,
)
from recare_patch.models import (
    COMPONENTS,
    DENOISERS,
    TRANSFORMER,
    UNET,
    in_words,
    kept_requires_grad,
    named_layers,
    named_tuner_layers,
    networks,
    remove_adapter,
    settle_adapter,
    split_name,
    tuner_layers,
)
from recare_patch.recipe import (
    TEXT_LAYER_SETS,
    WEIGHTS_NAME,
    Concept,
    Recipe,
    same_concept,
    stack_has_no_recipe,
)

if TYPE_CHECKING:
    from recare_patch.models import BaseModel as Base

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
HEADER_PREFIX = "recare_patch."

_KEY = re.compile(rf"(?P<module>(?:{'|'.join(COMPONENTS)})\..+)\.lora_(?P<side>[AB])\.weight")
_LOADERS = dict.fromkeys(COMPONENTS, "load_lora_into_text_encoder") | {
    UNET: "load_lora_into_unet",
    TRANSFORMER: "load_lora_into_transformer",
}
_FLOATS = ("F16", "BF16", "F32", "F64")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class _CareSetLike(Protocol):
    def to_json(self) -> str: ...


class Erased(BaseModel):
    """One concept that a patch erases.

    Attributes:
        concept: its name; an attribute is named with its subject, "stars from Van Gogh".
        kind: of it; ``None`` where it is not known.
        method: how it was erased; ``None`` where it is not known.
        care_words: what was guarded while it was.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    concept: str
    kind: str | None = None
    method: str | None = None
    care_words: tuple[str, ...] = ()

    @classmethod
    def by(cls, recipe: Recipe, care_words: Iterable[Sequence[str]]) -> tuple[Erased, ...]:
        """What a recipe erases, and the words that guard each of its concepts."""
        names = [recipe.title] if recipe.subject is not None else [one.text for one in recipe.concepts]
        return tuple(
            cls(concept=name, kind=one.kind, method=recipe.method, care_words=tuple(words))
            for name, one, words in zip(names, recipe.concepts, care_words, strict=True)
        )

    def as_concept(self) -> Concept:
        """With the prompts that speak of it.

        Raises:
            ConceptError: it is no concept, or its kind is not known.
        """
        return Concept(text=self.concept, kind=self.kind)  # type: ignore[arg-type]


def _each_once(found: Iterable[Erased]) -> tuple[Erased, ...]:
    """Every concept once, with all that was guarded for it."""
    kept: list[Erased] = []
    for one in found:
        place = next((k for k, other in enumerate(kept) if same_concept(other.concept, one.concept)), None)
        if place is None:
            kept.append(one)
            continue
        other = kept[place]
        words = tuple(dict.fromkeys((*other.care_words, *one.care_words)))
        kept[place] = other.model_copy(update={"kind": other.kind or one.kind, "care_words": words})
    return tuple(kept)


class PatchPart(BaseModel):
    """One patch in a stack, or one that was merged into a base.

    Attributes:
        name: how it is called: its concept, or its file.
        concept: what it erases; ``None`` for a LoRA of other make.
        kind: of that concept; ``None`` where it is not known.
        sha256: of its weights file; for a patch that has no file, of its tensors in the file's order.
        scale: its strength; stacks of stacks multiply theirs.
        care_words: what its run guarded.
        method: how it was made; ``None`` where it is not known.
        concepts: of a part that erases several: each of them; ``None`` for others.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    name: str
    concept: str | None = None
    kind: str | None = None
    sha256: str
    scale: float
    care_words: tuple[str, ...] = ()
    method: str | None = None
    concepts: tuple[Erased, ...] | None = None

    @property
    def erased(self) -> tuple[Erased, ...]:
        """Each concept that it erases; none where it does not say."""
        if self.concepts or self.concept is None:
            return self.concepts or ()
        one = Erased(concept=self.concept, kind=self.kind, method=self.method, care_words=self.care_words)
        return (one,)


class Stacking(BaseModel):
    """How a stack was made; see :func:`stack`.

    Attributes:
        method: ``concat``, ``regmean``, ``ties``, ``dare`` or ``svd``.
        density: share of the values that ``ties`` and ``dare`` keep.
        seed: of every random draw.
        relative_error: ``‖Δstack − Σ wΔ‖ / ‖Σ wΔ‖`` over all layers, as measured.
        kept_weight: of ``regmean``: see :class:`Moments`.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    method: str
    density: float | None = None
    seed: int = 0
    relative_error: float
    kept_weight: float | None = None


class PatchMetadata(BaseModel):
    """What a patch says of itself, stored as header entries ``recare_patch.<attribute>``.

    Attributes:
        format_version: of these entries; a newer one than this package knows is refused.
        versions: package → version, of the run that made it.
        base: ``atelier``, a hub id, or the name of the folder.
        base_family: its architecture.
        base_denoiser_sha256: see :func:`weights_hash`.
        base_text_encoders_sha256: the same of the text encoders, by component; ``None`` for a patch that
            changes the denoiser alone.
        prediction_type: of the base.
        concept: all that is erased, in words.
        kind: of what the recipe's first concept is.
        method: how.
        layers, rank, alpha: the adapter that was trained; ``alpha / rank`` is baked into the tensors.
        seed: of the run.
        recipe: the full recipe, YAML; ``None`` for a stack, which has none of its own.
        care_set: the CARE-set, JSON; ``None`` for methods without one.
        parts: of a stack, in its order; ``None`` for a single patch.
        stacking: how a stack was made; ``None`` for a single patch.
        concepts: of a patch that erases several, or was continued: each of them, the earliest first;
            ``None`` for others, and for patches from before this was told. See :attr:`erased`.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    format_version: int = FORMAT_VERSION
    versions: dict[str, str] = {}
    base: str
    base_family: str
    base_denoiser_sha256: str
    prediction_type: str
    concept: str
    kind: str
    method: str
    layers: str
    rank: int
    alpha: float
    seed: int
    recipe: str | None = None
    care_set: str | None = None
    parts: tuple[PatchPart, ...] | None = None
    stacking: Stacking | None = None
    base_text_encoders_sha256: dict[str, str] | None = None
    concepts: tuple[Erased, ...] | None = None

    @model_validator(mode="after")
    def _is_single_or_stack(self) -> PatchMetadata:
        if self.recipe is None and not self.parts:
            raise ValueError("a patch has a recipe, and a stack has parts")
        try:
            readable = all(isinstance(word, str) for word in self.care_words)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            readable = False
        if not readable:
            raise ValueError("its CARE-set is not readable")
        return self

    @classmethod
    def describe(
        cls, recipe: Recipe, base: Base, care_set: _CareSetLike | None, versions: Mapping[str, str]
    ) -> PatchMetadata:
        """The metadata of a run.

        Args:
            recipe: the run's full recipe.
            base: the base model it ran on.
            care_set: the CARE-set that guarded it, if any.
            versions: package → version.
        """
        encoders = {part: base.component_hash(part) for part in base.components if part not in DENOISERS}
        return cls(
            versions=dict(versions),
            base=base.id,
            base_family=base.family,
            base_denoiser_sha256=base.denoiser_hash(),
            prediction_type=base.prediction_type,
            concept=recipe.title,
            kind=recipe.concept.kind,
            method=recipe.method,
            layers=recipe.adapter.layers,
            rank=recipe.adapter.rank,
            alpha=recipe.adapter.alpha,
            seed=recipe.seed,
            recipe=recipe.to_yaml(),
            care_set=care_set.to_json() if care_set is not None else None,
            base_text_encoders_sha256=encoders if recipe.adapter.layers in TEXT_LAYER_SETS else None,
        )

    def with_concepts(self, own: Sequence[Erased], earlier: Patch | None = None) -> PatchMetadata:
        """The same, with each concept told.

        Args:
            own: what the run itself erased.
            earlier: the patch that it went on from, whose concepts stay erased.
        """
        if earlier is None:
            return self.model_copy(update={"concepts": tuple(own)})
        before = earlier.metadata.erased if earlier.metadata is not None else ()
        told = earlier.metadata.concept if earlier.metadata is not None else Path(earlier.source).name
        both = _each_once((*before, *own))
        title = " + ".join([told, *(one.concept for one in both[len(before) :])])
        return self.model_copy(update={"concept": title, "concepts": both})

    @property
    def erased(self) -> tuple[Erased, ...]:
        """Each concept that it erases, the earliest first; none for a stack of LoRAs that do not say."""
        if self.parts:
            return _each_once(one for part in self.parts for one in part.erased)
        if self.concepts:
            return _each_once(self.concepts)
        try:
            recipe = self.parsed_recipe
        except RecipeError:
            # Of a newer version, say: it is told of where its settings are needed.
            one = Erased(concept=self.concept, kind=self.kind, method=self.method, care_words=self.care_words)
            return (one,)
        return Erased.by(recipe, [self.care_words] * len(recipe.concepts))

    @property
    def by_concept(self) -> bool:
        """Whether it is judged by each of its concepts: a stack, or a patch that erases several."""
        return bool(self.parts) or len(self.erased) > 1

    def component_hash(self, component: str) -> str | None:
        """SHA-256 of one of the base's networks, where the patch names it."""
        if component in DENOISERS:
            return self.base_denoiser_sha256
        return (self.base_text_encoders_sha256 or {}).get(component)

    @property
    def parsed_recipe(self) -> Recipe:
        """The recipe as an object.

        Raises:
            RecipeError: if it does not hold what this version of the package knows, or the patch is a
                stack.
        """
        if self.recipe is None:
            raise RecipeError(stack_has_no_recipe(f"'{self.concept}'", len(self.parts or ())))
        return Recipe.from_yaml(self.recipe, source="the patch's recipe")

    @property
    def care_words(self) -> tuple[str, ...]:
        """The words that the run guarded, in the CARE-set's order."""
        tokens = json.loads(self.care_set).get("tokens", []) if self.care_set else []
        return tuple(token["text"] for token in tokens if token.get("kept"))

    def to_header(self) -> dict[str, str]:
        """Header entries: text as it is, everything else as JSON; what is ``None`` is left out."""
        entries = {key: value for key, value in self.model_dump().items() if value is not None}
        return {
            f"{HEADER_PREFIX}{key}": value if isinstance(value, str) else json.dumps(value)
            for key, value in entries.items()
        }

    @classmethod
    def from_header(cls, header: Mapping[str, str], source: str) -> PatchMetadata | None:
        """Read header entries; ``None`` where there are none of ours.

        Args:
            header: all entries of a safetensors header.
            source: where they came from, for messages.

        Raises:
            PatchError: the entries are incomplete, malformed, or of a newer format.
        """
        ours = {k[len(HEADER_PREFIX) :]: v for k, v in header.items() if k.startswith(HEADER_PREFIX)}
        if not ours:
            return None
        text = {name for name, one in cls.model_fields.items() if one.annotation in (str, str | None)}
        try:
            values = {key: value if key in text else json.loads(value) for key, value in ours.items()}
            version = values.get("format_version", 0)
            if isinstance(version, int) and version > FORMAT_VERSION:
                raise PatchError(
                    f"{source} has patch format {version}, newer than the {FORMAT_VERSION} that this "
                    "version of recare-patch reads; update it"
                )
            return cls(**values)
        except ValidationError as fault:
            first = fault.errors()[0]
            raise PatchError(
                f"{source} has a malformed header entry "
                f"'{HEADER_PREFIX}{'.'.join(map(str, first['loc'])) or 'recipe'}': {first['msg'].lower()}"
            ) from None
        except (ValueError, RecursionError):
            raise PatchError(f"{source} has a malformed header entry under '{HEADER_PREFIX}'") from None


def _check_finite(tensors: Mapping[str, Tensor], source: str) -> None:
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            what = "NaN" if torch.isnan(tensor).any() else "infinite"
            raise PatchError(f"{source} has {what} values in its tensor '{key}'")


def makes_update(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are a LoRA pair: ``A`` ``[rank, in, …]``, ``B`` ``[out, rank]`` (``…, 1, 1``)."""
    convolution = a.ndim == 4 and b.ndim == 4 and b.shape[2:] == (1, 1)
    shaped = (a.ndim == b.ndim == 2 or convolution) and a.shape[0] == b.shape[1]
    return shaped and 0 not in (*a.shape, *b.shape)


def _check_pairs(tensors: Mapping[str, Tensor], source: str) -> None:
    """Refuse whatever is not a complete, well-shaped set of LoRA pairs; diffusers would only warn."""
    if not tensors:
        raise PatchError(f"{source} holds no tensors")
    sides: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise PatchError(
                f"{source} has a tensor '{key}' that does not belong in a patch: only "
                f"'<component>.<module>.lora_A.weight' and '….lora_B.weight' do, for the components "
                f"{', '.join(COMPONENTS)}"
            )
        sides.setdefault(match["module"], {})[match["side"]] = tensor
    for module, pair in sides.items():
        for side in "AB":
            if side not in pair:
                raise PatchError(f"{source} lacks the tensor '{module}.lora_{side}.weight'")
        a, b = pair["A"], pair["B"]
        if not makes_update(a, b):
            raise PatchError(
                f"{source} has misshapen tensors for '{module}': lora_A {tuple(a.shape)} and "
                f"lora_B {tuple(b.shape)} do not make an update"
            )
    _check_finite(tensors, source)


def _check_scale(header: Mapping[str, str], source: str) -> None:
    """Refuse a file of other make whose header asks for a scale: its tensors alone would be too strong."""
    stored = header.get("lora_adapter_metadata")
    if stored is None:
        return
    try:
        configs: dict[str, dict[str, Any]] = {}
        for key, value in json.loads(stored).items():
            part, name = split_name(key) if key.startswith(tuple(f"{c}." for c in COMPONENTS)) else ("", key)
            configs.setdefault(part, {})[name] = value
        plain = all(
            config.get("lora_alpha") == config.get("r")
            and not config.get("use_rslora")
            and not config.get("alpha_pattern")
            and not config.get("rank_pattern")
            for config in configs.values()
        )
    except (ValueError, AttributeError, TypeError, RecursionError):
        plain = False
    if not plain:
        raise PatchError(
            f"{source} keeps a scale of its own in the header entry 'lora_adapter_metadata', and a patch has "
            "its scale in the tensors"
        )


def _find_weights(path: Path) -> Path:
    if path.is_dir():
        if (path / WEIGHTS_NAME).is_file():
            return path / WEIGHTS_NAME
        pickled = sorted(p.name for p in path.iterdir() if p.suffix in _PICKLES)
        if pickled:
            raise PatchError(
                f"{path} holds a pickle ({pickled[0]}), which can run code when it is opened: "
                "only safetensors is read"
            )
        raise PatchError(f"{path} is no patch: {WEIGHTS_NAME} is not in it")
    if not path.exists():
        raise PatchError(f"there is no patch at {path}")
    return path


@dataclass(frozen=True, repr=False, eq=False)
class Patch:
    """An erasing LoRA: tensors and what they are.

    Attributes:
        tensors: ``<component>.<module>.lora_A.weight`` ``[rank, in]`` and ``….lora_B.weight``
            ``[out, rank]`` (convolutions have two more axes), on the CPU, to be applied at scale 1.
            Components are those of :data:`COMPONENTS`.
        metadata: of the run that made it; ``None`` for a LoRA file of other make.
        source: where it was loaded from, for messages.
        file_sha256: of the weights file that :meth:`load` read; ``None`` for other patches.

    Example:
        >>> patch = Patch.load("van-gogh-patch")  # doctest: +SKIP
        >>> with patch.apply(pipe):  # doctest: +SKIP
        ...     pipe("A painting in the style of Van Gogh")
    """

    tensors: Mapping[str, Tensor]
    metadata: PatchMetadata | None = None
    source: str = "the patch"
    file_sha256: str | None = None

    def __post_init__(self) -> None:
        _check_pairs(self.tensors, self.source)
        object.__setattr__(self, "tensors", types.MappingProxyType(dict(self.tensors)))

    def __repr__(self) -> str:
        return f"Patch({self.name}: {len(self.modules)} modules, {self.parameters:,} parameters)"

    # ------------------------------------------------------------------ facts

    @property
    def name(self) -> str:
        """How messages call it: the concept's quoted name, or the file."""
        return f"'{self.metadata.concept}'" if self.metadata else self.source

    @property
    def modules(self) -> tuple[str, ...]:
        """The layers it changes, by their full names: ``unet.mid_block.attentions.0.proj_in``."""
        return tuple(dict.fromkeys(_KEY.fullmatch(key)["module"] for key in self.tensors))  # type: ignore[index]

    @property
    def components(self) -> tuple[str, ...]:
        """The networks it changes, in the order of :data:`COMPONENTS`."""
        found = {split_name(module)[0] for module in self.modules}
        return tuple(part for part in COMPONENTS if part in found)

    @property
    def ranks(self) -> dict[str, int]:
        """Rank of each module."""
        return {m: self.tensors[f"{m}.lora_A.weight"].shape[0] for m in self.modules}

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

    def update(self, module: str, device: torch.device | str = "cpu") -> Tensor:
        """What is added to a layer's weight at scale 1: ``B A``, fp32, in the weight's own shape."""
        a, b = (factor.to(device, torch.float32) for factor in self.factors(module))
        return (b.flatten(1) @ a.flatten(1)).reshape(b.shape[0], *a.shape[1:])

    def sha256(self) -> str:
        """SHA-256 of the weights file it was loaded from; of its tensors where it was never a file.

        Raises:
            PatchError: the file cannot be read any more.
        """
        if self.file_sha256 is not None:
            # Of these very tensors: what lies at that place now may be another patch.
            return self.file_sha256
        path = Path(self.source).expanduser()
        if path.exists():
            return file_sha256(_find_weights(path))
        digest = hashlib.sha256()
        for key, tensor in self.tensors.items():
            digest.update(f"{key}{tensor.dtype}{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def as_part(self, scale: float) -> PatchPart:
        """What a stack, or a base that it is merged into, records about it."""
        concept, kind = (self.metadata.concept, self.metadata.kind) if self.metadata else (None, None)
        told = self.metadata.erased if self.metadata else ()
        return PatchPart(
            name=concept or Path(self.source).name,
            concept=concept,
            kind=kind,
            sha256=self.sha256(),
            scale=scale,
            care_words=self.metadata.care_words if self.metadata else (),
            method=self.metadata.method if self.metadata else None,
            concepts=told if len(told) > 1 else None,
        )

    # ------------------------------------------------------------------ making, reading, writing

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
        """The patch of a trained adapter.

        Args:
            base: the model that holds it.
            adapter_name: of the adapter.
            rank: of the adapter.
            alpha: of the adapter; ``alpha / rank`` is multiplied into ``B``.
            metadata: of the run.
            dtype: rounded to at once, so that what is previewed is what is saved.

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
            PatchError: if a value does not fit into it.
        """
        cast = {key: tensor.to(dtype) for key, tensor in self.tensors.items()}
        return Patch(cast, self.metadata, f"{self.source} as {str(dtype).removeprefix('torch.')}")

    @classmethod
    def load(cls, path: str | Path) -> Patch:
        """Read a patch, or any diffusers LoRA file for a UNet, its text encoders, or both.

        Args:
            path: the patch's folder, or its safetensors file.

        Raises:
            PatchError: it is missing, a pickle, damaged, or its tensors are not a complete set of
                finite LoRA pairs.
        """
        file = _find_weights(Path(path).expanduser())
        source = str(path)
        header = read_safetensors_header(file)
        for key, info in header.tensors.items():
            if info.dtype not in _FLOATS:
                raise PatchError(
                    f"{source} has a tensor '{key}' of type {info.dtype}: {', '.join(_FLOATS)} are read"
                )
        tensors = load_tensors(file, header, source)
        metadata = PatchMetadata.from_header(header.metadata, source)
        if metadata is None:
            _check_scale(header.metadata, source)
        return cls(tensors, metadata, source, file_sha256(file))

    def save(self, folder: str | Path, dtype: torch.dtype = torch.float16) -> Path:
        """Write the weights file into a folder, whole or not at all.

        Args:
            folder: made if it is missing.
            dtype: of the file.

        Returns:
            The file, which ``pipe.load_lora_weights(folder)`` finds by itself.

        Raises:
            PatchError: a value does not fit into the dtype.
            OutputError: it cannot be written.
        """
        file = Path(folder) / WEIGHTS_NAME
        header = {"format": "pt"} | (self.metadata.to_header() if self.metadata else {})
        write_tensors(file, self.to(dtype).tensors, header)
        return file

    # ------------------------------------------------------------------ applying

    def check_base(self, base: Base, *, strict: bool = False) -> bool:
        """Whether a base model has the very networks that the patch changes.

        On others of the same shape, a fine-tune for example, a patch loads and works to a degree that
        nobody has measured. A patch for a text encoder does not ask for the denoiser it was made with.

        Args:
            base: the base model.
            strict: raise where one of the networks is another.

        Raises:
            IncompatiblePatchError: the shapes differ, or the weights do and ``strict`` is set.
        """
        self._check_shapes(base.components, f"base '{base.id}'")
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

    def _check_shapes(self, parts: Mapping[str, nn.Module], target: str) -> None:
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
            a = tuple(self.tensors[f"{name}.lora_A.weight"].shape[1:])
            b = self.tensors[f"{name}.lora_B.weight"].shape[0]
            if isinstance(layer, nn.Linear):
                takes: tuple[int, ...] = (layer.in_features,)
                gives = layer.out_features
            else:
                assert isinstance(layer, nn.Conv2d)
                takes, gives = (layer.in_channels // layer.groups, *layer.kernel_size), layer.out_channels
            if a != takes or b != gives:
                raise IncompatiblePatchError(
                    f"patch {self.name}{made_for} does not fit {target}: its module '{name}' maps "
                    f"{_words(a)} to {b}, and there it maps {_words(takes)} to {gives}"
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
        parts = networks(pipe)
        for part in self.components:
            if part not in parts or not hasattr(pipe, _LOADERS[part]):
                raise IncompatiblePatchError(
                    f"patch {self.name} does not fit a {type(pipe).__name__}: it has no {in_words(part)} "
                    "that takes LoRAs"
                )
        _check_strength(scale, "a patch")
        self._check_shapes(parts, f"this {type(pipe).__name__}")
        name = self._adapter_name(parts, adapter_name)
        return AppliedPatch._load(self, pipe, {part: parts[part] for part in self.components}, name, scale)

    def _adapter_name(self, parts: Mapping[str, nn.Module], wanted: str | None) -> str:
        taken = {name for network in parts.values() for name in getattr(network, "peft_config", {})}
        if wanted is not None:
            if wanted in taken:
                raise PatchError(f"the pipeline already holds an adapter named '{wanted}'")
            if not isinstance(wanted, str) or not wanted or "." in wanted:
                raise PatchError(f"'{wanted}' cannot name an adapter: it must be text without dots")
            return wanted
        concept = self.metadata.concept if self.metadata else Path(self.source).stem
        stem = "erase-" + (re.sub(r"[^a-z0-9]+", "-", concept.lower()).strip("-") or "concept")
        number, name = 2, stem
        while name in taken:
            name, number = f"{stem}-{number}", number + 1
        return name


def _check_strength(scale: object, whose: str) -> None:
    """Refuse a scale that is no finite number, whatever it is instead."""
    number = isinstance(scale, numbers.Real) and not isinstance(scale, bool)
    # Not isfinite: it stumbles over whole numbers that no float holds.
    if not (number and -sys.float_info.max <= scale <= sys.float_info.max):  # type: ignore[operator]
        given = f"{scale!r:.40}" if isinstance(scale, str | float | None) else f"a {type(scale).__name__}"
        raise PatchError(f"the scale of {whose} must be a finite number, got {given}")


def _words(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


@dataclass(eq=False)
class AppliedPatch:
    """A patch in a pipeline.

    Attributes:
        patch: what was applied.
        pipe: where.
        adapter_name: how the pipeline calls it.
        scale: its strength.
    """

    patch: Patch
    pipe: Any
    adapter_name: str
    scale: float = 1.0
    _networks: dict[str, nn.Module] = field(init=False, repr=False)
    _was_off: list[tuple[Any, list[str]]] = field(init=False, repr=False, default_factory=list)

    @classmethod
    def _load(
        cls, patch: Patch, pipe: Any, parts: dict[str, nn.Module], name: str, scale: float
    ) -> AppliedPatch:
        applied = cls(patch, pipe, name)
        applied._networks = parts
        before = {
            part: [(layer, list(layer.active_adapters), bool(layer.disable_adapters)) for _, layer in found]
            for part, network in parts.items()
            for found in [list(tuner_layers(network))]
        }
        with contextlib.ExitStack() as kept:
            for network in parts.values():
                kept.enter_context(kept_requires_grad(network))
                kept.enter_context(_kept_modes(network))
            try:
                for part, network in parts.items():
                    applied._load_part(part, network)
            except Exception as fault:
                for part, network in parts.items():
                    remove_adapter(network, name)
                    _restore(before[part])
                reason = (str(fault).strip() or type(fault).__name__).splitlines()[0]
                raise IncompatiblePatchError(
                    f"patch {patch.name} could not be loaded into this {type(pipe).__name__}: {reason}"
                ) from fault
            for part, network in parts.items():
                applied._switch_on(network, before[part])
        for _, layer in named_tuner_layers(parts):
            if name in layer.lora_A:
                layer.lora_A[name].requires_grad_(False)
                layer.lora_B[name].requires_grad_(False)
        applied.set_scale(scale)
        return applied

    def _load_part(self, part: str, network: nn.Module) -> None:
        """What ``load_lora_weights`` does for one network, without its warning that others get nothing."""
        others = [one for name, one in networks(self.pipe).items() if name != part]
        # diffusers takes a pipeline for offloaded, and offloads it anew, where one of its networks is.
        alone = hasattr(network, "_hf_hook") and not any(hasattr(one, "_hf_hook") for one in others)
        self._through_loader(part, network, None if alone else self.pipe)
        if not alone:
            return
        # The values went where the network's own are kept: nowhere, for now.
        settle_adapter(network, self.adapter_name)
        for name, layer in named_tuner_layers({part: network}):
            if self.adapter_name in layer.lora_A:
                down, up = self.patch.factors(name)
                with torch.no_grad():
                    layer.lora_A[self.adapter_name].weight.copy_(down)
                    layer.lora_B[self.adapter_name].weight.copy_(up)

    def _through_loader(self, part: str, network: nn.Module, pipeline: Any) -> None:
        prefix = f"{part}."
        tensors = {key: tensor for key, tensor in self.patch.tensors.items() if key.startswith(prefix)}
        common = {"network_alphas": None, "adapter_name": self.adapter_name, "_pipeline": pipeline}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")
            if part == UNET:
                self.pipe.load_lora_into_unet(tensors, unet=network, low_cpu_mem_usage=True, **common)
                return
            if part == TRANSFORMER:
                del common["network_alphas"]
                self.pipe.load_lora_into_transformer(
                    tensors, transformer=network, low_cpu_mem_usage=True, **common
                )
                return
            # The text encoder's loader draws a start before it loads: keep the global generator's state.
            with torch.random.fork_rng(devices=[]):
                self.pipe.load_lora_into_text_encoder(tensors, text_encoder=network, prefix=part, **common)

    def _switch_on(self, network: nn.Module, before: list[tuple[Any, list[str], bool]]) -> None:
        """Let the patch be heard beside what is on, and nothing else."""
        name = self.adapter_name
        known = {id(layer): (active, off) for layer, active, off in before}
        # Every layer lists all active adapters, also those it does not hold: diffusers asks the first.
        active_elsewhere = next((active for _, active, off in before if not off), [])
        for _, layer in tuner_layers(network):
            active, was_off = known.get(id(layer), (active_elsewhere, False))
            if was_off:
                # LoRAs that the user had switched off stay silent while the patch is on.
                self._was_off.append((layer, active))
                active = []
            layer.set_adapter([*active, name], inference_mode=True)
            if name in layer.lora_A:
                layer.enable_adapters(True)
                parts = [layer.lora_A[name], layer.lora_B[name]]
                for part in parts if id(layer) in known else [layer]:
                    part.train(layer.get_base_layer().training)

    @property
    def active(self) -> bool:
        """Whether the pipeline still holds the patch."""
        return any(self.adapter_name in layer.lora_A for _, layer in named_tuner_layers(self._networks))

    def set_scale(self, scale: float) -> None:
        """Change the patch's strength.

        Raises:
            PatchError: the scale is no finite number.
        """
        _check_strength(scale, "a patch")
        for _, layer in named_tuner_layers(self._networks):
            if self.adapter_name in layer.lora_A:
                layer.set_scale(self.adapter_name, float(scale))
        self.scale = float(scale)

    def remove(self) -> None:
        """Take the patch out; the pipeline is then what it was. Removing twice does nothing."""
        for network in self._networks.values():
            remove_adapter(network, self.adapter_name)
            with kept_requires_grad(network):
                present = {id(layer) for _, layer in tuner_layers(network)}
                _restore([(layer, active, True) for layer, active in self._was_off if id(layer) in present])
        self._was_off = []

    def __enter__(self) -> AppliedPatch:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


@contextlib.contextmanager
def _kept_modes(network: nn.Module) -> Iterator[None]:
    """Loading puts a text encoder into evaluation mode; put each of its modules back as it was."""
    modes = [(module, module.training) for module in network.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _restore(before: list[tuple[Any, list[str], bool]]) -> None:
    for layer, active, off in before:
        layer.set_adapter(active)
        layer.enable_adapters(not off)


@contextlib.contextmanager
def apply_all(pipe: Any, patches: Sequence[tuple[Patch, float]]) -> Iterator[tuple[AppliedPatch, ...]]:
    """Put several patches into a pipeline at once, and take them out at the end.

    Args:
        pipe: see :meth:`Patch.apply`.
        patches: patch and scale.

    Raises:
        PatchError, IncompatiblePatchError: as :func:`check_together`, before the pipeline is touched, and
            as :meth:`Patch.apply`, with the pipeline as it was.
    """
    if patches:
        check_together(patches)
    with contextlib.ExitStack() as applied:
        yield tuple(applied.enter_context(patch.apply(pipe, scale)) for patch, scale in patches)


def check_together(patches: Sequence[tuple[Patch, float]]) -> PatchMetadata | None:
    """Refuse patches that cannot be used as one: of different bases or shapes, or with odd scales.

    Only networks that both change are compared: a patch for a text encoder belongs to every base that
    has this encoder, whatever denoiser it was made with.

    Args:
        patches: patch and scale.

    Returns:
        What the patches say of the base they were made for, the first of them for a start; ``None`` if
        none does.

    Raises:
        PatchError: there are none, or a scale is not finite.
        IncompatiblePatchError: two were made for different base models.
    """
    if not patches:
        raise PatchError("no patch was given, and at least one is needed")
    for patch, scale in patches:
        _check_strength(scale, f"patch {patch.name}")
    told: dict[str, Patch] = {}
    shapes: dict[str, tuple[tuple[int, ...], int, Patch]] = {}
    for patch, _ in patches:
        if patch.metadata is None:
            logger.warning(
                "%s does not say what base it was made for: whether it belongs to these weights is unknown",
                patch.name,
            )
        for part in patch.components if patch.metadata is not None else ():
            _check_same_base(told.setdefault(part, patch), patch, part)
        for module in patch.modules:
            a, b = patch.factors(module)
            known = shapes.setdefault(module, (tuple(a.shape[1:]), b.shape[0], patch))
            if known[:2] != (tuple(a.shape[1:]), b.shape[0]):
                raise IncompatiblePatchError(
                    f"patches {known[2].name} and {patch.name} do not fit each other: module '{module}' maps "
                    f"{_words(known[0])} to {known[1]} in one, and {_words(tuple(a.shape[1:]))} to "
                    f"{b.shape[0]} in the other"
                )
    if not told:
        return None
    # Of the patches that change the denoiser where there are any: the others ask for no certain one.
    found = next((told[part] for part in DENOISERS if part in told), next(iter(told.values()))).metadata
    assert found is not None
    encoders = {
        part: digest
        for part, patch in told.items()
        if part not in DENOISERS and patch.metadata and (digest := patch.metadata.component_hash(part))
    }
    return found.model_copy(update={"base_text_encoders_sha256": encoders or None})


def _check_same_base(one: Patch, other: Patch, part: str) -> None:
    assert one.metadata is not None and other.metadata is not None
    if one.metadata.component_hash(part) == other.metadata.component_hash(part):
        return
    same = one.metadata.base == other.metadata.base
    raise IncompatiblePatchError(
        f"patch {one.name} was made for base '{one.metadata.base}' and patch {other.name} for "
        + (f"other weights called '{other.metadata.base}'" if same else f"'{other.metadata.base}'")
        + ": patches of one base only can be used as one"
    )


def concepts_of(patch: Patch) -> tuple[str, ...]:
    """What a patch erases; none for a LoRA that does not say."""
    return tuple(one.concept for one in patch.metadata.erased) if patch.metadata is not None else ()
