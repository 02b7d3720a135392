"""Other tools' LoRA files, read in any of the common shapes.

*ComfyUI*'s own names, which ai-toolkit and others write, are the original checkpoints' after ``diffusion_model.``.
*diffusers* names whole modules, ``unet.<module>.lora_A.weight`` today and ``….lora.down.weight`` or
``….processor.to_q_lora.down.weight`` in older files, and keeps no alpha among its tensors. *PEFT* prefixes
``base_model.model.`` and keeps alpha in a file beside the weights. *kohya*: see ``kohya.py``. diffusers' own
reader (``lora_state_dict``) lacks Stable Diffusion 1.x's original names and SDXL's ``add_embedding``, and
makes something up for a name that it does not know.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from recare_patch.core import PatchError, SafetensorsHeader, file_sha256, load_json, read_bytes, read_safetensors_header
from recare_patch.models import COMPILED, COMPONENTS, TRANSFORMER, full_name, split_name
from recare_patch.patch.folder import weights_file
from recare_patch.patch.kohya import RANKS_KEY, resolver, table_in, unet_module
from recare_patch.patch.metadata import PatchMetadata
from recare_patch.patch.patch import SCALES_KEY, Patch, check_finite, checked_pair, load_numbers
from recare_patch.patch.transformers import Factors, OriginalNames, kinds_naming, split_all

logger = logging.getLogger(__name__)

_PEFT_CONFIG = "adapter_config.json"
_PEFT_PREFIX = "base_model.model."
_COMFYUI = "diffusion_model."
_KOHYA_DENOISER = ("lora_unet_", "lora_transformer_")
_KOHYA_KEY = re.compile(r"(?P<name>lora_(?:unet|transformer|te[12]?)_[^.]*)\.(?:lora_(?P<side>down|up)\.weight|alpha)")
_SIDES = {"A": "A", "down": "A", "B": "B", "up": "B", None: "alpha"}
_KEYS = (
    re.compile(r"(?P<name>.+)\.lora_(?P<side>A|B|down|up)(?:\.(?!weight)\w+)?\.weight"),
    re.compile(r"(?P<name>.+?)(?P<kind>_lora|\.lora|\.lora_linear_layer)\.(?P<side>down|up)\.weight"),
    re.compile(r"(?P<name>.+?)(?P<kind>_lora|\.lora|\.lora_linear_layer)?\.alpha"),
)
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
    "bundle_emb": "a LoRA with a textual inversion in it",
}
_SETTING = re.compile(rf"(?:(?:{'|'.join(COMPONENTS)})\.)?(?:r|lora_alpha|(?:rank|alpha)_pattern|use_rslora|use_dora)")
"""Header entries in which SimpleTuner and others keep PEFT's settings one by one."""
_OMI = {"clip_l": "text_encoder", "clip_g": "text_encoder_2"}
"""OneTrainer's shape: text encoders by their own names, and the UNet's layers by the original checkpoints'."""
_COMFYUI_TEXT = re.compile(r"text_encoders\.(clip_[lg])\.(?:transformer\.)?")
_ORIGINAL = ("input_blocks.", "middle_block.", "output_blocks.", "time_embed.", "label_emb.", "out.")


