"""Patches into the weights of a base, and out of them again.

``W' = W + Σ wᵢ Bᵢ Aᵢ``, summed in fp32 and rounded to the dtype that the file has. A merged folder is
an ordinary diffusers pipeline: nobody who loads it can leave the patch out. Each weights file is
copied and only the changed tensors are written over, at their places in it: names, shards, index and
dtypes stay, and no more than one layer is in memory. (diffusers' ``fuse_lora`` rounds the update on its
own where weights are fp16; loaded in fp32 it gives these values, with the whole pipeline in memory twice.)
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

import recare_patch
from recare_patch.combine.stacking import Weighted, new_folder, parts_of
from recare_patch.core import (
    BaseModelError,
    IncompatiblePatchError,
    NullProgress,
    OutputError,
    PatchError,
    Progress,
    load_json,
    open_tensors,
    read_bytes,
    read_safetensors_header,
    write_json,
)
from recare_patch.models import (
    COMPONENTS,
    DENOISERS,
    UNET,
    Layout,
    base_folder,
    chosen_device,
    full_name,
    in_words,
    load_to_draw,
    read_layout,
    split_name,
    stored_weights_hash,
)
from recare_patch.patch import Patch, PatchPart, apply_all, check_together, has_known_sizes, plan, write_single_file
from recare_patch.recipe import MemoryOptions

logger = logging.getLogger(__name__)

RECORD_NAME = "recare_patch_merge.json"
"""What was merged, in the merged folder."""

RECORD_KEY = "recare_patch.merge"
"""The same in the header of a single-file checkpoint, JSON."""

_DTYPES = ("F16", "BF16", "F32", "F64")
_PICKLES = ("*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.msgpack", "*.h5", "*.onnx*")


class MergeRecord(BaseModel):
    """What a merged folder says of itself."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    format_version: int = 1
    version: str = Field(description="Of recare-patch that wrote it.")
    base: str = Field(description="The base that was first merged into.")
    denoiser: str = Field(UNET, description="The denoiser's component.")
    base_denoiser_sha256: str
    merged_denoiser_sha256: str
    patches: tuple[PatchPart, ...] = Field(description="What was merged, in the order of merging.")
    parts: tuple[PatchPart, ...] = Field(description="The same with stacks taken apart.")
    rounding: float | None = Field(
        None,
        description="How far a weight is from the base's at most when all is taken out again, as measured "
        "while it was merged; not told after several merges and in older records.",
    )
    base_text_encoders_sha256: dict[str, str] | None = None
    merged_text_encoders_sha256: dict[str, str] | None = None

    @property
    def base_hashes(self) -> dict[str, str]:
        """The base's networks before, by component."""
        return {self.denoiser: self.base_denoiser_sha256, **(self.base_text_encoders_sha256 or {})}

    @property
    def merged_hashes(self) -> dict[str, str]:
        """The same networks after."""
        return {self.denoiser: self.merged_denoiser_sha256, **(self.merged_text_encoders_sha256 or {})}

    @classmethod
    def load(cls, folder: str | Path) -> MergeRecord:
        """Read the record of a merged folder; :class:`BaseModelError` where there is none that is sound."""
        file = Path(folder) / RECORD_NAME
        try:
            return cls(**load_json(read_bytes(file, RECORD_NAME, BaseModelError)))
        except (OSError, BaseModelError) as fault:
            raise BaseModelError(f"{folder} is no merged base: {RECORD_NAME} is not in it or cannot be read") from fault
        except (ValidationError, ValueError, TypeError):
            raise BaseModelError(f"{file} is malformed") from None


@dataclass(frozen=True)
class Unmerged:
    """A base that patches were taken out of."""

    folder: Path
    same_hash: bool  # Whether all values are the base's when rounded to fp16.
    max_difference: float | None  # Of any weight from the base's, where the base was given.
    expected_difference: float | None = None  # The same as the merge foretold it, where its record says.


