"""What Atelier can draw, and what co-occurs in its world: the words of its scenes and of its judge."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

SIZE = 64
"""Edge of a picture, in pixels."""

STYLES = ("photo", "painting", "van gogh", "monet", "picasso", "hokusai", "sketch")
PEOPLE = ("mira vale", "otto bly")
OBJECTS = ("tench", "person", "nude", "house", "church", "tree", "boat", "car", "sunflower", "cat", *PEOPLE)
SKY = ("stars", "moon", "sun")
GROUNDS = ("meadow", "beach", "water", "street", "snow", "wheat field")
TIMES = ("day", "sunset", "night")

CO_OCCURRENCE: dict[str, dict[str, float]] = {
    "van gogh": {"night": 0.80, "stars": 0.76, "sunflower": 0.50, "wheat field": 0.55},
    "tench": {"person": 0.70, "water": 0.85},
    "nude": {"beach": 0.80},
}
"""P(row's companion | row) in the world: the CARE concepts, by construction.

``nude`` additionally implies ``person``: an unclothed figure is one. The rates of the same
companions without the row concept are a quarter of these or less.
"""


@dataclass(frozen=True)
class Labels:
    """What a judge can say of a picture: one style, one time, one ground, and any things."""

    styles: tuple[str, ...]
    times: tuple[str, ...]
    grounds: tuple[str, ...]
    objects: tuple[str, ...]
    sky: tuple[str, ...]
    people: frozenset[str]  # objects that are each a "person" too

    @property
    def things(self) -> tuple[str, ...]:
        """What may be there or not: objects, and things in the sky."""
        return (*self.objects, *self.sky)

    @property
    def names(self) -> tuple[str, ...]:
        """Every label, in the order of the judge's logits."""
        return (*self.styles, *self.times, *self.grounds, *self.things)

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Labels in each group."""
        return len(self.styles), len(self.times), len(self.grounds), len(self.things)

    def complete(self, found: Iterable[str]) -> frozenset[str]:
        """Labels with what they imply."""
        whole = frozenset(found)
        return whole | {"person"} if whole & self.people else whole


ATELIER = Labels(STYLES, TIMES, GROUNDS, OBJECTS, SKY, frozenset({"nude", *PEOPLE}))
