"""kohya's LoRA files, as A1111, Forge and ComfyUI expect them: what they call a layer, and how they are written.

kohya joins a module's name by underscores, ``lora_unet_<module>.lora_down.weight``, and keeps an ``.alpha``
for each. Transformers' layers have their original names there, see ``transformers.py``. diffusers' own writer
(``convert_state_dict_to_kohya``) writes alphas as whole numbers, and knows no transformers.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import logging
import re
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recare_patch import __version__
from recare_patch.core import IncompatiblePatchError, PatchError, load_json, nearest, unknown_name, write_tensors
from recare_patch.models import COMPONENTS, TRANSFORMER, split_name
from recare_patch.patch.folder import target_file
from recare_patch.patch.metadata import PatchMetadata
from recare_patch.patch.patch import Patch, check_finite, concept_name
from recare_patch.patch.transformers import OriginalNames, kind_of
from recare_patch.recipe import KINDS, fitted_stem

logger = logging.getLogger(__name__)

FORMATS = ("diffusers", "kohya")
"""What can be written; PEFT's shape is read as well."""

_SD1_NAME = re.compile(r"(?i)stable-diffusion-v?1|^compvis/|sd-?v?1[._-]?[45]")
_SD2_NAME = re.compile(r"(?i)stable-diffusion-v?2|sd-?v?2[._-]?[01]")
"""Bases that older patches name without telling the width of their prompts."""

RANKS_KEY = "recare_patch_ranks"
"""Header entry of our kohya files, JSON, kohya name → rank before padding, or ranks of the layers in one weight."""

MODULES_KEY = "recare_patch_modules"
"""Header entry of our kohya files: names that underscores make unreadable, JSON, kohya name → key."""

_LEGACY_START, _LEGACY_BYTES = 0x100000, 0x10000

_KOHYA_NAME = re.compile(r"lora_(unet|transformer|te[12]?)_(.*)")
_KOHYA_COMPONENTS = {"te": "text_encoder", "te1": "text_encoder", "te2": "text_encoder_2"}
_UNET_WORDS = """down_blocks mid_block up_blocks transformer_blocks attentions resnets downsamplers upsamplers
    attn1 attn2 attn to_q to_k to_v to_out add_k_proj add_v_proj add_q_proj to_add_out ff net proj proj_in
    proj_out conv conv1 conv2 conv_in conv_out conv_shortcut time_emb_proj time_embedding add_embedding
    class_embedding linear_1 linear_2 encoder_hid_proj norm norm1 norm2 norm3"""
# Longest first, so that "to_out_0" reads as to_out.0 and not as to . out . 0.
_UNET_WORD = re.compile(rf"(?:{'|'.join(sorted(_UNET_WORDS.split(), key=len, reverse=True))}|\d+)(?=_|$)")
_TEXT_NAME = re.compile(
    r"(text_projection)|text_model_encoder_layers_(\d+)_(?:self_attn_([qkv]|out)_proj|mlp_(fc[12]))"
)
_SGM_BLOCK = re.compile(r"(?P<side>input|output)_blocks_(?P<block>\d{1,3})_(?P<inner>[012])_(?P<rest>.+)")
_SGM_MIDDLE = re.compile(r"middle_block_(?P<inner>[012])_(?P<rest>.+)")
ORIGINAL_RESNET: dict[str, str] = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
ORIGINAL_UNET: dict[str, str] = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
}
"""diffusers' names of a UNet's layers, and inside its resnets → those of the original checkpoints."""

_POOLED = {"add_embedding_linear_1": "label_emb_0_0", "add_embedding_linear_2": "label_emb_0_2"}
_SGM_RESNET = {theirs.replace(".", "_"): ours for ours, theirs in ORIGINAL_RESNET.items()}
_SGM_SINGLE = {theirs.replace(".", "_"): ours.replace(".", "_") for ours, theirs in ORIGINAL_UNET.items()} | {
    theirs: ours for ours, theirs in _POOLED.items()
}


def has_kohya_names(patch: Patch) -> bool:
    """Whether kohya's format can hold it: it names the layers of UNets, of well-known transformers, and of CLIP."""
    if TRANSFORMER not in patch.components:
        return True
    texts = [split_name(one)[1] for one in patch.modules if split_name(one)[0] != TRANSFORMER]
    return transformer_of(patch) is not None and all(_text_module(one.replace(".", "_")) == one for one in texts)


