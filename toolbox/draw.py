"""What people look at: marked photographs, maps over them, a run's curves."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from common import writing

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
    font, mark = ImageFont.load_default(max(14, picture.width // 34)), len(captions) > 1
    height = sum(font.getmetrics())
    left = 8 + (height + 4) * mark
    lines = [(text, n == 0, color) for caption, color in zip(captions, colors)
             for n, text in enumerate(wrapped(caption, font, picture.width - left - 8))]
    sheet = Image.new("RGB", (picture.width, picture.height + height * len(lines) + 12), "white")
    sheet.paste(picture)
    pen = ImageDraw.Draw(sheet)
    for n, (text, first, color) in enumerate(lines):
        y = picture.height + 6 + n * height
        pen.text((left, y), text, "black", font)
        if mark and first:
            pen.rectangle((8, y + 3, 8 + height - 6, y + height - 3), tuple(color.tolist()))
    return sheet


def wrapped(text: str, font, width: int) -> list[str]:
    """Lines of words; a word that is wider than all is cut."""
    lines, line = [], ""
    for word in text.split():
        while font.getlength(word) > width and len(word) > 1:
            word = word[:-1]
        longer = f"{line} {word}".strip()
        if line and font.getlength(longer) > width:
            lines, line = lines + [line], word
        else:
            line = longer
    return lines + [line]


# What a model looks at: maps (B, h, w) by name, taken from a forward by hooks, so that the methods' files are without


@torch.no_grad()
def attention_maps(model: nn.Module, images: Tensor, tokens: Tensor) -> dict[str, Tensor]:
    """Maps over the canvas, by name. DCRIS: the length of what each adapter adds, and of the features. ETRIS: the
    length of the features with and without Bridgers (Fig. 3). M2IST: the attention of [REG] over the image (Fig. 4).
    Shared-RIS: the attention of the sentence's first token over the image (Fig. 7), a mean over heads."""
    maps, handles = {}, []
    method = type(model).__name__
    globals()[f"hook_{method.lower()}"](model, tokens, maps, lambda m, f: handles.append(m.register_forward_hook(f)))
    try:
        model(images, tokens)
        if method == "ETRIS" and model.bridgers:
            with_bridgers, bridgers = dict(maps), model.bridgers
            model.bridgers = nn.ModuleDict()
            try:
                model(images, tokens)
            finally:
                model.bridgers = bridgers
            without = {name.replace("features, level", "level") + " without Bridgers": m for name, m in maps.items()}
            maps = with_bridgers | without
    finally:
        for handle in handles:
            handle.remove()
    return maps


def on_grid(tokens: Tensor) -> Tensor:
    """(B, N) -> (B, H, W), for a square canvas"""
    side = int(tokens.shape[1] ** 0.5)
    return tokens[:, -side * side:].unflatten(1, (side, side))


def hook_features(model: nn.Module, maps: dict, hook) -> None:
    def features(neck, args, out) -> None:
        levels = args[0] if isinstance(args[0], (list, tuple)) else [args[0]]
        maps.update({f"features, level {n}": level.norm(dim=1) for n, level in enumerate(levels, 4 - len(levels))})

    hook(model.neck, features)


def hook_etris(model: nn.Module, tokens: Tensor, maps: dict, hook) -> None:
    hook_features(model, maps, hook)


def hook_dcris(model: nn.Module, tokens: Tensor, maps: dict, hook) -> None:
    for i, adapter in model.visual_adapters.items():
        def added(adapter, args, out, i=int(i)) -> None:
            scale = model.vision.encoder.layer[i].layer_scale2
            maps[f"adapter of block {i + 1}"] = on_grid(scale(model.c.adapter_scale * out)[:, 5:].norm(dim=2))

        hook(adapter, added)
    hook_features(model, maps, hook)


