"""The model card of a patch: what it erases, what it keeps, how to use it, where it ends."""

from recare_patch.publishing.card import PLACE, card_text, template
from recare_patch.publishing.figures import (
    EVIDENCE_END,
    EVIDENCE_START,
    claimed_figures,
    evidence_section,
    model_index,
    with_evidence,
)
from recare_patch.publishing.front_matter import (
    Identity,
    base_tag,
    concept_tag,
    front_matter,
    identity_in,
    is_unsafe,
    license_of,
)
from recare_patch.publishing.markdown import CARD_NAME, join_card, plain, split_card

__all__ = [
    "CARD_NAME",
    "EVIDENCE_END",
    "EVIDENCE_START",
    "PLACE",
    "Identity",
    "base_tag",
    "card_text",
    "claimed_figures",
    "concept_tag",
    "evidence_section",
    "front_matter",
    "identity_in",
    "is_unsafe",
    "join_card",
    "license_of",
    "model_index",
    "plain",
    "split_card",
    "template",
    "with_evidence",
]
