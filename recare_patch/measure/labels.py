"""The labels that a CARE-concept competes with."""

from __future__ import annotations

_COCO = """
person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant,
stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe,
backpack, umbrella, handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball
bat, baseball glove, skateboard, surfboard, tennis racket, bottle, wine glass, cup, fork, knife,
spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut, cake, chair,
couch, potted plant, bed, dining table, toilet, tv, laptop, mouse, remote, keyboard, cell phone,
microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors, teddy bear, hair drier,
toothbrush
"""
COCO_CLASSES: tuple[str, ...] = tuple(name.strip() for name in " ".join(_COCO.split()).split(","))
"""The 80 object classes of COCO (Lin et al., arXiv 1405.0312), in their order."""

DISTRACTORS: tuple[str, ...] = (*COCO_CLASSES, "stars", "freshwater")
"""What the ReCARE paper's code lets a CARE-concept compete with: COCO and two words of its own."""