# Long: it tells what it takes and raises, and is one straight way from the checks to the record.
def merge(
    patches: Weighted,
    base: str | Path,
    out: str | Path,
    *,
    single_file: str | Path | None = None,
    device: str = "cpu",
    any_base: bool = False,
    progress: Progress | None = None,
) -> MergeRecord:
    """Write a base with patches in its weights, as a complete diffusers pipeline folder.

    All components that the pipeline lists are copied (weights as safetensors only, no pickles); the
    patched layers change. The folder appears whole or not at all.

    Args:
        patches: patch and scale.
        base: ``atelier``, a pipeline folder, or a hub id. Of a folder that was merged into before, the
            earlier patches stay in its record.
        out: absent or an empty folder.
        single_file: a new ``.safetensors`` file, for the same as one checkpoint in the names that A1111
            and ComfyUI read.
        device: on which ``B A`` is multiplied.
        any_base: merge also into other weights than a patch was made for, a fine-tune for example.
        progress: receives the state of the run.

    Returns:
        The record that is also in the folder, as ``recare_patch_merge.json``.

    Raises:
        PatchError: no patch, a scale that is not finite, or a weight that leaves its dtype's range.
        IncompatiblePatchError: the patches are of different bases, or not of this one.
        BaseModelError: the base cannot be read, was changed since it was merged into, or has no place in a
            single file; or the device is unknown.
        OutputError: a place is taken or cannot be written to.
    """
    known = check_together(patches)
    folder, base_id = base_folder(base)
    source = read_layout(folder, f"'{base_id}'")
    earlier = MergeRecord.load(folder) if (folder / RECORD_NAME).exists() else None
    touched = _touched(patches)
    denoiser = next((part for part in DENOISERS if part in source.configs), UNET)
    before = _hashes(source, [denoiser, *touched, *(earlier.merged_hashes if earlier else ())])
    if earlier is not None and any(before[part] != one for part, one in earlier.merged_hashes.items()):
        raise BaseModelError(
            f"{_changed(folder)}; without that file it is a base of its own, into which --any-base merges"
        )
    origin = before | (earlier.base_hashes if earlier is not None else {})
    others = [part for part in touched if known and known.component_hash(part) != origin[part]]
    if known is not None and others:
        first = next(patch for patch, _ in patches if patch.metadata and others[0] in patch.components)
        what = "denoiser" if others[0] == denoiser else in_words(others[0])
        message = (
            f"patch {first.name} was made for base '{known.base}', and the {what} of base '{base_id}' has other weights"
        )
        if not any_base:
            raise IncompatiblePatchError(message)
        logger.warning("%s: how well it erases there is unknown", message)
    whole = tuple(patch.as_part(float(scale)) for patch, scale in patches)
    target = _single_file(single_file, source) if single_file is not None else None
    with _changed_copy(patches, source, out, device, progress) as (made, rounding):
        after = _hashes(made, before)
        record = MergeRecord(
            version=recare_patch.__version__,
            base=earlier.base if earlier is not None else base_id,
            denoiser=denoiser,
            base_denoiser_sha256=origin.pop(denoiser),
            merged_denoiser_sha256=after.pop(denoiser),
            patches=(*(earlier.patches if earlier is not None else ()), *whole),
            parts=(*(earlier.parts if earlier is not None else ()), *parts_of(patches)),
            # Each merge rounds anew, and only the base itself would tell how far several go together.
            rounding=rounding if earlier is None else None,
            base_text_encoders_sha256=origin or None,
            merged_text_encoders_sha256=after or None,
        )
        write_json(made.folder / RECORD_NAME, record.model_dump(exclude_none=True))
        if target is not None:
            write_single_file(made, target, _single_header(made, record, target))
    return record


def unmerge(
    folder: str | Path,
    patches: Sequence[Patch],
    out: str | Path,
    *,
    base: str | Path | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Unmerged:
    """Take patches out of a merged folder: the base again, within the rounding of its dtype.

    ``patches`` are exactly those that were merged, in any order, and the scales those of the record. With
    the ``base`` the difference is measured. Faults are those of :func:`merge`.
    """
    folder = Path(folder).expanduser()
    record = MergeRecord.load(folder)
    left = list(record.patches)
    weighted: list[tuple[Patch, float]] = []
    for patch in patches:
        digest = patch.sha256()
        part = next((one for one in left if one.sha256 == digest), None)
        if part is None:
            raise IncompatiblePatchError(
                f"patch {patch.name} was not merged into {folder}: its SHA-256 is {digest[:12]}…, and merged "
                f"were {', '.join(f'{one.name} ({one.sha256[:12]}…)' for one in record.patches)}"
            )
        left.remove(part)
        weighted.append((patch, -part.scale))
    if left:
        raise IncompatiblePatchError(
            f"{folder} holds more patches than were given: {', '.join(one.name for one in left)} as well"
        )
    check_together(weighted)
    source = read_layout(folder, f"'{folder.resolve().name}'")
    if _hashes(source, record.merged_hashes) != record.merged_hashes:
        raise BaseModelError(_changed(folder))
    reference = read_layout(base_folder(base)[0], f"'{record.base}'") if base is not None else None
    with _changed_copy(weighted, source, out, device, progress) as (made, _):
        same = _hashes(made, record.base_hashes) == record.base_hashes
        apart = None
        if reference is not None:
            apart = max(_max_difference(made, reference, part) for part in record.base_hashes)
    return Unmerged(Path(out), same, apart, record.rounding)


def compare(
    patches: Weighted,
    base: str | Path,
    merged: str | Path,
    *,
    steps: int = 20,
    device: str = "auto",
    memory: MemoryOptions | None = None,
    vram: float | None = None,
) -> int:
    """Draw the patches' concepts and a house with the patches in the base and with the merged folder.

    Returns:
        The largest difference of a value, of 255.
    """
    import numpy as np

    names = [part.name for part in parts_of(patches)]
    asked = dict.fromkeys([*(f"a picture of {name}" for name in names), "a photo of a house"])
    texts, draws = [text for text in asked for _ in range(2)], [0, 1] * len(asked)
    # In fp32, as half precision would round the merged weights apart from the patched ones.
    how: dict[str, Any] = {"precision": "fp32", "device": device, "memory": memory, "vram": vram}
    patched = load_to_draw(base, **how)
    with apply_all(patched.pipeline, patches):
        ours = patched.generate(texts, draws, steps=steps)
    del patched
    theirs = load_to_draw(merged, **how).generate(texts, draws, steps=steps)
    return max(
        int(np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)).max())
        for a, b in zip(ours, theirs, strict=True)
    )


