"""The built-in data sets: scenes of shapes, sentences about them, and how they are drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from data import SPLITS, Record, Source, box_of

COLOURS = ("red", "green", "blue", "yellow", "white")

SHAPES = ("circle", "square", "triangle", "cross")

SIZES = {"small": (0.115, 0.135), "large": (0.185, 0.215)}  # radius, in sides of the picture

PALETTE = {
    "shapes": dict(red=(220, 50, 47), green=(60, 170, 70), blue=(50, 100, 225), yellow=(240, 210, 50),
                   white=(240, 240, 240)),
    "shapes-shift": dict(red=(150, 25, 70), green=(150, 205, 120), blue=(125, 185, 240), yellow=(210, 150, 25),
                         white=(255, 250, 235)),
}

SPLIT_ID = {("shapes", s): n for n, s in enumerate(SPLITS["shapes"], 1)} | {
    ("shapes-shift", s): n for n, s in enumerate(SPLITS["shapes-shift"], 11)}

KINDS, KIND_SHARE = ("attribute", "position", "relation"), (0.5, 0.4, 0.1)

MARGIN = 0.16  # by so many sides of the picture a position or relation is clear

PLACES = {"left": (0, -1), "right": (0, 1), "top": (1, -1), "bottom": (1, 1)}  # axis, sign

PLACE_WORDS = {"left": ("the {} on the left", "the left {}", "the leftmost {}"),
               "right": ("the {} on the right", "the right {}", "the rightmost {}"),
               "top": ("the {} at the top", "the top {}", "the highest {}"),
               "bottom": ("the {} at the bottom", "the bottom {}", "the lowest {}")}

RELATIONS = {"left of": "left", "right of": "right", "above": "top", "below": "bottom"}

ADJECTIVES = ((), ("colour",), ("size",), ("size", "colour"))


@dataclass(frozen=True)
class Thing:
    """A shape of a scene; centre and radius in sides of the picture, y downwards. Later things lie on top."""

    shape: str
    colour: str
    size: str
    x: float
    y: float
    radius: float

    def named(self, adjectives: Sequence[str]) -> str:
        return " ".join([*(getattr(self, a) for a in adjectives), self.shape])

    def like(self, other: Thing, adjectives: Sequence[str]) -> bool:
        return self.shape == other.shape and all(getattr(self, a) == getattr(other, a) for a in adjectives)


@dataclass(frozen=True)
class Expression:
    """A sentence, and what it says: things like `target` in `adjectives`, and of these the one at a place, or the one
    in a relation to the only thing like `anchor` in `anchor_adjectives`."""

    target: int
    kind: str
    sentence: str
    adjectives: tuple[str, ...]
    place: str = ""
    anchor: int = -1
    anchor_adjectives: tuple[str, ...] = ()


class Shapes(Source):
    """Generated pictures, two objects of each referred to. Object i is number i % 2 of picture i // 2.

    A picture is a function of (seed, split, number) alone, and its scene does not depend on its size in pixels.
    """

    def __init__(self, name: str = "shapes", split: str = "train", seed: int = 0, size: int = 64,
                 images: int | None = None):
        self.name, self.split, self.seed, self.size = name, split, seed, size
        self.images = images if images is not None else 8000 if split == "train" else 300
        self.scene, self.box = cache(self._scene), cache(super().box)  # slow, and small

    def __reduce__(self):  # a cache does not travel to other processes
        return Shapes, (self.name, self.split, self.seed, self.size, self.images)

    def __len__(self) -> int:
        return 2 * self.images

    def sentences(self, i: int) -> tuple[str, ...]:
        return (self.scene(i // 2)[1][i % 2].sentence,)

    def count(self, i: int) -> int:
        return 1

    def picture(self, i: int) -> int:
        return i // 2

    def shape(self, i: int) -> tuple[int, int]:
        return self.size, self.size

    def identity(self) -> str:
        return f"{self.name} {self.split} {self.seed} {self.size} {self.images}"

    def describe(self, i: int) -> str:
        return f"{self.name}/{self.split} picture {i // 2} object {i % 2}"

    def read(self, i: int) -> Record:
        things, expressions = self.scene(i // 2)
        image, owner = draw_scene(things, self.size, self.name, self.rng(i // 2, 1))
        mask = owner == expressions[i % 2].target
        return Record(image, mask, box_of(mask), (expressions[i % 2].sentence,), i // 2, i, self.describe(i))

    def rng(self, number: int, stream: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, SPLIT_ID[self.name, self.split], number, stream])

    def _scene(self, number: int) -> tuple[list[Thing], list[Expression]]:
        """The things of a picture and two expressions for different ones of them."""
        if not 0 <= number < self.images:
            raise IndexError(f"{self.name} {self.split} has {self.images} pictures, no number {number}")
        rng = self.rng(number, 0)
        kinds = rng.choice(3, 2, p=KIND_SHARE)  # first the kind, then a scene that has it: else few relations occur
        for attempt in range(1000):
            things = place_things(rng)
            if attempt % 40 == 39:
                kinds = rng.choice(3, 2, p=KIND_SHARE)
            chosen = []
            for kind in kinds:
                options = [e for e in expressions_of(things, KINDS[kind]) if e.target not in {c.target for c in chosen}]
                if options:
                    chosen.append(options[rng.integers(len(options))])
            if len(chosen) == 2:
                return things, chosen
        raise AssertionError("no scene in 1000 attempts")


def place_things(rng: np.random.Generator) -> list[Thing]:
    """Two to four things; all but the first resemble it. They lie inside the picture and overlap little."""
    while True:
        count, things = rng.choice((2, 3, 4), p=(0.2, 0.4, 0.4)), []
        first = dict(shape=rng.choice(SHAPES), colour=rng.choice(COLOURS), size=rng.choice(tuple(SIZES)))
        for n in range(count):
            look = dict(first)
            changes = rng.choice((0, 1, 2), p=(0.25, 0.45, 0.3)) if n else 0
            for attribute in rng.permutation(("shape", "colour", "size"))[:changes]:
                others = [v for v in dict(shape=SHAPES, colour=COLOURS, size=tuple(SIZES))[attribute]
                          if v != look[attribute]]
                look[attribute] = others[rng.integers(len(others))]
            radius = rng.uniform(*SIZES[look["size"]])
            for _ in range(20):
                x, y = rng.uniform(1.05 * radius, 1 - 1.05 * radius, 2)
                if all(np.hypot(x - t.x, y - t.y) > 0.95 * (radius + t.radius) for t in things):
                    things.append(Thing(**{k: str(v) for k, v in look.items()}, x=x, y=y, radius=radius))
                    break
        if len(things) == count:
            return [things[i] for i in rng.permutation(count)]


def expressions_of(things: list[Thing], kind: str) -> list[Expression]:
    """Every expression of a kind that is true of exactly one thing, by a clear margin."""
    found = []
    for k, t in enumerate(things):
        for adjectives in ADJECTIVES:
            rivals = [o for n, o in enumerate(things) if n != k and o.like(t, adjectives)]
            name = t.named(adjectives)
            if kind == "attribute" and not rivals:
                found.append(Expression(k, kind, f"the {name}", adjectives))
            elif kind == "position" and rivals:
                for place in PLACES:
                    for words in PLACE_WORDS[place][:place_is_clear(t, rivals, place)]:
                        found.append(Expression(k, kind, words.format(name), adjectives, place))
            elif kind == "relation" and rivals:
                for a, anchor in enumerate(things):
                    if a == k:
                        continue
                    for words, place in RELATIONS.items():
                        if not relation_is_clear(t, [o for o in rivals if o is not anchor], anchor, place):
                            continue
                        for named in ADJECTIVES:
                            if not any(o.like(anchor, named) for o in things if o is not anchor):
                                sentence = f"the {name} {words} the {anchor.named(named)}"
                                found.append(Expression(k, kind, sentence, adjectives, place, a, named))
    return found


def place_is_clear(t: Thing, rivals: list[Thing], place: str) -> int:
    """3 if "leftmost" and "on the left" are both clear, 0 if neither: it lies in the outer half, beyond every rival by
    the margin, and the rivals in the other half."""
    axis, sign = PLACES[place]
    at = sign * ((t.x, t.y)[axis] - 0.5)
    others = [sign * ((o.x, o.y)[axis] - 0.5) for o in rivals]
    return 3 if at > 0.02 and max(others) < min(at - MARGIN, 0.02) else 0


def relation_is_clear(t: Thing, rivals: list[Thing], anchor: Thing, place: str) -> bool:
    """Further along than the anchor by the margin, more so than sideways; every rival is on the anchor's other side."""
    if not rivals:
        return False  # then the relation would say nothing
    axis, sign = PLACES[place]
    along = [sign * ((o.x, o.y)[axis] - (anchor.x, anchor.y)[axis]) for o in (t, *rivals)]
    sideways = abs((t.x, t.y)[1 - axis] - (anchor.x, anchor.y)[1 - axis])
    return along[0] > max(MARGIN, sideways) and max(along[1:]) < 0