def from_any(path: str | Path, modules: Iterable[str] | None = None) -> Patch:
    """Read a LoRA of any common shape as a patch: diffusers' of any age, PEFT's, kohya's.

    A module without an alpha is taken to have alpha = rank, as every loader takes it.

    Args:
        path: a safetensors file, or a folder that holds one.
        modules: names of the denoiser's modules, to resolve kohya's against; without them the grammar of
            diffusers' UNets does it.

    Raises:
        PatchError: it is missing, a pickle, damaged, of another kind (LoHa, LoKr, DoRA, …), of mixed
            shape, or its tensors are not complete, finite pairs.
        IncompatiblePatchError: a name fits none of ``modules``.
    """
    file, source = weights_file(Path(path).expanduser(), of_any_tool=True), str(path)
    header = read_safetensors_header(file)
    shape = shape_of(header, source)
    metadata = PatchMetadata.from_header(header.metadata, source)
    stored = load_numbers(file, header, source)
    check_finite(stored, source)
    modules = None if modules is None else tuple(modules)
    told = metadata.base_denoiser_class if metadata is not None else None
    kinds = kinds_naming(_original_names(stored, shape), told)
    parts, kept = _sorted(stored, shape, header.metadata, modules, source, kinds)
    pairs = {name: checked_pair(part, name, source) for name, part in parts.items()}
    scales = _scales_beside(file, header, shape, {name: len(a) for name, (a, _) in pairs.items()}, source)
    for name, part in parts.items():
        if "alpha" in part:
            if part["alpha"].numel() != 1:
                size = tuple(part["alpha"].shape)
                raise PatchError(f"{source} has an alpha of shape {size} for '{name}': it must be one number")
            scales[name] = float(part["alpha"].item()) / len(part["A"])
    # One dtype throughout: a scale such as 1/3 would be rounded twice in half precision.
    plain = all(scale == 1 for scale in scales.values())
    whole = {name: (a, b) if plain else (a.float(), b.float() * scales[name]) for name, (a, b) in pairs.items()}
    for name, rank in kept.items():
        if isinstance(rank, int):
            whole[name] = _cut(name, whole[name], rank, source)
    if kinds:
        own = {split_name(name)[1]: whole.pop(name) for name in list(whole) if name.startswith(f"{TRANSFORMER}.")}
        ranks = {split_name(name)[1]: rank for name, rank in kept.items() if not isinstance(rank, int)}
        split = split_all(kinds, own, ranks, modules, source)
        whole |= {f"{TRANSFORMER}.{module}": pair for module, pair in split.items()}
    tensors = {
        f"{name}.lora_{side}.weight": one for name, pair in whole.items() for side, one in zip("AB", pair, strict=True)
    }
    return Patch(tensors, metadata, source, file_sha256(file), shape, {} if metadata else header.metadata)


def _cut(name: str, factors: Factors, rank: int, source: str) -> Factors:
    """Without the zeros that fill a rank up."""
    a, b = factors
    if rank > len(a):
        raise PatchError(f"{source} has a malformed header entry '{RANKS_KEY}': '{name}' has rank {len(a)}, not {rank}")
    if a[rank:].any() and b[:, rank:].any():
        # Whatever is cut off here, every other loader applies.
        raise PatchError(f"{source} hides ranks: '{name}' has more than the {rank} of its '{RANKS_KEY}', not zero")
    return a[:rank].contiguous(), b[:, :rank].contiguous()


def _original_names(stored: Iterable[str], shape: str) -> set[str]:
    """The denoiser's names in a file of kohya's or ComfyUI's, dots as underscores."""
    found: set[str] = set()
    for key in stored:
        plain = key.replace(COMPILED, "").replace(f"{COMPILED[:-1]}_", "")
        if shape == "kohya" and (match := _KOHYA_KEY.fullmatch(plain)) and match["name"].startswith(_KOHYA_DENOISER):
            found.add(match["name"].split("_", 2)[2])
        elif shape == "comfyui" and plain.startswith(_COMFYUI):
            match = next((m for form in _KEYS if (m := form.fullmatch(plain.removeprefix(_COMFYUI)))), None)
            found.add(match["name"].replace(".", "_") if match else plain)
    return found


def transformers_of(keys: Iterable[str]) -> list[str]:
    """The transformers that a LoRA file may be for, by its keys: several where the names fit them; none for a UNet."""
    keys = tuple(keys)
    shape = "kohya" if any(key.startswith(_KOHYA_DENOISER) for key in keys) else "comfyui"
    shorts = _original_names(keys, shape)
    for key in keys:
        if key.startswith(f"{TRANSFORMER}.") and (match := _KEYS[0].fullmatch(key)):
            shorts.add(split_name(match["name"])[1].replace(".", "_"))
    return [kind.title for kind in kinds_naming(shorts, None)]


