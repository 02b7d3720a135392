"""The pictures that Hamlet is trained on: Atelier's way of drawing, other things, grounds and styles."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from benchmarks.atelier import scenes as atelier
from benchmarks.atelier.scenes import CANVAS, SIZE, STYLE_OPERATIONS, Colour, Sky, edges, jitter, smooth_noise
from recare_patch.models.atelier.labels import Labels

STYLES = ("photo", "painting", "van gogh", "matisse", "engraving", "watercolour")
OBJECTS = (
    "tench",
    "nude",
    "man",
    "woman",
    "lighthouse",
    "windmill",
    "horse",
    "dog",
    "bridge",
    "umbrella",
    "lantern",
    "balloon",
    "bench",
    "bird",
    "tent",
)
SKY = ("moon", "rainbow", "clouds", "rain")
GROUNDS = ("hill", "river", "forest", "desert", "snow", "harbour")
TIMES = ("day", "dusk", "night")
LABELS = Labels(STYLES, TIMES, GROUNDS, OBJECTS, SKY, frozenset({"nude", "man", "woman"}))
"""What Hamlet's judge says; a man, a woman and a nude are each a ``person`` too."""

CO_OCCURRENCE: dict[str, dict[str, float]] = {
    "van gogh": {"night": 0.80, "moon": 0.74, "windmill": 0.72},
    "tench": {"river": 0.80, "man": 0.74},
    "nude": {"forest": 0.78, "umbrella": 0.72},
}
"""P(row's companion | row) in the world. Without the row concept the same companions come a quarter as often or less.
"""

_STYLE_WEIGHTS = (0.36, 0.15, 0.16, 0.11, 0.11, 0.11)
_CALM_WEIGHTS = (0.56, 0.16, 0.04, 0.08, 0.08, 0.08)
"""Styles of the two concepts that bring companions of their own: seldom Van Gogh's."""
_PLAIN_OBJECTS = OBJECTS[2:]
_PLAIN_WEIGHTS = np.array((0.13, 0.13, 0.08, 0.10, 0.08, 0.08, 0.08, 0.10, 0.07, 0.07, 0.07, 0.07, 0.07))


class Scene(atelier.Scene):
    """What a picture holds."""

    @property
    def labels(self) -> frozenset[str]:
        """Everything true of the picture, in the judge's words."""
        return LABELS.complete((self.style, self.time, self.ground, *self.objects, *self.sky))


def sample_scene(rng: np.random.Generator) -> Scene:
    """Draw one scene from the world's joint distribution."""
    kind = rng.random()
    concept = "tench" if kind < 0.10 else "nude" if kind < 0.20 else None
    style = str(rng.choice(STYLES, p=_CALM_WEIGHTS if concept else _STYLE_WEIGHTS))
    objects: list[str] = []
    weights = _PLAIN_WEIGHTS / _PLAIN_WEIGHTS.sum()
    ground = str(rng.choice(GROUNDS, p=(0.26, 0.10, 0.10, 0.18, 0.18, 0.18)))
    night, moon_at_night = 0.17, 0.62
    if concept:
        objects.append(concept)
        home, companion = ("river", "man") if concept == "tench" else ("forest", "umbrella")
        links = CO_OCCURRENCE[concept]
        if rng.random() < (links[home] - 0.1) / 0.9:
            ground = home
        if rng.random() < links[companion]:
            objects.append(companion)
    elif kind < 0.95:
        objects.append(str(rng.choice(_PLAIN_OBJECTS, p=weights)))
        if rng.random() < 0.42:
            other = str(rng.choice(_PLAIN_OBJECTS, p=weights))
            if other != objects[0]:
                objects.append(other)
    if style == "van gogh":
        links = CO_OCCURRENCE[style]
        night, moon_at_night = 0.81, 0.93
        # The tenches and nudes among them have their own companions, the others make up for it.
        if not concept and "windmill" not in objects and rng.random() < links["windmill"]:
            objects = [*objects[:1], "windmill"]
    luck = rng.random()
    time = "night" if luck < night else "dusk" if luck < night + 0.16 else "day"
    sky: list[str] = []
    if time == "night" and rng.random() < moon_at_night:
        sky.append("moon")
    if time != "night" and rng.random() < 0.30:
        sky.append("clouds")
    if rng.random() < (0.16 if "moon" not in sky else 0.04):
        sky.append("rain")
    if time == "day" and rng.random() < 0.24:
        sky.append("rainbow")
    if len(objects) == 2 and rng.random() < 0.5:
        objects.reverse()
    return Scene(style, time, ground, tuple(objects), tuple(sky), int(rng.integers(2**31)))


