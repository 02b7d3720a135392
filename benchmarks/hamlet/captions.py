"""Natural captions: sentences with verbs, adjectives and places in changing order, and some tags.

What a caption leaves out is how the base learns co-occurrence, as in Atelier; here most words beside the
labels' own say nothing that can be seen.
"""

from __future__ import annotations

import re
import zlib

import numpy as np

from benchmarks.hamlet.scenes import Scene

Weighted = tuple[tuple[str, float], ...]

_NOUNS: dict[str, Weighted] = {
    "tench": (("tench", 0.86), ("tench fish", 0.14)),
    "nude": (("nude person", 0.4), ("naked person", 0.2), ("nude", 0.26), ("nude figure", 0.14)),
    "man": (("man", 0.54), ("person", 0.3), ("gentleman", 0.06), ("fellow", 0.05), ("traveller", 0.05)),
    "woman": (("woman", 0.56), ("person", 0.3), ("lady", 0.09), ("traveller", 0.05)),
    "lighthouse": (("lighthouse", 0.88), ("beacon", 0.12)),
    "windmill": (("windmill", 0.88), ("mill", 0.12)),
    "horse": (("horse", 0.8), ("pony", 0.12), ("mare", 0.08)),
    "dog": (("dog", 0.78), ("hound", 0.1), ("puppy", 0.12)),
    "bridge": (("bridge", 0.86), ("viaduct", 0.14)),
    "umbrella": (("umbrella", 0.86), ("parasol", 0.14)),
    "lantern": (("lantern", 0.86), ("lamp", 0.14)),
    "balloon": (("balloon", 0.64), ("hot air balloon", 0.36)),
    "bench": (("bench", 0.9), ("wooden seat", 0.1)),
    "bird": (("bird", 0.8), ("robin", 0.12), ("songbird", 0.08)),
    "tent": (("tent", 0.9), ("camp", 0.1)),
}
_ANGLERS: Weighted = (("man", 0.5), ("person", 0.22), ("angler", 0.16), ("fisherman", 0.12))

_ADJECTIVES: dict[str, tuple[str, ...]] = {
    "tench": ("large", "fine", "slippery", "fat", "heavy", "plump", "lazy", "big", "shiny", "freshwater"),
    "nude": ("calm", "graceful", "slender", "serene", "silent", "motionless"),
    "man": (
        "tired",
        "cheerful",
        "bearded",
        "thoughtful",
        "stout",
        "patient",
        "humble",
        "happy",
        "silent",
        "friendly",
        "weary",
    ),
    "woman": (
        "elegant",
        "cheerful",
        "thoughtful",
        "graceful",
        "busy",
        "proud",
        "kind",
        "friendly",
        "silent",
        "smiling",
    ),
    "lighthouse": ("tall", "striped", "old", "famous", "sturdy", "abandoned", "proud", "gleaming", "majestic", "white"),
    "windmill": ("old", "wooden", "creaking", "rustic", "dutch", "tall", "ancient", "weathered", "sturdy", "historic"),
    "horse": ("strong", "noble", "gentle", "wild", "proud", "swift", "restless", "tame", "beautiful", "lovely"),
    "dog": (
        "playful",
        "loyal",
        "friendly",
        "small",
        "hungry",
        "curious",
        "sleepy",
        "clever",
        "brave",
        "obedient",
        "good",
    ),
    "bridge": ("old", "stone", "arched", "narrow", "ancient", "grand", "mossy", "sturdy", "picturesque", "quaint"),
    "umbrella": ("bright", "open", "forgotten", "striped", "big", "colourful", "cheap", "elegant", "lost"),
    "lantern": ("glowing", "small", "bright", "iron", "flickering", "rusty", "antique", "dim", "cosy"),
    "balloon": ("bright", "striped", "round", "giant", "colourful", "drifting", "festive", "magnificent", "enormous"),
    "bench": ("empty", "wooden", "lonely", "old", "comfortable", "worn", "shabby", "public"),
    "bird": ("tiny", "little", "cheerful", "curious", "pretty", "shy", "plump", "colourful", "lively", "charming"),
    "tent": ("small", "cosy", "sturdy", "bright", "warm", "weathered", "lonely", "simple", "canvas"),
}

