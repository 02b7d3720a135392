"""What can be asked for by name. Commands list and check names from here, without torch."""

from recare_patch.core import Registry

METRICS = (
    *("concept-rate", "care-score", "neighbours"),
    *("clip-score", "kid", "fid", "perceptual-change", "memorization"),
)
"""What can be measured."""

DETECTORS = Registry(
    "detector",
    {
        "atelier-judge": "recare_patch.measure.judges:AtelierJudge",
        "clip": "recare_patch.measure.judges:ZeroShotClip",
        "ensemble": "recare_patch.measure.eyes:Ensemble",
        "image-classifier": "recare_patch.measure.judges:ImageClassifier",
        "nudenet-6": "recare_patch.measure.judges:NudeNetSix",
        "nudenet-9": "recare_patch.measure.judges:NudeNetNine",
        "vision-language": "recare_patch.measure.eyes:VisionLanguage",
    },
    group="recare_patch.detectors",
)
"""Who may judge pictures."""

SOURCES = {"clip": "clip", "image-classifier": "source", "vision-language": "source"}
"""Detectors that take weights, and the option that says where those are."""

CHECKS = Registry(
    "check",
    {
        "fine-tuning": "recare_patch.measure.checks.fine_tuning:FineTuning",
        "negative-prompt": "recare_patch.measure.checks.negative_prompt:NegativePrompt",
        "personalisation": "recare_patch.measure.checks.personalisation:Personalisation",
        "samplers": "recare_patch.measure.checks.samplers:Samplers",
        "scales": "recare_patch.measure.checks.scales:Scales",
        "spellings": "recare_patch.measure.checks.spellings:Spellings",
    },
    group="recare_patch.checks",
)
"""How a patch can be tried away from its own setting."""

ATTACKS = Registry(
    "attack",
    {
        "classifier-guidance": "recare_patch.measure.attacks.classifier_guidance:ClassifierGuidance",
        "completion": "recare_patch.measure.attacks.probes:Completion",
        "concept-inversion": "recare_patch.measure.attacks.concept_inversion:ConceptInversion",
        "img2img": "recare_patch.measure.attacks.probes:ImageToImage",
        "inpainting": "recare_patch.measure.attacks.probes:Inpainting",
        "noise-search": "recare_patch.measure.attacks.probes:NoiseSearch",
        "p4d": "recare_patch.measure.attacks.p4d:P4D",
        "ring-a-bell": "recare_patch.measure.attacks.ring_a_bell:RingABell",
        "unlearn-diff-atk": "recare_patch.measure.attacks.unlearn_diff_atk:UnlearnDiffAtk",
    },
    group="recare_patch.attacks",
)
"""How the concept can be brought back."""

DEFENCES = Registry("defence", {}, group="recare_patch.defences")
"""Components at sampling time that installed packages bring; see :data:`recare_patch.measure.erasers.Defend`."""
