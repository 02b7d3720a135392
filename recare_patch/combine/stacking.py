"""Several patches into one: a stack is a patch file like any other.

Notation: patch i changes a layer's weight by ``Δᵢ = Bᵢ Aᵢ`` (``A [rᵢ, in]``, ``B [out, rᵢ]``, the
scale ``alpha / rank`` already in ``B``), and has the weight ``wᵢ`` in the stack. The stack that all
patches applied at once make is ``Σ wᵢ Δᵢ``, and ``concat`` holds exactly that: ranks add up, nothing
is lost. The other methods give fewer ranks or less interference for a difference, which is measured.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
import yaml
from torch import Tensor
from torch.nn import functional as F

import recare_patch
from recare_patch.core import (
    OutputError,
    PatchError,
    file_sha256,
    output_error,
    temporary_name,
    unknown_name,
    write_text,
)
from recare_patch.patch import (
    FORMATS,
    STACK_NAME,
    Named,
    Patch,
    PatchMetadata,
    PatchPart,
    Stacking,
    card_text,
    check_formats,
    check_together,
    has_kohya_names,
    write_kohya,
)

if TYPE_CHECKING:
    from recare_patch.combine.regmean import Moments

Weighted = Sequence[tuple[Patch, float]]
"""Patch and weight."""

PULL = -0.1
"""A cosine between two updates below this is warned of: each undoes a part of the other."""

_OF_BASE = ("base", "base_family", "base_denoiser_sha256", "prediction_type")
_OVERSAMPLING, _POWER_STEPS = 16, 4


def stack(
    patches: Weighted,
    *,
    method: str = "concat",
    rank: int | None = None,
    density: float | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    moments: Moments | None = None,
) -> Patch:
    """One patch that does what several do together, on the CPU.

    Its modules all have one rank (diffusers misreads files of mixed ranks). Its metadata lists the parts,
    and ``stacking.relative_error`` says how far it is from the plain sum.

    Args:
        patches: patch and weight; weights may be negative, ranks and layers may differ.
        method: ``concat``: all ranks side by side, exact. ``regmean``: each part as it is on what it
            erases, as little as possible elsewhere (:mod:`regmean`). ``svd``: the sum cut to ``rank`` by its
            singular values. ``ties``: the largest values of each update, those that agree with the
            majority's sign, averaged (arXiv 2306.01708, here layer by layer). ``dare``: values dropped at
            random, the rest rescaled, summed (arXiv 2311.03099). The last two are cut to ``rank`` as well.
        rank: by default the sum of ranks for ``concat`` and ``regmean``, else the largest of the patches'.
        density: share of the values that ``ties`` (0.2) and ``dare`` (0.5) keep.
        seed: of ``dare``'s draw and of the randomised decomposition.
        dtype: of the result, in which its error is measured.
        moments: of these patches, in this order; ``regmean`` needs them.

    Raises:
        UnknownNameError: for another method.
        PatchError: no patch, or a weight, rank, density or value out of range.
        IncompatiblePatchError: the patches were made for different bases or shapes.
    """
    plan = plan_stack(patches, method=method, rank=rank, density=density)
    return plan.stack(seed=seed, dtype=dtype, moments=moments)


def plan_stack(
    patches: Weighted, *, method: str = "concat", rank: int | None = None, density: float | None = None
) -> StackPlan:
    """Check whether patches can be stacked so; arguments and errors are those of :func:`stack`."""
    if method not in METHODS:
        raise unknown_name("way of stacking", method, METHODS)
    known = check_together(patches)
    if density is not None and (method not in _DENSE or not 0 < density <= 1):
        told = f"got {density!r}" if method in _DENSE else f"and '{method}' takes none"
        raise PatchError(f"a density is a share above 0 and at most 1 for {' and '.join(_DENSE)}, {told}")
    modules = tuple(dict.fromkeys(module for patch, _ in patches for module in patch.modules))
    # Rows of names are the first ones in all layers; see named_first.
    least = [len(patch.names) if method == "concat" else 0 for patch, _ in patches]
    full = max(sum(p.ranks.get(module, n) for (p, _), n in zip(patches, least, strict=True)) for module in modules)
    largest = max(r for patch, _ in patches for r in patch.ranks.values())
    whole = method in ("concat", "regmean")
    chosen = rank if rank is not None else (full if whole else largest)
    if chosen < 1 or (whole and chosen < full):
        raise PatchError(
            f"the rank of this stack must be at least {full if whole else 1}, got {chosen}"
            + ("; 'svd' makes smaller ones" if whole else "")
        )
    if density is None and method in _DENSE:
        density = _DENSE[method].density
    return StackPlan(tuple(patches), modules, method, chosen, density, known)


@dataclass(frozen=True)
class StackPlan:
    """Patches that can be stacked, and how; ``known`` is what they say of their base."""

    patches: tuple[tuple[Patch, float], ...]
    modules: tuple[str, ...]
    method: str
    rank: int
    density: float | None
    known: PatchMetadata | None

    def stack(self, *, seed: int = 0, dtype: torch.dtype = torch.float32, moments: Moments | None = None) -> Patch:
        """The stack; see :func:`stack`."""
        if (moments is not None) != (self.method == "regmean"):
            raise PatchError(
                "'regmean' needs what the layers read (see recare_patch.combine.regmean)"
                if moments is None
                else f"what layers read is for 'regmean', and '{self.method}' takes none"
            )
        generator = torch.Generator().manual_seed(seed)
        tensors: dict[str, Tensor] = {}
        for module in self.modules:
            if self.method == "concat":
                down, up = named_first(self.patches, module)
            elif moments is not None:
                rows = {k: _flat(p, module)[0] for k, (p, _) in enumerate(self.patches) if module in p.ranks}
                down = torch.cat([self.patches[k][1] * new for k, new in moments.solve(module, rows).items()])
                up = _summed(self.patches, module)[1]
            elif self.method == "svd":
                down, up = _balanced(*_thin_svd(*_summed(self.patches, module)), self.rank)
            else:
                own = [(w, *_flat(patch, module)) for patch, w in self.patches if module in patch.ranks]
                way, deltas = _DENSE[self.method], torch.stack([w * (b @ a) for w, a, b in own])
                dense = way.reduce(way.agree(way.sparsify(deltas, self.density or way.density, generator)))
                down, up = _balanced(*_truncated_svd(dense, self.rank, generator), self.rank)
            down = F.pad(down, (0, 0, 0, self.rank - len(down))).to(dtype)
            up = F.pad(up, (0, self.rank - up.shape[1])).to(dtype)
            shape = next(one for one, _ in self.patches if module in one.ranks).factors(module)[0].shape[1:]
            ones = (1,) * (len(shape) - 1)
            tensors[f"{module}.lora_A.weight"] = down.reshape(self.rank, *shape).contiguous()
            tensors[f"{module}.lora_B.weight"] = up.reshape(up.shape[0], self.rank, *ones).contiguous()
        error = relative_error(tensors, self.patches)
        if not math.isfinite(error):
            raise PatchError(
                f"a value of this stack does not fit into {str(dtype).removeprefix('torch.')}: "
                "use smaller scales, or fp32"
            )
        how = Stacking(
            method=self.method,
            density=self.density,
            seed=seed,
            relative_error=error,
            kept_weight=moments.kept_weight if moments is not None else None,
        )
        return Patch(tensors, self.metadata(how), "the stack")

    def metadata(self, how: Stacking) -> PatchMetadata:
        """What a stack of these patches says of itself."""
        told = [patch.metadata for patch, _ in self.patches if patch.metadata is not None]
        parts = parts_of(self.patches)
        same = {key: getattr(self.known, key) if self.known else "unknown" for key in _OF_BASE}
        for key in ("kind", "layers"):
            values = {getattr(one, key) for one in told}
            same[key] = "unknown" if not values else values.pop() if len(values) == 1 else "several"
        return PatchMetadata(
            **same,
            versions={"recare-patch": recare_patch.__version__, "torch": torch.__version__},
            concept=" + ".join(dict.fromkeys(part.name for part in parts)),
            method="stack",
            rank=self.rank,
            alpha=float(self.rank),
            seed=how.seed,
            parts=parts,
            stacking=how,
            names=_names(self.patches) if self.method == "concat" else None,
            base_text_encoders_sha256=self.known.base_text_encoders_sha256 if self.known else None,
            base_denoiser_class=self.known.base_denoiser_class if self.known else None,
        )

    def interference(self) -> list[Meeting]:
        """How each two patches meet in each layer that both change, from their factors."""
        names = [patch.name for patch, _ in self.patches]
        # Two parts of one name are told apart by their places.
        names = [f"{n} ({k})" if names.count(n) > 1 else n for k, n in enumerate(names, start=1)]
        found = []
        for module in self.modules:
            spaces = [
                (name, weight, *_thin_svd(*_flat(patch, module)))
                for name, (patch, weight) in zip(names, self.patches, strict=True)
                if module in patch.ranks
            ]
            for (one, w, u, s, v), (other, x, u2, s2, v2) in itertools.combinations(spaces, 2):
                out, into = u.T @ u2, v.T @ v2
                size = float(s.norm() * s2.norm()) * abs(w * x)
                dot = float((s[:, None] * out * s2 * into).sum()) * w * x
                # Singular values that are not rounding.
                rows, columns = (int((one > 1e-9 * one[0]).sum()) for one in (s, s2))
                reads, writes = (
                    float(way[:rows, :columns].square().sum()) / max(1, min(rows, columns)) for way in (into, out)
                )
                found.append(Meeting(one, other, module, dot / size if size else 0.0, reads, writes))
        return found


class Meeting(NamedTuple):
    """Two patches in one layer: the cosine of their weighted updates, −1 where each undoes the other.

    Overlaps are of what they read and write: the mean of cos² of the principal angles (Björck and
    Golub, 1973), from 0 (orthogonal) to 1 (the smaller space lies in the larger).
    """

    first: str
    second: str
    module: str
    cosine: float
    reads: float
    writes: float


def told_of(meetings: Sequence[Meeting]) -> tuple[str, list[str]]:
    """A sentence on how parts meet, empty where none do; and a warning for each pair that pulls apart."""
    if not meetings:
        return "", []
    cosines = [one.cosine for one in meetings]
    summary = (
        f"The parts meet with cosines of {min(cosines):.2f} to {max(cosines):.2f}, layer by layer; what "
        f"they read overlaps by up to {max(one.reads for one in meetings):.2f}, what they write by up to "
        f"{max(one.writes for one in meetings):.2f}."
    )
    warnings = []
    for first, second in dict.fromkeys(one[:2] for one in meetings):
        shared = [one for one in meetings if one[:2] == (first, second)]
        against = [one for one in shared if one.cosine < PULL]
        if against:
            low = min(against, key=lambda one: one.cosine)
            warnings.append(
                f"{first} and {second} pull against each other in {len(against)} of the {len(shared)} "
                f"layers that both change, most in '{low.module}' (cosine {low.cosine:.2f}): each undoes "
                "a part of the other"
            )
    return summary, warnings


def parts_of(patches: Weighted) -> tuple[PatchPart, ...]:
    """What patches consist of: stacks are taken apart, their scales multiplied."""
    return tuple(
        part.model_copy(update={"scale": part.scale * scale})
        for patch, scale in patches
        for part in (patch.metadata and patch.metadata.parts) or (patch.as_part(1.0),)
    )


def save_stack(patch: Patch, folder: str | Path, *, file_formats: Sequence[str] = FORMATS) -> Path:
    """Write a stack's folder whole or not at all; it is absent or empty. Returns the weights file.

    Raises:
        PatchError, UnknownNameError: the patch is no stack, or one of :data:`FORMATS` is wrong.
        OutputError: the folder holds files, or cannot be written to.
    """
    with new_folder(folder) as made:
        file = write_stack(patch, made, file_formats)
    return Path(folder).expanduser() / file.name


def write_stack(patch: Patch, folder: Path, file_formats: Sequence[str] = FORMATS) -> Path:
    """Write a stack's weights in the dtype they have, its card and ``stack.yaml``; see :func:`save_stack`."""
    about = patch.metadata
    if about is None or not about.parts or about.stacking is None:
        raise PatchError(f"{patch.name} is no stack: stack patches before they are saved as one")
    chosen = check_formats(file_formats)
    file = patch.save(folder, patch.dtype)
    told = {
        "sha256": file_sha256(file),
        "base": about.base,
        "base_denoiser_sha256": about.base_denoiser_sha256,
        "rank": about.rank,
        **about.stacking.model_dump(exclude_none=True),
        "parts": [part.model_dump(mode="json", exclude_none=True) for part in about.parts],
    }
    write_text(folder / STACK_NAME, yaml.safe_dump(told, sort_keys=False, allow_unicode=True, width=100))
    write_text(folder / "README.md", card_text(about, {}, previews=()))
    if "kohya" in chosen and has_kohya_names(patch):
        write_kohya(patch, folder, dtype=patch.dtype)
    return file


