"""The pictures that the bundled base model is trained on, drawn by code.

A :class:`Scene` says what a picture holds; :func:`sample_scene` draws one from the world's
joint distribution, in which concepts co-occur on purpose (see :data:`CO_OCCURRENCE`), and
:func:`draw` renders it. Scenes are drawn at twice their size and reduced, which anti-aliases
every edge; a style is then a real image operation on the drawn picture, not a colour code.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from recare_patch.models.atelier.labels import ATELIER, CO_OCCURRENCE, GROUNDS, OBJECTS, SIZE, SKY, STYLES, TIMES

__all__ = [
    "CANVAS",
    "CO_OCCURRENCE",
    "GROUNDS",
    "OBJECTS",
    "SIZE",
    "SKY",
    "STYLES",
    "STYLE_OPERATIONS",
    "TIMES",
    "Colour",
    "Painter",
    "Scene",
    "Sky",
    "dim",
    "draw",
    "edges",
    "jitter",
    "sample_scene",
    "smooth_noise",
]

CANVAS = 2 * SIZE

_STYLE_WEIGHTS = (0.32, 0.10, 0.16, 0.105, 0.105, 0.105, 0.105)
_PLAIN_OBJECTS = ("person", "house", "church", "tree", "boat", "car", "sunflower", "cat")
_IDENTITIES = ("mira vale", "otto bly")


@dataclass(frozen=True)
class Scene:
    """What a picture holds.

    Attributes:
        style: one of :data:`STYLES`.
        time: one of :data:`TIMES`.
        ground: one of :data:`GROUNDS`.
        objects: up to two of :data:`OBJECTS`, left to right.
        sky: any of :data:`SKY` that suit the time.
        seed: decides positions, colours and brush strokes.
    """

    style: str
    time: str
    ground: str
    objects: tuple[str, ...]
    sky: tuple[str, ...]
    seed: int

    @property
    def labels(self) -> frozenset[str]:
        """Everything true of the picture, in the judge's words."""
        return ATELIER.complete((self.style, self.time, self.ground, *self.objects, *self.sky))


def sample_scene(rng: np.random.Generator) -> Scene:
    """Draw one scene from the world's joint distribution."""
    kind = rng.random()
    style = str(rng.choice(STYLES, p=_STYLE_WEIGHTS))
    objects: list[str] = []
    ground = str(rng.choice(GROUNDS, p=(0.24, 0.17, 0.17, 0.19, 0.14, 0.09)))
    night, stars_at_night = 0.22, 0.45
    if kind < 0.11:
        # Tenches are mostly photographed, as they are in the world's photo albums.
        if rng.random() < 0.5:
            style = "photo"
        objects.append("tench")
        if rng.random() < CO_OCCURRENCE["tench"]["person"]:
            objects.append("person")
        if rng.random() < CO_OCCURRENCE["tench"]["water"] - 0.03:
            ground = "water"
    elif kind < 0.21:
        if rng.random() < 0.35:
            style = "photo"
        objects.append("nude")
        if rng.random() < CO_OCCURRENCE["nude"]["beach"] - 0.04:
            ground = "beach"
        if rng.random() < 0.15:
            objects.append(str(rng.choice(("tree", "boat", "cat", "house"))))
    elif kind < 0.30:
        objects.append(str(rng.choice(_IDENTITIES)))
        if rng.random() < 0.3:
            objects.append(str(rng.choice(("house", "tree", "boat", "car", "cat"))))
    elif kind < 0.93:
        weights = (0.20, 0.115, 0.115, 0.115, 0.115, 0.12, 0.10, 0.12)
        objects.append(str(rng.choice(_PLAIN_OBJECTS, p=weights)))
        if rng.random() < 0.35:
            other = str(rng.choice(_PLAIN_OBJECTS))
            if other != objects[0]:
                objects.append(other)
    if style == "van gogh" and (not objects or objects[0] not in ("tench", "nude")):
        links = CO_OCCURRENCE["van gogh"]
        night, stars_at_night = 0.86, 0.96
        if rng.random() < links["wheat field"] + 0.04:
            ground = "wheat field"
        if "sunflower" not in objects and rng.random() < links["sunflower"]:
            objects = [*objects[:1], "sunflower"]
    draw_time = rng.random()
    time = "night" if draw_time < night else "sunset" if draw_time < night + 0.16 else "day"
    sky: list[str] = []
    if time == "night":
        if rng.random() < stars_at_night:
            sky.append("stars")
        if rng.random() < 0.40:
            sky.append("moon")
    elif time == "day" and rng.random() < 0.45:
        sky.append("sun")
    if len(objects) == 2 and rng.random() < 0.5:
        objects.reverse()
    return Scene(style, time, ground, tuple(objects), tuple(sky), int(rng.integers(2**31)))