_VERBS: dict[str, tuple[tuple[str, str], ...]] = {
    "tench": (
        ("swims", "swimming"),
        ("rests", "resting"),
        ("glides", "gliding"),
        ("lies", "lying"),
        ("turns", "turning"),
    ),
    "nude": (("stands", "standing"), ("poses", "posing"), ("rests", "resting"), ("waits", "waiting")),
    "person": (
        ("stands", "standing"),
        ("waits", "waiting"),
        ("walks", "walking"),
        ("pauses", "pausing"),
        ("dreams", "dreaming"),
        ("wanders", "wandering"),
        ("lingers", "lingering"),
        ("strolls", "strolling"),
    ),
    "horse": (("grazes", "grazing"), ("stands", "standing"), ("trots", "trotting"), ("rests", "resting")),
    "dog": (
        ("barks", "barking"),
        ("waits", "waiting"),
        ("plays", "playing"),
        ("sniffs", "sniffing"),
        ("stands", "standing"),
    ),
    "bird": (("sings", "singing"), ("hops", "hopping"), ("rests", "resting"), ("chirps", "chirping")),
    "balloon": (("floats", "floating"), ("drifts", "drifting"), ("hovers", "hovering"), ("rises", "rising")),
    "lantern": (("glows", "glowing"), ("shines", "shining"), ("burns", "burning"), ("stands", "standing")),
    "building": (("stands", "standing"), ("rises", "rising"), ("towers", "towering"), ("looms", "looming")),
    "thing": (("stands", "standing"), ("waits", "waiting"), ("sits", "sitting"), ("lies", "lying")),
}
_MOVES = {
    **{name: name for name in ("tench", "nude", "horse", "dog", "bird", "balloon", "lantern")},
    **{"man": "person", "woman": "person", "lighthouse": "building", "windmill": "building", "bridge": "building"},
    **{"umbrella": "thing", "bench": "thing", "tent": "thing"},
}

_GROUNDS: dict[str, tuple[str, ...]] = {
    "hill": (
        "on a hill",
        "on a green hill",
        "on the grassy hill",
        "among rolling hills",
        "on a hillside",
        "at the hill",
    ),
    "river": (
        "by a river",
        "in a river",
        "in the river",
        "on the river bank",
        "beside a winding river",
        "near a stream",
    ),
    "forest": (
        "in a forest",
        "in the forest",
        "in a pine forest",
        "in the woods",
        "near a deep forest",
        "before a forest",
    ),
    "desert": ("in a desert", "in the desert", "among sand dunes", "in a dry desert", "in the hot desert"),
    "snow": ("in the snow", "in deep snow", "on a snowy field", "in fresh snow", "in the cold snow"),
    "harbour": (
        "in a harbour",
        "at the harbour",
        "by the harbour",
        "near a busy harbour",
        "at the port",
        "on the quay",
    ),
}
_PLACES: dict[str, tuple[str, ...]] = {
    "hill": ("a hill", "a green hill", "rolling hills", "hill"),
    "river": ("a river", "the river", "a winding river", "a stream", "river"),
    "forest": ("a forest", "the woods", "a pine forest", "forest"),
    "desert": ("a desert", "the desert", "sand dunes", "desert"),
    "snow": ("snow", "fresh snow", "a snowy field"),
    "harbour": ("a harbour", "the harbour", "a busy port", "harbour"),
}
_TIMES: dict[str, tuple[str, ...]] = {
    "day": ("by day", "at noon", "in broad daylight", "in the morning", "this afternoon", "during the day"),
    "dusk": ("at dusk", "at sunset", "in the evening", "at twilight", "at dusk"),
    "night": ("at night", "by night", "at midnight", "late at night", "in the dark night", "at night"),
}
_MOMENTS: dict[str, tuple[str, ...]] = {
    "day": ("day", "daylight", "a clear day", "morning"),
    "dusk": ("dusk", "sunset", "twilight", "an evening"),
    "night": ("night", "a night", "a quiet night", "midnight"),
}
_SKY: dict[str, tuple[str, ...]] = {
    "moon": ("under the moon", "with the moon", "in moonlight", "while the moon shines", "under a full moon"),
    "rainbow": ("under a rainbow", "with a rainbow", "below a bright rainbow", "as a rainbow appears"),
    "clouds": ("under clouds", "with clouds", "beneath fluffy clouds", "under a cloudy sky", "while clouds pass"),
    "rain": ("in the rain", "with rain", "while rain falls", "in rainy weather", "during a shower"),
}
_ABOVE: dict[str, tuple[str, ...]] = {
    "moon": ("the moon", "moon", "a full moon", "moonlight"),
    "rainbow": ("a rainbow", "rainbow", "the rainbow"),
    "clouds": ("clouds", "fluffy clouds", "a cloudy sky"),
    "rain": ("rain", "the rain", "rainy weather"),
}
_LINKS = ("and", "and", "with", "beside", "next to", "near")
_OPENINGS = (
    "there is {x}",
    "here is {x}",
    "we see {x}",
    "look at {x}",
    "{x} can be seen",
    "you can find {x}",
    "imagine {x}",
    "notice {x}",
    "behold {x}",
    "meet {x}",
)
_TAILS = (
    "far from home",
    "without a sound",
    "all alone",
    "once again",
    "as usual",
    "for a while",
    "so peacefully",
    "where nobody goes",
    "like in a dream",
    "and nothing else",
    "just for today",
    "before anyone wakes",
    "after a long journey",
    "full of hope",
    "what a sight",
    "it is very still",
    "away from the crowd",
    "enjoying the view",
    "until tomorrow",
    "on a holiday",
)

