"""Finding patches on the Hub, by what their cards say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from recare_patch.patch import TAG, base_tag, concept_tag
from recare_patch.recipe import Concept
from recare_patch.share.hub import check_reachable, client, one_line, talking

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo

_PROPERTIES = ["cardData", "downloads", "lastModified", "likes", "model-index", "private", "sha", "tags"]
_OWN_TAGS = {"text-to-image", "diffusers", "lora", "template:sd-lora", "concept-erasure", TAG}


@dataclass(frozen=True)
class Metric:
    """A figure as a card claims it; nobody has measured it again.

    Attributes:
        type: what was computed, such as "concept-rate".
        name: of the figure.
        value: under the patch.
    """

    type: str
    name: str
    value: float


@dataclass(frozen=True)
class Found:
    """A patch on the Hub, by its own account: all texts are its owner's, cleaned to be shown.

    Attributes:
        repo: OWNER/NAME.
        commit: the newest of its main branch.
        concepts: what it erases, as slugs: "van-gogh".
        base: id or name of the base.
        license: as the Hub calls it.
        tags: those that the other attributes do not tell.
        metrics: of its ``model-index``.
        downloads, likes: as the Hub counts them.
        modified: ISO date of the last commit.
        private: whether others cannot see it.
    """

    repo: str
    commit: str
    concepts: tuple[str, ...]
    base: str
    license: str
    tags: tuple[str, ...]
    metrics: tuple[Metric, ...]
    downloads: int
    likes: int
    modified: str
    private: bool

    def rates(self, *types: str) -> tuple[Metric, ...]:
        """Its figures of some types that are shares of pictures."""
        return tuple(one for one in self.metrics if one.type in types and 0 <= one.value <= 1)


def search(
    text: str | None = None,
    *,
    base: str | None = None,
    concept: str | None = None,
    tags: Sequence[str] = (),
    owner: str | None = None,
    limit: int = 20,
) -> tuple[Found, ...]:
    """Patches of this package on the Hub, the most downloaded first.

    Args:
        text: to be found in the repo's name.
        base: id or name of the base model.
        concept: what is erased, as one writes it.
        tags: that the patch must have, all of them.
        owner: of the repo.
        limit: at most so many.

    Raises:
        HubError: no connection.
        ConceptError: the concept is empty or too long.
    """
    if concept is not None:
        # Checked as a concept; which kind it is does not matter here.
        concept = Concept(text=concept, kind="object").text
    wanted = [TAG, *([base_tag(base)] if base else []), *([concept_tag(concept)] if concept else []), *tags]
    with talking("the search"):
        check_reachable()
        listed = list(
            client().list_models(
                filter=wanted, search=text, author=owner, sort="downloads", limit=limit, expand=_PROPERTIES
            )
        )
        return tuple(_found(one) for one in listed)


def _found(info: ModelInfo) -> Found:
    front: dict[str, Any] = info.card_data.to_dict() if info.card_data is not None else {}
    tags = [one_line(tag) for tag in info.tags or ()]
    linked = front.get("base_model")
    linked = linked[0] if isinstance(linked, list) and linked else linked
    base = one_line(linked) if isinstance(linked, str) else _plain_base(tags)
    concepts = tuple(tag.removeprefix("concept:") for tag in tags if tag.startswith("concept:"))
    known = {*_OWN_TAGS, base, *(tag for tag in tags if tag.partition(":")[1])}
    return Found(
        repo=one_line(info.id),
        commit=one_line(info.sha or ""),
        concepts=concepts,
        base=base,
        license=one_line(front.get("license") or ""),
        tags=tuple(tag for tag in tags if tag not in known),
        metrics=_metrics(info.model_index),
        downloads=int(info.downloads or 0),
        likes=int(info.likes or 0),
        modified=info.last_modified.date().isoformat() if info.last_modified else "",
        private=bool(info.private),
    )


def _plain_base(tags: Sequence[str]) -> str:
    """The base that is a plain tag; only the bundled one's name can be told from other tags."""
    return "atelier" if "atelier" in tags else "unknown"


def _metrics(index: Any) -> tuple[Metric, ...]:
    """Figures of a ``model-index``, which may be anything; what is not well-formed is passed over."""
    found = []
    for entry in index if isinstance(index, list) else ():
        results = entry.get("results") if isinstance(entry, dict) else None
        for result in results if isinstance(results, list) else ():
            metrics = result.get("metrics") if isinstance(result, dict) else None
            for one in metrics if isinstance(metrics, list) else ():
                value = one.get("value") if isinstance(one, dict) else None
                if isinstance(value, int | float) and not isinstance(value, bool):
                    found.append(Metric(one_line(one.get("type")), one_line(one.get("name")), float(value)))
    return tuple(found)
