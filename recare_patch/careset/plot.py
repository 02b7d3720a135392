"""The map of a CARE-set: which tokens lie together, and which were kept."""

from __future__ import annotations

import io
import os
from typing import TYPE_CHECKING, Any

from recare_patch.careset.care_set import CareSet
from recare_patch.careset.mining import token_map
from recare_patch.core import CareSetError, write_bytes

if TYPE_CHECKING:
    from recare_patch.careset.clip import Clip


def plot_care_set(care_set: CareSet, path: str | os.PathLike[str], clip: Clip) -> None:
    """Draw all tokens as a PNG, on a two-dimensional map of their text features.

    Colours are clusters, filled dots with bold names are kept, hollow grey-named ones dropped.

    Raises:
        CareSetError: the set has no tokens.
        OutputError: the file cannot be written.
    """
    tokens = care_set.tokens
    if not tokens:
        raise CareSetError(f"the CARE-set of '{care_set.concept}' has no tokens to draw")
    from matplotlib.figure import Figure

    positions = token_map(clip.text_features([token.text for token in tokens]), seed=care_set.seed).numpy()
    # Drawn on a figure of its own: pyplot would touch the caller's backend and open figures.
    figure = Figure(figsize=(9.6, 7.2), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    shown: set[str] = set()
    for token, place in zip(tokens, positions, strict=True):
        label, colour = "no cluster", "0.55"
        if token.cluster is not None:
            label, colour = f"cluster {token.cluster}", f"C{token.cluster % 10}"
        fill, weight, ink = (colour, "bold", "black") if token.kept else ("none", "normal", "0.5")
        # A label that begins with an underscore is not in the legend.
        name = f"_{label}" if label in shown else label
        axes.scatter(place[0], place[1], s=46, facecolors=fill, edgecolors=colour, label=name)
        shown.add(label)
        font: dict[str, Any] = {"fontsize": 9, "fontweight": weight, "color": ink}
        axes.annotate(token.text, place, xytext=(5, 4), textcoords="offset points", **font)
    # Dollar signs would be read as formulas.
    concept = str(care_set.concept).replace("$", r"\$")
    axes.set_title(f"CARE-set of {concept}: {len(care_set.words)} of {len(tokens)} mined tokens kept (filled)")
    axes.set(xticks=[], yticks=[])
    axes.margins(0.12)
    axes.legend(fontsize=8, loc="best", title="0 is nearest to the concept", title_fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_bytes(path, buffer.getvalue())
