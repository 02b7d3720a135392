"""Patches that have a row for each name: several solved anew together, and single names scaled or taken out.

A closed form changes a layer by ``Σ_k B_k A_k`` with one row and one column for each name
(:mod:`recare_patch.erasure.methods.closed`), so that a name is scaled exactly by scaling its row. Two of them added are
not the closed form of both: each spares what its own names let it, and each moves what the other moves too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from recare_patch.careset import CareSet
from recare_patch.combine.stacking import Weighted, parts_of, plan_stack, relative_error
from recare_patch.core import PatchError, Progress, unknown_name
from recare_patch.erasure import PLAIN, erase
from recare_patch.patch import Named, Patch, PatchMetadata, PatchPart, Stacking, names_of
from recare_patch.recipe import Concept, MemoryOptions, Recipe, concept_key

SOLVED, SCALED = "solved", "scaled"
"""How a patch was made, in its header, beside the names of ``METHODS``."""


def closed_forms(patches: Weighted) -> tuple[Weighted, Weighted]:
    """Those that consist of names alone, and the others."""
    told = [(one, one[0].metadata) for one in patches]
    alone = [one for one, about in told if about is not None and _is_closed(one[0], about)]
    return alone, [one for one, _ in told if all(one is not other for other in alone)]


def _is_closed(patch: Patch, about: PatchMetadata) -> bool:
    parts = about.parts or (patch.as_part(1.0),)
    return bool(patch.names) and all(erased.method == "closed" for part in parts for erased in part.erased)


def solve(
    patches: Weighted,
    *,
    base: str | None = None,
    clip: str | None = None,
    device: str = "auto",
    memory: MemoryOptions | None = None,
    dtype: torch.dtype = torch.float32,
    progress: Progress | None = None,
) -> Patch:
    """The closed form of all names of several closed forms together, and the plain sum of other patches with it.

    What companions they guard is guarded for all. A name that several have is solved once, at the largest scale.

    Args:
        patches: patch and weight; two closed forms at least.
        base, clip: what they were made for, where it lies elsewhere than they say.
        device, memory: of the base, while its text encoder and values are read.
        dtype: of the result.
        progress: told of what the run does.

    Raises:
        PatchError: fewer than two of the patches are closed forms.
        IncompatiblePatchError: they were made for different bases.
    """
    alone, others = closed_forms(patches)
    if len(alone) < 2:
        told = ", ".join(patch.name for patch, _ in alone) or "none"
        raise PatchError(f"closed forms are solved together, and of these {len(patches)} patches they are: {told}")
    plan = plan_stack(patches)
    recipe = _union(alone, base, clip, memory)
    companions = list(dict.fromkeys(word for patch, _ in alone for word in _guarded(patch)))
    with TemporaryDirectory() as folder:
        made = erase(
            recipe,
            Path(folder) / SOLVED,
            device=device,
            progress=progress,
            preview=False,
            file_formats=("diffusers",),
            care_set=CareSet.of_words(recipe.concept, companions) if companions else None,
        ).patch
    scales: dict[str, float] = {}
    for patch, weight in alone:
        for one in patch.names:
            key = concept_key(one.name)
            scales[key] = max(scales.get(key, one.scale * weight), one.scale * weight, key=abs)
    made = _rescaled(made, [scales.get(concept_key(one.name), 1.0) for one in names_of(made)])
    found = plan_stack([(made, 1.0), *others]).stack(dtype=dtype)
    assert found.metadata is not None
    error = relative_error(found.tensors, plan.patches)
    about = plan.metadata(Stacking(method=SOLVED, relative_error=error)).model_copy(
        update={"names": found.metadata.names, "rank": found.metadata.rank, "alpha": found.metadata.alpha}
    )
    return Patch(found.tensors, about, "the stack")


def _guarded(patch: Patch) -> Iterator[str]:
    about = patch.metadata
    assert about is not None
    yield from about.care_words
    for part in about.parts or ():
        yield from part.care_words


def _union(patches: Weighted, base: str | None, clip: str | None, memory: MemoryOptions | None) -> Recipe:
    """One recipe for the concepts of several closed forms, by what their headers say."""
    concepts: dict[str, Concept] = {}
    instead: dict[str, str] = {}
    recipes = [about.parsed_recipe for patch, _ in patches if (about := patch.metadata) and about.recipe is not None]
    for patch, _ in patches:
        about = patch.metadata
        assert about is not None
        for erased in about.erased:
            plain = erased.as_concept()
            own = [one for one in patch.names if concept_key(one.concept) == concept_key(plain)]
            known = {concept_key(name) for name in plain.bare_names}
            other = [one.name for one in own if concept_key(one.name) not in known]
            before = concepts.get(concept_key(plain), plain)
            aliases = dict.fromkeys((*before.aliases, *other))
            concepts[concept_key(plain)] = Concept(text=before.text, kind=before.kind, aliases=tuple(aliases))
            if own and own[0].instead != PLAIN[plain.kind]:
                instead[before.text] = own[0].instead
    first, *also = concepts.values()
    options = dict(recipes[0].own) | {"hold": None} if recipes and recipes[0].own is not None else {}
    about = patches[0][0].metadata
    assert about is not None
    return Recipe(
        concept=first,
        also=tuple(also),
        method="closed",
        base=base or (recipes[0].base if recipes else about.base),
        clip=clip or (recipes[0].clip if recipes else None),
        adapter={"layers": about.layers},
        closed={**options, "instead": instead},
        memory=memory or MemoryOptions(),
    )


def _rescaled(patch: Patch, scales: list[float]) -> Patch:
    """A patch with its names' rows scaled; those at 0 are left out."""
    names = names_of(patch)
    rest = min(patch.ranks.values()) - len(names)
    keep = [k for k, scale in enumerate(scales) if scale] + list(range(len(names), len(names) + rest))
    if not keep:
        raise PatchError(f"no name of patch {patch.name} would be left")
    tensors = {}
    for module in patch.modules:
        a, b = patch.factors(module)
        by = torch.tensor([*scales, *[1.0] * rest], dtype=b.dtype)
        tensors[f"{module}.lora_A.weight"] = a[keep].contiguous()
        tensors[f"{module}.lora_B.weight"] = (b * by.reshape(1, -1, *[1] * (b.ndim - 2)))[:, keep].contiguous()
    left = tuple(
        one.model_copy(update={"scale": one.scale * scale}) for one, scale in zip(names, scales, strict=True) if scale
    )
    about = patch.metadata
    assert about is not None
    told = about.model_copy(update={"names": left or None, "rank": len(keep), "alpha": float(len(keep))})
    return Patch(tensors, told, patch.source)


