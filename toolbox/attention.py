"""What a model looks at, behind `python evaluate.py --attention`.

The maps are taken from a forward pass by hooks, so the methods' files have nothing of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import data
from toolbox.draw import grid, overlay


@torch.no_grad()
def attention_sheet(model: nn.Module, image: np.ndarray, sentence: str, answer) -> Image.Image:
    """The maps over a photograph (H, W, 3) for a sentence, and the model's answer, a mask or a box."""
    device, pre = next(model.parameters()).device, model.preprocess
    canvas = data.normalise(data.to_canvas(image, pre)[None].to(device), pre)
    tokens = model.tokenize([sentence]).to(device)
    groups = {group: {name: data.from_canvas(m[0].float().cpu(), image.shape[:2], pre).numpy()
                      for name, m in maps.items()} for group, maps in attention_maps(model, canvas, tokens).items()}
    return heat_sheet(image, groups, answer, sentence)


@torch.no_grad()
def attention_maps(model: nn.Module, images: Tensor, tokens: Tensor) -> dict[str, dict[str, Tensor]]:
    """Maps (B, h, w) over the canvas, by name, in groups, whose maps have one scale.

    ETRIS: length of the features with and without Bridgers (Fig. 3). DCRIS: length of what each adapter adds; the
    mask's probability, with all adapters and without one kind (Fig. 4 d to f shows models that are trained without;
    here all have the same weights). M2IST: attention of [REG] over the image (Fig. 4). Shared-RIS: attention of
    the sentence's first token over the image in the encoder's last layer, in the FPN (mean over its stages) and in the
    decoder's last layer (Fig. 7). Attention is a mean over heads.
    """
    return MAPS[type(model).__name__](model, images, tokens)


