"""Patches into the weights of a base, and out of them again.

``W' = W + Σ wᵢ Bᵢ Aᵢ``, summed in fp32 and rounded to the dtype that the file has. A merged folder is
an ordinary diffusers pipeline: nobody who loads it can leave the patch out. Each weights file is
copied and only the changed tensors are written over, at their places in it: names, shards, index and
dtypes stay, and no more than one layer is in memory. The same pipeline can be written as one
checkpoint file as well, one tensor at a time.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

import recare_patch
from recare_patch.core import (
    BaseModelError,
    IncompatiblePatchError,
    NullProgress,
    OutputError,
    PatchError,
    Progress,
    output_error,
    read_safetensors_header,
    write_json,
)
from recare_patch.models import (
    COMPONENTS,
    UNET,
    Layout,
    base_folder,
    full_name,
    in_words,
    load_base,
    read_layout,
    split_name,
    stored_weights_hash,
)
from recare_patch.patch import (
    Patch,
    PatchPart,
    apply_all,
    check_together,
    has_known_sizes,
    plan,
    write_single_file,
)

logger = logging.getLogger(__name__)

RECORD_NAME = "recare_patch_merge.json"
"""What was merged, in the merged folder."""

RECORD_KEY = "recare_patch.merge"
"""The same in the header of a single-file checkpoint, JSON."""

_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
_PICKLES = ("*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.msgpack", "*.h5", "*.onnx*")


class MergeRecord(BaseModel):
    """What a merged folder says of itself.

    Attributes:
        format_version: of this record.
        version: of recare-patch that wrote it.
        base: id of the base that was merged into; of the first one, where a merged folder was merged
            into again.
        base_denoiser_sha256: of its denoiser before, see :func:`weights_hash`.
        merged_denoiser_sha256: of the denoiser after.
        base_text_encoders_sha256, merged_text_encoders_sha256: the same of the text encoders that patches
            changed, by component; ``None`` where there is none.
        patches: what was merged, at what scale, in the order of merging.
        parts: the same with stacks taken apart.
        rounding: how far a weight is from the base's at most when all is taken out again, as measured
            while it was merged; ``None`` after several merges and in older records.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    format_version: int = 1
    version: str
    base: str
    base_denoiser_sha256: str
    merged_denoiser_sha256: str
    patches: tuple[PatchPart, ...]
    parts: tuple[PatchPart, ...]
    rounding: float | None = None
    base_text_encoders_sha256: dict[str, str] | None = None
    merged_text_encoders_sha256: dict[str, str] | None = None

    @property
    def base_hashes(self) -> dict[str, str]:
        """The base's networks before, by component."""
        return {UNET: self.base_denoiser_sha256, **(self.base_text_encoders_sha256 or {})}

    @property
    def merged_hashes(self) -> dict[str, str]:
        """The same networks after."""
        return {UNET: self.merged_denoiser_sha256, **(self.merged_text_encoders_sha256 or {})}

    @classmethod
    def load(cls, folder: str | Path) -> MergeRecord:
        """Read the record of a merged folder.

        Raises:
            BaseModelError: there is none, or it is malformed.
        """
        file = Path(folder) / RECORD_NAME
        try:
            return cls(**json.loads(file.read_text(encoding="utf-8")))
        except OSError as fault:
            raise BaseModelError(
                f"{folder} is no merged base: {RECORD_NAME} is not in it or cannot be read"
            ) from fault
        except (ValidationError, ValueError, TypeError, RecursionError):
            raise BaseModelError(f"{file} is malformed") from None


@dataclass(frozen=True)
class Unmerged:
    """A base that patches were taken out of.

    Attributes:
        folder: where it is.
        same_hash: whether its denoiser has the hash of the base, that is whether all values are the
            same when rounded to fp16. A difference in the last digit of fp32 may turn a rounding over.
        max_difference: the largest absolute difference of any weight from the base's; ``None`` where
            the base was not given.
        expected_difference: the same as the merge foretold it; ``None`` where its record does not say.
    """

    folder: Path
    same_hash: bool
    max_difference: float | None
    expected_difference: float | None = None