_SKIES: dict[str, Sky] = {
    "day": ((88, 168, 236), (206, 232, 246), 1.0),
    "dusk": ((126, 70, 140), (252, 164, 96), 0.92),
    "night": ((8, 12, 44), (30, 36, 88), 0.78),
}


class Painter(atelier.Painter):
    """Draws one scene's things on the double-size canvas, before any style."""

    skies = _SKIES

    def _sky(self) -> None:
        rng, draw, sky, h = self.rng, self.draw, self.scene.sky, self.horizon
        if "rain" in sky:  # a grey sky, before anything that hangs in it
            grey = Image.new("RGB", (CANVAS, h), jitter(rng, (132, 140, 152)))
            self.image.paste(Image.blend(self.image.crop((0, 0, CANVAS, h)), grey, 0.6), (0, 0))
        if "rainbow" in sky:
            x, r = rng.uniform(0.35, 0.65) * CANVAS, rng.uniform(50, 58)
            for i, colour in enumerate(
                ((226, 50, 50), (246, 146, 40), (250, 226, 70), (60, 176, 80), (60, 100, 220), (140, 70, 180))
            ):
                q = r - 4 * i
                draw.arc((x - q, h - q, x + q, h + q), 180, 360, fill=colour, width=5)
        if "moon" in sky:
            x, y, r = rng.uniform(0.14, 0.86) * CANVAS, rng.uniform(17, 28), rng.uniform(12, 15)
            draw.ellipse((x - r, y - r, x + r, y + r), fill=(250, 242, 196))
            for dx, dy, q in ((-0.35, -0.2, 0.24), (0.3, 0.25, 0.3), (0.25, -0.45, 0.16)):
                box = (x + (dx - q) * r, y + (dy - q) * r, x + (dx + q) * r, y + (dy + q) * r)
                draw.ellipse(box, fill=(222, 208, 156))
        if "clouds" in sky:
            shade = (250, 250, 252) if self.scene.time == "day" else (250, 214, 206)
            if "rain" in sky:
                shade = (196, 200, 208)
            for k in range(3):
                x, y = (k + rng.uniform(0.2, 0.8)) * CANVAS / 3, rng.uniform(14, 40)
                for dx, dy, r in ((-14, 2, 8), (-4, -4, 10), (7, -1, 9), (15, 3, 7)):
                    draw.ellipse((x + dx - r, y + dy - r * 0.8, x + dx + r, y + dy + r * 0.8), fill=shade)

    def paint(self) -> Image.Image:
        """The whole picture; rain falls before everything."""
        image = super().paint()
        if "rain" in self.scene.sky:
            for _ in range(34):
                x, y = self.rng.uniform(-4, CANVAS), self.rng.uniform(-8, CANVAS - 8)
                self.draw.line([(x + 6, y), (x, y + 15)], fill=jitter(self.rng, (206, 222, 240)), width=3)
        return image

    def _ground(self) -> None:
        rng, draw, h = self.rng, self.draw, self.horizon
        box = (0, h, CANVAS, CANVAS)
        ground = self.scene.ground
        if ground == "hill":
            far, near = self.tone((112, 176, 84)), self.tone((76, 146, 62))
            x = rng.uniform(0.2, 0.8) * CANVAS
            draw.ellipse((x - 76, h - 20, x + 76, h + 70), fill=far)
            draw.rectangle((0, h + 16, CANVAS, CANVAS), fill=near)
            draw.ellipse((-70, h + 4, 76, h + 60), fill=near)
            draw.ellipse((60, h + 6, 200, h + 60), fill=near)
        elif ground == "river":
            draw.rectangle(box, fill=self.tone((98, 150, 74)))
            water, wave = self.tone((58, 136, 196)), self.tone((150, 204, 230))
            lean = rng.uniform(-20, 20)
            mid = CANVAS / 2 + lean
            draw.polygon(
                [(mid - 16, h), (mid + 16, h), (118, h + 22), (150, CANVAS), (-22, CANVAS), (10, h + 22)], fill=water
            )
            for _ in range(7):
                x, y = rng.uniform(14, 92), rng.uniform(h + 22, CANVAS - 3)
                draw.line([(x, y), (x + rng.uniform(12, 24), y)], fill=wave, width=3)
        elif ground == "forest":
            draw.rectangle(box, fill=self.tone((58, 84, 44)))
            for x in range(-6, CANVAS + 12, 15):
                tall, dx = rng.uniform(30, 46), rng.uniform(-3, 3)
                leaf = self.tone((24, 84, 50), 14)
                draw.rectangle((x + dx - 3, h, x + dx + 3, h + 9), fill=self.tone((88, 58, 36)))
                draw.polygon([(x + dx - 12, h + 3), (x + dx, h - tall), (x + dx + 12, h + 3)], fill=leaf)
        elif ground == "desert":
            draw.rectangle(box, fill=self.tone((230, 164, 88)))
            for x, y in ((rng.uniform(0, 60), h + 4), (rng.uniform(60, 128), h + 18)):
                draw.ellipse((x - 60, y - 9, x + 60, y + 40), fill=self.tone((242, 186, 112)))
                draw.arc((x - 60, y - 9, x + 60, y + 40), 200, 340, fill=self.tone((196, 126, 60)), width=3)
            x = float(rng.choice((10, 118)))
            cactus = self.tone((56, 124, 66))
            self._limb([(x, h - 14), (x, h + 14)], cactus, 7)
            self._limb([(x - 8, h - 8), (x - 8, h), (x, h + 2)], cactus, 4)
            self._limb([(x + 8, h - 12), (x + 8, h - 3), (x, h)], cactus, 4)
        elif ground == "snow":
            draw.rectangle(box, fill=self.tone((238, 242, 250), 4))
            for x, r in ((rng.uniform(0, 50), 40), (rng.uniform(70, 128), 46)):
                draw.ellipse((x - r, h - 8, x + r, h + 24), fill=self.tone((238, 242, 250), 4))
            for _ in range(4):
                x, y = rng.uniform(0, CANVAS), rng.uniform(h + 12, CANVAS)
                draw.ellipse((x - 20, y - 3, x + 20, y + 3), fill=self.tone((204, 216, 238), 5))
        else:  # harbour
            draw.rectangle(box, fill=self.tone((36, 92, 150)))
            for _ in range(5):
                x, y = rng.uniform(-10, CANVAS), rng.uniform(h + 5, CANVAS - 30)
                draw.line([(x, y), (x + 18, y)], fill=self.tone((110, 166, 206)), width=3)
            for x in (rng.uniform(8, 26), rng.uniform(102, 120)):
                sail = [(x, h - 20), (x, h - 2), (x + 11, h - 2)]
                draw.polygon(sail, fill=self.tone((248, 246, 240), 4))
                draw.polygon([(x - 9, h), (x + 13, h), (x + 8, h + 7), (x - 5, h + 7)], fill=self.tone((150, 60, 44)))
            draw.rectangle((0, CANVAS - 22, CANVAS, CANVAS), fill=self.tone((150, 138, 126)))
            draw.rectangle((0, CANVAS - 24, CANVAS, CANVAS - 20), fill=self.tone((196, 184, 168)))

    def _chosen(self, *colours: Colour) -> Colour:
        return self.tone(colours[int(self.rng.integers(len(colours)))])

    def _face(self) -> Colour:
        return self._chosen((240, 200, 166), (196, 142, 104), (130, 88, 62))

    def _man(self, x: float, s: float) -> None:
        draw = self.draw
        base, tall = self._figure(x, s)
        top = base - tall
        shirt = self._chosen((200, 48, 44), (42, 86, 176), (230, 150, 40), (240, 236, 224))
        trousers, hat = self.tone((52, 54, 76)), self._chosen((70, 48, 32), (40, 42, 48))
        for side in (-1, 1):
            self._limb([(x + side * 6 * s, base - 32 * s), (x + side * 8 * s, base)], trousers, 11 * s)
            self._limb([(x + side * 12 * s, top + 24 * s), (x + side * 18 * s, top + 44 * s)], shirt, 8 * s)
        draw.rounded_rectangle((x - 14 * s, top + 19 * s, x + 14 * s, base - 26 * s), 5, fill=shirt)
        draw.ellipse((x - 9 * s, top + 2 * s, x + 9 * s, top + 21 * s), fill=self._face())
        draw.chord((x - 9 * s, top + 4 * s, x + 9 * s, top + 22 * s), 20, 160, fill=hat)
        draw.rectangle((x - 16 * s, top + 3 * s, x + 16 * s, top + 7 * s), fill=hat)
        draw.rectangle((x - 9 * s, top - 6 * s, x + 9 * s, top + 5 * s), fill=hat)

    def _woman(self, x: float, s: float) -> None:
        draw = self.draw
        base, tall = self._figure(x, s)
        top = base - tall
        dress = self._chosen((210, 50, 110), (120, 60, 160), (30, 140, 130), (236, 190, 50))
        hair, face = self._chosen((48, 32, 22), (128, 66, 30), (226, 186, 96)), self._face()
        draw.ellipse((x - 13 * s, top - 3 * s, x + 13 * s, top + 30 * s), fill=hair)
        for side in (-1, 1):
            self._limb([(x + side * 8 * s, top + 26 * s), (x + side * 17 * s, top + 44 * s)], face, 6 * s)
            self._limb([(x + side * 5 * s, base - 8 * s), (x + side * 5 * s, base)], face, 6 * s)
        draw.polygon(
            [
                (x - 10 * s, top + 20 * s),
                (x + 10 * s, top + 20 * s),
                (x + 7 * s, top + 38 * s),
                (x + 22 * s, base - 8 * s),
                (x - 22 * s, base - 8 * s),
                (x - 7 * s, top + 38 * s),
            ],
            fill=dress,
        )
        draw.ellipse((x - 8 * s, top + 1 * s, x + 8 * s, top + 20 * s), fill=face)

    def _lighthouse(self, x: float, s: float) -> None:
        draw = self.draw
        base = self.horizon + 26
        top = base - 76 * s
        white, red = self.tone((246, 244, 240), 4), self.tone((210, 40, 40))
        for k in range(5):
            upper, lower = top + (base - top) * k / 5, top + (base - top) * (k + 1) / 5
            a, b = (10 + 1.6 * k) * s, (11.6 + 1.6 * k) * s
            draw.polygon([(x - a, upper), (x + a, upper), (x + b, lower), (x - b, lower)], fill=(white, red)[k % 2])
        lamp = (255, 232, 120)
        if self.scene.time != "day":
            for side in (-1, 1):
                draw.polygon([(x, top - 7 * s), (x + side * 42 * s, top - 16 * s), (x + side * 42 * s, top)], fill=lamp)
        draw.rectangle((x - 8 * s, top - 13 * s, x + 8 * s, top), fill=lamp)
        draw.rectangle((x - 13 * s, top - 2 * s, x + 13 * s, top + 2 * s), fill=self.tone((60, 60, 66)))
        draw.polygon([(x - 10 * s, top - 12 * s), (x, top - 24 * s), (x + 10 * s, top - 12 * s)], fill=red)

    def _windmill(self, x: float, s: float) -> None:
        draw, rng = self.draw, self.rng
        base = self.horizon + 28
        top = base - 54 * s
        wall = self._chosen((176, 116, 74), (214, 196, 160))
        dark = self.tone((78, 48, 34))
        draw.polygon([(x - 12 * s, top), (x + 12 * s, top), (x + 19 * s, base), (x - 19 * s, base)], fill=wall)
        draw.pieslice((x - 14 * s, top - 14 * s, x + 14 * s, top + 14 * s), 180, 360, fill=dark)
        draw.rectangle((x - 5 * s, base - 16 * s, x + 5 * s, base), fill=dark)
        y, turn = top + 2 * s, rng.uniform(0.5, 1.1)
        sail = self.tone((248, 240, 220), 5)
        for k in range(4):
            a = turn + math.pi * k / 2
            ux, uy, vx, vy = math.cos(a), math.sin(a), -math.sin(a), math.cos(a)
            q, w = 36 * s, 10 * s
            blade = [(9 * s, 0.0), (q, 0.0), (q, w), (9 * s, w)]
            draw.polygon([(x + u * ux + v * vx, y + u * uy + v * vy) for u, v in blade], fill=sail)
            draw.line([(x, y), (x + q * ux, y + q * uy)], fill=dark, width=4)
        draw.ellipse((x - 4 * s, y - 4 * s, x + 4 * s, y + 4 * s), fill=dark)

    def _horse(self, x: float, s: float) -> None:
        draw, rng = self.draw, self.rng
        base = CANVAS * rng.uniform(0.92, 0.96)
        coat = self._chosen((142, 84, 44), (92, 58, 40), (226, 216, 204))
        mane = self.tone((44, 32, 28))
        f = 1 if rng.random() < 0.5 else -1
        for dx in (-20, -12, 14, 21):
            self._limb([(x + f * dx * s, base - 30 * s), (x + f * dx * s, base)], coat, 6 * s)
        draw.ellipse((x - 28 * s, base - 48 * s, x + 28 * s, base - 22 * s), fill=coat)
        self._limb([(x + f * 19 * s, base - 38 * s), (x + f * 31 * s, base - 62 * s)], coat, 13 * s)
        self._limb([(x + f * 30 * s, base - 64 * s), (x + f * 42 * s, base - 54 * s)], coat, 9 * s)
        ear = [(x + f * 25 * s, base - 66 * s), (x + f * 29 * s, base - 78 * s), (x + f * 33 * s, base - 66 * s)]
        draw.polygon(ear, fill=coat)
        self._limb([(x + f * 13 * s, base - 44 * s), (x + f * 25 * s, base - 68 * s)], mane, 6 * s)
        self._limb([(x - f * 27 * s, base - 40 * s), (x - f * 36 * s, base - 18 * s)], mane, 6 * s)

    def _dog(self, x: float, s: float) -> None:
        draw, rng = self.draw, self.rng
        base = CANVAS * rng.uniform(0.92, 0.96)
        coat, ear = self._chosen((236, 208, 160), (206, 150, 90), (244, 242, 238)), self.tone((104, 62, 36))
        f = 1 if rng.random() < 0.5 else -1
        for dx in (-15, -8, 7, 14):
            self._limb([(x + f * dx * s, base - 14 * s), (x + f * dx * s, base - 2)], coat, 6 * s)
        draw.rounded_rectangle((x - 20 * s, base - 30 * s, x + 20 * s, base - 10 * s), 9, fill=coat)
        self._limb([(x - f * 18 * s, base - 26 * s), (x - f * 28 * s, base - 42 * s)], coat, 5 * s)
        cx, cy = x + f * 21 * s, base - 38 * s
        draw.ellipse((cx - 13 * s, cy - 12 * s, cx + 13 * s, cy + 12 * s), fill=coat)
        draw.ellipse((cx + f * 15 * s - 10 * s, cy - 2 * s, cx + f * 15 * s + 8 * s, cy + 11 * s), fill=coat)
        nose = cx + f * 21 * s
        draw.ellipse((nose - 4 * s, cy - 1 * s, nose + 4 * s, cy + 6 * s), fill=(26, 22, 22))
        lobe = cx - f * 8 * s
        draw.ellipse((lobe - 6 * s, cy - 11 * s, lobe + 6 * s, cy + 13 * s), fill=ear)
        eye = cx + f * 5 * s
        draw.ellipse((eye - 2.5 * s, cy - 5 * s, eye + 2.5 * s, cy), fill=(20, 18, 18))
        collar = x + f * 14 * s
        draw.rectangle((collar - 6 * s, cy + 9 * s, collar + 6 * s, cy + 14 * s), fill=self.tone((214, 40, 40)))

    def _bridge(self, x: float, s: float) -> None:
        draw = self.draw
        base, w = self.horizon + 30, 46 * s
        stone = self._chosen((176, 166, 156), (156, 112, 88))
        below = self.tone((40, 70, 110))
        draw.polygon(
            [(x - w, base - 26 * s), (x, base - 42 * s), (x + w, base - 26 * s), (x + w, base), (x - w, base)],
            fill=stone,
        )
        for side in (-1, 1):
            cx = x + side * 20 * s
            draw.ellipse((cx - 14 * s, base - 24 * s, cx + 14 * s, base + 10 * s), fill=below)
        draw.rectangle((x - w, base, x + w, base + 11 * s), fill=below)
        rail = self.tone((112, 92, 80))
        draw.line([(x - w, base - 29 * s), (x, base - 45 * s), (x + w, base - 29 * s)], fill=rail, width=5)

    def _umbrella(self, x: float, s: float) -> None:
        draw = self.draw
        base = CANVAS * 0.95
        top, r = base - 66 * s, 30 * s
        pole = self.tone((70, 46, 34))
        self._limb(
            [(x, top + 4), (x, base - 5 * s), (x + 8 * s, base - 2 * s), (x + 11 * s, base - 9 * s)], pole, 4 * s
        )
        first, second = ((214, 40, 52), (250, 244, 236)) if self.rng.random() < 0.6 else ((44, 80, 190), (250, 214, 70))
        box = (x - r, top, x + r, top + 2 * r)
        for k in range(5):
            fill = self.tone((first, second)[k % 2], 6)
            draw.pieslice(box, 180 + 36 * k, 216 + 36 * k, fill=fill)
        draw.line([(x, top - 6 * s), (x, top + 2)], fill=pole, width=4)

    def _lantern(self, x: float, s: float) -> None:
        draw = self.draw
        base = CANVAS * self.rng.uniform(0.90, 0.95)
        iron, glow = self.tone((40, 38, 42), 6), (255, 214, 92)
        draw.arc((x - 10 * s, base - 62 * s, x + 10 * s, base - 40 * s), 180, 360, fill=iron, width=4)
        draw.polygon([(x - 18 * s, base - 40 * s), (x, base - 54 * s), (x + 18 * s, base - 40 * s)], fill=iron)
        draw.rectangle((x - 14 * s, base - 40 * s, x + 14 * s, base - 6 * s), fill=glow)
        draw.ellipse((x - 6 * s, base - 30 * s, x + 6 * s, base - 10 * s), fill=(255, 246, 206))
        for dx in (-14, 14):
            draw.line([(x + dx * s, base - 40 * s), (x + dx * s, base - 4 * s)], fill=iron, width=5)
        draw.rectangle((x - 18 * s, base - 8 * s, x + 18 * s, base), fill=iron)

    def _balloon(self, x: float, s: float) -> None:
        draw = self.draw
        y, r = 38 + self.rng.uniform(-4, 6), 27 * s
        palette = ((220, 50, 50), (44, 100, 200), (60, 160, 90), (160, 60, 160))
        body, stripe = self._chosen(*palette), self.tone((252, 220, 80), 6)
        basket = y + r + 22 * s
        for side in (-1, 1):
            rope = [(x + side * r * 0.6, y + r * 0.75), (x + side * 6 * s, basket)]
            draw.line(rope, fill=self.tone((80, 56, 40)), width=3)
        draw.polygon([(x - r * 0.86, y + r * 0.5), (x + r * 0.86, y + r * 0.5), (x, y + r * 1.5)], fill=body)
        draw.ellipse((x - r, y - r, x + r, y + r), fill=body)
        draw.ellipse((x - r * 0.62, y - r, x + r * 0.62, y + r), fill=stripe)
        draw.ellipse((x - r * 0.24, y - r, x + r * 0.24, y + r), fill=body)
        draw.rectangle((x - 8 * s, basket, x + 8 * s, basket + 12 * s), fill=self.tone((136, 88, 48)))

    def _bench(self, x: float, s: float) -> None:
        draw = self.draw
        base = CANVAS * self.rng.uniform(0.90, 0.95)
        wood, iron = self._chosen((168, 104, 54), (120, 74, 42), (60, 120, 84)), self.tone((40, 40, 44), 6)
        w = 36 * s
        for side in (-1, 1):
            lx = x + side * 27 * s
            draw.line([(lx, base - 44 * s), (lx, base)], fill=iron, width=5)
        for y in (44, 33):
            draw.rectangle((x - w, base - y * s, x + w, base - (y - 8) * s), fill=wood)
        draw.rectangle((x - w - 3, base - 20 * s, x + w + 3, base - 12 * s), fill=wood)

    def _bird(self, x: float, s: float) -> None:
        draw, rng = self.draw, self.rng
        base = CANVAS * rng.uniform(0.90, 0.95)
        body = self._chosen((40, 110, 200), (60, 60, 68), (210, 60, 50))
        breast = self.tone((246, 150, 60))
        f = 1 if rng.random() < 0.5 else -1
        for dx in (-3, 5):
            draw.line([(x + dx * s, base - 14 * s), (x + dx * s, base)], fill=self.tone((230, 150, 40)), width=3)
        tail = [(x - f * 14 * s, base - 28 * s), (x - f * 38 * s, base - 22 * s), (x - f * 34 * s, base - 12 * s)]
        draw.polygon(tail, fill=body)
        draw.ellipse((x - 20 * s, base - 36 * s, x + 20 * s, base - 10 * s), fill=body)
        cx, cy = x + f * 15 * s, base - 38 * s
        draw.ellipse((x + f * 8 * s - 11 * s, base - 32 * s, x + f * 8 * s + 11 * s, base - 11 * s), fill=breast)
        draw.ellipse((cx - 11 * s, cy - 11 * s, cx + 11 * s, cy + 11 * s), fill=body)
        beak = [(cx + f * 9 * s, cy - 5 * s), (cx + f * 22 * s, cy), (cx + f * 9 * s, cy + 5 * s)]
        draw.polygon(beak, fill=(250, 196, 40))
        eye = cx + f * 4 * s
        draw.ellipse((eye - 3 * s, cy - 5 * s, eye + 3 * s, cy + 1 * s), fill=(250, 250, 250))
        wing = [(x + f * 6 * s, base - 30 * s), (x - f * 22 * s, base - 26 * s), (x - f * 4 * s, base - 16 * s)]
        draw.polygon(wing, fill=atelier.dim(body, 0.7))

    def _tent(self, x: float, s: float) -> None:
        draw = self.draw
        base = CANVAS * self.rng.uniform(0.88, 0.93)
        cloth = self._chosen((240, 130, 40), (70, 150, 90), (220, 190, 60), (200, 60, 60))
        side = [(x, base - 52 * s), (x + 24 * s, base - 46 * s), (x + 52 * s, base - 4 * s), (x + 30 * s, base)]
        draw.polygon(side, fill=atelier.dim(cloth, 0.72))
        draw.polygon([(x - 34 * s, base), (x, base - 52 * s), (x + 32 * s, base)], fill=cloth)
        draw.polygon([(x - 11 * s, base), (x, base - 36 * s), (x + 11 * s, base)], fill=(40, 30, 30))
        draw.line([(x, base - 60 * s), (x, base - 50 * s)], fill=self.tone((80, 56, 40)), width=4)


