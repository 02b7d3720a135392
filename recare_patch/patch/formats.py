"""Other tools' LoRA files: read in any of the common shapes, written as A1111 and ComfyUI expect them.

Three shapes are about. *diffusers* names whole modules, ``unet.<module>.lora_A.weight`` today and
``….lora.down.weight`` or ``….processor.to_q_lora.down.weight`` in older files, and keeps no alpha
among its tensors. *PEFT* prefixes ``base_model.model.`` and keeps alpha in a file beside the
weights. *kohya* joins a module's name by underscores, ``lora_unet_<module>.lora_down.weight``, and
keeps an ``.alpha`` for each. Inside the package there is one shape, the patch's: whole names, the
scale ``alpha / rank`` multiplied into ``B``.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import logging
import math
import re
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recare_patch import __version__
from recare_patch.core import (
    IncompatiblePatchError,
    OutputError,
    PatchError,
    SafetensorsHeader,
    load_tensors,
    nearest,
    read_safetensors_header,
    unknown_name,
    write_tensors,
)
from recare_patch.models import COMPONENTS, TRANSFORMER, full_name, split_name
from recare_patch.patch.patch import Patch, PatchMetadata, makes_update
from recare_patch.recipe import KINDS, WEIGHTS_NAME

logger = logging.getLogger(__name__)

FORMATS = ("diffusers", "kohya")
"""What can be written; PEFT's shape is read as well."""

RANKS_KEY = "recare_patch_ranks"
"""Header entry of our kohya files: the ranks before padding, JSON, kohya name → rank."""

MODULES_KEY = "recare_patch_modules"
"""Header entry of our kohya files: names that underscores make unreadable, JSON, kohya name → key."""

_FLOATS = ("F16", "BF16", "F32", "F64")
_ALPHAS = (*_FLOATS, "I64", "I32", "I16")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_PEFT_WEIGHTS, _PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PEFT_PREFIX = "base_model.model."
_LEGACY_START, _LEGACY_BYTES = 0x100000, 0x10000

_KOHYA_PREFIXES = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
}
_KOHYA_PARTS = {"lora_down.weight": "A", "lora_up.weight": "B", "alpha": "alpha"}
_SIDES = {"A": "A", "down": "A", "B": "B", "up": "B"}
_PEFT_KEY = re.compile(r"(?P<name>.+)\.lora_(?P<side>A|B|down|up)(?:\.(?!weight)\w+)?\.weight")
_OLD_KEY = re.compile(r"(?P<name>.+?)(?P<kind>_lora|\.lora|\.lora_linear_layer)\.(?P<side>down|up)\.weight")
_ALPHA_KEY = re.compile(r"(?P<name>.+?)(?P<kind>_lora|\.lora|\.lora_linear_layer)?\.alpha")

_OTHER_KINDS = {
    "hada_": "a LoHa",
    "lokr_": "a LoKr",
    "dora_scale": "a DoRA",
    "lora_magnitude_vector": "a DoRA",
    "lora_mid": "a LoRA with a third, middle factor",
    "oft_": "an OFT",
    ".diff": "a file of whole weights",
    "w_norm": "a file of whole weights",
    ".a1.weight": "a GLoRA",
    "on_input": "an IA3",
    "emb_params": "a textual inversion",
}

