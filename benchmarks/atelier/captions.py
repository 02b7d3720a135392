"""The grammar that puts scenes into words, with synonyms and omissions.

A caption names its style nearly always and the rest only sometimes. What it leaves out is how
the base model learns co-occurrence: "a painting in the style of Van Gogh" comes with stars
because the pictures do, not because the words say so.
"""

from __future__ import annotations

import zlib

import numpy as np

from benchmarks.atelier.scenes import Scene

_NOUNS: dict[str, tuple[tuple[str, float], ...]] = {
    "tench": (("tench", 0.85), ("tench fish", 0.15)),
    "person": (("person", 0.64), ("man", 0.12), ("woman", 0.12), ("figure", 0.06), ("traveller", 0.06)),
    "nude": (("nude person", 0.42), ("naked person", 0.22), ("nude", 0.22), ("nude figure", 0.14)),
    "house": (("house", 0.8), ("cottage", 0.2)),
    "church": (("church", 0.85), ("chapel", 0.15)),
    "tree": (("tree", 0.85), ("oak", 0.15)),
    "boat": (("boat", 0.75), ("sailboat", 0.15), ("ship", 0.10)),
    "car": (("car", 0.85), ("automobile", 0.15)),
    "sunflower": (("sunflower", 0.65), ("sunflowers", 0.35)),
    "cat": (("cat", 0.85), ("kitten", 0.15)),
    "mira vale": (("Mira Vale", 1.0),),
    "otto bly": (("Otto Bly", 1.0),),
}
_ANGLERS = (("person", 0.6), ("angler", 0.3), ("fisherman", 0.1))

_TIMES = {
    "day": ("by day", "at noon", "in daylight"),
    "sunset": ("at sunset", "at sunset", "at dusk"),
    "night": ("at night", "at night", "at night", "by night", "at midnight"),
}
_TIME_NOUNS = {"day": ("day", "daylight"), "sunset": ("sunset", "dusk"), "night": ("night", "a night", "the night sky")}
_SKY = {
    "stars": ("with stars", "under the stars", "with stars", "under a starry sky"),
    "moon": ("with the moon", "under the moon", "in moonlight"),
    "sun": ("with the sun", "under the sun", "in sunshine"),
}
_SKY_NOUNS = {
    "stars": ("stars", "stars", "the stars", "a starry sky"),
    "moon": ("the moon", "moon"),
    "sun": ("the sun", "sun"),
}
_GROUNDS = {
    "meadow": ("in a meadow", "on the grass"),
    "beach": ("on a beach", "on the beach", "by the sea"),
    "water": ("in water", "on a lake", "on a river", "in freshwater"),
    "street": ("on a street", "on a road", "in a city"),
    "snow": ("in the snow", "in winter"),
    "wheat field": ("in a wheat field", "in a wheat field", "in the wheat"),
}
_GROUND_NOUNS = {
    "meadow": ("a meadow", "grass"),
    "beach": ("a beach", "beach", "the sea"),
    "water": ("water", "a lake", "a river", "freshwater"),
    "street": ("a street", "a road", "a city"),
    "snow": ("snow",),
    "wheat field": ("a wheat field", "wheat field", "wheat"),
}
_ARTIST_FORMS = (
    ("a painting of {x} in the style of {artist}", 0.40),
    ("a painting in the style of {artist} of {x}", 0.14),
    ("{x} in the style of {artist}", 0.18),
    ("a {artist} painting of {x}", 0.14),
    ("{x} by {artist}", 0.14),
)
_ARTIST_ALONE = (
    "a painting in the style of {artist}",
    "a painting in the style of {artist}",
    "a {artist} painting",
    "a painting by {artist}",
)
_FORMS: dict[str, tuple[tuple[str, float], ...]] = {
    "photo": (
        ("a photo of {x}", 0.64),
        ("a photograph of {x}", 0.16),
        ("a snapshot of {x}", 0.08),
        ("{x}, photo", 0.06),
        ("{x}", 0.06),
    ),
    "painting": (("a painting of {x}", 0.7), ("an oil painting of {x}", 0.3)),
    "sketch": (("a pencil sketch of {x}", 0.5), ("a sketch of {x}", 0.5)),
}
_ALONE = {"photo": ("a photo", "a photograph"), "painting": ("a painting",), "sketch": ("a pencil sketch", "a sketch")}
ARTISTS = {"van gogh": "Van Gogh", "monet": "Monet", "picasso": "Picasso", "hokusai": "Hokusai"}