def _is_rank(_: str, rank: object) -> bool:
    """A whole number, or those of the layers that are one weight."""
    if isinstance(rank, list):
        return bool(rank) and all(type(one) is int and one >= 0 for one in rank)
    return type(rank) is int and rank > 0


def _sorted(
    stored: Mapping[str, Tensor],
    shape: str,
    header: Mapping[str, str],
    modules: Iterable[str] | None,
    source: str,
    kinds: Sequence[OriginalNames],
) -> tuple[dict[str, dict[str, Tensor]], dict[str, int | list[int]]]:
    """Whole name → side or "alpha" → tensor, and the ranks before padding where our own file tells them.

    Weights of a transformer's original checkpoint keep their names.
    """
    kind = kinds[0] if kinds else None
    resolve = resolver(modules, header, source, kind)
    ranks = table_in(header, RANKS_KEY, _is_rank, source)
    parts: dict[str, dict[str, Tensor]] = {}
    kept: dict[str, int | list[int]] = {}
    for key, tensor in stored.items():
        forms = (_KOHYA_KEY,) if shape == "kohya" else _KEYS
        plain = key.replace(COMPILED, "").replace(f"{COMPILED[:-1]}_", "")
        found = next((match.groupdict() for form in forms if (match := form.fullmatch(plain))), None)
        name = found and (resolve(found["name"]) if shape == "kohya" else _whole_name(key, found, source, kind))
        if not found or not name:
            raise PatchError(f"{source} has a tensor '{key}' that belongs to no LoRA of a known model")
        side = _SIDES[found.get("side")]
        if side in parts.setdefault(name, {}):
            raise PatchError(f"{source} holds the {side} of '{name}' twice, under two names")
        parts[name][side] = tensor
        if shape == "kohya" and found["name"] in ranks:
            kept[name] = ranks[found["name"]]
    return parts, kept


def shape_of(header: SafetensorsHeader, source: str) -> str:
    """Tell the shape by the keys, before any tensor is read; other kinds are named and refused."""
    seen: dict[str, str] = {}
    for key in header.tensors:
        for mark, kind in _OTHER_KINDS.items():
            if mark in key:
                raise PatchError(f"{source} is {kind}, by its tensor '{key}': only plain LoRAs are read")
        peft = "peft" if key.startswith(_PEFT_PREFIX) else "diffusers"
        peft = "comfyui" if key.startswith((_COMFYUI, "text_encoders.")) else peft
        seen.setdefault("kohya" if key.startswith("lora_") else peft, key)
    if len(seen) > 1:
        listed = " and ".join(f"{shape} ('{key}')" for shape, key in sorted(seen.items()))
        raise PatchError(f"{source} mixes the shapes of several tools: {listed}")
    return next(iter(seen), "diffusers")


def _whole_name(key: str, found: Mapping[str, str], source: str, kind: OriginalNames | None) -> str | None:
    """``<component>.<module>`` of a diffusers, PEFT or ComfyUI key."""
    name = _COMFYUI_TEXT.sub(r"\1.", found["name"].removeprefix(_PEFT_PREFIX))
    component, _, module = name.partition(".")
    if component in ("text_encoder_3", "text_encoders"):
        raise PatchError(
            f"{source} has a tensor '{key}' of a '{component}': LoRAs for a denoiser and CLIP text encoders are read"
        )
    if name.startswith(_COMFYUI):
        short = module.replace(".", "_")
        known = kind.named(short) if kind is not None else unet_module(short)
        return known and full_name(TRANSFORMER if kind is not None else "unet", known)
    component, named = _OMI.get(component, component), component in COMPONENTS or component in _OMI
    if not named:
        text = name.startswith(("text_model.", "encoder.layers."))
        component, module = ("text_encoder" if text else "unet"), name
    old = found.get("kind") == "_lora"
    if component == "unet":
        if old or ".processor." in module:
            module = module.replace(".processor.", ".")
            module += ".0" if module.endswith(".to_out") else ""
        if module.startswith(_ORIGINAL):
            module = unet_module(module.replace(".", "_")) or ""
        elif not named and unet_module(module.replace(".", "_")) != module:
            # No file says that it is the UNet's, and no UNet has it.
            return None
    elif old:
        module = re.sub(r"\.to_(q|k|v|out)$", r".\1_proj", module)
    return full_name(component, module) if module else None