def merge(
    patches: Sequence[tuple[Patch, float]],
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
    patched layers of the denoiser change. The folder appears whole or not at all.

    Args:
        patches: patch and scale.
        base: ``atelier``, a pipeline folder, or a hub id. Of a folder that was merged into before, the
            earlier patches stay in its record.
        out: absent or an empty folder.
        single_file: where to write the merged pipeline as one checkpoint as well, in the names that
            A1111 and ComfyUI read; a ``.safetensors`` file that is not there yet.
        device: on which ``B A`` is multiplied.
        any_base: merge also where the denoiser has other weights than the one a patch was made for, a
            fine-tune for example; how well it erases there is unknown.
        progress: receives the state of the run.

    Returns:
        The record that is also in the folder, as ``recare_patch_merge.json``.

    Raises:
        PatchError: no patch, a scale that is not finite, or a weight that leaves its dtype's range.
        IncompatiblePatchError: the patches are of different bases, or not of this one.
        BaseModelError: the base is missing or incomplete, was changed after it was merged into, cannot
            be written as a single file, or the device is unknown.
        OutputError: ``out`` is in use or cannot be written to, or ``single_file`` is there already.
    """
    known = check_together(patches)
    folder, base_id = base_folder(base)
    earlier = MergeRecord.load(folder) if (folder / RECORD_NAME).exists() else None
    before = _hashes(folder, base_id, [UNET, *_touched(patches), *(earlier.merged_hashes if earlier else ())])
    if earlier is not None and any(before[part] != one for part, one in earlier.merged_hashes.items()):
        raise BaseModelError(
            f"{_changed(folder)}; without that file it is a base of its own, into which --any-base merges"
        )
    origin = before | (earlier.base_hashes if earlier is not None else {})
    others = [part for part in _touched(patches) if known and known.component_hash(part) != origin[part]]
    if known is not None and others:
        first = next(patch for patch, _ in patches if patch.metadata and others[0] in patch.components)
        what = "denoiser" if others[0] == UNET else in_words(others[0])
        message = (
            f"patch {first.name} was made for base '{known.base}', and the {what} of base '{base_id}' has "
            "other weights"
        )
        if not any_base:
            raise IncompatiblePatchError(message)
        logger.warning("%s: how well it erases there is unknown", message)
    whole, parts = [], []
    for patch, scale in patches:
        whole.append(patch.as_part(float(scale)))
        inner = (patch.metadata.parts if patch.metadata else None) or (patch.as_part(1.0),)
        parts += [part.model_copy(update={"scale": part.scale * scale}) for part in inner]
    target = _single_file(single_file, folder, base_id)
    with _built(Path(out), folder) as made:
        _copy(folder, base_id, made)
        rounding: float | None = _add(patches, folder, base_id, made, device, progress or NullProgress())
        if earlier is not None:
            # Each merge rounded anew, and only the base itself would tell how far that goes together.
            rounding = None
            whole, parts = [*earlier.patches, *whole], [*earlier.parts, *parts]
        record = MergeRecord(
            version=recare_patch.__version__,
            base=earlier.base if earlier is not None else base_id,
            base_denoiser_sha256=origin.pop(UNET),
            merged_denoiser_sha256=(after := _hashes(made, base_id, before)).pop(UNET),
            patches=tuple(whole),
            parts=tuple(parts),
            rounding=rounding,
            base_text_encoders_sha256=origin or None,
            merged_text_encoders_sha256=after or None,
        )
        write_json(made / RECORD_NAME, record.model_dump(exclude_none=True))
        if target is not None:
            layout = read_layout(made, f"'{base_id}'")
            write_single_file(layout, target, _single_header(layout, record, target))
    return record


def _changed(folder: Path) -> str:
    return (
        f"the denoiser in {folder} is not the one that {RECORD_NAME} records: it was changed after the merge"
    )


def _single_file(file: str | Path | None, folder: Path, base_id: str) -> Path | None:
    """Where to write the checkpoint, with every fault told before hours of merging."""
    if file is None:
        return None
    target = Path(file).expanduser()
    if target.suffix != ".safetensors":
        raise OutputError(f"cannot write {target}: a checkpoint in one file is written as .safetensors")
    if target.exists():
        raise OutputError(f"{target} is there already; choose another --single-file")
    layout = read_layout(folder, f"'{base_id}'")
    plan(layout)
    if not has_known_sizes(layout):
        logger.warning(
            "base '%s' has other sizes than Stable Diffusion 1.x and 2.x: A1111 and ComfyUI cannot read its "
            "single file, diffusers can (from_single_file(FILE, config=FOLDER))",
            base_id,
        )
    return target


def _single_header(layout: Layout, record: MergeRecord, file: Path) -> dict[str, str]:
    """What a checkpoint says of itself: ModelSpec 1.0.1, and the record."""
    width = layout.configs["unet"].get("cross_attention_dim")
    v_prediction = layout.configs.get("scheduler", {}).get("prediction_type") == "v_prediction"
    if width == 1024:
        architecture = f"stable-diffusion-v2-{'768-v' if v_prediction else '512'}"
    else:
        architecture = "stable-diffusion-v1"
    told = ", ".join(f"{part.name} at {part.scale:g}" for part in record.patches)
    return {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": architecture,
        "modelspec.implementation": "https://github.com/CompVis/latent-diffusion",
        "modelspec.title": file.stem,
        "modelspec.description": f"{record.base} with patches merged by recare-patch: {told}",
        "modelspec.prediction_type": "v" if v_prediction else "epsilon",
        RECORD_KEY: record.model_dump_json(exclude_none=True),
    }


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

    Args:
        folder: what :func:`merge` wrote.
        patches: exactly those that were merged, in any order; the scales are those of the record.
        out: absent or an empty folder.
        base: the base, to measure the difference against.
        device, progress: as in :func:`merge`.

    Raises:
        BaseModelError: the folder is no merged base, or is damaged.
        IncompatiblePatchError: the patches are not those that were merged.
        PatchError, OutputError: as :func:`merge`.
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
    name = folder.resolve().name
    if _hashes(folder, name, record.merged_hashes) != record.merged_hashes:
        raise BaseModelError(_changed(folder))
    reference = base_folder(base)[0] if base is not None else None
    with _built(Path(out), folder) as made:
        _copy(folder, name, made)
        _add(weighted, folder, name, made, device, progress or NullProgress())
        same = _hashes(made, name, record.base_hashes) == record.base_hashes
        apart = None
        if reference is not None:
            apart = max(_max_difference(made, reference, record.base, part) for part in record.base_hashes)
    return Unmerged(Path(out), same, apart, record.rounding)


def compare(
    patches: Sequence[tuple[Patch, float]],
    base: str | Path,
    merged: str | Path,
    prompts: Sequence[str] | None = None,
    *,
    seeds: Sequence[int] = (0, 1),
    steps: int = 20,
    device: str = "auto",
) -> int:
    """Draw with the patches in the base and with the merged folder; the largest difference of a value.

    Args:
        patches, base: what was merged, and into what.
        merged: the folder.
        prompts: the patches' concepts and an ordinary picture by default.
        seeds: a picture of each prompt for each.
        steps: of the sampler.
        device: see :func:`load_base`.

    Returns:
        Of 255.
    """
    import numpy as np

    names = [part.name for patch, _ in patches for part in _named(patch)]
    asked = list(prompts or dict.fromkeys([*(f"a picture of {n}" for n in names), "a photo of a house"]))
    texts = [text for text in asked for _ in seeds]
    draws = list(seeds) * len(asked)
    patched = load_base(base, device=device)
    with apply_all(patched.pipeline, patches):
        ours = patched.generate(texts, draws, steps=steps)
    del patched
    theirs = load_base(merged, device=device).generate(texts, draws, steps=steps)
    return max(
        int(np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)).max())
        for a, b in zip(ours, theirs, strict=True)
    )


# ------------------------------------------------------------------------ files


def _named(patch: Patch) -> tuple[PatchPart, ...]:
    return (patch.metadata.parts if patch.metadata else None) or (patch.as_part(1.0),)


def _weights(folder: Path, base_id: str, component: str = UNET) -> dict[str, list[Path]]:
    """A network's weights; see :meth:`Layout.weight_sets`."""
    layout = read_layout(folder, f"'{base_id}'")
    layout.require(component)
    return layout.weight_sets(component)


def _hashes(folder: Path, base_id: str, parts: Iterable[str]) -> dict[str, str]:
    """SHA-256 of a folder's networks, by component."""
    files = {part: next(iter(_weights(folder, base_id, part).values())) for part in dict.fromkeys(parts)}
    return _reading(base_id, lambda: {part: stored_weights_hash(one, part) for part, one in files.items()})


def _reading(base_id: str, work: Any) -> Any:
    from safetensors import SafetensorError

    try:
        return work()
    except SafetensorError as fault:
        raise BaseModelError(
            f"base '{base_id}' has damaged weights: {str(fault).splitlines()[0].lower()}"
        ) from fault


@contextlib.contextmanager
def _built(out: Path, source: Path) -> Iterator[Path]:
    """A folder under a temporary name that gets its own when it is whole."""
    out = out.expanduser()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        what = "it already holds files" if out.is_dir() else "it is a file, not a folder"
        raise OutputError(f"cannot write into {out}: {what}; choose another --out")
    if out.resolve().is_relative_to(source.resolve()):
        raise OutputError(f"cannot write into {out}: it lies in the folder that is read")
    made = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        made.mkdir(parents=True)
        try:
            yield made
            # Takes the place of an empty folder, and fails where somebody filled it meanwhile.
            os.replace(made, out)
        except BaseException:
            shutil.rmtree(made, ignore_errors=True)
            raise
    except OSError as fault:
        raise output_error(out, fault) from fault


def _copy(folder: Path, base_id: str, made: Path) -> None:
    """All that the pipeline lists, following links: a hub's cache is full of them."""
    layout = read_layout(folder, f"'{base_id}'")
    shutil.copyfile(folder / "model_index.json", made / "model_index.json")
    for notice in sorted(folder.glob("LICENSE*")):
        if notice.is_file():
            shutil.copyfile(notice, made / notice.name)
    for part in layout.listed:
        if not (folder / part).is_dir():
            continue
        shutil.copytree(
            folder / part,
            made / part,
            ignore=shutil.ignore_patterns(*_PICKLES),
            copy_function=shutil.copyfile,
        )


def _add(
    patches: Sequence[tuple[Patch, float]],
    folder: Path,
    base_id: str,
    made: Path,
    device: str,
    progress: Progress,
) -> float:
    """Add the patches' updates; how far a weight would be from the old one at most, were they taken out."""
    place = _device(device)
    modules = tuple(dict.fromkeys(module for patch, _ in patches for module in patch.modules))
    by_part = {
        part: [module for module in modules if split_name(module)[0] == part] for part in _touched(patches)
    }
    sets = [(part, files) for part in by_part for files in _weights(folder, base_id, part).values()]
    done, total, rounding = 0, sum(len(by_part[part]) for part, _ in sets), 0.0
    for part, files in sets:
        wanted = by_part[part]
        headers = {file: read_safetensors_header(file) for file in files}
        # A text encoder's weights are named with or without a prefix that a patch always has.
        names = {
            file: {full_name(part, name.removesuffix(".weight")): name for name in header.tensors}
            for file, header in headers.items()
        }
        missing = [module for module in wanted if not any(module in found for found in names.values())]
        if missing:
            raise IncompatiblePatchError(
                f"{' and '.join(patch.name for patch, _ in patches)} cannot be merged into base '{base_id}': "
                f"{len(missing)} of {len(modules)} modules are not in it, first '{missing[0]}'"
            )
        for file, found in names.items():
            inside = {module: found[module] for module in wanted if module in found}
            for name in inside.values():
                info = headers[file].tensors[name]
                if info.dtype not in _DTYPES:
                    raise BaseModelError(
                        f"base '{base_id}' stores '{name}' as {info.dtype}, and only "
                        f"{', '.join(_DTYPES)} can be merged into"
                    )
            for error in _written(file, made / part / file.name, inside, patches, base_id, place):
                done, rounding = done + 1, max(rounding, error)
                progress.update("merge", done, total)
    return rounding


def _touched(patches: Sequence[tuple[Patch, float]]) -> list[str]:
    """The networks that patches change."""
    return [part for part in COMPONENTS if any(part in patch.components for patch, _ in patches)]


def _written(
    source: Path,
    target: Path,
    modules: Mapping[str, str],
    patches: Sequence[tuple[Patch, float]],
    base_id: str,
    device: torch.device,
) -> Iterator[float]:
    """Write changed tensors over a copied file, one layer at a time; gives each layer's rounding.

    Args:
        source, target: the file, and its copy.
        modules: the patches' name of each layer → the file's name of its weight.
        patches, base_id, device: see :func:`merge`.
    """
    from safetensors import safe_open

    places = _offsets(source)
    with safe_open(source, "pt") as stored, open(target, "r+b") as handle:
        for module, name in modules.items():
            weight: Tensor = stored.get_tensor(name)
            exact = torch.promote_types(weight.dtype, torch.float32)
            total = torch.zeros(weight.shape, dtype=torch.float32, device=device)
            for patch, scale in patches:
                if module not in patch.ranks:
                    continue
                update = patch.update(module, device)
                if update.shape != weight.shape:
                    raise IncompatiblePatchError(
                        f"patch {patch.name} does not fit base '{base_id}': its update of '{module}' has "
                        f"shape {tuple(update.shape)}, and the weight there {tuple(weight.shape)}"
                    )
                total += scale * update
            new = (weight.to(exact) + total.cpu()).to(weight.dtype).contiguous()
            if not torch.isfinite(new).all():
                raise PatchError(
                    f"'{name}' leaves the range of {str(weight.dtype).removeprefix('torch.')} when patched: "
                    "use a smaller scale"
                )
            handle.seek(places[name])
            handle.write(new.reshape(-1).view(torch.uint8).numpy().data)
            back = (new.to(exact) - total.cpu()).to(weight.dtype)
            yield float((back.double() - weight.double()).abs().max())
        handle.flush()
        os.fsync(handle.fileno())


def _offsets(file: Path) -> dict[str, int]:
    """Where each tensor starts in a safetensors file; its header was checked before."""
    with open(file, "rb") as handle:
        size = struct.unpack("<Q", handle.read(8))[0]
        header = json.loads(handle.read(size))
    return {name: 8 + size + one["data_offsets"][0] for name, one in header.items() if name != "__metadata__"}


def _max_difference(first: Path, second: Path, base_id: str, part: str) -> float:
    from safetensors import safe_open

    one, other = (next(iter(_weights(folder, base_id, part).values())) for folder in (first, second))
    worst = 0.0
    with contextlib.ExitStack() as stack:
        ours, theirs = (
            {
                name: handle
                for file in files
                for handle in (stack.enter_context(safe_open(file, "pt")),)
                for name in handle.keys()  # noqa: SIM118 - no mapping
            }
            for files in (one, other)
        )
        if ours.keys() != theirs.keys():
            raise BaseModelError(f"base '{base_id}' has other tensors than the merged folder")
        for name in sorted(ours):
            a, b = ours[name].get_tensor(name).double(), theirs[name].get_tensor(name).double()
            if a.shape != b.shape:
                raise BaseModelError(f"base '{base_id}' has another shape of '{name}' than the merged folder")
            worst = max(worst, float((a - b).abs().max())) if a.numel() else worst
    return worst


def _device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.zeros(0, device=device).device
    except (RuntimeError, AssertionError) as fault:
        raise BaseModelError(f"device '{device}' is not available here: give auto or cpu") from fault


__all__ = ["RECORD_KEY", "RECORD_NAME", "MergeRecord", "Unmerged", "compare", "merge", "unmerge"]