def transformer_of(patch: Patch, told: str | None = None) -> OriginalNames | None:
    """How other tools call the layers of the transformer that it changes; None where nobody knows, or it changes none.

    Args:
        patch: its metadata tell the transformer's class; another tool's LoRA may fit several.
        told: the class in diffusers of the base that it is for.
    """
    changed = [module for part, module in map(split_name, patch.modules) if part == TRANSFORMER]
    told = told or (patch.metadata.base_denoiser_class if patch.metadata is not None else None)
    return kind_of(changed, told) if changed else None


def _kohya_name(name: str, *, numbered: bool) -> str:
    """``unet.mid_block.x`` → ``lora_unet_mid_block_x``; the first text encoder has a number where there are two.

    What takes in SDXL's pooled prompt has its original name, since A1111 knows no other.
    """
    component, module = split_name(name)
    first = "lora_te1" if numbered else "lora_te"
    prefix = {"unet": "lora_unet", TRANSFORMER: "lora_unet", "text_encoder": first}.get(component, "lora_te2")
    short = module.replace(".", "_")
    return f"{prefix}_{_POOLED.get(short, short) if component == 'unet' else short}"


def resolver(
    modules: Iterable[str] | None, header: Mapping[str, str], source: str, kind: OriginalNames | None = None
) -> Callable[[str], str]:
    """How kohya's names of one file become ``<component>.<module>``, for a transformer by its original names."""
    table: dict[str, list[str]] = {}
    for full in modules or ():
        table.setdefault(full.replace(".", "_"), []).append(full)
    recorded = table_in(header, MODULES_KEY, _stands_for, source)

    def resolve(name: str) -> str:
        if name in recorded:
            return recorded[name]
        prefix, rest = _KOHYA_NAME.fullmatch(name).groups()  # type: ignore[union-attr]
        component = _KOHYA_COMPONENTS.get(prefix, TRANSFORMER if kind else "unet")
        if component.startswith("text"):
            module = _text_module(rest)
        elif kind is not None:
            module = kind.named(rest)
        elif modules is None:
            module = unet_module(rest)
        else:
            rest = from_sgm(rest)
            found = table.get(rest, [])
            if len(found) != 1:
                why = "fits several" if found else "fits no"
                guess = None if found else nearest(rest, table)
                hint = f"; the nearest is '{table[guess][0]}'" if guess else ""
                raise IncompatiblePatchError(f"{source} has a '{name}' that {why} modules of the base{hint}")
            module = found[0]
        if module is None:
            raise PatchError(
                f"{source} has a '{name}' that names no layer of a Stable Diffusion model or a known transformer; "
                "if it is for another base, name that with --base"
            )
        return f"{component}.{module}"

    return resolve


def unet_module(name: str) -> str | None:
    """``mid_block_attentions_0_proj_in`` → ``mid_block.attentions.0.proj_in``, by diffusers' vocabulary."""
    name, words, position = from_sgm(name), list[str](), 0
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
    if match is None or match[1]:
        return match and match[1]
    last = f"self_attn.{match[3]}_proj" if match[3] else f"mlp.{match[4]}"
    return f"text_model.encoder.layers.{match[2]}.{last}"


def from_sgm(name: str) -> str:
    """The original checkpoints' block names, which kohya keeps for SDXL, as diffusers' (2 layers a block)."""
    match = _SGM_MIDDLE.fullmatch(name) or _SGM_BLOCK.fullmatch(name)
    if match is None:
        return _SGM_SINGLE.get(name, name)
    inner, rest = int(match["inner"]), match["rest"]
    last = _SGM_RESNET.get(rest, rest)
    if match.re is _SGM_MIDDLE:
        # Resnet, attention, resnet.
        return f"mid_block_{'attentions_0' if inner == 1 else f'resnets_{inner // 2}'}_{last}"
    side = "down" if match["side"] == "input" else "up"
    # Before the first layer of the way down there is conv_in.
    block, layer = divmod(int(match["block"]) - (side == "down"), 3)
    if rest == {"down": "op", "up": "conv"}[side]:
        return f"{side}_blocks_{block}_{side}samplers_0_conv"
    return f"{side}_blocks_{block}_{'attentions' if inner == 1 else 'resnets'}_{layer}_{last}"


def table_in(header: Mapping[str, str], key: str, sound: Callable[[str, Any], bool], source: str) -> dict[str, Any]:
    """A header entry of our own files: JSON, kohya name → what is sound for it."""
    try:
        table: dict[str, Any] = load_json(header.get(key, "{}"))
        if all(sound(*entry) for entry in table.items()):
            return table
    except (ValueError, AttributeError):
        pass
    raise PatchError(f"{source} has a malformed header entry '{key}'")