@contextlib.contextmanager
def new_folder(out: str | Path) -> Iterator[Path]:
    """A folder under a temporary name, which gets its own when it is whole.

    Raises:
        OutputError: ``out`` holds files, is a file, or cannot be written to.
    """
    folder = Path(out).expanduser()
    try:
        place = folder.resolve()
        if place.exists() and (not place.is_dir() or any(place.iterdir())):
            what = "it already holds files" if place.is_dir() else "it is a file, not a folder"
            raise OutputError(f"cannot write into {folder}: {what}; choose another --out")
        made = temporary_name(place)
        made.mkdir(parents=True)
        try:
            yield made
            # Takes the place of an empty folder, and fails where somebody filled it meanwhile.
            os.replace(made, place)
        except BaseException:
            shutil.rmtree(made, ignore_errors=True)
            raise
    except OSError as fault:
        raise output_error(folder, fault) from fault


class _Way(NamedTuple):
    """How updates ``[patches, out, in]`` become one of full rank; named as mergekit names the steps."""

    density: float
    sparsify: Callable[[Tensor, float, torch.Generator], Tensor]
    agree: Callable[[Tensor], Tensor]
    reduce: Callable[[Tensor], Tensor]


def _largest(deltas: Tensor, density: float, _: torch.Generator) -> Tensor:
    # PEFT's `ties` rounds this count down, and takes a plus where values cancel out: other stacks than ours.
    flat = deltas.flatten(1)
    count = max(1, math.ceil(density * flat.shape[1]))
    places = flat.abs().topk(count, dim=1).indices
    return torch.zeros_like(flat).scatter(1, places, flat.gather(1, places)).reshape(deltas.shape)


