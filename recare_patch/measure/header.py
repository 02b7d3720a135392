"""What a patch says of itself, held against its own recipe, its tensors and its base; and two weight files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from recare_patch.careset import CareSet
from recare_patch.core import NoMatchingModuleError, RecarePatchError
from recare_patch.models import BaseModel, adapted, full_name, target_modules
from recare_patch.patch import FORMAT_VERSION, Erased, Patch, PatchMetadata
from recare_patch.recipe import KINDS, LAYER_SETS, METHODS, TEXT_LAYER_SETS, Recipe, concept_key


def header_faults(patch: Patch) -> list[str]:
    """Where the header of a patch contradicts the recipe in it, its parts, or the tensors."""
    told = patch.metadata
    assert told is not None
    ranks = sorted(set(patch.ranks.values()))
    found = []
    if told.format_version != FORMAT_VERSION:
        found.append(f"it has format {told.format_version}, and there is {FORMAT_VERSION}")
    if ranks[-1] != told.rank or (told.parts is None and ranks != [told.rank]):
        found.append(f"it says rank {told.rank}, and the tensors have {' and '.join(map(str, ranks[:4]))}")
    found += _of_stack(told) if told.recipe is None else _of_run(told, told.parsed_recipe)
    encoders = {part for part in patch.components if part.startswith("text_encoder")}
    if encoders != set(told.base_text_encoders_sha256 or {}) & set(patch.components):
        found.append(f"it names no hash of the {' and '.join(sorted(encoders))} that it changes")
    return found


def _of_run(told: PatchMetadata, recipe: Recipe) -> Iterator[str]:
    pairs = {
        "kind": (told.kind, recipe.concept.kind),
        "method": (told.method, recipe.method),
        "layers": (told.layers, recipe.adapter.layers),
        "rank": (told.rank, recipe.adapter.rank),
        "alpha": (told.alpha, recipe.adapter.alpha),
        "seed": (told.seed, recipe.seed),
    }
    for what, (header, own) in pairs.items():
        if header != own:
            yield f"it says {what} '{header}', and its recipe '{own}'"
    if not _same_base(told.base, recipe.base):
        yield f"it says base '{told.base}', and its recipe '{recipe.base}'"
    in_text = recipe.adapter.layers in TEXT_LAYER_SETS
    if in_text != (told.base_text_encoders_sha256 is not None):
        yield f"its recipe's layers '{recipe.adapter.layers}' are {'' if in_text else 'not '}those of a text encoder"
    own = {concept_key(one.concept): one for one in Erased.by(recipe, [()] * len(recipe.concepts))}
    names = told.concepts or (Erased(concept=told.concept, kind=told.kind, method=told.method),)
    listed = {concept_key(one.concept): one for one in names}
    if missing := [one.concept for key, one in own.items() if key not in listed] if told.concepts else []:
        yield f"it does not list '{missing[0]}', which its recipe erases"
    wrong = [one.concept for key, one in own.items() if key in listed and listed[key].kind not in (one.kind, None)]
    if wrong:
        yield f"it gives '{wrong[0]}' another kind than its recipe"
    if recipe.continue_from is None:
        if told.concepts and len(listed) > len(own):
            yield f"it lists {len(listed)} concepts, and its recipe erases {len(own)}"
        if told.concept != recipe.title:
            yield f"it says concept '{told.concept}', and its recipe '{recipe.title}'"
    elif not all(one.concept in told.concept for one in own.values()):
        yield f"it says concept '{told.concept}', and its recipe '{recipe.title}'"
    yield from _of_care_set(told, recipe)


def _of_care_set(told: PatchMetadata, recipe: Recipe) -> Iterator[str]:
    if told.care_set is None:
        return
    try:
        care = CareSet.from_json(told.care_set)
    except RecarePatchError as fault:
        yield f"its CARE-set is none: {fault}"
        return
    if concept_key(care.concept) not in {concept_key(one.text) for one in recipe.concepts}:
        yield f"its CARE-set is one of '{care.concept.text}', and its recipe erases '{recipe.title}'"


def _same_base(told: str, source: str) -> bool:
    """Whether a base's id is the one that loading this source gives; another machine's path may be a link."""
    path = Path(source)
    if told in (source, path.name, path.stem) or told.casefold() == source.casefold() == "atelier":
        return True
    return len(path.parts) > 1 and "/" not in told and told != "atelier" and (path.is_absolute() or len(path.parts) > 2)


def _of_stack(told: PatchMetadata) -> Iterator[str]:
    parts = told.parts or ()
    names = " + ".join(dict.fromkeys(part.name for part in parts))
    if told.concept != names:
        yield f"it says concept '{told.concept}', and its parts are '{names}'"
    if told.method != "stack" or told.stacking is None:
        yield f"it says method '{told.method}' of a stack"
    kinds = {part.kind for part in parts if part.concept is not None}
    if told.kind in KINDS and kinds - {told.kind}:
        yield f"it says kind '{told.kind}', and its parts are of {len(kinds)}"


def layer_faults(patch: Patch, base: BaseModel) -> list[str]:
    """Where the layers that a patch changes are not those of the set that it names, in this base."""
    told = patch.metadata
    assert told is not None
    if told.layers not in LAYER_SETS:
        # A stack of several sets, or of LoRAs that name none.
        return [] if told.parts else [f"it names layers '{told.layers}', and there are {', '.join(LAYER_SETS)}"]
    try:
        wanted = {
            full_name(part, name)
            for part, network in adapted(base, told.layers).items()
            for name in target_modules(network, told.layers)
        }
    except NoMatchingModuleError as fault:
        return [str(fault)]
    found, have = [], set(patch.modules)
    if extra := sorted(have - wanted):
        found.append(f"{len(extra)} of its modules are no '{told.layers}', first '{extra[0]}'")
    if told.parts is None and (missing := sorted(wanted - have)):
        found.append(f"it lacks {len(missing)} of the '{told.layers}', first '{missing[0]}'")
    for what, (header, own) in {
        "base family": (told.base_family, base.family),
        "prediction type": (told.prediction_type, base.prediction_type),
    }.items():
        if header != own:
            found.append(f"it says {what} '{header}', and the base's is '{own}'")
    if told.method not in METHODS and told.parts is None:
        found.append(f"it names a method '{told.method}' that this version does not know")
    return found


def update_difference(one: Patch, other: Patch) -> tuple[float, str]:
    """How far apart the updates ``B A`` of two patches are, relative to the norm of the first, and where most.

    In float64, whatever the factors are: [B, −B′] [A; A′] by a QR decomposition of each side, so that no weight of the
    base's size is made. Layers that one of them lacks count as changed by it alone.
    """
    worst = (0.0, "")
    for module in dict.fromkeys((*one.modules, *other.modules)):
        pairs = []
        for patch, sign in ((one, 1.0), (other, -1.0)):
            if f"{module}.lora_A.weight" in patch.tensors:
                a, b = (factor.double().flatten(1) for factor in patch.factors(module))
                pairs.append((a, sign * b))
        if len({(a.shape[1], b.shape[0]) for a, b in pairs}) > 1:
            return float("inf"), module
        size = _norm(*pairs[0])
        apart = _norm(torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs], 1))
        share = apart / size if size > 0 else (0.0 if apart == 0 else float("inf"))
        worst = max(worst, (share, module))
    return worst


def _norm(a: torch.Tensor, b: torch.Tensor) -> float:
    """‖B A‖, from the triangles of both."""
    rows, columns = (torch.linalg.qr(factor, mode="r").R for factor in (a.T, b))
    return float((columns @ rows.T).norm())