@contextmanager
def hooked(hooks: dict[nn.Module, Callable]) -> Iterator[None]:
    """Forward hooks, module -> hook(module, args, output), that are removed in the end."""
    handles = [module.register_forward_hook(hook) for module, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def on_grid(tokens: Tensor) -> Tensor:
    """(B, N) -> (B, H, W), for a square canvas"""
    side = int(tokens.shape[1] ** 0.5)
    return tokens[:, -side * side:].unflatten(1, (side, side))


def feature_lengths(model: nn.Module, images: Tensor, tokens: Tensor) -> dict[str, Tensor]:
    """Of each level that ETRIS's neck reads."""
    maps = {}

    def look(neck, args, out) -> None:
        levels = args[0] if isinstance(args[0], (list, tuple)) else [args[0]]
        maps.update({f"level {n}": level.norm(dim=1) for n, level in enumerate(levels, 4 - len(levels))})

    with hooked({model.neck: look}):
        model(images, tokens)
    return maps


def etris_maps(model: nn.Module, images: Tensor, tokens: Tensor) -> dict:
    bridged = feature_lengths(model, images, tokens)
    if not model.bridgers:
        return {"features": bridged}
    bridgers, model.bridgers = model.bridgers, nn.ModuleDict()
    try:
        plain = feature_lengths(model, images, tokens)
    finally:
        model.bridgers = bridgers
    return {f"features, {level}": {"without Bridgers": plain[level], "with Bridgers": bridged[level]}
            for level in plain}


def dcris_maps(model: nn.Module, images: Tensor, tokens: Tensor) -> dict:
    def probability(off: list[nn.Module] = []) -> Tensor:
        with hooked({adapter: lambda adapter, args, out: torch.zeros_like(out) for adapter in off}):
            return model(images, tokens)[:, 0].sigmoid()

    added, hooks = {}, {}
    for i, adapter in model.visual_adapters.items():
        def look(adapter, args, out, i=int(i)) -> None:
            scale = model.vision.encoder.layer[i].layer_scale2
            added[f"block {i + 1}"] = on_grid(scale(model.c.adapter_scale * out)[:, 5:].norm(dim=2))

        hooks[adapter] = look
    with hooked(hooks):
        probabilities = {"of the model": probability()}
    for name, adapters in ("text", model.text_adapters), ("DenseCross", model.visual_adapters):
        if adapters:
            probabilities[f"without {name} adapters"] = probability(list(adapters.values()))
    return ({"what an adapter adds": added} if added else {}) | {"probability": probabilities}


def m2ist_maps(model: nn.Module, images: Tensor, tokens: Tensor) -> dict:
    maps, hooks = {}, {}
    for i, layer in enumerate(model.vl_encoder, 1):
        def look(layer, args, out, i=i) -> None:
            x, pos, pad = args
            weights = layer.self_attn(x + pos, x + pos, x, pad, need_weights=True)[1]  # (B, 1 + L + N, 1 + L + N)
            maps[f"V-L layer {i}"] = on_grid(weights[:, 0, 1 + tokens.shape[1]:])

        hooks[layer] = look
    with hooked(hooks):
        model(images, tokens)
    return {"attention of [REG]": maps}


def shared_ris_maps(model: nn.Module, images: Tensor, tokens: Tensor) -> dict:
    maps, hooks = {"encoder": [], "FPN": [], "decoder": []}, {}

    def look_in_encoder(layer, args, out) -> None:
        v, t, keys = args
        attention, (v, t) = layer.self_attn, layer.self_attn_layer_norm(v, t)
        q, k = attention.q_proj.B(t[:, :1]), torch.cat(attention.k_proj(v, t), 1)
        q, k = (x.unflatten(2, (attention.heads, -1)).transpose(1, 2) for x in (q, k))  # (B, h, 1 or 1 + N + L, d / h)
        scores = (q @ k.transpose(2, 3) / q.shape[3] ** 0.5).masked_fill(~keys, -torch.inf)
        maps["encoder"].append(on_grid(scores.softmax(3).mean(1)[:, 0, 1:v.shape[1]]))

    hooks[model.beit3.layers[-1]] = look_in_encoder
    places = [("FPN", fusion) for fusion in model.fpn.fusion if model.c.fpn_fusion == "self"]
    places += [("decoder", layer.fusion) for layer in model.decoder.layers[-1:] if model.c.decoder_fusion == "self"]
    for name, fusion in places:
        def look(fusion, args, out, name=name) -> None:
            x, n, pad = args
            y = fusion.norm(x)
            weights = fusion.attention(y[:, n:n + 1], y, y, pad, need_weights=True)[1]  # (B, 1, 1 + N + L)
            maps[name].append(on_grid(weights[:, 0, 1:n]))

        hooks[fusion] = look
    with hooked(hooks):
        model(images, tokens)
    return {"attention of the sentence's first token": {k: torch.stack(v).mean(0) for k, v in maps.items() if v}}


MAPS = dict(ETRIS=etris_maps, DCRIS=dcris_maps, M2IST=m2ist_maps, SharedRIS=shared_ris_maps)


def heat_sheet(image: np.ndarray, groups: dict[str, dict[str, np.ndarray]], answer, sentence: str) -> Image.Image:
    """The answer, and below it a row for each group of maps (H, W) over the photograph. All of a row have one scale,
    from dark, their least value, to bright."""
    rows = [[overlay(image, [answer], [sentence], least=320)]]
    for group, maps in groups.items():
        low, high = min(map(np.min, maps.values())), max(map(np.max, maps.values()))
        rows.append([])
        for name, values in maps.items():
            heat = ((values - low) / (high - low or 1))[..., None]     # (H, W, 1) in 0..1
            color = 255 * np.concatenate([heat, np.clip(2 * heat - 1, 0, 1), np.clip(1.2 * heat - 0.2, 0, 0.35)], 2)
            mixed = (0.45 * image.mean(2, keepdims=True) + 0.55 * color).astype(np.uint8)
            caption = f"{group}, {name}: {values.min():.3g} to {values.max():.3g}"
            rows[-1].append(overlay(mixed, [None], [caption], least=320))
    for picture in (picture for row in rows for picture in row):
        picture.thumbnail((480, 560))
    return grid([grid(row) for row in rows], columns=1)