def draw_scene(things: list[Thing], size: int, name: str, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(picture (S, S, 3) uint8, number of the topmost thing at each pixel (S, S), -1 for none)"""
    shift = name == "shapes-shift"
    if shift:  # a gradient with noise, in a tint of its own
        base, slope = rng.uniform(70, 130, 3), rng.uniform(-40, 40, 2)
        ramp = np.linspace(-1, 1, size)
        image = base + (slope[0] * ramp[:, None] + slope[1] * ramp)[:, :, None] + rng.normal(0, 8, (size, size, 1))
    else:
        image = np.full((size, size, 3), rng.uniform(25, 60))
    owner = np.full((size, size), -1, dtype=np.int8)
    for k, t in enumerate(things):
        top, left = (max(0, int((c - 1.1 * t.radius) * size)) for c in (t.y, t.x))
        bottom, right = (min(size, int((c + 1.1 * t.radius) * size) + 2) for c in (t.y, t.x))
        y = ((np.arange(top, bottom) + 0.5) / size - t.y)[:, None] / t.radius
        x = ((np.arange(left, right) + 0.5) / size - t.x)[None, :] / t.radius
        cover = (0.5 - distance(t.shape, x, y) * t.radius * size).clip(0, 1)  # one pixel of antialiasing
        colour = np.array(PALETTE[name][t.colour], dtype=float)
        if shift:
            colour = colour * texture(rng, x, y)[:, :, None]
        window = image[top:bottom, left:right]
        window += cover[:, :, None] * (colour - window)
        owner[top:bottom, left:right][cover > 0.5] = k
    return image.clip(0, 255).astype(np.uint8), owner


def distance(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Signed distance to a shape of radius 1 about the origin, negative inside."""
    if shape == "circle":
        return np.hypot(x, y) - 1
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.86
    if shape == "triangle":
        return np.maximum(y - 0.72, np.abs(x) * 0.866 - 0.5 * y - 0.5)
    bars = [np.maximum(np.abs(a) - 0.98, np.abs(b) - 0.34) for a, b in ((x, y), (y, x))]
    return np.minimum(*bars)


def texture(rng: np.random.Generator, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Brightness of stripes, dots or noise, 0.7 to 1."""
    kind, angle, pitch = rng.integers(3), rng.uniform(0, np.pi), rng.uniform(5, 8)
    u, v = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x
    if kind == 0:
        return 0.85 + 0.15 * np.sin(pitch * u)
    if kind == 1:
        return 0.85 + 0.15 * np.sin(pitch * u) * np.sin(pitch * v)
    return rng.uniform(0.7, 1, np.broadcast_shapes(x.shape, y.shape))