def scale_names(patch: Patch, scales: Mapping[str, float]) -> Patch:
    """A patch with single names, or all names of a concept, at other strengths than they have in it.

    A name's row is scaled and nothing else, so every other name does what it did, to the bit.

    Args:
        patch: a closed form, or a stack in which there are some.
        scales: concept or name → factor; 0 takes it out.

    Raises:
        PatchError: the patch has no row for each name, or no name would be left.
        UnknownNameError: it has no such name.
    """
    names = names_of(patch)
    known = {concept_key(text): text for one in names for text in (one.name, one.concept)}
    for asked in scales:
        if concept_key(asked) not in known:
            raise unknown_name("name in this patch", asked, tuple(dict.fromkeys(known.values())))
    by = {concept_key(asked): float(scale) for asked, scale in scales.items()}
    # A name that is asked for goes before its concept.
    factors = [by.get(concept_key(one.name), by.get(concept_key(one.concept), 1.0)) for one in names]
    made = _rescaled(patch, factors)
    left, about = (made.metadata.names if made.metadata else None) or (), patch.metadata
    assert about is not None
    strengths: dict[str, float] = {}
    for one in left:
        strengths[concept_key(one.concept)] = max(strengths.get(concept_key(one.concept), 0.0), one.scale, key=abs)
    parts = tuple(part for whole in parts_of([(patch, 1.0)]) for part in _parts(whole, names, strengths))
    how = Stacking(method=SCALED, relative_error=relative_error(made.tensors, [(patch, 1.0)]))
    told = plan_stack([(patch, 1.0)]).metadata(how)
    title = " + ".join(dict.fromkeys(part.name for part in parts))
    kinds = {part.kind for part in parts}
    kind = (kinds.pop() if len(kinds) == 1 else "several") or "unknown"
    rank = min(made.ranks.values())
    same = {"parts": parts, "names": left or None, "concept": title, "kind": kind, "rank": rank, "alpha": float(rank)}
    return Patch(made.tensors, told.model_copy(update=same), f"{patch.source}, scaled")


def _parts(whole: PatchPart, names: tuple[Named, ...], strengths: Mapping[str, float]) -> Iterator[PatchPart]:
    """A part as it is, or one for each of its concepts that is left where these have names."""
    own = {concept_key(one.concept) for one in names}
    if not any(concept_key(one.concept) in own for one in whole.erased):
        yield whole
        return
    for one in whole.erased:
        if concept_key(one.concept) in strengths:
            scale = strengths[concept_key(one.concept)]
            yield PatchPart(name=one.concept, sha256=whole.sha256, scale=scale, **one.model_dump())