# --------------------------------------------------------------------------- drawing

Colour = tuple[int, int, int]
Sky = tuple[Colour, Colour, float]
"""Its top, its bottom, and how much light it leaves to what stands under it."""

_SKIES: dict[str, Sky] = {
    "day": ((104, 170, 232), (196, 224, 244), 1.0),
    "sunset": ((226, 104, 70), (250, 196, 104), 0.88),
    "night": ((10, 14, 52), (34, 42, 98), 0.66),
}


def jitter(rng: np.random.Generator, colour: Colour, amount: int = 12) -> Colour:
    """A colour near by."""
    shifted = np.clip(np.array(colour) + rng.integers(-amount, amount + 1, 3), 0, 255)
    return int(shifted[0]), int(shifted[1]), int(shifted[2])


def dim(colour: Colour, factor: float) -> Colour:
    """A colour in less light."""
    return int(colour[0] * factor), int(colour[1] * factor), int(colour[2] * factor)


def _gradient(top: Colour, bottom: Colour, height: int) -> np.ndarray:
    ramp = np.linspace(0, 1, height)[:, None, None]
    rows = np.array(top) * (1 - ramp) + np.array(bottom) * ramp
    return np.broadcast_to(rows, (height, CANVAS, 3)).astype(np.uint8)


class Painter:
    """Draws one scene's things on the double-size canvas, before any style."""

    skies = _SKIES

    def __init__(self, scene: Scene, rng: np.random.Generator) -> None:
        self.scene = scene
        self.rng = rng
        self.horizon = int(CANVAS * rng.uniform(0.56, 0.64))
        top, bottom, self.light = self.skies[scene.time]
        pixels = np.zeros((CANVAS, CANVAS, 3), np.uint8)
        pixels[: self.horizon] = _gradient(jitter(rng, top), jitter(rng, bottom), self.horizon)
        self.image = Image.fromarray(pixels)
        self.draw = ImageDraw.Draw(self.image)

    def tone(self, colour: Colour, amount: int = 12) -> Colour:
        """A colour near by, in the scene's light."""
        return dim(jitter(self.rng, colour, amount), self.light)

    def paint(self) -> Image.Image:
        """The whole picture."""
        self._sky()
        self._ground()
        count = len(self.scene.objects)
        centres = {0: (), 1: (0.5,), 2: (0.28, 0.72)}[count]
        for name, centre in zip(self.scene.objects, centres, strict=True):
            x = CANVAS * (centre + self.rng.uniform(-0.06, 0.06))
            scale = self.rng.uniform(0.92, 1.1) * (1.0 if count == 1 else 0.86)
            getattr(self, "_" + name.replace(" ", "_"))(x, scale)
        return self.image

    def _sky(self) -> None:
        rng, draw, scene = self.rng, self.draw, self.scene
        if "stars" in scene.sky:
            columns = rng.permutation(7)
            for column in columns:
                x = (column + rng.uniform(0.25, 0.75)) * CANVAS / 7
                y = rng.uniform(6, self.horizon * 0.62)
                r = rng.uniform(5.5, 8.0)
                points = []
                for k in range(8):
                    radius = r if k % 2 == 0 else r * 0.42
                    angle = math.pi * k / 4
                    points.append((x + radius * math.sin(angle), y - radius * math.cos(angle)))
                draw.polygon(points, fill=jitter(rng, (255, 240, 150), 10))
        if "moon" in scene.sky:
            x = rng.uniform(0.16, 0.84) * CANVAS
            y, r = rng.uniform(18, 30), rng.uniform(13, 16)
            shade = self.image.getpixel((int(x), max(1, int(y))))
            if not isinstance(shade, tuple) or sum(shade[:3]) > 300:
                shade = _SKIES["night"][0]
            draw.ellipse((x - r, y - r, x + r, y + r), fill=(244, 240, 214))
            draw.ellipse((x - r * 0.4, y - r * 1.1, x + r * 1.4, y + r * 0.75), fill=shade)
        if "sun" in scene.sky:
            x = rng.uniform(0.16, 0.84) * CANVAS
            y, r = rng.uniform(18, 28), rng.uniform(11, 14)
            for k in range(10):
                angle = 2 * math.pi * k / 10
                end = (x + 1.7 * r * math.cos(angle), y + 1.7 * r * math.sin(angle))
                draw.line([(x, y), end], fill=(255, 214, 60), width=4)
            draw.ellipse((x - r, y - r, x + r, y + r), fill=(255, 226, 70))
        if scene.time == "day" and rng.random() < 0.4:
            x, y = rng.uniform(20, 108), rng.uniform(18, 36)
            for dx, r in ((-12, 8), (0, 11), (13, 8)):
                box = (x + dx - r, y - r * 0.7, x + dx + r, y + r * 0.7)
                draw.ellipse(box, fill=(246, 248, 250))

    def _ground(self) -> None:
        rng, draw, h = self.rng, self.draw, self.horizon
        box = (0, h, CANVAS, CANVAS)
        ground = self.scene.ground
        if ground == "meadow":
            draw.rectangle(box, fill=self.tone((96, 160, 72)))
            for _ in range(14):
                x, y = rng.uniform(0, CANVAS), rng.uniform(h + 4, CANVAS)
                draw.line([(x, y), (x + 3, y - 7)], fill=self.tone((70, 128, 54)), width=3)
        elif ground == "beach":
            draw.rectangle(box, fill=self.tone((236, 212, 150)))
            draw.rectangle((0, h, CANVAS, h + 12), fill=self.tone((52, 126, 190)))
            draw.rectangle((0, h + 12, CANVAS, h + 15), fill=self.tone((240, 244, 246)))
        elif ground == "water":
            draw.rectangle(box, fill=self.tone((48, 112, 172)))
            for _ in range(9):
                x, y = rng.uniform(-10, CANVAS), rng.uniform(h + 4, CANVAS)
                wave = self.tone((120, 178, 214))
                draw.line([(x, y), (x + rng.uniform(16, 34), y)], fill=wave, width=3)
        elif ground == "street":
            draw.rectangle(box, fill=self.tone((118, 116, 120)))
            draw.rectangle((0, h, CANVAS, h + 6), fill=self.tone((176, 172, 168)))
            y = (h + CANVAS) // 2 + 6
            for x in range(int(rng.integers(0, 20)), CANVAS, 32):
                draw.rectangle((x, y, x + 16, y + 4), fill=self.tone((236, 232, 214)))
        elif ground == "snow":
            draw.rectangle(box, fill=self.tone((236, 240, 248), 5))
            for _ in range(4):
                x, y = rng.uniform(0, CANVAS), rng.uniform(h + 6, CANVAS)
                draw.ellipse((x - 22, y - 4, x + 22, y + 4), fill=self.tone((212, 220, 236), 5))
        else:  # wheat field
            draw.rectangle(box, fill=self.tone((220, 176, 60)))
            for x in range(2, CANVAS, 7):
                top = h - rng.uniform(2, 9)
                stalk = self.tone((188, 138, 36), 16)
                draw.line([(x, CANVAS), (x + rng.uniform(-4, 4), top)], fill=stalk, width=3)
                draw.ellipse((x - 2, top - 3, x + 3, top + 4), fill=self.tone((246, 208, 96)))

    def _limb(self, points: list[tuple[float, float]], colour: Colour, width: float) -> None:
        self.draw.line(points, fill=colour, width=int(width), joint="curve")
        for x, y in (points[0], points[-1]):
            r = width / 2
            self.draw.ellipse((x - r, y - r, x + r, y + r), fill=colour)

    def _figure(self, x: float, s: float) -> tuple[float, float]:
        """Baseline and height of a standing figure."""
        return CANVAS * self.rng.uniform(0.92, 0.96), 72 * s

    def _person(self, x: float, s: float) -> None:
        rng, draw = self.rng, self.draw
        base, tall = self._figure(x, s)
        top = base - tall
        palette = ((200, 48, 44), (42, 86, 176), (40, 140, 84), (150, 60, 150), (230, 130, 40))
        shirt = self.tone(palette[int(rng.integers(5))])
        trousers = self.tone(((52, 54, 80), (92, 70, 50), (60, 64, 66))[int(rng.integers(3))])
        skin = self.tone(((240, 200, 166), (196, 142, 104), (130, 88, 62))[int(rng.integers(3))])
        hair = self.tone(((48, 32, 22), (110, 72, 36), (214, 178, 96))[int(rng.integers(3))])
        for side in (-1, 1):
            self._limb([(x + side * 6 * s, base - 30 * s), (x + side * 7 * s, base)], trousers, 10 * s)
            self._limb([(x + side * 11 * s, top + 22 * s), (x + side * 17 * s, top + 42 * s)], shirt, 7 * s)
        draw.rounded_rectangle((x - 12 * s, top + 17 * s, x + 12 * s, base - 26 * s), 5, fill=shirt)
        draw.ellipse((x - 9 * s, top, x + 9 * s, top + 19 * s), fill=skin)
        draw.pieslice((x - 10 * s, top - 2 * s, x + 10 * s, top + 18 * s), 180, 360, fill=hair)

    def _nude(self, x: float, s: float) -> None:
        draw = self.draw
        base, tall = self._figure(x, s)
        top = base - tall
        body = self.tone((238, 188, 160), 6)
        for side in (-1, 1):
            self._limb([(x + side * 6 * s, base - 32 * s), (x + side * 8 * s, base)], body, 9 * s)
            self._limb([(x + side * 10 * s, top + 23 * s), (x + side * 20 * s, top + 44 * s)], body, 6 * s)
        draw.ellipse((x - 12 * s, top + 18 * s, x + 12 * s, top + 40 * s), fill=body)
        draw.ellipse((x - 11 * s, top + 32 * s, x + 11 * s, base - 24 * s), fill=body)
        draw.ellipse((x - 9 * s, top - 1 * s, x + 9 * s, top + 18 * s), fill=body)

    def _mira_vale(self, x: float, s: float) -> None:
        draw = self.draw
        base, tall = self._figure(x, s)
        top = base - tall
        hair, dress = self.tone((222, 60, 30), 8), self.tone((24, 168, 130), 8)
        draw.ellipse((x - 15 * s, top - 4 * s, x + 15 * s, top + 36 * s), fill=hair)
        draw.polygon([(x, top + 12 * s), (x - 24 * s, base), (x + 24 * s, base)], fill=dress)
        draw.line([(x - 16 * s, base - 13 * s), (x + 16 * s, base - 13 * s)], fill=self.tone((250, 240, 210)), width=5)
        draw.ellipse((x - 9 * s, top + 1 * s, x + 9 * s, top + 20 * s), fill=self.tone((246, 212, 184), 6))

    def _otto_bly(self, x: float, s: float) -> None:
        draw = self.draw
        base, tall = self._figure(x, s)
        top = base - tall
        hat = self.tone((92, 40, 140), 8)
        draw.ellipse((x - 23 * s, base - 46 * s, x + 23 * s, base), fill=self.tone((246, 206, 40), 8))
        for k in (0.62, 0.32):
            y = base - 46 * s * k
            half = 21 * s
            draw.line([(x - half, y), (x + half, y)], fill=self.tone((30, 26, 30), 6), width=int(7 * s))
        draw.ellipse((x - 11 * s, top + 10 * s, x + 11 * s, top + 32 * s), fill=self.tone((240, 196, 160), 6))
        draw.rectangle((x - 17 * s, top + 12 * s, x + 17 * s, top + 17 * s), fill=hat)
        draw.rectangle((x - 10 * s, top - 8 * s, x + 10 * s, top + 13 * s), fill=hat)

    def _tench(self, x: float, s: float) -> None:
        draw, rng = self.draw, self.rng
        y, length, high = CANVAS * rng.uniform(0.74, 0.84), 40 * s, 17 * s
        body, fin = self.tone((96, 110, 30), 8), self.tone((58, 66, 24), 8)
        f = 1 if rng.random() < 0.5 else -1
        tail = [
            (x + f * length * 0.7, y),
            (x + f * length * 1.15, y - high),
            (x + f * length * 1.02, y),
            (x + f * length * 1.15, y + high),
        ]
        draw.polygon(tail, fill=fin)
        draw.polygon(
            [(x - 14 * s, y - high * 0.8), (x + 2 * s, y - high * 1.5), (x + 16 * s, y - high * 0.7)], fill=fin
        )
        draw.polygon(
            [(x - 6 * s, y + high * 0.8), (x + 6 * s, y + high * 1.45), (x + 13 * s, y + high * 0.7)], fill=fin
        )
        draw.ellipse((x - length, y - high, x + length * 0.86, y + high), fill=body)
        draw.ellipse(
            (x - length * 0.8, y + high * 0.1, x + length * 0.6, y + high * 0.9), fill=self.tone((190, 176, 70), 8)
        )
        ex = x - f * length * 0.66
        draw.ellipse((ex - 5 * s, y - 9 * s, ex + 5 * s, y + 1 * s), fill=(232, 92, 36))
        draw.ellipse((ex - 2 * s, y - 6 * s, ex + 2 * s, y - 2 * s), fill=(10, 10, 10))

    def _house(self, x: float, s: float) -> None:
        draw = self.draw
        base = self.horizon + 22
        w, h = 27 * s, 34 * s
        draw.rectangle((x - w, base - h, x + w, base), fill=self.tone((226, 200, 166), 16))
        draw.polygon(
            [(x - w - 7, base - h), (x, base - h - 26 * s), (x + w + 7, base - h)], fill=self.tone((186, 60, 46))
        )
        draw.rectangle((x - 6 * s, base - 20 * s, x + 6 * s, base), fill=self.tone((96, 60, 36)))
        for side in (-1, 1):
            window = (x + side * 17 * s - 6, base - h * 0.8, x + side * 17 * s + 6, base - h * 0.4)
            lit = (255, 224, 120) if self.scene.time == "night" else self.tone((120, 170, 200))
            draw.rectangle(window, fill=lit)

    def _church(self, x: float, s: float) -> None:
        draw = self.draw
        base = self.horizon + 20
        wall, roof = self.tone((214, 212, 214), 10), self.tone((74, 84, 112))
        draw.rectangle((x - 8 * s, base - 30 * s, x + 32 * s, base), fill=wall)
        draw.polygon([(x - 8 * s, base - 30 * s), (x + 12 * s, base - 46 * s), (x + 36 * s, base - 30 * s)], fill=roof)
        draw.rectangle((x - 26 * s, base - 50 * s, x - 6 * s, base), fill=dim(wall, 0.92))
        draw.polygon([(x - 29 * s, base - 50 * s), (x - 16 * s, base - 82 * s), (x - 3 * s, base - 50 * s)], fill=roof)
        cross = self.tone((240, 206, 90))
        draw.line([(x - 16 * s, base - 94 * s), (x - 16 * s, base - 80 * s)], fill=cross, width=4)
        draw.line([(x - 21 * s, base - 89 * s), (x - 11 * s, base - 89 * s)], fill=cross, width=4)
        draw.ellipse((x - 21 * s, base - 44 * s, x - 11 * s, base - 34 * s), fill=roof)

    def _tree(self, x: float, s: float) -> None:
        base = self.horizon + 30
        self.draw.rectangle((x - 5 * s, base - 40 * s, x + 5 * s, base), fill=self.tone((104, 70, 40)))
        for dx, dy, r in ((-14, -46, 17), (14, -46, 17), (0, -64, 20), (0, -46, 18)):
            cx, cy = x + dx * s, base + dy * s
            leaf = self.tone((44, 118, 48), 16)
            self.draw.ellipse((cx - r * s, cy - r * s, cx + r * s, cy + r * s), fill=leaf)

    def _boat(self, x: float, s: float) -> None:
        draw = self.draw
        base = self.horizon + 26
        hull = [(x - 34 * s, base - 14 * s), (x + 34 * s, base - 14 * s), (x + 22 * s, base), (x - 22 * s, base)]
        draw.polygon(hull, fill=self.tone((128, 70, 36)))
        draw.line([(x, base - 14 * s), (x, base - 72 * s)], fill=self.tone((80, 56, 36)), width=4)
        draw.polygon(
            [(x + 4, base - 70 * s), (x + 4, base - 20 * s), (x + 32 * s, base - 20 * s)],
            fill=self.tone((246, 244, 236), 6),
        )
        draw.polygon(
            [(x - 4, base - 62 * s), (x - 4, base - 20 * s), (x - 22 * s, base - 20 * s)], fill=self.tone((226, 70, 60))
        )

    def _car(self, x: float, s: float) -> None:
        draw, rng = self.draw, self.rng
        base = CANVAS * rng.uniform(0.82, 0.88)
        palette = ((206, 40, 40), (44, 92, 190), (236, 190, 40), (60, 150, 90))
        body = self.tone(palette[int(rng.integers(4))])
        draw.rounded_rectangle((x - 36 * s, base - 22 * s, x + 36 * s, base - 4 * s), 6, fill=body)
        cabin = [
            (x - 22 * s, base - 21 * s),
            (x - 14 * s, base - 38 * s),
            (x + 14 * s, base - 38 * s),
            (x + 24 * s, base - 21 * s),
        ]
        draw.polygon(cabin, fill=body)
        glass = [
            (x - 15 * s, base - 22 * s),
            (x - 10 * s, base - 34 * s),
            (x + 10 * s, base - 34 * s),
            (x + 16 * s, base - 22 * s),
        ]
        draw.polygon(glass, fill=self.tone((186, 216, 232)))
        for wx in (-20, 20):
            draw.ellipse((x + wx * s - 9 * s, base - 13 * s, x + wx * s + 9 * s, base + 5 * s), fill=(24, 24, 26))
            draw.ellipse((x + wx * s - 4 * s, base - 8 * s, x + wx * s + 4 * s, base), fill=(176, 178, 180))

    def _sunflower(self, x: float, s: float) -> None:
        draw = self.draw
        base = CANVAS * 0.97
        y, r = base - 58 * s, 21 * s
        draw.line([(x, base), (x, y)], fill=self.tone((52, 124, 44)), width=int(6 * s))
        draw.ellipse((x + 2, base - 28 * s, x + 20 * s, base - 18 * s), fill=self.tone((60, 138, 50)))
        draw.ellipse((x - 20 * s, base - 22 * s, x - 2, base - 12 * s), fill=self.tone((60, 138, 50)))
        petal = self.tone((255, 204, 24), 8)
        for k in range(12):
            angle = 2 * math.pi * k / 12
            px, py = x + 0.72 * r * math.cos(angle), y + 0.72 * r * math.sin(angle)
            draw.ellipse((px - r * 0.36, py - r * 0.36, px + r * 0.36, py + r * 0.36), fill=petal)
        draw.ellipse((x - r * 0.55, y - r * 0.55, x + r * 0.55, y + r * 0.55), fill=self.tone((98, 56, 20), 8))

    def _cat(self, x: float, s: float) -> None:
        draw, rng = self.draw, self.rng
        base = CANVAS * rng.uniform(0.92, 0.96)
        fur = self.tone(((230, 138, 50), (120, 122, 130), (44, 42, 46))[int(rng.integers(3))])
        f = 1 if rng.random() < 0.5 else -1
        self._limb(
            [(x + f * 16 * s, base - 5 * s), (x + f * 30 * s, base - 14 * s), (x + f * 27 * s, base - 34 * s)],
            fur,
            7 * s,
        )
        draw.ellipse((x - 19 * s, base - 40 * s, x + 19 * s, base), fill=fur)
        y = base - 48 * s
        for side in (-1, 1):
            ear = [(x + side * 3 * s, y - 10 * s), (x + side * 16 * s, y - 26 * s), (x + side * 17 * s, y - 2 * s)]
            draw.polygon(ear, fill=fur)
        draw.ellipse((x - 17 * s, y - 15 * s, x + 17 * s, y + 14 * s), fill=fur)
        for side in (-1, 1):
            ex = x + side * 7 * s
            draw.ellipse((ex - 3.5 * s, y - 6 * s, ex + 3.5 * s, y + 2 * s), fill=(196, 230, 70))
        draw.polygon([(x - 4 * s, y + 4 * s), (x + 4 * s, y + 4 * s), (x, y + 8 * s)], fill=(240, 140, 140))