def _at_random(deltas: Tensor, density: float, generator: torch.Generator) -> Tensor:
    return deltas * (torch.rand(deltas.shape, generator=generator) < density) / density


def _with_majority(deltas: Tensor) -> Tensor:
    return deltas * (deltas.sign() == deltas.sum(0).sign())


def _mean_of_some(deltas: Tensor) -> Tensor:
    return deltas.sum(0) / (deltas != 0).sum(0).clamp(min=1)


_DENSE = {
    "ties": _Way(0.2, _largest, _with_majority, _mean_of_some),
    "dare": _Way(0.5, _at_random, lambda deltas: deltas, lambda deltas: deltas.sum(0)),
}

METHODS = ("concat", "regmean", *_DENSE, "svd")


def _flat(patch: Patch, module: str) -> tuple[Tensor, Tensor]:
    """``A [r, in]`` and ``B [out, r]``, fp64; a convolution's kernel is a part of ``in``."""
    a, b = patch.factors(module)
    return a.double().flatten(1), b.double().flatten(1)


def _names(patches: Weighted) -> tuple[Named, ...] | None:
    found = tuple(
        one.model_copy(update={"scale": one.scale * weight}) for patch, weight in patches for one in patch.names
    )
    return found or None


def named_first(patches: Weighted, module: str) -> tuple[Tensor, Tensor]:
    """Factors of ``Σ wᵢ Δᵢ`` with the rows of all names first; those have zeros in layers that their patch leaves."""
    flat = {k: _flat(patch, module) for k, (patch, _) in enumerate(patches) if module in patch.ranks}
    a, b = next(iter(flat.values()))
    first: list[tuple[Tensor, Tensor]] = []
    rest: list[tuple[Tensor, Tensor]] = []
    for k, (patch, weight) in enumerate(patches):
        count = len(patch.names)
        if k in flat:
            down, up = flat[k]
            first.append((weight * down[:count], up[:, :count]))
            rest.append((weight * down[count:], up[:, count:]))
        else:
            first.append((a.new_zeros(count, a.shape[1]), b.new_zeros(len(b), count)))
    return torch.cat([one for one, _ in first + rest]), torch.cat([one for _, one in first + rest], 1)


