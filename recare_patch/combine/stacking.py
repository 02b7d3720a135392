"""Several patches into one: a stack is a patch file like any other.

Notation: patch i changes a layer's weight by ``Δᵢ = Bᵢ Aᵢ`` (``A [rᵢ, in]``, ``B [out, rᵢ]``, the
scale ``alpha / rank`` already in ``B``), and has the weight ``wᵢ`` in the stack. The stack that all
patches applied at once make is ``Σ wᵢ Δᵢ``, and ``concat`` holds exactly that: ranks add up, nothing
is lost. The other methods give fewer ranks or less interference for a difference, which is measured.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from torch import Tensor

import recare_patch
from recare_patch.combine.regmean import Moments
from recare_patch.core import LOCK_NAME, PatchError, claim_folder, file_sha256, unknown_name, write_text
from recare_patch.patch import (
    FORMATS,
    STACK_NAME,
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

logger = logging.getLogger(__name__)

METHODS = ("concat", "regmean", "ties", "dare", "svd")
DENSITIES = {"ties": 0.2, "dare": 0.5}
"""Share of the values that a method keeps where none is given: TIES keeps a fifth in its paper."""

PULL = -0.1
"""A cosine between two updates below this is warned of: each undoes a part of the other."""

_WHOLE = ("concat", "regmean")
"""Methods whose stacks have all the ranks of their parts."""

_WORK = ".run"
_SEVERAL = "several"
_UNKNOWN = "unknown"
_OVERSAMPLING, _POWER_STEPS = 16, 4


def stack(
    patches: Sequence[tuple[Patch, float]],
    *,
    method: str = "concat",
    rank: int | None = None,
    density: float | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    moments: Moments | None = None,
) -> Patch:
    """One patch that does what several do together.

    Every module of the result has the same rank (diffusers misreads files of mixed ranks), zeros fill
    up those that need less. Its parts are listed in its metadata, those of stacks with their scales
    multiplied; ``metadata.stacking.relative_error`` says how far it is from the plain sum.

    Args:
        patches: patch and weight; weights may be negative, ranks and layers may differ.
        method: ``concat``: all ranks side by side, exact. ``regmean``: each part as it is on what it
            erases, and as little as possible elsewhere, from what layers read (:mod:`regmean`;
            Jin et al., arXiv 2212.09849); ranks as in ``concat``. ``svd``: the sum cut to ``rank`` by its
            singular values. ``ties``: the largest values of each update, those that agree with the
            majority's sign, averaged (Yadav et al., arXiv 2306.01708, here layer by layer). ``dare``:
            values dropped at random, the rest rescaled, summed (Yu et al., arXiv 2311.03099). The last
            two are cut to ``rank`` as well, since what they make has full rank.
        rank: of the result; for ``concat`` and ``regmean`` the sum of ranks by default, else the largest
            of the patches' ranks.
        density: share of the values that ``ties`` (0.2) and ``dare`` (0.5) keep.
        seed: of ``dare``'s draw and of the randomised decomposition.
        dtype: of the result, in which its error is measured.
        moments: of these patches, in this order; ``regmean`` needs them.

    Returns:
        The stack, on the CPU.

    Raises:
        UnknownNameError: for another method.
        PatchError: no patch, a weight that is not finite, a rank or density out of range, or a value
            that does not fit into the dtype.
        IncompatiblePatchError: the patches were made for different bases or shapes.

    Example:
        >>> both = stack([(van_gogh, 1.0), (nudity, 0.8)])  # doctest: +SKIP
        >>> save_stack(both, "both")  # doctest: +SKIP
    """
    chosen = check_stacking(patches, method=method, rank=rank, density=density)
    if (moments is not None) != (method == "regmean"):
        raise PatchError(
            "'regmean' needs what the layers read (see recare_patch.combine.regmean)"
            if moments is None
            else f"what layers read is for 'regmean', and '{method}' takes none"
        )
    known = check_together(patches)
    kept = density if density is not None else DENSITIES.get(method)
    modules = tuple(dict.fromkeys(module for patch, _ in patches for module in patch.modules))
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    missed = total = 0.0
    for module in modules:
        a, b = _summed(patches, module)
        if method == "concat":
            down, up = a, b
        elif moments is not None:
            down, up = _regressed(patches, module, moments), b
        elif method == "svd":
            down, up = _balanced(*_thin_svd(a, b), chosen)
        else:
            deltas = _deltas(patches, module)
            assert kept is not None
            dense = _ties(deltas, kept) if method == "ties" else _dare(deltas, kept, generator)
            down, up = _balanced(*_truncated_svd(dense, chosen, generator), chosen)
        down, up = (_padded(down, chosen, 0).to(dtype), _padded(up, chosen, 1).to(dtype))
        missed += _norm(torch.cat([down.double(), -a]), torch.cat([up.double(), b], 1)) ** 2
        total += _norm(a, b) ** 2
        shape = next(patch for patch, _ in patches if module in patch.ranks).factors(module)[0].shape[1:]
        ones = (1,) * (len(shape) - 1)
        tensors[f"{module}.lora_A.weight"] = down.reshape(chosen, *shape).contiguous()
        tensors[f"{module}.lora_B.weight"] = up.reshape(up.shape[0], chosen, *ones).contiguous()
    error = math.sqrt(missed / total) if total else math.sqrt(missed)
    if not math.isfinite(error):
        raise PatchError(
            f"a value of this stack does not fit into {str(dtype).removeprefix('torch.')}: "
            "use smaller scales, or fp32"
        )
    how = Stacking(
        method=method,
        density=kept,
        seed=seed,
        relative_error=error,
        kept_weight=moments.kept_weight if moments is not None else None,
    )
    return Patch(tensors, _metadata(patches, known, how, chosen), "the stack")


def check_stacking(
    patches: Sequence[tuple[Patch, float]],
    *,
    method: str,
    rank: int | None = None,
    density: float | None = None,
) -> int:
    """Whether patches can be stacked so; arguments and errors are those of :func:`stack`.

    Returns:
        The rank that the stack will have.
    """
    if method not in METHODS:
        raise unknown_name("way of stacking", method, METHODS)
    check_together(patches)
    if density is not None and (method not in DENSITIES or not 0 < density <= 1):
        told = f"got {density!r}" if method in DENSITIES else f"and '{method}' takes none"
        raise PatchError(f"a density is a share above 0 and at most 1 for {' and '.join(DENSITIES)}, {told}")
    modules = dict.fromkeys(module for patch, _ in patches for module in patch.modules)
    full = max(_sum_of_ranks(patches, module) for module in modules)
    largest = max(r for patch, _ in patches for r in patch.ranks.values())
    whole = method in _WHOLE
    chosen = rank if rank is not None else (full if whole else largest)
    if chosen < 1 or (whole and chosen < full):
        raise PatchError(
            f"the rank of this stack must be at least {full if whole else 1}, got {chosen}"
            + ("; 'svd' makes smaller ones" if whole else "")
        )
    return chosen


# ------------------------------------------------------------------------ arithmetic


def _flat(patch: Patch, module: str) -> tuple[Tensor, Tensor]:
    """``A [r, in]`` and ``B [out, r]``, fp64; a convolution's kernel is a part of ``in``."""
    a, b = patch.factors(module)
    return a.double().flatten(1), b.double().flatten(1)


