"""The map of a CARE-set: which tokens lie together, and which were kept."""

from __future__ import annotations

import io
import os
from typing import TYPE_CHECKING

from recare_patch.careset.care_set import CareSet
from recare_patch.careset.clustering import token_map
from recare_patch.core import CareSetError, write_bytes

if TYPE_CHECKING:
    from recare_patch.careset.clip import Clip


def plot_care_set(care_set: CareSet, path: str | os.PathLike[str], clip: Clip) -> None:
    """Draw all tokens on their two-dimensional map as a PNG.

    Colours are clusters, filled dots with bold names are kept, hollow grey-named ones dropped.

    Args:
        care_set: what to draw.
        path: the picture's file.
        clip: gives the text features that the map is made from.

    Raises:
        CareSetError: the set has no tokens.
        OutputError: the file cannot be written.
    """
    tokens = care_set.tokens
    if not tokens:
        raise CareSetError(f"the CARE-set of '{care_set.concept}' has no tokens to draw")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    positions = token_map(clip.text_features([token.text for token in tokens]), seed=care_set.seed).numpy()
    # Drawn on a figure of its own: pyplot would touch the caller's backend and open figures.
    figure = Figure(figsize=(9.6, 7.2), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    shown: list[str] = []
    for token, (x, y) in zip(tokens, positions, strict=True):
        label = "no cluster" if token.cluster is None else f"cluster {token.cluster}"
        colour = "0.55" if token.cluster is None else f"C{token.cluster % 10}"
        axes.scatter(
            [x],
            [y],
            s=46,
            marker="o",
            facecolors=colour if token.kept else "none",
            edgecolors=colour,
            label=label if label not in shown else None,
        )
        shown.append(label)
        axes.annotate(
            token.text,
            (x, y),
            xytext=(5, 4),
            textcoords="offset points",
            fontsize=9,
            fontweight="bold" if token.kept else "normal",
            color="black" if token.kept else "0.5",
        )
    kept = len(care_set.words)
    # Dollar signs would be read as formulas.
    name = str(care_set.concept).replace("$", r"\$")
    axes.set_title(f"CARE-set of {name}: {kept} of {len(tokens)} mined tokens kept (filled)")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.margins(0.12)
    axes.legend(fontsize=8, loc="best", title="0 is nearest to the concept", title_fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_bytes(path, buffer.getvalue())
