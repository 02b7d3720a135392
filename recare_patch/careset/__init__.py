"""The CARE-set: benign concepts that co-occur with the erased one and must not go with it."""

from recare_patch.careset.building import build_care_set, concept_feature
from recare_patch.careset.care_set import CareSet, CareToken, names_concept
from recare_patch.careset.plot import plot_care_set
from recare_patch.careset.scoring import ConceptScore, guess_kind, score_concept

__all__ = [
    "CareSet",
    "CareToken",
    "ConceptScore",
    "build_care_set",
    "concept_feature",
    "guess_kind",
    "names_concept",
    "plot_care_set",
    "score_concept",
]