def _scales_beside(
    file: Path, header: SafetensorsHeader, shape: str, ranks: Mapping[str, int], source: str
) -> dict[str, float]:
    """The scales of modules that have no alpha among the tensors: from PEFT's settings, or 1."""
    told = None if shape == "kohya" else header_scales(header.metadata, ranks, source)
    try:
        if shape == "peft":
            where = f"{_PEFT_CONFIG} of {source}"
            text = read_bytes(file.parent / _PEFT_CONFIG, where, PatchError, within=file.parent)
            return _agreed(stored_scales(text, _PEFT_CONFIG, ranks, source), told, source)
    except FileNotFoundError:
        if told is None:
            logger.warning("%s has no %s beside it: alpha is taken to be the rank", source, _PEFT_CONFIG)
    return told or dict.fromkeys(ranks, 1.0)


def _agreed(one: dict[str, float], other: dict[str, float] | None, source: str) -> dict[str, float]:
    if other is not None and any(not math.isclose(one[name], other[name]) for name in one):
        raise PatchError(f"{source} tells two scales: the settings in its header contradict those beside them")
    return one


def header_scales(header: Mapping[str, str], ranks: Mapping[str, int], source: str) -> dict[str, float] | None:
    """The scales of modules that a header keeps, as diffusers or as SimpleTuner writes them; None where it tells none.

    Raises:
        PatchError: as :func:`stored_scales`; or it tells two.
    """
    single = {key: text for key, text in header.items() if _SETTING.fullmatch(key)}
    found = None
    if single:
        where = f"header entry '{next(iter(single))}'"
        words = {"None": "null", "True": "true", "False": "false"}
        try:
            settings = json.dumps({key: load_json(words.get(text, text)) for key, text in single.items()})
        except ValueError:
            raise PatchError(f"{source} has a malformed {where}") from None
        found = stored_scales(settings, where, ranks, source)
    if SCALES_KEY in header:
        whole = stored_scales(header[SCALES_KEY], f"header entry '{SCALES_KEY}'", ranks, source)
        found = _agreed(whole, found, source)
    return found


def stored_scales(text: str | bytes, where: str, ranks: Mapping[str, int], source: str) -> dict[str, float]:
    """The scales of modules of these ranks, as PEFT's settings have them.

    Raises:
        PatchError: they are malformed, or those of a DoRA.
    """
    try:
        config = load_json(text)
        if any(key.rpartition(".")[2] == "use_dora" and value for key, value in config.items()):
            raise PatchError(f"{source} is a DoRA, by its {where}: only plain LoRAs are read")
        return {name: _scale(config, name, rank) for name, rank in ranks.items()}
    except (ValueError, AttributeError, TypeError, OverflowError):
        raise PatchError(f"{source} has a malformed {where}") from None


def _scale(config: Mapping[str, Any], name: str, rank: int) -> float:
    component, module = split_name(name)
    # diffusers writes the component before each setting, PEFT does not.
    own = {key.removeprefix(f"{component}."): value for key, value in config.items()}
    alpha = own.get("lora_alpha")
    for pattern, value in reversed((own.get("alpha_pattern") or {}).items()):
        if not re.fullmatch(r"\^?[\w.\\]+\$?", pattern):
            raise ValueError("only plain names are read")
        if f".{module}".endswith("." + pattern.strip("^$").replace("\\", "")):
            alpha = value
    if alpha is None:
        return 1.0
    if isinstance(alpha, bool) or not math.isfinite(alpha):
        raise ValueError("an alpha is a finite number")
    return float(alpha) / (math.sqrt(rank) if own.get("use_rslora") else rank)