def _changed(folder: Path) -> str:
    return f"the denoiser in {folder} is not the one that {RECORD_NAME} records: it was changed after the merge"


def _single_file(file: str | Path, layout: Layout) -> Path:
    """Where to write the checkpoint, with every fault told before hours of merging."""
    target = Path(file).expanduser()
    if target.suffix != ".safetensors":
        raise OutputError(f"cannot write {target}: a checkpoint in one file is written as .safetensors")
    if target.exists():
        raise OutputError(f"{target} is there already; choose another --single-file")
    plan(layout)
    if not has_known_sizes(layout):
        logger.warning(
            "base %s has other sizes than Stable Diffusion 1.x and 2.x: A1111 and ComfyUI cannot read its "
            "single file, diffusers can (from_single_file(FILE, config=FOLDER))",
            layout.name,
        )
    return target


def _single_header(layout: Layout, record: MergeRecord, file: Path) -> dict[str, str]:
    """What a checkpoint says of itself: ModelSpec 1.0.1, and the record."""
    v_prediction = layout.configs.get("scheduler", {}).get("prediction_type") == "v_prediction"
    second = layout.configs["unet"].get("cross_attention_dim") == 1024
    told = ", ".join(f"{part.name} at {part.scale:g}" for part in record.patches)
    version = f"v2-{'768-v' if v_prediction else '512'}" if second else "v1"
    return {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"stable-diffusion-{version}",
        "modelspec.implementation": "https://github.com/CompVis/latent-diffusion",
        "modelspec.title": file.stem,
        "modelspec.description": f"{record.base} with patches merged by recare-patch: {told}",
        "modelspec.prediction_type": "v" if v_prediction else "epsilon",
        RECORD_KEY: record.model_dump_json(exclude_none=True),
    }


def _touched(patches: Weighted) -> list[str]:
    """The networks that patches change."""
    return [part for part in COMPONENTS if any(part in patch.components for patch, _ in patches)]


def _weights(layout: Layout, component: str) -> list[Path]:
    layout.require(component)
    return next(iter(layout.weight_sets(component).values()))


def _hashes(layout: Layout, parts: Iterable[str]) -> dict[str, str]:
    """SHA-256 of a folder's networks, by component."""
    from safetensors import SafetensorError

    try:
        return {part: stored_weights_hash(_weights(layout, part), part) for part in dict.fromkeys(parts)}
    except SafetensorError as fault:
        told = str(fault).splitlines()[0].lower()
        raise BaseModelError(f"base {layout.name} has damaged weights: {told}") from fault


@contextlib.contextmanager
def _changed_copy(
    patches: Weighted, source: Layout, out: str | Path, device: str, progress: Progress | None
) -> Iterator[tuple[Layout, float]]:
    """A pipeline's copy with the patches added and its rounding; it appears whole or not at all."""
    folder, place = source.folder, chosen_device(device)
    if Path(out).expanduser().resolve().is_relative_to(folder.resolve()):
        raise OutputError(f"cannot write into {out}: it lies in the folder that is read")
    with new_folder(out) as made:
        for file in (folder / "model_index.json", *sorted(folder.glob("LICENSE*"))):
            if file.is_file():
                shutil.copyfile(file, made / file.name)
        # All that the pipeline lists, following links: a hub's cache is full of them.
        for part in source.listed:
            if (folder / part).is_dir():
                ignored = shutil.ignore_patterns(*_PICKLES)
                shutil.copytree(folder / part, made / part, ignore=ignored, copy_function=shutil.copyfile)
        copied = read_layout(made, source.name)
        yield copied, _add(patches, copied, place, progress or NullProgress())