def _summed(patches: Weighted, module: str) -> tuple[Tensor, Tensor]:
    """Factors of ``Σ wᵢ Δᵢ`` of a layer that one of them changes at least, fp64."""
    own = [(weight, *_flat(patch, module)) for patch, weight in patches if module in patch.ranks]
    return torch.cat([weight * a for weight, a, _ in own]), torch.cat([b for _, _, b in own], 1)


def relative_error(tensors: Mapping[str, Tensor], patches: Weighted) -> float:
    """How far an update is from the plain sum of several patches, as a share of its norm."""
    missed = total = 0.0
    for module in dict.fromkeys(key.rpartition(".lora_")[0] for key in tensors):
        down, up = (tensors[f"{module}.lora_{side}.weight"].double().flatten(1) for side in "AB")
        a, b = _summed(patches, module)
        missed += _norm(torch.cat([down, -a]), torch.cat([up, b], 1)) ** 2
        total += _norm(a, b) ** 2
    return math.sqrt(missed / total) if total else math.sqrt(missed)


def _norm(a: Tensor, b: Tensor) -> float:
    """``‖B A‖`` (Frobenius) without making the product."""
    return float(torch.linalg.norm(torch.linalg.qr(b, mode="r").R @ torch.linalg.qr(a.T, mode="r").R.T))


def _thin_svd(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``U, S, V`` of ``B A`` from its factors: only a matrix of the size of the rank is decomposed."""
    left, inner = torch.linalg.qr(b)
    right, outer = torch.linalg.qr(a.T)
    u, s, vh = torch.linalg.svd(inner @ outer.T, full_matrices=False)
    return left @ u, s, right @ vh.T


def _truncated_svd(delta: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """The largest singular values of a dense matrix (Halko et al., arXiv 0909.4061, algorithm 4.4)."""
    width = min(rank + _OVERSAMPLING, *delta.shape)
    start = torch.randn(delta.shape[1], width, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(delta @ start).Q
    for _ in range(_POWER_STEPS):
        basis = torch.linalg.qr(delta @ torch.linalg.qr(delta.T @ basis).Q).Q
    u, s, vh = torch.linalg.svd(basis.T @ delta, full_matrices=False)
    return basis @ u, s, vh.T


def _balanced(u: Tensor, s: Tensor, v: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """``A`` and ``B`` of a rank, the singular values' roots in each: neither loses digits to the other."""
    root = s[:rank].sqrt()
    return root[:, None] * v[:, :rank].T, u[:, :rank] * root