def _stands_for(short: str, full: object) -> bool:
    """Whether kohya's spelling makes one name out of the other."""
    if not isinstance(full, str) or split_name(full)[0] not in COMPONENTS:
        return False
    return short in [_kohya_name(full, numbered=numbered) for numbered in (False, True)]


# Long: every header entry that three tools read is told here, once.
def to_kohya(
    patch: Patch,
    *,
    dtype: torch.dtype = torch.float16,
    date: datetime.date | None = None,
    denoiser_class: str | None = None,
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header of a kohya file.

    Of a UNet all modules get one alpha, equal to their one rank, so that every loader finds the scale 1:
    diffusers drops alphas that differ from module to module. Lower ranks are filled up with zeros. Each layer of a
    transformer keeps its rank, and layers that are one weight in the original checkpoint become one.

    Args:
        patch: what to write.
        dtype: of the factors; alphas are float32.
        date: of making, today (UTC) by default.
        denoiser_class: of the base it is for, where the patch does not tell.

    Returns:
        Tensors, and kohya's header entries, ModelSpec's and our own, from which the way back restores all.

    Raises:
        PatchError: a value does not fit into the dtype, two modules share one name in kohya's spelling,
            or it changes a transformer whose layers have no names there.
    """
    kind = transformer_of(patch, denoiser_class)
    if TRANSFORMER in patch.components and kind is None:
        raise PatchError(
            f"{patch.source} changes a transformer whose layers have no names in kohya's format, or several: "
            "diffusers' file is the one to use, or --base says which model it is for"
        )
    base, architecture, pixels = _version_of(patch) if kind is None else (kind.version, kind.architecture, 1024)
    numbered = kind is not None or architecture == "stable-diffusion-xl-v1-base"
    rank = max(patch.ranks.values())
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int | tuple[int, ...]] = {}
    unreadable: dict[str, str] = {}
    resolve = resolver(None, {}, patch.source, kind)

    def write(short: str, a: Tensor, b: Tensor) -> None:
        if f"{short}.alpha" in tensors:
            raise PatchError(f"{patch.source} has two modules that kohya's spelling calls '{short}'")
        tensors[f"{short}.lora_down.weight"], tensors[f"{short}.lora_up.weight"] = a.to(dtype), b.to(dtype)
        tensors[f"{short}.alpha"] = torch.tensor(float(len(a)))

    changed = {one: patch.factors(one) for one in patch.modules}
    if kind is not None:
        own = {split_name(one)[1]: pair for one, pair in changed.items() if one.startswith(f"{TRANSFORMER}.")}
        for joined in kind.join(own, patch.source):
            short = _kohya_name(f"{TRANSFORMER}.{joined.name}", numbered=True)
            write(short, *joined.factors)
            if joined.ranks is not None:
                ranks[short] = joined.ranks
    for full, (a, b) in changed.items():
        if kind is not None and full.startswith(f"{TRANSFORMER}."):
            continue
        short = _kohya_name(full, numbered=numbered)
        if a.shape[0] != rank:
            ranks[short] = a.shape[0]
        write(short, _padded(a, rank, 0), _padded(b, rank, 1))
        try:
            readable = resolve(short) == full
        except PatchError:
            readable = False
        if not readable:
            unreadable[short] = full
    check_finite(tensors, f"{patch.source} as {str(dtype).removeprefix('torch.')}")
    # What another tool said of its training stays; what describes the tensors is said anew.
    training = {key: text for key, text in patch.foreign.items() if key.startswith(("ss_", "modelspec."))}
    header = {"format": "pt", **training} | {
        "ss_network_module": "networks.lora" if kind is None else kind.script,
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(float(rank)),
        "ss_output_name": output_name(patch),
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.implementation": "diffusers",
        "modelspec.title": output_name(patch),
        "modelspec.date": (date or datetime.datetime.now(datetime.UTC).date()).isoformat(),
    }
    if base is not None:
        header |= {"ss_base_model_version": base, "ss_v2": str(base.startswith("sd_v2"))}
    if architecture is not None:
        header["modelspec.architecture"] = f"{architecture}/lora"
    if pixels is not None:
        header["modelspec.resolution"] = f"{pixels}x{pixels}"
    if patch.metadata is not None:
        header |= _told(patch.metadata)
    header |= {key: json.dumps(one) for key, one in ((RANKS_KEY, ranks), (MODULES_KEY, unreadable)) if one}
    return tensors, header | _hashes(tensors, header)


def _padded(factor: Tensor, rank: int, axis: int) -> Tensor:
    shape = list(factor.shape)
    shape[axis] = rank - shape[axis]
    return torch.cat([factor, factor.new_zeros(shape)], dim=axis) if shape[axis] else factor


def _version_of(patch: Patch) -> tuple[str | None, str | None, int | None]:
    """Which Stable Diffusion it is for, as kohya and ModelSpec call it, and its pictures' width; None where unknown.

    Told by the width of the prompts that it reads or changes, else by what it says of its base: the layers of
    self-attention alone are the same in 1.x and 2.x.
    """

    def widths(module: str) -> set[int]:
        return {patch.mapping(one)[0][0] for one in patch.modules if re.fullmatch(module, one)}

    told = patch.metadata
    v_prediction = told is not None and told.prediction_type == "v_prediction"
    suffix = "_v" if v_prediction else ""
    found = widths(r"unet\..*attn2\.to_[kv]")
    # Without cross-attention, SDXL still shows by blocks of several transformers or by its second encoder.
    deep = any(".transformer_blocks.1." in one or one.startswith("text_encoder_2.") for one in patch.modules)
    xl = ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base", 1024)
    if 2048 in found or (not found and deep):
        return xl
    found = found or widths(r"text_encoder\..*self_attn\.[qkv]_proj")
    if not found and told is not None:
        width = told.base_prompt_width
        # Older patches do not tell the width; only 2.x came with other than noise to predict.
        width = 1024 if width is None and (v_prediction or _SD2_NAME.search(told.base)) else width
        found = {width} if width is not None else {768} if _SD1_NAME.search(told.base) else set()
    if not found:
        return None, None, None
    if 2048 in found:
        return xl
    if 1024 in found:
        kind, pixels = ("768-v", 768) if v_prediction else ("512", 512)
        return f"sd_v2{suffix}", f"stable-diffusion-v2-{kind}", pixels
    return f"sd_v1{suffix}", "stable-diffusion-v1", 512 if 768 in found else None


def output_name(patch: Patch) -> str:
    """A file's stem for it: "erase-van-gogh", or the name of the file that it came from."""
    if patch.metadata is not None:
        return concept_name(patch.metadata.concept)
    stem = Path(patch.source).name.removesuffix(".safetensors")
    return fitted_stem(re.sub(r"[^\w.-]+", "-", stem).strip("-.") or "lora", stem)


def _told(made: PatchMetadata) -> dict[str, str]:
    """What a patch of ours says of itself, to other tools and to this package."""
    # A stack of several kinds has none that could be named.
    kind = made.kind if made.kind in KINDS else "concepts" if made.parts else "concept"
    what = f"Erases the {kind} '{made.concept}' from {made.base}, by {made.method}"
    predicted = {"v_prediction": "v", "epsilon": "epsilon"}.get(made.prediction_type)
    return {
        **({"modelspec.prediction_type": predicted} if predicted else {}),
        "ss_training_comment": f"{what}; made by recare-patch {__version__}",
        "ss_sd_model_name": made.base,
        "ss_seed": str(made.seed),
        "modelspec.title": f"Erase {made.concept}",
        "modelspec.description": f"{what}. To be used at strength 1.",
        "modelspec.tags": f"concept-erasure, {kind}",
    } | made.to_header()


def _hashes(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> dict[str, str]:
    """The hashes by which model lists recognise a file, as kohya's trainer precalculates them.

    One of all bytes after the header, and one of 64 KiB from the first MiB on, of a file whose header has the
    ``ss_*`` entries alone; smaller files all have the same one, so there it is left out.
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


def write_kohya(
    patch: Patch,
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float16,
    date: datetime.date | None = None,
    denoiser_class: str | None = None,
) -> Path:
    """Write a kohya file for A1111, Forge and ComfyUI, whole or not at all.

    Args:
        patch, dtype, date, denoiser_class: see :func:`to_kohya`, also for what it raises.
        path: the file, or a folder, in which it is named by :func:`output_name`.

    Raises:
        OutputError: it cannot be written.
    """
    file = target_file(path, f"{output_name(patch)}.safetensors")
    tensors, header = to_kohya(patch, dtype=dtype, date=date, denoiser_class=denoiser_class)
    write_tensors(file, tensors, header)
    return file


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