_UNET_WORDS = (
    "down_blocks",
    "mid_block",
    "up_blocks",
    "transformer_blocks",
    "attentions",
    "resnets",
    "downsamplers",
    "upsamplers",
    "attn1",
    "attn2",
    "attn",
    "to_q",
    "to_k",
    "to_v",
    "to_out",
    "add_k_proj",
    "add_v_proj",
    "add_q_proj",
    "to_add_out",
    "ff",
    "net",
    "proj",
    "proj_in",
    "proj_out",
    "conv",
    "conv1",
    "conv2",
    "conv_in",
    "conv_out",
    "conv_shortcut",
    "time_emb_proj",
    "time_embedding",
    "add_embedding",
    "class_embedding",
    "linear_1",
    "linear_2",
    "encoder_hid_proj",
    "norm",
    "norm1",
    "norm2",
    "norm3",
)
# Longest first, so that "to_out_0" reads as to_out.0 and not as to . out . 0.
_UNET_WORD = re.compile(rf"(?:{'|'.join(sorted(_UNET_WORDS, key=len, reverse=True))}|\d+)(?=_|$)")
_TEXT_NAME = re.compile(
    r"(?:text_model_encoder_layers_(?P<layer>\d+)_(?:self_attn_(?P<attn>[qkv]|out)_proj|mlp_fc(?P<fc>[12]))"
    r"|(?P<projection>text_projection))"
)
_SGM_BLOCK = re.compile(r"(?P<side>input|output)_blocks_(?P<block>\d+)_(?P<inner>\d+)_(?P<rest>.+)")
_SGM_MIDDLE = re.compile(r"middle_block_(?P<inner>[012])_(?P<rest>.+)")
_SGM_RESNET = {
    "in_layers_2": "conv1",
    "out_layers_3": "conv2",
    "emb_layers_1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}
_SGM_SINGLE = {
    "input_blocks_0_0": "conv_in",
    "out_2": "conv_out",
    "time_embed_0": "time_embedding_linear_1",
    "time_embed_2": "time_embedding_linear_2",
    "label_emb_0_0": "add_embedding_linear_1",
    "label_emb_0_2": "add_embedding_linear_2",
}


@dataclass(frozen=True)
class _Version:
    """A base's generation, in the words of kohya's metadata and of ModelSpec."""

    base: str
    v2: bool
    architecture: str
    pixels: int | None


@dataclass(frozen=True, repr=False, eq=False)
class LoraWeights:
    """A LoRA file's content, whatever its shape was.

    Attributes:
        tensors: ``<component>.<module>.lora_A.weight`` ``[rank, in]`` and ``….lora_B.weight``
            ``[out, rank]`` (convolutions have two more axes); components are ``unet``,
            ``text_encoder`` and ``text_encoder_2``. Scales are multiplied into ``B``.
        format: "diffusers", "peft" or "kohya".
        header: the file's header entries.
        metadata: of the run, in a file that this package made.
        source: where it was read, for messages.
    """

    tensors: Mapping[str, Tensor]
    format: str
    header: Mapping[str, str]
    metadata: PatchMetadata | None
    source: str

    @property
    def components(self) -> tuple[str, ...]:
        """The models that it changes."""
        return tuple(dict.fromkeys(key.split(".")[0] for key in self.tensors))

    def to_patch(self) -> Patch:
        """As a patch."""
        return Patch(self.tensors, self.metadata, self.source)


def check_formats(names: Iterable[str]) -> tuple[str, ...]:
    """The formats of a patch folder, checked.

    Raises:
        UnknownNameError: for another name.
        PatchError: "diffusers" is not among them: that file is the patch, of which the others are made.
    """
    chosen = tuple(dict.fromkeys(name.strip().casefold() for name in names))
    for name in chosen:
        if name not in FORMATS:
            raise unknown_name("format", name, FORMATS)
    if "diffusers" not in chosen:
        raise PatchError(
            f"a patch folder always has the diffusers file, got '{', '.join(chosen)}': give diffusers or "
            f"{','.join(FORMATS)}"
        )
    return chosen


# ---------------------------------------------------------------------- reading


def from_any(path: str | Path, modules: Iterable[str] | None = None) -> Patch:
    """Read a LoRA of any common shape as a patch.

    Args:
        path: a safetensors file, or a folder that holds one.
        modules: full names of the denoiser's modules, to resolve kohya's names against; without
            them the grammar of diffusers' UNets does it.

    Raises:
        PatchError: see :func:`read_lora`.
        IncompatiblePatchError: a name fits none of ``modules``.
    """
    return read_lora(path, modules).to_patch()


def read_lora(path: str | Path, modules: Iterable[str] | None = None) -> LoraWeights:
    """Read a LoRA of any common shape: diffusers' of any age, PEFT's, kohya's.

    A module without an alpha is taken to have alpha = rank, as every loader takes it.

    Args:
        path: a safetensors file, or a folder that holds one.
        modules: see :func:`from_any`.

    Returns:
        Its tensors as a patch has them, alphas multiplied in.

    Raises:
        PatchError: it is missing, a pickle, damaged, of another kind (LoHa, LoKr, DoRA, …), of mixed
            shape, or its tensors are not complete, finite pairs.
        IncompatiblePatchError: a name fits none of ``modules``.
    """
    file = _find_file(Path(path).expanduser())
    source = str(path)
    header = read_safetensors_header(file)
    shape = _shape_of(header, source)
    stored = _load(file, header, source)
    parts: dict[str, dict[str, Tensor]] = {}
    resolve = _resolver(modules, header.metadata, source)
    for key, tensor in stored.items():
        name, part = _kohya_key(key, resolve, source) if shape == "kohya" else _dotted_key(key, source)
        if part in parts.setdefault(name, {}):
            raise PatchError(f"{source} holds the {_PART_WORDS[part]} of '{name}' twice, under two names")
        parts[name][part] = tensor
    scale = _config_scale(file, header, shape, source)
    ranks = _stored_ranks(header.metadata, source) if shape == "kohya" else {}
    tensors = _bake(parts, scale, ranks, source)
    return LoraWeights(
        tensors, shape, header.metadata, PatchMetadata.from_header(header.metadata, source), source
    )


_PART_WORDS = {"A": "lower factor", "B": "upper factor", "alpha": "alpha"}


def _find_file(path: Path) -> Path:
    if not path.is_dir():
        if not path.exists():
            raise PatchError(f"there is no LoRA file at {path}")
        return path
    for name in (WEIGHTS_NAME, _PEFT_WEIGHTS):
        if (path / name).is_file():
            return path / name
    found = sorted(path.glob("*.safetensors"))
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(one.name for one in found)
        raise PatchError(f"{path} holds several LoRA files ({names}): name one of them")
    pickled = sorted(one.name for one in path.iterdir() if one.suffix in _PICKLES)
    if pickled:
        raise PatchError(
            f"{path} holds a pickle ({pickled[0]}), which can run code when it is opened: "
            "only safetensors is read"
        )
    raise PatchError(f"{path} holds no LoRA file: there is no safetensors file in it")


def _shape_of(header: SafetensorsHeader, source: str) -> str:
    """Tell the shape by the keys, before any tensor is read; other kinds are named and refused."""
    if not header.tensors:
        raise PatchError(f"{source} holds no tensors")
    seen: dict[str, str] = {}
    for key, info in header.tensors.items():
        for mark, kind in _OTHER_KINDS.items():
            if mark in key:
                raise PatchError(f"{source} is {kind}, by its tensor '{key}': only plain LoRAs are read")
        allowed = _ALPHAS if key.endswith(".alpha") else _FLOATS
        if info.dtype not in allowed:
            raise PatchError(
                f"{source} has a tensor '{key}' of type {info.dtype}: {', '.join(allowed)} are read"
            )
        if key.startswith("lora_"):
            shape = "kohya"
        elif key.startswith(_PEFT_PREFIX):
            shape = "peft"
        else:
            shape = "diffusers"
        seen.setdefault(shape, key)
    if len(seen) > 1:
        listed = " and ".join(f"{shape} ('{key}')" for shape, key in sorted(seen.items()))
        raise PatchError(f"{source} mixes the shapes of several tools: {listed}")
    return next(iter(seen))


def _load(file: Path, header: SafetensorsHeader, source: str) -> dict[str, Tensor]:
    stored = load_tensors(file, header, source)
    for key, tensor in stored.items():
        if not torch.isfinite(tensor).all():
            what = "NaN" if torch.isnan(tensor).any() else "infinite"
            raise PatchError(f"{source} has {what} values in its tensor '{key}'")
    return stored


def _unknown(key: str, source: str) -> PatchError:
    return PatchError(f"{source} has a tensor '{key}' that belongs to no LoRA of a Stable Diffusion model")


def _kohya_key(key: str, resolve: Callable[[str], str], source: str) -> tuple[str, str]:
    """``<component>.<module>`` and the part of a kohya key."""
    name, _, part = key.partition(".")
    if part not in _KOHYA_PARTS or not name.startswith(tuple(_KOHYA_PREFIXES)):
        raise _unknown(key, source)
    return resolve(name), _KOHYA_PARTS[part]


def _dotted_key(key: str, source: str) -> tuple[str, str]:
    """``<component>.<module>`` and the part of a diffusers or PEFT key."""
    match = _PEFT_KEY.fullmatch(key) or _OLD_KEY.fullmatch(key) or _ALPHA_KEY.fullmatch(key)
    if match is None:
        raise _unknown(key, source)
    found = match.groupdict()
    name = found["name"].removeprefix(_PEFT_PREFIX)
    component, _, module = name.partition(".")
    if component not in COMPONENTS:
        if component in ("text_encoder_3", "diffusion_model"):
            raise PatchError(
                f"{source} has a tensor '{key}' of a '{component}': LoRAs for a UNet and its text encoders "
                "are read"
            )
        text = name.startswith(("text_model.", "encoder.layers."))
        component, module = ("text_encoder" if text else "unet"), name
    old = found.get("kind") == "_lora"
    if component == "unet":
        if old or ".processor." in module:
            module = module.replace(".processor.", ".")
            module += ".0" if module.endswith(".to_out") else ""
    else:
        if old:
            module = re.sub(r"\.to_(q|k|v|out)$", r".\1_proj", module)
    if not module:
        raise _unknown(key, source)
    return full_name(component, module), _SIDES[found["side"]] if "side" in found else "alpha"


def _bake(
    parts: Mapping[str, Mapping[str, Tensor]],
    scale: Callable[[str, int], float],
    ranks: Mapping[str, int],
    source: str,
) -> dict[str, Tensor]:
    """Check pairs and multiply their scales in, in float32 where there is a scale other than 1."""
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    scales: dict[str, float] = {}
    for name, part in parts.items():
        for side in "AB":
            if side not in part:
                raise PatchError(f"{source} lacks the {_PART_WORDS[side]} of '{name}'")
        a, b = part["A"], part["B"]
        if not makes_update(a, b):
            raise PatchError(
                f"{source} has misshapen tensors for '{name}': {tuple(a.shape)} and {tuple(b.shape)} do not "
                "make an update"
            )
        rank = a.shape[0]
        if "alpha" in part:
            if part["alpha"].numel() != 1:
                raise PatchError(
                    f"{source} has an alpha of shape {tuple(part['alpha'].shape)} for '{name}': it must be "
                    "one number"
                )
            scales[name] = float(part["alpha"].item()) / rank
        else:
            scales[name] = scale(name, rank)
        kept = ranks.get(_kohya_name(name, sdxl=False), rank)
        if kept > rank:
            raise PatchError(
                f"{source} has a malformed header entry '{RANKS_KEY}': '{name}' has rank {rank}, not {kept}"
            )
        pairs[name] = a[:kept].contiguous(), b[:, :kept].contiguous()
    plain = all(value == 1 for value in scales.values())
    tensors: dict[str, Tensor] = {}
    for name, (a, b) in pairs.items():
        # One dtype throughout: a scale such as 1/3 would be rounded twice in half precision.
        tensors[f"{name}.lora_A.weight"] = a if plain else a.float()
        tensors[f"{name}.lora_B.weight"] = b if plain else b.float() * scales[name]
        if not torch.isfinite(tensors[f"{name}.lora_B.weight"]).all():
            raise PatchError(f"{source} has an alpha for '{name}' that makes its values infinite")
    return tensors


# ---------------------------------------------------------------------- scales kept elsewhere


def _config_scale(
    file: Path, header: SafetensorsHeader, shape: str, source: str
) -> Callable[[str, int], float]:
    """The scale of a module that has no alpha among the tensors: from PEFT's settings, or 1."""
    config: dict[str, Any] = {}
    where = ""
    try:
        if "lora_adapter_metadata" in header.metadata and shape == "diffusers":
            where = "header entry 'lora_adapter_metadata'"
            config = json.loads(header.metadata["lora_adapter_metadata"])
            if not any(key.startswith(tuple(f"{name}." for name in COMPONENTS)) for key in config):
                config = {f"{name}.{key}": value for name in COMPONENTS for key, value in config.items()}
        elif shape == "peft" and (file.parent / _PEFT_CONFIG).is_file():
            where = _PEFT_CONFIG
            text = (file.parent / _PEFT_CONFIG).read_text(encoding="utf-8")
            config = {
                f"{name}.{key}": value for name in COMPONENTS for key, value in json.loads(text).items()
            }
        elif shape == "peft":
            logger.warning("%s has no %s beside it: alpha is taken to be the rank", source, _PEFT_CONFIG)
        return _scale_of(config, where, source)
    except OSError as fault:
        raise PatchError(f"cannot read {_PEFT_CONFIG} of {source}: {fault.strerror}") from fault
    except (ValueError, AttributeError, TypeError, OverflowError, RecursionError):
        raise PatchError(f"{source} has a malformed {where}") from None


def _scale_of(config: dict[str, Any], where: str, source: str) -> Callable[[str, int], float]:
    for component in COMPONENTS:
        if config.get(f"{component}.use_dora"):
            raise PatchError(f"{source} is a DoRA, by its {where}: only plain LoRAs are read")
    alphas = {name: config.get(f"{name}.lora_alpha") for name in COMPONENTS}
    patterns = {name: dict(config.get(f"{name}.alpha_pattern") or {}) for name in COMPONENTS}
    for value in [*alphas.values(), *(v for one in patterns.values() for v in one.values())]:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not (number and math.isfinite(value)):
            raise PatchError(f"{source} has an alpha {value!r} in its {where}: it must be a finite number")
    for pattern in (key for one in patterns.values() for key in one):
        if not re.fullmatch(r"\^?[\w.\\]+\$?", pattern):
            raise PatchError(f"{source} has alphas by pattern in its {where}, and only plain names are read")

    def scale(name: str, rank: int) -> float:
        component, _, module = name.partition(".")
        alpha = alphas[component]
        for pattern, value in patterns[component].items():
            plain = pattern.strip("^$").replace("\\", "")
            if module == plain or module.endswith(f".{plain}"):
                alpha = value
                break
        if alpha is None:
            return 1.0
        return float(alpha) / (math.sqrt(rank) if config.get(f"{component}.use_rslora") else rank)

    return scale


# ---------------------------------------------------------------------- kohya's names


def has_kohya_names(patch: Patch | LoraWeights) -> bool:
    """Whether kohya's format can hold it: it names the layers of UNets and their text encoders."""
    return not any(key.startswith(f"{TRANSFORMER}.") for key in patch.tensors)


def _kohya_name(name: str, *, sdxl: bool) -> str:
    """``unet.mid_block.x`` → ``lora_unet_mid_block_x``."""
    component, module = split_name(name)
    if component == "unet":
        prefix = "lora_unet"
    elif component == "text_encoder":
        prefix = "lora_te1" if sdxl else "lora_te"
    else:
        prefix = "lora_te2"
    return f"{prefix}_{module.replace('.', '_')}"


def _resolver(modules: Iterable[str] | None, header: Mapping[str, str], source: str) -> Callable[[str], str]:
    """How kohya's names of one file become ``<component>.<module>``."""
    table: dict[str, list[str]] = {}
    if modules is not None:
        for full in modules:
            table.setdefault(full.replace(".", "_"), []).append(full)
    recorded = _stored_names(header, source)

    def resolve(name: str) -> str:
        if name in recorded:
            return recorded[name]
        prefix = next(one for one in _KOHYA_PREFIXES if name.startswith(one))
        component, rest = _KOHYA_PREFIXES[prefix], name.removeprefix(prefix)
        if component != "unet":
            module = _text_module(rest)
        else:
            rest = _from_sgm(rest)
            if modules is not None:
                found = table.get(rest, [])
                if len(found) != 1:
                    why = "fits several" if found else "fits no"
                    guess = None if found else nearest(rest, table)
                    hint = f"; the nearest is '{table[guess][0]}'" if guess else ""
                    raise IncompatiblePatchError(
                        f"{source} has a '{name}' that {why} modules of the base{hint}"
                    )
                return f"unet.{found[0]}"
            module = _unet_module(rest)
        if module is None:
            raise PatchError(
                f"{source} has a '{name}' that names no module of a Stable Diffusion model; if it is for "
                "another base, name that with --base"
            )
        return f"{component}.{module}"

    return resolve


def _unet_module(name: str) -> str | None:
    """``mid_block_attentions_0_proj_in`` → ``mid_block.attentions.0.proj_in``, by diffusers' vocabulary."""
    words, position = [], 0
    while position < len(name):
        match = _UNET_WORD.match(name, position)
        if match is None:
            return None
        words.append(match.group())
        position = match.end() + 1
    sound = bool(words) and not words[0].isdigit() and "_".join(words) == name
    return ".".join(words) if sound else None


def _text_module(name: str) -> str | None:
    match = _TEXT_NAME.fullmatch(name)
    if match is None:
        return None
    if match["projection"]:
        return "text_projection"
    last = f"self_attn.{match['attn']}_proj" if match["attn"] else f"mlp.fc{match['fc']}"
    return f"text_model.encoder.layers.{match['layer']}.{last}"


def _from_sgm(name: str) -> str:
    """The original checkpoints' block names, which kohya keeps for SDXL, as diffusers' (2 layers a block)."""
    if name in _SGM_SINGLE:
        return _SGM_SINGLE[name]
    middle = _SGM_MIDDLE.fullmatch(name)
    if middle:
        inner, rest = int(middle["inner"]), middle["rest"]
        place = "attentions_0" if inner == 1 else f"resnets_{inner // 2}"
        return f"mid_block_{place}_{_SGM_RESNET.get(rest, rest)}"
    match = _SGM_BLOCK.fullmatch(name)
    # Longer numbers name nothing, and int() refuses the longest.
    if match is None or len(match["block"]) > 3 or match["inner"] not in ("0", "1", "2"):
        return name
    number, inner, rest = int(match["block"]), int(match["inner"]), match["rest"]
    if match["side"] == "input":
        block, layer = divmod(number - 1, 3)
        if rest == "op":
            return f"down_blocks_{block}_downsamplers_0_conv"
        where = f"down_blocks_{block}"
    else:
        block, layer = divmod(number, 3)
        if rest == "conv":
            return f"up_blocks_{block}_upsamplers_0_conv"
        where = f"up_blocks_{block}"
    return f"{where}_{'attentions' if inner == 1 else 'resnets'}_{layer}_{_SGM_RESNET.get(rest, rest)}"


def _json_table(header: Mapping[str, str], key: str, kind: type, source: str) -> dict[str, Any]:
    if key not in header:
        return {}
    try:
        table = json.loads(header[key])
    except (ValueError, RecursionError):
        table = None
    if not isinstance(table, dict) or not all(type(value) is kind for value in table.values()):
        raise PatchError(f"{source} has a malformed header entry '{key}'")
    return table


def _stored_names(header: Mapping[str, str], source: str) -> dict[str, str]:
    """Names that our own file says itself; each must be what its underscored form stands for."""
    table = _json_table(header, MODULES_KEY, str, source)
    for short, full in table.items():
        if full.split(".")[0] not in COMPONENTS or short not in (
            _kohya_name(full, sdxl=False),
            _kohya_name(full, sdxl=True),
        ):
            raise PatchError(f"{source} has a malformed header entry '{MODULES_KEY}'")
    return table


def _stored_ranks(header: Mapping[str, str], source: str) -> dict[str, int]:
    table = _json_table(header, RANKS_KEY, int, source)
    if any(rank < 1 for rank in table.values()):
        raise PatchError(f"{source} has a malformed header entry '{RANKS_KEY}'")
    # Kept by the plain prefix, as _bake asks for them.
    return {name.replace("lora_te1_", "lora_te_"): rank for name, rank in table.items()}


# ---------------------------------------------------------------------- writing


def to_kohya(
    patch: Patch | LoraWeights,
    *,
    dtype: torch.dtype = torch.float16,
    name: str | None = None,
    date: datetime.date | None = None,
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header of a kohya file.

    All modules get one alpha, equal to their one rank, so that every loader finds the scale 1:
    diffusers drops alphas that differ from module to module. Lower ranks are filled up with zeros.

    Args:
        patch: what to write.
        dtype: of the factors; alphas are float32.
        name: how other tools list it; made from the concept by default.
        date: of making, today (UTC) by default.

    Returns:
        Tensors and header entries: kohya's ``ss_*``, the hashes ``sshs_*``, ModelSpec 1.0.1, and our
        own, from which the way back restores everything.

    Raises:
        PatchError: a value does not fit into the dtype, two modules share one name in kohya's spelling,
            or it changes a transformer.
    """
    if not has_kohya_names(patch):
        raise PatchError(
            f"{patch.source} changes a transformer, and kohya files are written for UNets and their text "
            "encoders"
        )
    version = _version_of(patch)
    sdxl = version.base.startswith("sdxl")
    pairs = {key.removesuffix(".lora_A.weight") for key in patch.tensors if key.endswith(".lora_A.weight")}
    names = [key for key in dict.fromkeys(k.rsplit(".lora_", 1)[0] for k in patch.tensors) if key in pairs]
    rank = max(patch.tensors[f"{one}.lora_A.weight"].shape[0] for one in names)
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    unreadable: dict[str, str] = {}
    resolve = _resolver(None, {}, patch.source)
    for full in names:
        short = _kohya_name(full, sdxl=sdxl)
        if f"{short}.alpha" in tensors:
            raise PatchError(f"{patch.source} has two modules that kohya's spelling calls '{short}'")
        a, b = patch.tensors[f"{full}.lora_A.weight"], patch.tensors[f"{full}.lora_B.weight"]
        ranks[short] = a.shape[0]
        tensors[f"{short}.lora_down.weight"] = _cast(_padded(a, rank, 0), dtype, short, patch.source)
        tensors[f"{short}.lora_up.weight"] = _cast(_padded(b, rank, 1), dtype, short, patch.source)
        tensors[f"{short}.alpha"] = torch.tensor(float(rank))
        try:
            readable = resolve(short) == full
        except PatchError:
            readable = False
        if not readable:
            unreadable[short] = full
    header = _kohya_header(patch, version, rank, name, date)
    if set(ranks.values()) != {rank}:
        header[RANKS_KEY] = json.dumps({one: r for one, r in ranks.items() if r != rank})
    if unreadable:
        header[MODULES_KEY] = json.dumps(unreadable)
    return tensors, header | _hashes(tensors, header)


def _padded(factor: Tensor, rank: int, axis: int) -> Tensor:
    missing = rank - factor.shape[axis]
    if not missing:
        return factor
    shape = [*factor.shape]
    shape[axis] = missing
    return torch.cat([factor, factor.new_zeros(shape)], dim=axis)


def _cast(tensor: Tensor, dtype: torch.dtype, name: str, source: str) -> Tensor:
    cast = tensor.to(dtype)
    if not torch.isfinite(cast).all():
        raise PatchError(f"{source} has values in '{name}' that do not fit into {str(dtype)[6:]}")
    return cast


def _version_of(patch: Patch | LoraWeights) -> _Version:
    """Which Stable Diffusion it is for, by the width of the prompts that it reads or changes."""
    v_prediction = patch.metadata is not None and patch.metadata.prediction_type == "v_prediction"
    suffix = "_v" if v_prediction else ""
    widths = {
        tensor.shape[1]
        for key, tensor in patch.tensors.items()
        if re.fullmatch(r"unet\..*attn2\.to_[kv]\.lora_A\.weight", key)
    }
    # Without cross-attention, SDXL still shows by blocks of several transformers or by its second encoder.
    deep = any(".transformer_blocks.1." in key or key.startswith("text_encoder_2.") for key in patch.tensors)
    if not widths and not deep:
        widths = {
            tensor.shape[1]
            for key, tensor in patch.tensors.items()
            if re.fullmatch(r"text_encoder\..*self_attn\.[qkv]_proj\.lora_A\.weight", key)
        }
    if 2048 in widths or (not widths and deep):
        return _Version("sdxl_base_v1-0", False, "stable-diffusion-xl-v1-base", 1024)
    if 1024 in widths:
        kind = "768-v" if v_prediction else "512"
        return _Version(f"sd_v2{suffix}", True, f"stable-diffusion-v2-{kind}", 768 if v_prediction else 512)
    pixels = 512 if 768 in widths else None
    return _Version(f"sd_v1{suffix}", False, "stable-diffusion-v1", pixels)


def concept_name(concept: str) -> str:
    """A file's stem for a patch of ours, by what it erases: "erase-van-gogh"."""
    stem = re.sub(r"[^a-z0-9]+", "-", concept.lower()).strip("-")
    return f"erase-{stem or 'concept'}"[:100]


def output_name(patch: Patch | LoraWeights) -> str:
    """A file's stem for it: "erase-van-gogh", or the name of the file that it came from."""
    if patch.metadata is not None:
        return concept_name(patch.metadata.concept)
    stem = Path(patch.source).name.removesuffix(".safetensors")
    return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-.")[:100] or "lora"


def _kohya_header(
    patch: Patch | LoraWeights, version: _Version, rank: int, name: str | None, date: datetime.date | None
) -> dict[str, str]:
    made = patch.metadata
    title = name or output_name(patch)
    header = {"format": "pt"}
    if made is None and isinstance(patch, LoraWeights):
        # What another tool said of its training stays; what describes the tensors is said anew below.
        header |= {key: text for key, text in patch.header.items() if key.startswith(("ss_", "modelspec."))}
    header |= {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(float(rank)),
        "ss_base_model_version": version.base,
        "ss_v2": str(version.v2),
        "ss_output_name": title,
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{version.architecture}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": title,
        "modelspec.date": (date or datetime.datetime.now(datetime.UTC).date()).isoformat(),
    }
    if version.pixels is not None:
        header["modelspec.resolution"] = f"{version.pixels}x{version.pixels}"
    if made is not None:
        # A stack of several kinds has none that could be named.
        kind = made.kind if made.kind in KINDS else "concepts" if made.parts else "concept"
        what = f"Erases the {kind} '{made.concept}' from {made.base}, by {made.method}"
        header |= {
            "ss_training_comment": f"{what}; made by recare-patch {__version__}",
            "ss_sd_model_name": made.base,
            "ss_seed": str(made.seed),
            "modelspec.title": f"Erase {made.concept}" if name is None else name,
            "modelspec.description": f"{what}. To be used at strength 1.",
            "modelspec.tags": f"concept-erasure, {kind}",
            "modelspec.prediction_type": "v" if made.prediction_type == "v_prediction" else "epsilon",
        }
        header |= made.to_header()
    return header


def _hashes(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> dict[str, str]:
    """The hashes by which model lists recognise a file, as kohya's trainer precalculates them.

    The model hash is the SHA-256 of all bytes after the header. The legacy hash is that of 64 KiB
    from the first MiB on, of a file whose header has the ``ss_*`` entries alone; smaller files all
    have the same one, so there it is left out.
    """
    from safetensors.torch import save

    training = {key: text for key, text in header.items() if key.startswith("ss_")}
    data = save(dict(tensors), training)
    body = hashlib.sha256(memoryview(data)[8 + struct.unpack("<Q", data[:8])[0] :]).hexdigest()
    found = {"sshs_model_hash": body, "modelspec.hash_sha256": f"0x{body}"}
    if len(data) > _LEGACY_START:
        old = hashlib.sha256(data[_LEGACY_START : _LEGACY_START + _LEGACY_BYTES]).hexdigest()
        found["sshs_legacy_hash"] = old[:8]
    return found


def body_hash(path: str | Path) -> str:
    """SHA-256 of all bytes after a safetensors file's header: what ``sshs_model_hash`` should be.

    Raises:
        PatchError: it cannot be read, or is not safetensors.
    """
    read_safetensors_header(path)
    with open(path, "rb") as handle:
        handle.seek(8 + struct.unpack("<Q", handle.read(8))[0])
        digest = hashlib.sha256()
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_kohya(
    patch: Patch | LoraWeights,
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float16,
    name: str | None = None,
    date: datetime.date | None = None,
) -> Path:
    """Write a kohya file for A1111 and ComfyUI, whole or not at all.

    Args:
        patch: what to write.
        path: the file, or a folder, in which it is named by :func:`output_name`.
        dtype: see :func:`to_kohya`.
        name: see :func:`to_kohya`.
        date: see :func:`to_kohya`.

    Returns:
        The file.

    Raises:
        PatchError: see :func:`to_kohya`.
        OutputError: it cannot be written.
    """
    file = target_file(path, f"{output_name(patch)}.safetensors")
    tensors, header = to_kohya(patch, dtype=dtype, name=name, date=date)
    write_tensors(file, tensors, header)
    return file


def write_diffusers(
    patch: Patch | LoraWeights, path: str | Path, *, dtype: torch.dtype = torch.float16
) -> Path:
    """Write a diffusers file, whole or not at all; of a patch, the very one that ``Patch.save`` writes.

    Args:
        patch: what to write.
        path: the file, or a folder, in which it has the name that diffusers looks for.
        dtype: of the tensors.

    Returns:
        The file.

    Raises:
        PatchError: a value does not fit into the dtype.
        OutputError: it cannot be written.
    """
    file = target_file(path, WEIGHTS_NAME)
    header = {"format": "pt"}
    if patch.metadata is not None:
        header |= patch.metadata.to_header()
    elif isinstance(patch, LoraWeights):
        header |= {key: text for key, text in patch.header.items() if key.startswith("ss_")}
    tensors = {key: _cast(one, dtype, key, patch.source) for key, one in patch.tensors.items()}
    write_tensors(file, tensors, header)
    return file


def target_file(path: str | Path, name: str) -> Path:
    """``path`` where it names a safetensors file, else ``name`` in that folder.

    Raises:
        OutputError: ``path`` names a file of another kind.
    """
    path = Path(path)
    if path.suffix in _PICKLES and not path.is_dir():
        raise OutputError(f"cannot write {path}: LoRA files are written as .safetensors")
    return path if path.suffix == ".safetensors" and not path.is_dir() else path / name
