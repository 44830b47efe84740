"""What people look at: marked photographs with captions, sheets of pictures, a run's curves."""

from __future__ import annotations

import functools
import json
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from common import UserError, writing

# magenta first: rare in photographs, and no colour of the shapes
COLORS = np.array([(235, 0, 180), (0, 170, 255), (255, 150, 0), (0, 190, 90), (140, 80, 255), (230, 40, 40)])


def overlay(image: np.ndarray, answers: list, sentences: list[str] = [], least: int = 480) -> Image.Image:
    """The photograph (H, W, 3) uint8 with masks (H, W) bool tinted and outlined, or boxes x1, y1, x2, y2 in its pixels,
    each in a colour of its own, and the sentences below.

    Small pictures are drawn larger, the longer side at least `least` pixels.
    """
    scale = max(1, -(-least // max(image.shape[:2])))
    out = np.repeat(np.repeat(image, scale, 0), scale, 1).astype(np.float32)
    colors, edge = [COLORS[n % len(COLORS)] for n in range(len(answers))], np.zeros(out.shape[:2], dtype=bool)
    for answer, color in zip(answers, colors):
        if isinstance(answer, np.ndarray):
            mask = np.repeat(np.repeat(answer, scale, 0), scale, 1)
            out[mask] = 0.55 * out[mask] + 0.45 * color
            edge |= outline(mask)
    out[edge] = 255
    picture = Image.fromarray(out.round().astype(np.uint8))
    width, pen = max(2, max(picture.size) // 200), ImageDraw.Draw(picture)
    for answer, color in zip(answers, colors):
        if not isinstance(answer, np.ndarray) and answer is not None:
            x1, y1, x2, y2 = (round(v * scale) for v in answer)
            frame = x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)
            pen.rectangle(frame, outline="white", width=2 * width)  # seen on dark and light ground alike
            pen.rectangle(frame, outline=tuple(color.tolist()), width=width)
    return captioned(picture, sentences, colors) if sentences else picture


def outline(mask: np.ndarray) -> np.ndarray:
    """The pixels of a mask (H, W) at its edge; the picture's border is no edge."""
    edge = np.zeros_like(mask)
    for axis in 0, 1:
        for step in range(1, max(1, max(mask.shape) // 300) + 1):
            for s in step, -step:
                index = np.clip(np.arange(mask.shape[axis]) - s, 0, mask.shape[axis] - 1)
                edge |= mask & ~np.take(mask, index, axis)
    return edge


def captioned(picture: Image.Image, captions: list[str], colors: list) -> Image.Image:
    """The picture with the captions under it, each in as many lines as it takes; several have their colours."""
    size, mark = max(14, picture.width // 34), len(captions) > 1
    fonts = [font_for(caption, size) for caption in captions]
    height = max(sum(font.getmetrics()) for font in fonts)
    left = 8 + (height + 4) * mark
    lines = [(text, n == 0, color, font) for caption, color, font in zip(captions, colors, fonts)
             for n, text in enumerate(wrapped(caption, font, picture.width - left - 8))]
    sheet = Image.new("RGB", (picture.width, picture.height + height * len(lines) + 12), "white")
    sheet.paste(picture)
    pen = ImageDraw.Draw(sheet)
    for n, (text, first, color, font) in enumerate(lines):
        y = picture.height + 6 + n * height
        pen.text((left, y), text, "black", font)
        if mark and first:
            pen.rectangle((8, y + 3, 8 + height - 6, y + height - 3), tuple(color.tolist()))
    return sheet


# by name, as Pillow searches the system's font folders; Pillow's own font has no accents
FONTS = ("DejaVuSans.ttf", "NotoSansCJK-Regular.ttc", "NotoSansCJKsc-Regular.otf", "wqy-microhei.ttc", "wqy-zenhei.ttc",
         "DroidSansFallbackFull.ttf", "Arial Unicode.ttf", "PingFang.ttc", "Hiragino Sans GB.ttc", "msyh.ttc",
         "YuGothM.ttc", "malgun.ttf", "arial.ttf")


@functools.cache
def fonts(size: int) -> list[ImageFont.FreeTypeFont]:
    """Pillow's own font, and those of FONTS that this system has."""
    found = [ImageFont.load_default(size)]
    for name in FONTS:
        with suppress(OSError):
            found.append(ImageFont.truetype(name, size))
    return found


@functools.cache
def has_letter(font: ImageFont.FreeTypeFont, letter: str) -> bool:
    """Whether a font draws a letter otherwise than a code point that is no letter."""
    return bytes(font.getmask(letter)) != bytes(font.getmask("\U0010fffe"))


def font_for(text: str, size: int) -> ImageFont.FreeTypeFont:
    """The font that lacks the fewest letters of a text; a note on standard error where it lacks any."""
    letters = {letter for letter in text if not letter.isspace()}
    lacking = {font: sum(not has_letter(font, letter) for letter in letters) for font in fonts(size)}
    font = min(lacking, key=lacking.get)
    if lacking[font]:
        note_missing_letters()
    return font


@functools.cache  # said once
def note_missing_letters() -> None:
    print("note: no font here has all letters of a caption, so some are drawn as boxes; the system's package of Noto "
          "fonts (on Debian and Ubuntu fonts-noto-cjk) has them", file=sys.stderr)


def wrapped(text: str, font, width: int) -> list[str]:
    """Lines of words. A word that is wider than a line is broken, as is a sentence that is written without blanks."""
    length = functools.cache(font.getlength)
    parts = []                                                   # (blank before it, word or letter)
    for word in text.split():
        pieces = [word] if font.getlength(word) <= width else word
        parts += [(" " * (n == 0), piece) for n, piece in enumerate(pieces)]
    lines, line, used = [], "", 0.0
    for blank, part in parts:
        if line and used + length(blank + part) > width:
            lines.append(line)
            line, used = "", 0.0
        line += blank + part if line else part
        used += length(blank + part)
    return [*lines, line]


def draw_answers(image: np.ndarray, answers: list[dict], sentences: list[str], out: str | Path | None,
                 mask: str | Path | None = None) -> list[str]:
    """Draws what evaluate.ask gave: all of it to `out`, and each mask alone to `mask`, or else beside `out`. The file,
    or None, then stands for the mask. -> what was found, a line for each sentence"""
    if out:
        save(overlay(image, [answer.get("mask", answer["box"]) for answer in answers], sentences), out)
        mask = mask or Path(out).with_name(Path(out).stem + "_mask.png")
    said = []
    for n, (sentence, answer) in enumerate(zip(sentences, answers), 1):
        found = f"box {answer['box']}" if answer["box"] else "nothing"
        if "mask" in answer:
            pixels, answer["mask"] = answer["mask"], None
            if answer["box"]:
                found = f"{answer['area']} pixels, {found}, mean confidence {answer['confidence']}"
            if mask:
                file = Path(mask)
                file = file if len(answers) == 1 else file.with_name(f"{file.stem}_{n}{file.suffix}")
                save(Image.fromarray(pixels.astype(np.uint8) * 255), file)
                answer["mask"] = str(file)
                found += f", mask: {file}"
        said.append(f"{sentence!r}: {found}.")
    return said


def grid(pictures: list[Image.Image], columns: int = 4) -> Image.Image:
    """Pictures side by side, `columns` to a row."""
    width, height = max(p.width for p in pictures), max(p.height for p in pictures)
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (min(columns, len(pictures)) * width, rows * height), "white")
    for n, p in enumerate(pictures):
        sheet.paste(p, (n % columns * width, n // columns * height))
    return sheet


# A run's curves


def read_curves(log: Path, metric: str) -> dict[str, list[tuple[float, float]]]:
    """Of a run's log.jsonl, (step, value) of the loss and of the metric on val; empty without one."""
    entries = []
    for text in log.read_text("utf-8", "replace").splitlines() if log.is_file() else []:
        try:
            entries.append(json.loads(text))
        except ValueError:  # half a line, where a run was killed
            break
    return {"loss in training": [(e["step"], e["loss"]) for e in entries if "loss" in e],
            f"val {metric}": [(e["step"], e["val"][metric]) for e in entries if metric in e.get("val", {})]}


def curves(log: Path, metric: str) -> Image.Image:
    """The same as a picture."""
    w, h, pad = 460, 220, 56
    sheet = Image.new("RGB", (2 * w, h), "white")
    font, draw, color = ImageFont.load_default(13), ImageDraw.Draw(sheet), tuple(COLORS[0].tolist())
    for n, (title, points) in enumerate(read_curves(log, metric).items()):
        left, right, top, bottom = n * w + pad, (n + 1) * w - 16, 34, h - 34
        draw.text((left, 8), title, "black", font)
        draw.line([(left, top), (left, bottom), (right, bottom)], "#c8c8d0")
        if not points:
            continue
        xs, ys = zip(*points)
        low, high, last = min(ys), max(ys), max(xs)
        at = [(left + x / last * (right - left), bottom - (y - low) / (high - low or 1) * (bottom - top))
              for x, y in points]
        draw.line(at, color, 2) if len(at) > 1 else draw.circle(at[0], 2, color)
        for y, value in (top, high), (bottom, low):
            draw.text((left - 6, y), f"{value:.3g}", "black", font, anchor="rm")
        draw.text((right, bottom + 6), f"step {last:,}", "black", font, anchor="ra")
    return sheet


def draw_curves(log: Path, metric: str, file: Path) -> None:
    save(curves(log, metric), file)


# Files


def picture_format(file: str | Path, flag: str = "--out", formats: tuple[str, ...] = ("PNG", "JPEG", "WEBP")) -> str:
    """The format that a file's name asks for. Raises UserError for a name that asks for none of `formats`."""
    name = Image.registered_extensions().get(Path(file).suffix.lower())
    if name not in formats:
        endings = " or ".join(f".{f.lower().replace('jpeg', 'jpg')}" for f in formats)
        raise UserError(f"{flag} {file}: a name that ends in {endings} is needed.")
    return name


def save(picture: Image.Image, file: str | Path) -> None:
    with writing(file) as temporary:
        picture.save(temporary, format=picture_format(file))