def _add(patches: Weighted, made: Layout, device: torch.device, progress: Progress) -> float:
    """Add updates to a copy's weights; gives how far a weight moves at most if they are taken out again."""
    modules = tuple(dict.fromkeys(module for patch, _ in patches for module in patch.modules))
    work: list[tuple[Path, str, str]] = []
    for part in _touched(patches):
        made.require(part)
        wanted = [module for module in modules if split_name(module)[0] == part]
        # All variants, such as fp16. A text encoder's weights are named with or without a prefix that a
        # patch always has.
        for files in made.weight_sets(part).values():
            headers = {file: read_safetensors_header(file).tensors for file in files}
            found = {
                full_name(part, name.removesuffix(".weight")): (file, name)
                for file, tensors in headers.items()
                for name in tensors
            }
            if missing := [module for module in wanted if module not in found]:
                raise IncompatiblePatchError(
                    f"{' and '.join(patch.name for patch, _ in patches)} cannot be merged into base "
                    f"{made.name}: {len(missing)} of {len(modules)} modules are not in it, first "
                    f"'{missing[0]}'"
                )
            for module in wanted:
                file, name = found[module]
                if (dtype := headers[file][name].dtype) not in _DTYPES:
                    raise BaseModelError(
                        f"base {made.name} stores '{name}' as {dtype}, and only {', '.join(_DTYPES)} can be merged into"
                    )
                work.append((file, name, module))
    rounding = 0.0
    for done, (file, name, module) in enumerate(work, 1):
        rounding = max(rounding, _change(file, name, module, patches, made.name, device))
        progress.update("merge", done, len(work))
    for file in {file for file, _, _ in work}:
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())
    return rounding


def _change(file: Path, name: str, module: str, patches: Weighted, base: str, device: torch.device) -> float:
    """Write one changed tensor over the old one; gives what rounding it took."""
    with open_tensors(file) as stored:
        # Cloned, since it may be a window on the file.
        weight: Tensor = stored.get_tensor(name).clone()
    exact = torch.promote_types(weight.dtype, torch.float32)
    total = torch.zeros(weight.shape, dtype=torch.float32, device=device)
    for patch, scale in patches:
        if module not in patch.ranks:
            continue
        update = patch.update(module, device)
        if update.shape != weight.shape:
            raise IncompatiblePatchError(
                f"patch {patch.name} does not fit base {base}: its update of '{module}' has "
                f"shape {tuple(update.shape)}, and the weight there {tuple(weight.shape)}"
            )
        total += scale * update
    new = (weight.to(exact) + total.cpu()).to(weight.dtype).contiguous()
    if not torch.isfinite(new).all():
        raise PatchError(
            f"'{name}' leaves the range of {str(weight.dtype).removeprefix('torch.')} when patched: use a smaller scale"
        )
    with open(file, "r+b") as handle:
        size = struct.unpack("<Q", handle.read(8))[0]
        start, _ = load_json(handle.read(size))[name]["data_offsets"]
        handle.seek(8 + size + start)
        handle.write(new.reshape(-1).view(torch.uint8).numpy().data)
    back = (new.to(exact) - total.cpu()).to(weight.dtype)
    return float((back.double() - weight.double()).abs().max())


def _max_difference(made: Layout, base: Layout, part: str) -> float:
    worst = 0.0
    with contextlib.ExitStack() as stack:
        ours, theirs = (
            {
                name: handle
                for file in _weights(layout, part)
                for handle in (stack.enter_context(open_tensors(file)),)
                for name in handle.keys()  # noqa: SIM118 - no mapping
            }
            for layout in (made, base)
        )
        if ours.keys() != theirs.keys():
            raise BaseModelError(f"base {base.name} has other tensors than the merged folder")
        for name in ours:
            a, b = ours[name].get_tensor(name).double(), theirs[name].get_tensor(name).double()
            if a.shape != b.shape:
                raise BaseModelError(f"base {base.name} has another shape of '{name}' than the merged folder")
            worst = max(worst, float((a - b).abs().max())) if a.numel() else worst
    return worst