def _sum_of_ranks(patches: Sequence[tuple[Patch, float]], module: str) -> int:
    return sum(patch.ranks.get(module, 0) for patch, _ in patches)


def _summed(patches: Sequence[tuple[Patch, float]], module: str) -> tuple[Tensor, Tensor]:
    """Factors of ``Σ wᵢ Δᵢ``: ``[w₁A₁; w₂A₂; …]`` and ``[B₁ | B₂ | …]``."""
    weighted = [(w, *_flat(patch, module)) for patch, w in patches if module in patch.ranks]
    return torch.cat([w * a for w, a, _ in weighted]), torch.cat([b for _, _, b in weighted], 1)


def _regressed(patches: Sequence[tuple[Patch, float]], module: str, moments: Moments) -> Tensor:
    """``[w₁A₁′; w₂A₂′; …]``, in the order of :func:`_summed`."""
    return torch.cat([patches[k][1] * a for k, a in moments.solve(module).items()])


def _deltas(patches: Sequence[tuple[Patch, float]], module: str) -> Tensor:
    """``wᵢ Δᵢ`` of all patches that have the layer, ``[patches, out, in]``, fp64."""
    found = []
    for patch, w in patches:
        if module in patch.ranks:
            a, b = _flat(patch, module)
            found.append(w * (b @ a))
    return torch.stack(found)


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


