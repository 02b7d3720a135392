"""What Atelier can draw, and what co-occurs in its world: the words of its scenes and of its judge."""

from __future__ import annotations

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
