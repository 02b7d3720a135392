"""What a run refuses before it draws anything, and a plan in the same words."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from recare_patch.careset import CareSet
from recare_patch.core import BaseModelError, RecipeError
from recare_patch.recipe import KINDS, METHODS, Concept, Recipe

if TYPE_CHECKING:
    from pathlib import Path

    from recare_patch.models import Layout


def check_files(recipe: Recipe) -> None:
    """Refuse faulty files that a recipe names: a CARE-set, word lists."""
    method = METHODS.get(recipe.method)
    if method.needs.care_set and recipe.care_set.file:
        from pathlib import Path

        CareSet.load(Path(recipe.care_set.file).expanduser())
    if method.needs.word_lists:
        method.word_lists(recipe)


def check_names(recipe: Recipe, tokenizer: Any, base: str) -> None:
    """Refuse names of which the text encoder would not read the end: something else would be erased.

    Args:
        recipe: of the run.
        tokenizer: of the base's first text encoder.
        base: what messages call the base.

    Raises:
        RecipeError: a concept's own prompt, or that of one of its aliases, is longer than what is read.
    """
    most = int(tokenizer.model_max_length) - 2
    also = [one for one in (recipe.subject, recipe.replace_with) if one is not None]
    every = [Concept(text=one, kind="object") if isinstance(one, str) else one for one in (*recipe.concepts, *also)]
    named = {one.text: one for one in every}
    for name, concept in named.items():
        # Of any kind: a plan does not know it yet.
        prompts = {prompt for kind in KINDS for prompt in concept.model_copy(update={"kind": kind}).name_prompts}
        tokens = max(len(tokenizer(prompt, add_special_tokens=False).input_ids) for prompt in prompts)
        if tokens > most:
            told = f"with its prompt it has {tokens} tokens, and the text encoder reads {most}"
            raise RecipeError(f"the concept '{name}' is too long for base '{base}': {told}")


def tokenizer_of(layout: Layout) -> Any:
    """The tokenizer of a base's first text encoder, without its weights.

    Raises:
        BaseModelError: it cannot be read.
    """
    import transformers

    place: Path = layout.folder / "tokenizer"
    try:
        return getattr(transformers, layout.index["tokenizer"][1]).from_pretrained(place, local_files_only=True)
    except Exception as fault:
        # transformers and tokenizers raise classes of their own on damaged files.
        reason = (str(fault).strip() or type(fault).__name__).splitlines()[0]
        raise BaseModelError(f"base {layout.name} cannot be loaded: {reason}") from fault