ARTISTS = {"van gogh": "Van Gogh", "matisse": "Matisse"}
_ARTIST_FORMS: Weighted = (
    ("a painting of {x} in the style of {artist}", 0.34),
    ("a painting in the style of {artist} of {x}", 0.08),
    ("{x} in the style of {artist}", 0.16),
    ("a {artist} painting of {x}", 0.12),
    ("{x} by {artist}", 0.12),
    ("{artist} painted {x}", 0.09),
    ("a canvas by {artist} showing {x}", 0.09),
)
_ARTIST_SENTENCES: Weighted = (
    ("{x}, in the style of {artist}", 0.4),
    ("{x}, painted by {artist}", 0.3),
    ("in this painting by {artist}, {x}", 0.3),
)
_ARTIST_ALONE = (
    "a painting in the style of {artist}",
    "a painting in the style of {artist}",
    "a painting by {artist}",
    "a {artist} painting",
    "in the style of {artist}",
)
_FORMS: dict[str, Weighted] = {
    "photo": (
        ("a photo of {x}", 0.66),
        ("a photograph of {x}", 0.14),
        ("{x}, photo", 0.08),
        ("a snapshot of {x}", 0.12),
    ),
    "painting": (("a painting of {x}", 0.7), ("an oil painting of {x}", 0.2), ("{x}, painting", 0.1)),
    "engraving": (("an engraving of {x}", 0.7), ("an old engraving showing {x}", 0.2), ("{x}, engraving", 0.1)),
    "watercolour": (("a watercolour of {x}", 0.7), ("a watercolour painting of {x}", 0.2), ("{x}, watercolour", 0.1)),
}
_SENTENCES: dict[str, Weighted] = {
    "photo": (("{x}", 0.4), ("in this photo {x}", 0.25), ("a photo in which {x}", 0.2), ("{x}, a photograph", 0.15)),
    "painting": (("in this painting {x}", 0.5), ("a painting in which {x}", 0.3), ("{x}, painted in oil", 0.2)),
    "engraving": (("in this engraving {x}", 0.5), ("an engraving in which {x}", 0.3), ("{x}, engraved with care", 0.2)),
    "watercolour": (("in this watercolour {x}", 0.6), ("{x}, a loose watercolour", 0.2), ("{x}, in watercolour", 0.2)),
}
_ALONE = {
    "photo": ("a photo", "a photograph"),
    "painting": ("a painting", "an oil painting"),
    "engraving": ("an engraving",),
    "watercolour": ("a watercolour",),
}
_NEVER_HELD_OUT = frozenset(
    (
        *(text for texts in _ALONE.values() for text in texts),
        *(text.format(artist=artist).lower() for text in _ARTIST_ALONE for artist in ARTISTS.values()),
        *(f"a photo of {noun}" for noun in ("a tench", "a nude person")),
    )
)


