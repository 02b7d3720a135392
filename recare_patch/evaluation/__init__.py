"""What an erasure took and what it left, in numbers."""

from recare_patch.evaluation.care_score import care_hits, care_score
from recare_patch.evaluation.intervals import wilson_interval
from recare_patch.evaluation.labels import COCO_CLASSES, DISTRACTORS

__all__ = ["COCO_CLASSES", "DISTRACTORS", "care_hits", "care_score", "wilson_interval"]