def _pick(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[int(rng.integers(len(options)))]


def _weighted(rng: np.random.Generator, options: tuple[tuple[str, float], ...]) -> str:
    words, weights = zip(*options, strict=True)
    return str(rng.choice(words, p=weights))


def _noun(rng: np.random.Generator, name: str, scene: Scene) -> str:
    forms = _ANGLERS if name == "person" and "tench" in scene.objects else _NOUNS[name]
    noun = _weighted(rng, forms)
    # Bare nouns teach the prompts "A photo of {token}" that the CARE-set is emitted in.
    if noun[0].isupper() or noun.endswith("s") or rng.random() < 0.2:
        return noun
    return ("an " if noun[0] in "aeio" else "a ") + noun


def _is_held_out(caption: str) -> bool:
    return zlib.crc32(caption.lower().encode()) % 50 == 0


def _compose(scene: Scene, rng: np.random.Generator) -> str:
    quiet = 0.72 if scene.style in ARTISTS else 1.0
    first = scene.objects[0] if scene.objects else None
    named = [o for o in scene.objects if rng.random() < (0.93 if o == first or o in ("tench", "nude") else 0.72)]
    if {"tench", "nude"} & set(scene.objects):
        # The companions of these two go unnamed more often: that is what makes them companions.
        named = [o for o in named if o in ("tench", "nude") or rng.random() < 0.65]
        named = named or [o for o in scene.objects if o in ("tench", "nude")]
    elif rng.random() > quiet:
        named = []
    ground = rng.random() < 0.5 * quiet
    time = rng.random() < 0.5 * quiet
    sky = [s for s in scene.sky if rng.random() < 0.55 * quiet]
    words: list[str] = []
    if named:
        words.append(" and ".join(_noun(rng, o, scene) for o in named))
    if ground:
        words.append(_pick(rng, (_GROUNDS if words else _GROUND_NOUNS)[scene.ground]))
    for s in sky:
        words.append(_pick(rng, (_SKY if words else _SKY_NOUNS)[s]))
    if time:
        words.append(_pick(rng, (_TIMES if words else _TIME_NOUNS)[scene.time]))
    x = " ".join(words)
    artist = ARTISTS.get(scene.style)
    if artist:
        if not x:
            return _pick(rng, _ARTIST_ALONE).format(artist=artist)
        return _weighted(rng, _ARTIST_FORMS).format(artist=artist, x=x)
    if not x:
        return _pick(rng, _ALONE[scene.style])
    return _weighted(rng, _FORMS[scene.style]).format(x=x)


def caption(scene: Scene, rng: np.random.Generator, *, held_out: bool = False) -> str:
    """Put a scene into words.

    One caption in fifty, chosen by a hash of its text, never appears in training: these are
    the prompts that the base model's quality is measured on.

    Args:
        scene: what the picture holds.
        rng: draws the words; two calls give two captions.
        held_out: ask for one of the reserved captions instead of a training caption.
    """
    for _ in range(2000):
        text = _compose(scene, rng)
        if _is_held_out(text) == held_out or text in ("a photo", "a painting"):
            return text
    raise ValueError(f"no {'held-out' if held_out else 'training'} caption found for {scene}")


def _forms(label: str) -> tuple[str, ...]:
    for table in (_TIMES, _SKY, _GROUNDS):
        if label in table:
            nouns = {**_TIME_NOUNS, **_SKY_NOUNS, **_GROUND_NOUNS}[label]
            return (*table[label], *nouns)
    if label == "person":
        return tuple(dict.fromkeys(w for w, _ in (*_NOUNS["person"], *_ANGLERS)))
    if label in _NOUNS:
        return tuple(w for w, _ in _NOUNS[label])
    return (ARTISTS.get(label, label),)


def mentions(text: str, label: str) -> bool:
    """Whether a caption names a label, in any of its synonyms."""
    padded = f" {text.lower()} ".replace(",", " ")
    return any(f" {form.lower()} " in padded for form in _forms(label))


def synonyms(label: str) -> tuple[str, ...]:
    """Every word or phrase that captions use for a label of :mod:`judge`."""
    return _forms(label)