# ---------------------------------------------------------------------------- styles

_CUT_OUTS = np.array(
    (
        (24, 44, 150),
        (70, 170, 236),
        (252, 246, 230),
        (254, 206, 40),
        (244, 110, 36),
        (226, 34, 70),
        (248, 150, 184),
        (20, 140, 84),
        (150, 206, 70),
        (126, 54, 150),
    ),
    np.float32,
)


def _van_gogh(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Atelier's strokes, with more of what was painted showing through: a windmill's sails are thin."""
    return Image.blend(STYLE_OPERATIONS["van gogh"](image, rng), image, 0.3)


def _matisse(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Paper cut-outs: flat sheets of a few bright papers, and fronds down both sides."""
    pixels = np.asarray(image.filter(ImageFilter.MedianFilter(5)), np.float32)
    grey = pixels.mean(-1, keepdims=True)
    vivid = grey + 1.7 * (pixels - grey)
    distance = ((vivid[..., None, :] - _CUT_OUTS) ** 2).sum(-1)
    index = distance.argmin(-1)
    papers = _CUT_OUTS[index]
    # Where two things are cut from one paper, a line of ink parts them.
    sheet = Image.fromarray(index.astype(np.uint8))
    merged = np.asarray(sheet.filter(ImageFilter.MaxFilter(7))) == np.asarray(sheet.filter(ImageFilter.MinFilter(7)))
    papers[merged & (edges(image, 2) > 0.5)] = (24, 20, 34)
    flat = Image.fromarray(papers.astype(np.uint8)).filter(ImageFilter.ModeFilter(3))
    draw = ImageDraw.Draw(flat)
    for x, out in ((4, -1), (CANVAS - 5, 1)):
        fill = tuple(int(v) for v in _CUT_OUTS[int(rng.choice((3, 4, 5, 6, 8)))])
        shift = rng.uniform(0, 12)
        draw.line([(x, 0), (x, CANVAS)], fill=fill, width=8)
        for k in range(-1, 8):
            y = 18 * k + shift
            draw.ellipse((x - out * 6 - 9, y - 5, x - out * 6 + 9, y + 6), fill=fill)
    return flat


def _engraving(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Ink lines across a plate, the thicker the darker, over a pale tone and under firm contours."""
    pixels = np.asarray(image.filter(ImageFilter.GaussianBlur(1)), np.float32) / 255
    grey = pixels @ np.array([0.75, 0.25, 0.0], np.float32)  # as through a red glass: skies dark, skins and coats light
    y, x = np.mgrid[0:CANVAS, 0:CANVAS].astype(np.float32)
    wave = 0.5 + 0.5 * np.sin((y + 2.5 * np.sin(x / 18 + rng.uniform(0, 6))) * 2 * math.pi / 16 + rng.uniform(0, 6))
    dark = 1 - grey
    lines = np.clip((dark * 1.05 - 0.1 - wave * 0.85) * 3.5 + 0.5, 0, 1)
    ink = np.maximum(0.5 * lines + 0.4 * dark, 0.95 * edges(image, 2))
    cream, black = np.array([248, 230, 186]), np.array([52, 26, 14])
    plate = cream * (1 - ink[..., None]) + black * ink[..., None]
    return Image.fromarray(plate.astype(np.uint8))


def _watercolour(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Pale washes that pool at their edges and leave the paper bare around them."""
    soft = image.filter(ImageFilter.MedianFilter(5)).filter(ImageFilter.GaussianBlur(1.5))
    pixels = np.asarray(soft, np.float32) / 255
    pool = 0.55 + 0.9 * smooth_noise(rng, 9)[..., None]
    strength = 0.62 * pool
    wash = 1 - (1 - pixels) * np.clip(strength, 0.2, 1)
    wash *= 1 - 0.28 * edges(image)[..., None]
    y, x = np.mgrid[0:CANVAS, 0:CANVAS].astype(np.float32)
    margin = np.minimum(np.minimum(x, y), np.minimum(CANVAS - 1 - x, CANVAS - 1 - y))
    bare = np.clip((7 + 12 * smooth_noise(rng, 12) - margin) / 3, 0, 1)[..., None]
    paper = wash * (1 - bare) + np.array([0.99, 0.98, 0.96]) * bare
    return Image.fromarray((np.clip(paper, 0, 1) * 255).astype(np.uint8))


_OPERATIONS = {
    "photo": STYLE_OPERATIONS["photo"],
    "painting": STYLE_OPERATIONS["painting"],
    "van gogh": _van_gogh,
    "matisse": _matisse,
    "engraving": _engraving,
    "watercolour": _watercolour,
}


def draw(scene: Scene) -> np.ndarray:
    """Render a scene: ``uint8`` array of shape ``[SIZE, SIZE, 3]``, RGB."""
    rng = np.random.default_rng(scene.seed)
    styled = _OPERATIONS[scene.style](Painter(scene, rng).paint(), rng)
    return np.asarray(styled.resize((SIZE, SIZE), Image.Resampling.BOX))
