"""The papers of the ways of stacking; an erasing method's file says its own."""

from __future__ import annotations

from recare_patch.recipe import METHODS, Paper, method_info

_STACKING = {
    "regmean": Paper(
        *("RegMean", "Jin et al.", "ICLR 2023", "2212.09849"),
        "Jin, Xisen and Ren, Xiang and Preotiuc-Pietro, Daniel and Cheng, Pengxiang",
        "Dataless Knowledge Fusion by Merging Weights of Language Models",
        "International Conference on Learning Representations",
    ),
    "ties": Paper(
        *("TIES", "Yadav et al.", "NeurIPS 2023", "2306.01708"),
        "Yadav, Prateek and Tam, Derek and Choshen, Leshem and Raffel, Colin and Bansal, Mohit",
        "{TIES}-Merging: Resolving Interference When Merging Models",
        "Advances in Neural Information Processing Systems",
    ),
    "dare": Paper(
        *("DARE", "Yu et al.", "ICML 2024", "2311.03099"),
        "Yu, Le and Yu, Bowen and Yu, Haiyang and Huang, Fei and Li, Yongbin",
        "Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch",
        "International Conference on Machine Learning",
    ),
}


def citation(method: str | None) -> Paper | None:
    """The paper of a method, of erasing or of stacking; ``None`` where it has none, such as a plain sum."""
    if method in METHODS:
        return method_info(method or "").paper
    return _STACKING.get(method or "")