def _padded(factor: Tensor, rank: int, axis: int) -> Tensor:
    shape = list(factor.shape)
    shape[axis] = rank - shape[axis]
    return torch.cat([factor, factor.new_zeros(shape)], axis)


def _ties(deltas: Tensor, density: float) -> Tensor:
    """Trim, elect signs, average what agrees; ``[patches, out, in]`` to ``[out, in]``."""
    flat = deltas.flatten(1)
    count = max(1, math.ceil(density * flat.shape[1]))
    places = flat.abs().topk(count, dim=1).indices
    trimmed = torch.zeros_like(flat).scatter(1, places, flat.gather(1, places))
    agrees = trimmed.sign() == trimmed.sum(0).sign()
    agrees &= trimmed != 0
    merged = (trimmed * agrees).sum(0) / agrees.sum(0).clamp(min=1)
    return merged.reshape(deltas.shape[1:])


def _dare(deltas: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Drop each value with probability ``1 − density``, divide the rest by ``density``, sum."""
    kept = torch.rand(deltas.shape, generator=generator) < density
    return (deltas * kept / density).sum(0)


# ------------------------------------------------------------------------ metadata and files


def _common(values: Sequence[str]) -> str:
    return values[0] if len(set(values)) == 1 else _SEVERAL


def _parts(patches: Sequence[tuple[Patch, float]]) -> tuple[PatchPart, ...]:
    parts: list[PatchPart] = []
    for patch, scale in patches:
        inner = patch.metadata.parts if patch.metadata else None
        if inner:
            parts += [part.model_copy(update={"scale": part.scale * scale}) for part in inner]
        else:
            parts.append(patch.as_part(float(scale)))
    return tuple(parts)


def _metadata(
    patches: Sequence[tuple[Patch, float]], known: PatchMetadata | None, how: Stacking, rank: int
) -> PatchMetadata:
    told = [patch.metadata for patch, _ in patches if patch.metadata is not None]
    parts = _parts(patches)
    return PatchMetadata(
        versions={"recare-patch": recare_patch.__version__, "torch": torch.__version__},
        base=known.base if known else _UNKNOWN,
        base_family=known.base_family if known else _UNKNOWN,
        base_denoiser_sha256=known.base_denoiser_sha256 if known else _UNKNOWN,
        prediction_type=known.prediction_type if known else _UNKNOWN,
        concept=" + ".join(dict.fromkeys(part.name for part in parts)),
        kind=_common([one.kind for one in told]) if told else _UNKNOWN,
        method="stack",
        layers=_common([one.layers for one in told]) if told else _UNKNOWN,
        rank=rank,
        alpha=float(rank),
        seed=how.seed,
        parts=parts,
        stacking=how,
        base_text_encoders_sha256=known.base_text_encoders_sha256 if known else None,
    )


def save_stack(patch: Patch, folder: str | Path, *, file_formats: Sequence[str] = FORMATS) -> Path:
    """Write a stack's folder: ``stack.yaml``, a card and, last, the weights in the dtype they have.

    Args:
        patch: what :func:`stack` returned.
        folder: absent or empty.
        file_formats: names of :data:`FORMATS`; "diffusers" must be among them, "kohya"
            adds a file for A1111 and ComfyUI.

    Returns:
        The weights file.

    Raises:
        PatchError: the patch is no stack, or "diffusers" is not among the formats.
        UnknownNameError: for another format.
        OutputError: the folder is in use, holds files, or cannot be written to.
    """
    about = patch.metadata
    if about is None or not about.parts or about.stacking is None:
        raise PatchError(f"{patch.name} is no stack: stack patches before they are saved as one")
    chosen = check_formats(file_formats)
    folder = Path(folder)
    with claim_folder(folder, resumable=False), _emptied_on_failure(folder):
        # Written apart and moved at the end, since its hash goes into a file that comes before it.
        weights = patch.save(folder / _WORK, patch.dtype)
        told = {
            "sha256": file_sha256(weights),
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
        # The weights come last: a folder that has them is a whole patch.
        file = weights.replace(folder / weights.name)
        weights.parent.rmdir()
    return file


@contextlib.contextmanager
def _emptied_on_failure(folder: Path) -> Iterator[None]:
    """Leave nothing of a stack that could not be written whole; the folder was claimed empty."""
    try:
        yield
    except BaseException:
        for entry in folder.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry, ignore_errors=True)
            elif entry.name != LOCK_NAME:
                with contextlib.suppress(OSError):
                    entry.unlink()
        raise


# ------------------------------------------------------------------------ interference


@dataclass(frozen=True)
class LayerInterference:
    """How two patches meet in one layer.

    Attributes:
        first, second: names of the patches.
        module: the layer.
        cosine: between their weighted updates: 1 the same direction, −1 each undoes the other.
        overlap_in, overlap_out: of the spaces that they read and write: the mean of cos² of the
            principal angles (Björck and Golub, 1973), from 0 (orthogonal) to 1 (the smaller lies in the
            larger).
    """

    first: str
    second: str
    module: str
    cosine: float
    overlap_in: float
    overlap_out: float


@dataclass(frozen=True)
class Interference:
    """How patches meet.

    Attributes:
        layers: each pair of patches in each layer that both change.
    """

    layers: tuple[LayerInterference, ...]

    def worst(self, count: int = 5) -> tuple[LayerInterference, ...]:
        """The layers with the lowest cosines, the lowest first."""
        return tuple(sorted(self.layers, key=lambda one: one.cosine)[:count])

    @property
    def in_short(self) -> str:
        """One sentence with the range of the cosines and the largest overlaps; empty if none is shared."""
        if not self.layers:
            return ""
        cosines = [one.cosine for one in self.layers]
        reads, writes = (max(getattr(one, f"overlap_{way}") for one in self.layers) for way in ("in", "out"))
        return (
            f"The parts meet with cosines of {min(cosines):.2f} to {max(cosines):.2f}, layer by layer; what "
            f"they read overlaps by up to {reads:.2f}, what they write by up to {writes:.2f}."
        )

    @property
    def warnings(self) -> tuple[str, ...]:
        """A sentence for each pair that pulls against each other somewhere."""
        found = []
        for first, second in dict.fromkeys((one.first, one.second) for one in self.layers):
            shared = [one for one in self.layers if (one.first, one.second) == (first, second)]
            against = [one for one in shared if one.cosine < PULL]
            if against:
                low = min(against, key=lambda one: one.cosine)
                found.append(
                    f"{first} and {second} pull against each other in {len(against)} of the {len(shared)} "
                    f"layers that both change, most in '{low.module}' (cosine {low.cosine:.2f}): each undoes "
                    "a part of the other"
                )
        return tuple(found)


def interference(patches: Sequence[tuple[Patch, float]]) -> Interference:
    """Measure how patches meet, layer by layer, from their factors.

    Args:
        patches: patch and weight; a negative weight turns its cosines round.

    Raises:
        PatchError, IncompatiblePatchError: as :func:`stack`.
    """
    check_together(patches)
    names = [patch.name for patch, _ in patches]
    # Two parts of one name are told apart by their places.
    names = [f"{n} ({k})" if names.count(n) > 1 else n for k, n in enumerate(names, start=1)]
    found = []
    for module in dict.fromkeys(module for patch, _ in patches for module in patch.modules):
        spaces = {
            k: _thin_svd(*_flat(patch, module))
            for k, (patch, _) in enumerate(patches)
            if module in patch.ranks
        }
        for i, j in itertools.combinations(spaces, 2):
            (u, s, v), (other_u, other_s, other_v) = spaces[i], spaces[j]
            out, into = u.T @ other_u, v.T @ other_v
            size = float(s.norm() * other_s.norm()) * abs(patches[i][1] * patches[j][1])
            dot = float((s[:, None] * out * other_s * into).sum()) * patches[i][1] * patches[j][1]
            rows, columns = _used(s), _used(other_s)
            smaller = max(1, min(rows, columns))
            found.append(
                LayerInterference(
                    names[i],
                    names[j],
                    module,
                    dot / size if size else 0.0,
                    float(into[:rows, :columns].square().sum()) / smaller,
                    float(out[:rows, :columns].square().sum()) / smaller,
                )
            )
    return Interference(tuple(found))


def _used(s: Tensor) -> int:
    """Number of singular values that are not rounding."""
    return int((s > 1e-9 * s[0]).sum()) if float(s[0]) > 0 else 0