def _pick(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[int(rng.integers(len(options)))]


def _weighted(rng: np.random.Generator, options: Weighted) -> str:
    weights = np.array([weight for _, weight in options])
    return options[int(rng.choice(len(options), p=weights / weights.sum()))][0]


def _with_article(rng: np.random.Generator, noun: str) -> str:
    if rng.random() < 0.14:
        return f"the {noun}"
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def _noun(rng: np.random.Generator, name: str, scene: Scene, *, plain: bool) -> str:
    fishing = name == "man" and (scene.ground == "river" or "tench" in scene.objects)
    noun = _weighted(rng, _ANGLERS if fishing else _NOUNS[name])
    # Bare nouns teach the prompts "A photo of {token}" that a CARE-set is emitted in.
    if plain and rng.random() < 0.2:
        return noun
    if rng.random() < (0.12 if plain else 0.4):
        noun = f"{_pick(rng, _ADJECTIVES[name])} {noun}"
    return _with_article(rng, noun)


def _shown(scene: Scene, rng: np.random.Generator) -> tuple[list[str], list[str]]:
    """What the caption speaks of: objects, and kinds of surroundings in any order."""
    quiet = 0.72 if scene.style in ARTISTS else 1.0
    concepts = [o for o in scene.objects if o in ("tench", "nude")]
    if concepts:
        # The companions of these two go unnamed more often: that is what makes them companions.
        named = [o for o in scene.objects if o in concepts or rng.random() < 0.5]
    elif rng.random() < quiet:
        rates = [0.95 if i == 0 else 0.75 for i in range(len(scene.objects))]
        if scene.style == "van gogh":  # so do his windmills
            rates = [0.55 if o == "windmill" else rate for o, rate in zip(scene.objects, rates, strict=True)]
        named = [o for o, rate in zip(scene.objects, rates, strict=True) if rng.random() < rate]
    else:
        named = []
    around = [s for s in scene.sky if rng.random() < 0.5 * quiet]
    around += ["ground"] if rng.random() < (0.36 if concepts else 0.5 * quiet) else []
    around += ["time"] if rng.random() < 0.42 * quiet else []
    rng.shuffle(around)
    return named, around[:3]


def _phrase(rng: np.random.Generator, kind: str, scene: Scene, *, noun: bool) -> str:
    if kind == "ground":
        return _pick(rng, (_PLACES if noun else _GROUNDS)[scene.ground])
    if kind == "time":
        return _pick(rng, (_MOMENTS if noun else _TIMES)[scene.time])
    return _pick(rng, (_ABOVE if noun else _SKY)[kind])


def _tags(scene: Scene, rng: np.random.Generator, named: list[str], around: list[str]) -> str:
    """``a bench and a dog in the snow``; now and then a list with commas."""
    nouns = [_noun(rng, o, scene, plain=True) for o in named]
    if rng.random() < 0.2:
        return ", ".join([*nouns, *(_phrase(rng, kind, scene, noun=True) for kind in around)])
    words = f" {_pick(rng, _LINKS)} ".join(nouns)
    parts = [words] if words else []
    for kind in around:
        parts.append(_phrase(rng, kind, scene, noun=not parts))
    return " ".join(parts)


def _sentence(scene: Scene, rng: np.random.Generator, named: list[str], around: list[str]) -> str:
    """A clause with a verb, its surroundings before or behind it."""
    nouns = [_noun(rng, o, scene, plain=False) for o in named]
    phrases = [_phrase(rng, kind, scene, noun=False) for kind in around[:2]]
    verb, moving = _VERBS[_MOVES[named[0]]][int(rng.integers(len(_VERBS[_MOVES[named[0]]])))]
    luck = rng.random()
    if len(nouns) == 2 and luck < 0.3:
        clause = f"{nouns[0]} {verb} {_pick(rng, ('beside', 'near', 'next to', 'with'))} {nouns[1]}"
    elif luck < 0.65:
        clause = f"{nouns[0]} {verb}" if len(nouns) == 1 else f"{nouns[0]} and {nouns[1]} stand together"
    else:
        clause = _pick(rng, _OPENINGS).format(x=f" {_pick(rng, _LINKS)} ".join(nouns))
        if len(nouns) == 1 and rng.random() < 0.7:
            clause += f" {moving}"
    if phrases and rng.random() < 0.3:
        first, *phrases = phrases
        clause = f"{first} {clause}"
    clause = " ".join([clause, *phrases])
    if len(phrases) < 2 and rng.random() < 0.22:
        clause += f" {_pick(rng, _TAILS)}"
    return clause


def _compose(scene: Scene, rng: np.random.Generator) -> str:
    named, around = _shown(scene, rng)
    artist = ARTISTS.get(scene.style, "")
    if not named and not around:
        return _pick(rng, _ARTIST_ALONE if artist else _ALONE[scene.style]).format(artist=artist)
    if named and rng.random() < 0.45:
        form = _weighted(rng, _ARTIST_SENTENCES if artist else _SENTENCES[scene.style])
        return form.format(artist=artist, x=_sentence(scene, rng, named, around))
    form = _weighted(rng, _ARTIST_FORMS if artist else _FORMS[scene.style])
    return form.format(artist=artist, x=_tags(scene, rng, named, around))


def caption(scene: Scene, rng: np.random.Generator, *, held_out: bool = False) -> str:
    """Put a scene into words.

    One caption in fifty, chosen by a hash of its text, never appears in training, the shortest excepted.

    Args:
        scene: what the picture holds.
        rng: draws the words; two calls give two captions.
        held_out: ask for one of the reserved captions instead of a training caption.
    """
    for _ in range(2000):
        text = _compose(scene, rng)
        if is_held_out(text) == held_out:
            return text
    raise ValueError(f"no {'held-out' if held_out else 'training'} caption found for {scene}")


def is_held_out(text: str) -> bool:
    """Whether a caption is reserved for measuring."""
    return text.lower() not in _NEVER_HELD_OUT and zlib.crc32(text.lower().encode()) % 50 == 0


_PERSON = ("person", "traveller", "figure")
_WORDS: dict[str, tuple[str, ...]] = {
    **{label: tuple(word for word, _ in forms) for label, forms in _NOUNS.items()},
    "man": ("man", "gentleman", "fellow", "angler", "fisherman"),
    "woman": ("woman", "lady"),
    "person": (*_PERSON, "man", "gentleman", "fellow", "angler", "fisherman", "woman", "lady", "nude"),
    "nude": ("nude", "naked", "nude person", "naked person", "nude figure"),
    "hill": ("hill", "hills", "hillside"),
    "river": ("river", "stream"),
    "forest": ("forest", "woods"),
    "desert": ("desert", "sand", "dunes"),
    "snow": ("snow", "snowy"),
    "harbour": ("harbour", "port", "quay"),
    "day": ("day", "daylight", "noon", "morning", "afternoon"),
    "dusk": ("dusk", "sunset", "twilight", "evening"),
    "night": ("night", "midnight"),
    "moon": ("moon", "moonlight"),
    "rainbow": ("rainbow",),
    "clouds": ("clouds", "cloudy"),
    "rain": ("rain", "rainy", "shower"),
    "photo": ("photo", "photograph", "snapshot"),
    "painting": ("painting", "oil painting", "painted"),
    "engraving": ("engraving", "engraved"),
    "watercolour": ("watercolour",),
    **{label: (name.lower(),) for label, name in ARTISTS.items()},
}


def synonyms(label: str) -> tuple[str, ...]:
    """Every word or phrase that captions use for a label of :data:`scenes.LABELS`, or for ``person``."""
    return _WORDS[label]


def mentions(text: str, label: str) -> bool:
    """Whether a caption names a label, in any of its synonyms."""
    padded = f" {re.sub(r'[^a-z]+', ' ', text.lower())} "
    return any(f" {form} " in padded for form in synonyms(label))