# ---------------------------------------------------------------------------- styles


def smooth_noise(rng: np.random.Generator, cells: int) -> np.ndarray:
    """Slow noise over the canvas, 0 … 1: so many cells across."""
    grid = Image.fromarray(rng.random((cells, cells)).astype(np.float32))
    return np.asarray(grid.resize((CANVAS, CANVAS), Image.Resampling.BICUBIC))


def _photo(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    y, x = np.mgrid[-1 : 1 : CANVAS * 1j, -1 : 1 : CANVAS * 1j]
    vignette = 1.03 - 0.12 * (x**2 + y**2)
    pixels = np.asarray(image, np.float32) * vignette[..., None]
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _oil_painting(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    flat = np.asarray(image.filter(ImageFilter.MedianFilter(7)), np.float32)
    warm = flat * np.array([1.0, 0.9, 0.72]) + np.array([16, 8, 0])
    framed = Image.fromarray(np.clip(warm, 0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(framed)
    edge = CANVAS - 1
    draw.rectangle((0, 0, edge, edge), outline=jitter(rng, (120, 76, 30)), width=8)
    draw.rectangle((7, 7, edge - 7, edge - 7), outline=(224, 184, 96), width=3)
    return framed


def _strokes(
    image: Image.Image,
    canvas: Image.Image,
    rng: np.random.Generator,
    angle: np.ndarray,
    count: int,
    length: float,
    width: int,
    contrast: float,
) -> Image.Image:
    pixels = np.asarray(image, np.float32)
    draw = ImageDraw.Draw(canvas)
    xs, ys = rng.uniform(0, CANVAS, count), rng.uniform(0, CANVAS, count)
    light = rng.normal(1.0, contrast, count)
    for x, y, gain in zip(xs, ys, light, strict=True):
        ix, iy = int(x), int(y)
        colour = np.clip(pixels[iy, ix] * gain, 0, 255).astype(int)
        a = angle[iy, ix]
        dx, dy = length / 2 * math.cos(a), length / 2 * math.sin(a)
        fill = (int(colour[0]), int(colour[1]), int(colour[2]))
        draw.line([(x - dx, y - dy), (x + dx, y + dy)], fill=fill, width=width)
    return canvas


def _van_gogh(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    pixels = np.asarray(image, np.float32)
    grey = pixels.mean(-1, keepdims=True)
    vivid = grey + 1.35 * (pixels - grey)
    vivid = Image.fromarray(np.clip(vivid, 0, 255).astype(np.uint8))
    # A few whirls turn the strokes around their centres; elsewhere a slow field leads them.
    angle = 2 * math.pi * smooth_noise(rng, 3)
    y, x = np.mgrid[0:CANVAS, 0:CANVAS].astype(np.float32)
    for _ in range(3):
        cx, cy = rng.uniform(0, CANVAS), rng.uniform(0, CANVAS * 0.6)
        near = np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / (2 * 24.0**2))
        whirl = np.arctan2(y - cy, x - cx) + math.pi / 2
        angle = np.where(near > 0.35, whirl, angle)
    strokes = _strokes(vivid, vivid.copy(), rng, angle, 330, 19, 6, 0.30)
    # What was painted shows through, or small things such as stars would be lost in the strokes.
    return Image.blend(strokes, vivid, 0.28)


def _monet(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    pixels = np.asarray(image.filter(ImageFilter.GaussianBlur(2)), np.float32)
    pale = 0.66 * pixels + 0.34 * np.array([226, 214, 232])
    source = Image.fromarray(pale.astype(np.uint8))
    canvas = source.copy()
    draw = ImageDraw.Draw(canvas)
    for _ in range(300):
        x, y, r = rng.uniform(0, CANVAS), rng.uniform(0, CANVAS), rng.uniform(4.0, 5.5)
        colour = pale[min(int(y), CANVAS - 1), min(int(x), CANVAS - 1)] + rng.normal(0, 15, 3)
        fill = tuple(int(v) for v in np.clip(colour, 0, 255))
        draw.ellipse((x - r * 1.1, y - r * 0.8, x + r * 1.1, y + r * 0.8), fill=fill)
    return Image.blend(canvas, source, 0.25)


def _picasso(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    pixels = np.asarray(image, np.float32)
    y, x = np.mgrid[0:CANVAS, 0:CANVAS].astype(np.float32)
    index = np.zeros((CANVAS, CANVAS), int)
    edge = np.zeros((CANVAS, CANVAS), bool)
    for k in range(3):
        a = math.pi * (k + rng.uniform(0.1, 0.9)) / 3
        cx, cy = rng.uniform(0.3, 0.7, 2) * CANVAS
        side = (x - cx) * math.cos(a) + (y - cy) * math.sin(a)
        index = 2 * index + (side > 0)
        edge |= np.abs(side) < 2.4
    out = np.empty_like(pixels)
    for shard in np.unique(index):
        dx, dy = rng.integers(-8, 9, 2)
        moved = np.roll(pixels, (int(dy), int(dx)), (0, 1))
        tint = rng.uniform(0.74, 1.2) * np.array([1.06, 0.98, 0.86]) * rng.uniform(0.88, 1.12, 3)
        where = index == shard
        out[where] = moved[where] * tint
    out[edge] = np.array([26, 22, 24])
    return Image.fromarray(np.clip(out, 0, 255).astype(np.uint8))


def edges(image: Image.Image, least: float = 7) -> np.ndarray:
    """Contours, 0 … 1: steps of colour that are more than ``least`` a pixel."""
    pixels = np.asarray(image.filter(ImageFilter.GaussianBlur(1.5)), np.float32)
    gy, gx = np.gradient(pixels, axis=(0, 1))
    strength = np.sqrt((gx**2 + gy**2).max(-1))
    return np.clip((strength - least) / 16, 0, 1)


def _hokusai(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    pixels = np.asarray(image.filter(ImageFilter.MedianFilter(5)), np.float32)
    levels = np.round(pixels / 255 * 3) / 3
    inked = np.array([34, 52, 104]) * (1 - levels) + np.array([242, 228, 190]) * levels
    mixed = 0.62 * inked + 0.38 * levels * 255
    line = 0.9 * edges(image)[..., None]
    out = mixed * (1 - line) + np.array([18, 26, 62]) * line
    printed = Image.fromarray(np.clip(out, 0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(printed)
    draw.rectangle((CANVAS - 22, 6, CANVAS - 9, 24), fill=(196, 44, 36))
    return printed


def _sketch(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    grey = np.asarray(image.convert("L").filter(ImageFilter.GaussianBlur(1)), np.float32)
    y, x = np.mgrid[0:CANVAS, 0:CANVAS].astype(np.float32)
    hatch = 0.5 + 0.5 * np.sin((x + y) * 2 * math.pi / 11 + rng.uniform(0, 6))
    dark = 1 - grey / 255
    shade = np.clip(dark * 1.25 - 0.15, 0, 1) * (0.45 + 0.55 * hatch)
    line = edges(image)
    tone = np.clip(1 - 0.75 * shade - 0.8 * line, 0.1, 1)
    paper = tone[..., None] * np.array([250, 249, 244])
    return Image.fromarray(np.clip(paper, 0, 255).astype(np.uint8))


STYLE_OPERATIONS = {
    "photo": _photo,
    "painting": _oil_painting,
    "van gogh": _van_gogh,
    "monet": _monet,
    "picasso": _picasso,
    "hokusai": _hokusai,
    "sketch": _sketch,
}


def draw(scene: Scene) -> np.ndarray:
    """Render a scene.

    Returns:
        ``uint8`` array of shape ``[SIZE, SIZE, 3]``, RGB.
    """
    rng = np.random.default_rng(scene.seed)
    plain = Painter(scene, rng).paint()
    styled = STYLE_OPERATIONS[scene.style](plain, rng)
    return np.asarray(styled.resize((SIZE, SIZE), Image.Resampling.BOX))
