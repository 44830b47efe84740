"""Augmentation as TransVG (Deng et al., ICCV 2021), in sides of the canvas."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageEnhance

from common import Preprocess

Place = tuple[int, int, int, int]  # top, left, height and width of a picture on the canvas
SCALES = tuple(k / 20 for k in range(14, 21))  # of the longer side
SHORT_SIDES, CROP_SIDES = (0.625, 0.78125, 0.9375), (0.6, 0.9375)
PLACE = re.compile(r"\b((left|right|top|bottom|upper|lower)(most|hand|side|wards?)?|middle|cent(er|re)|highest|lowest|"
                   r"corner|edge)\b", re.IGNORECASE)
SIDE = re.compile(r"\b(left|right)(?=(most|hand|side|wards?)?\b)", re.IGNORECASE)


def mirrored(sentence: str) -> str:
    """The sentence with left and right swapped, as words ("bright", "copyright" and "lefty" stay)."""
    def other(m: re.Match) -> str:
        word = "right" if m[1].lower() == "left" else "left"
        return word.upper() if m[1].isupper() else word.capitalize() if m[1][0].isupper() else word

    return SIDE.sub(other, sentence)


def crop_window(size: tuple[int, int], box: Sequence[float], side: int, rng: np.random.Generator) -> Place:
    """A window (top, left, height, width) of a picture (H, W) that has the centre of the box inside; the whole picture
    after 20 failures. Its sides are 0.6 to 0.9375 of the canvas where the picture's shorter is one of SHORT_SIDES."""
    h, w = size
    scale = rng.choice(SHORT_SIDES) * side / min(h, w)
    low, high = (s * side / scale for s in CROP_SIDES)
    for _ in range(20):
        ch, cw = (min(n, max(1, round(rng.uniform(low, min(n, high))))) for n in (h, w))
        top, left = int(rng.integers(h - ch + 1)), int(rng.integers(w - cw + 1))
        if left < (box[0] + box[2]) / 2 < left + cw and top < (box[1] + box[3]) / 2 < top + ch:
            return top, left, ch, cw
    return 0, 0, h, w


def jittered(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Brightness, contrast and saturation, each times 0.6 to 1.4, in any order; 4 of 5 pictures."""
    if rng.random() < 0.2:
        return image
    picture = Image.fromarray(image)
    for k in rng.permutation(3):
        kind = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[k]
        picture = kind(picture).enhance(rng.uniform(0.6, 1.4))
    return np.asarray(picture)


def augment(image: np.ndarray, mask: np.ndarray | None, box: Sequence[float], sentence: str, pre: Preprocess,
            rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray | None, tuple, str, Place]:
    """Another picture of the same object: (image, mask, box, sentence, place on the canvas).

    It is cropped only where the sentence has no word for a place in the picture, and mirrored along with the sentence.
    """
    if rng.random() < 0.5 and not PLACE.search(sentence):
        top, left, h, w = crop_window(image.shape[:2], box, pre.size, rng)
        image, mask = (a if a is None else a[top:top + h, left:left + w] for a in (image, mask))
        box = (max(box[0] - left, 0), max(box[1] - top, 0), min(box[2] - left, w), min(box[3] - top, h))
    image = jittered(np.ascontiguousarray(image), rng)
    h, w = image.shape[:2]
    if rng.random() < 0.5:
        image, mask = (a if a is None else a[:, ::-1].copy() for a in (image, mask))
        box, sentence = (w - box[2], box[1], w - box[0], box[3]), mirrored(sentence)
    scale = rng.choice(SCALES) * pre.size / max(h, w)
    h, w = (min(pre.size, max(1, round(n * scale))) for n in (h, w))
    place = int(rng.integers(pre.size - h + 1)), int(rng.integers(pre.size - w + 1)), h, w
    return image, mask, box, sentence, place