def hook_m2ist(model: nn.Module, tokens: Tensor, maps: dict, hook) -> None:
    for i, layer in enumerate(model.vl_encoder, 1):
        def look(layer, args, out, i=i) -> None:
            x, pos, pad = args
            weights = layer.self_attn(x + pos, x + pos, x, key_padding_mask=pad)[1]  # (B, 1 + L + N, 1 + L + N)
            maps[f"[REG], V-L layer {i}"] = on_grid(weights[:, 0, 1 + tokens.shape[1]:])

        hook(layer, look)


def hook_sharedris(model: nn.Module, tokens: Tensor, maps: dict, hook) -> None:
    def look_in_encoder(layer, args, out) -> None:
        v, t, keys = args
        attention, (v, t) = layer.self_attn, layer.self_attn_layer_norm(v, t)
        q, k = attention.q_proj.B(t[:, :1]), torch.cat(attention.k_proj(v, t), 1)
        q, k = (x.unflatten(2, (attention.heads, -1)).transpose(1, 2) for x in (q, k))  # (B, h, 1 or 1 + N + L, d / h)
        scores = (q @ k.transpose(2, 3) / q.shape[3] ** 0.5).masked_fill(~keys, -torch.inf)
        maps["encoder"] = on_grid(scores.softmax(3).mean(1)[:, 0, 1:v.shape[1]])

    hook(model.beit3.layers[-1], look_in_encoder)
    places = {f"FPN, stage {j}": m for j, m in zip(model.fpn.stages, model.fpn.fusion) if model.c.fpn_fusion == "self"}
    if model.c.decoder_fusion == "self" and len(model.decoder.layers):
        places["decoder"] = model.decoder.layers[0].fusion
    for name, fusion in places.items():
        def look(fusion, args, out, name=name) -> None:
            x, n, pad = args
            y = fusion.norm(x)
            weights = fusion.attention(y[:, n:n + 1], y, y, key_padding_mask=pad)[1]  # (B, 1, 1 + N + L)
            maps[name] = on_grid(weights[:, 0, 1:n])

        hook(fusion, look)


def heat_sheet(image: np.ndarray, maps: dict[str, np.ndarray], answer, sentence: str) -> Image.Image:
    """A sheet of the answer and of maps (H, W) over the photograph, each from dark, its least value, to bright."""
    pictures = [overlay(image, [answer], [sentence], least=320)]
    for name, values in maps.items():
        low, high = float(values.min()), float(values.max())
        heat = ((values - low) / (high - low or 1))[..., None]     # (H, W, 1) in 0..1
        color = 255 * np.concatenate([heat, np.clip(2 * heat - 1, 0, 1), np.clip(1.2 * heat - 0.2, 0, 0.35)], 2)
        mixed = (0.45 * image.mean(2, keepdims=True) + 0.55 * color).astype(np.uint8)
        pictures.append(overlay(mixed, [None], [f"{name}: {low:.3g} to {high:.3g}"], least=320))
    for picture in pictures:
        picture.thumbnail((480, 560))
    return grid(pictures, columns=4)


def grid(pictures: list[Image.Image], columns: int = 4) -> Image.Image:
    """Pictures side by side, `columns` to a row."""
    width, height = max(p.width for p in pictures), max(p.height for p in pictures)
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (min(columns, len(pictures)) * width, rows * height), "white")
    for n, p in enumerate(pictures):
        sheet.paste(p, (n % columns * width, n // columns * height))
    return sheet


# The page


def read_curves(log: Path, metric: str) -> dict[str, list[tuple[float, float]]]:
    """Of a run's log.jsonl, (step, value) of the loss and of the metric on val; empty without one."""
    entries = []
    for text in log.read_text(errors="replace").splitlines() if log.is_file() else []:
        try:
            entries.append(json.loads(text))
        except ValueError:  # half a line, where a run was killed
            break
    return {"loss in training": [(e["step"], e["loss"]) for e in entries if "loss" in e],
            f"val {metric}": [(e["step"], e["val"][metric]) for e in entries if metric in e.get("val", {})]}


def draw_curves(log: Path, metric: str, file: Path) -> None:
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
    with writing(file) as temporary:
        sheet.save(temporary, format="PNG")


