"""The checkpoints of DETRIS's and ETRIS's authors; how their code, and TransVG's and M2IST's, brings pictures to the
canvas and answers back."""

from __future__ import annotations

import dataclasses
import os
import re

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import common
from common import Preprocess, Process, UserError
from toolbox.refer import what_it_is
from toolbox.weights import dinov2_state, fetch, load_exactly, read_weights, renamed


def warped(image: np.ndarray, pre: Preprocess) -> Tensor:
    """(H, W, 3) uint8 -> (3, S, S) uint8, as CRIS, ETRIS and DETRIS do it: cv2.warpAffine, cubic."""
    mean = 255 * torch.tensor(pre.mean)[:, None, None]  # what lies outside is the mean
    x = torch.from_numpy(image.copy()).permute(2, 0, 1).float() - mean
    return (warp(x, pre.size, "bicubic") + mean).round().clamp(0, 255).byte()


def warped_mask(mask: np.ndarray, pre: Preprocess) -> Tensor:
    """(H, W) bool -> (S, S) float32 in 0..1, for training as they do it: cv2.warpAffine, linear."""
    return warp(torch.from_numpy(mask).float()[None], pre.size, "bilinear")[0]


def warp(x: Tensor, s: int, mode: str) -> Tensor:
    """(C, H, W) -> (C, s, s) by cv2.warpAffine: without a shift by half a pixel and without antialiasing, places
    rounded to 1/32 of a pixel, 0 outside."""
    h, w = x.shape[1:]
    scale = min(s / h, s / w)
    ys, xs = ((2 * ((torch.arange(s) - (s - n * scale) / 2) / scale * 32).round() / 32 + 1) / n - 1 for n in (h, w))
    at = torch.stack([xs.float().expand(s, s), ys.float()[:, None].expand(s, s)], 2)[None]  # (1, s, s, 2)
    return F.grid_sample(x[None], at, mode=mode, padding_mode="zeros", align_corners=False)[0]


def unwarped(probability: Tensor, size: tuple[int, int], pre: Preprocess) -> Tensor:
    """(h, w) -> (H, W) as CRIS, ETRIS and DETRIS do it: bicubic to the canvas with align_corners, then the inverse of
    their letterbox, cubic, 0 outside. Their cv2.warpAffine rounds places to 1/32 of a pixel; this does not."""
    (h, w), s = size, pre.size
    x = F.interpolate(probability[None, None].float(), (s, s), mode="bicubic", align_corners=True)
    scale = min(s / h, s / w)
    ys, xs = ((torch.arange(n) * scale + (s - n * scale) / 2) * 2 / (s - 1) - 1 for n in (h, w))
    at = torch.stack([xs.expand(h, w), ys[:, None].expand(h, w)], 2)[None]  # (1, H, W, 2)
    return F.grid_sample(x, at, mode="bicubic", padding_mode="zeros", align_corners=True)[0, 0]


def cut_at_canvas(box: Tensor) -> Tensor:
    """Centre x, centre y, width, height in sides of the canvas (4,) -> the same, its corners clamped to 0..1 as in
    TransVG and M2IST: padding counts as photograph."""
    low, high = (box[:2] - box[2:] / 2).clamp(0, 1), (box[:2] + box[2:] / 2).clamp(0, 1)
    return torch.cat([(low + high) / 2, high - low])


def whole_pixels(box: tuple[float, float, float, float]) -> tuple[int, int, int, int]:
    """An annotation's x1, y1, x2, y2 as TransVG and M2IST read it: left, top, width and height cut to whole pixels."""
    x, y, w, h = (int(v + 1e-6) for v in (box[0], box[1], box[2] - box[0], box[3] - box[1]))
    return x, y, x + w, y + h


# Checkpoints


def is_released(ckpt: str) -> bool:
    """Whether --ckpt names a file that torch.save wrote, as the methods' authors did; ours are safetensors."""
    if ckpt.startswith("hf:") or not os.path.isfile(ckpt):
        return ckpt.startswith("hf:")
    with open(ckpt, "rb") as f:
        head = f.read(2)
    if head in (b"PK", b"\x80\x02", b"\x80\x04"):
        return True
    if what := what_it_is(ckpt):
        raise UserError(f"{ckpt} is no checkpoint{what}.")
    return False


TRAINED_ON = {  # words of a file's name, or of its folder's -> what such a file was trained on
    "mixed": "mix(ed)?", "refcocog_google": "(refcocog|gref)[_ -]?(g|google)",
    "refcocog_umd": "(refcocog|gref)[_ -]?(u|umd)?", "refcoco+": r"refcoco(\+|[_ -]?p(lus)?)", "refcoco": "refcoco"}


def trained_on(ckpt: str) -> str | None:
    """What the names of a released file and of its own folder say that it was trained on; None where they do not."""
    path = ckpt if ckpt.startswith("hf:") else os.path.abspath(ckpt)
    names = "/".join(path.lower().replace(os.sep, "/").split("/")[-2:])
    return next((dataset for dataset, words in TRAINED_ON.items()
                 if re.search(rf"(?<![a-z0-9])({words})(?![a-z0-9+])", names)), None)


def load_released(ckpt: str, dataset: str | None, process: Process) -> tuple[torch.nn.Module, dict]:
    """(model in eval mode, what load_run says of one) for a checkpoint that DETRIS's or ETRIS's authors released, or
    hf:OWNER/REPOSITORY/FILE on the Hugging Face hub. Raises UserError for any other file.

    The data set that it was trained on tells how many words it reads: `dataset`, or else what trained_on() guesses. A
    mixture holds whatever it is measured on, so `dataset` does not contradict it.
    """
    file = ckpt
    if ckpt.startswith("hf:"):
        owner, repo, name = (ckpt.removeprefix("hf:").split("/", 2) + ["", ""])[:3]
        if not name:
            raise UserError(f"--ckpt {ckpt}: hf:OWNER/REPOSITORY/FILE is needed, as hf:thuteam/DETRIS/FILE.")
        file = fetch(f"{owner}/{repo}", name, "--ckpt takes the file itself")
    state = read_weights(file)
    guess = trained_on(ckpt)
    trained = guess if guess == "mixed" else dataset or guess or "refcoco"
    for name, convert in dict(dcris=from_detris, etris=from_etris).items():
        try:
            found = convert(state, trained)
        except (UserError, LookupError, TypeError, ValueError) as e:
            raise UserError(f"{ckpt} is not whole, or not as the authors of {name} released it: "
                            f"{common.first_line(e)}.") from None
        if found:
            (c, state), method = found, common.load_method(name)
            model = method.Model(c, "random")
            load_exactly(model, state, file, f"the released {method.Model.__name__} with {c.backbone}")
            process.print(f"{ckpt}: released weights of {name} ({c.variant}), {c.backbone}, {c.image_size} pixels, "
                          f"{c.words} tokens, as for {trained}")
            if guess not in (None, trained):
                process.print(f"note: its name says {guess}, --dataset {dataset}; it reads as many tokens as for "
                              f"{dataset}")
            return model.to(process.device).eval(), dict(
                method=name, config=dataclasses.asdict(c), dataset=None, data_root=None, seed=0, weights=ckpt)
    raise UserError(f"{ckpt} is neither a run of train.py (of which a folder or its model.safetensors is wanted) nor a "
                    "checkpoint that the authors of DETRIS or ETRIS released.")


# of CRIS's head, as the files of ETRIS and DETRIS name it -> as etris.py and dcris.py do
CRIS_HEAD = [(r"^neck\.fusion([345])\.multihead_attn\.", lambda m: f"neck.fusion.{int(m[1]) - 3}."),
             (r"^neck\.f([345])_proj\.", lambda m: f"neck.f_proj.{int(m[1]) - 3}."),
             (r"^neck\.coordconv\.0\.conv1\.", "neck.coordconv.0.conv."),
             (r"^(decoder\.layers\.\d+)\.multihead_attn\.", r"\1.cross_attn.")]


def layers_of(state: dict[str, Tensor], pattern: str) -> tuple[int, ...]:
    """The numbers that a pattern finds in the names of tensors."""
    return tuple(sorted({int(m[1]) for k in state if (m := re.match(pattern, k))}))


def from_detris(state: dict[str, Tensor], dataset: str) -> tuple | None:
    """A checkpoint that DETRIS's authors trained on a data set: its settings, and its tensors under our names; None for
    another file. Raises UserError, LookupError or TypeError for half a file."""
    if "dinov2.pos_embed" not in state:
        return None
    blocks = dict(visual_layers=r"dinov2\.blocks\.(\d+)\.adapter\.",
                  text_layers=r"txt_backbone\.transformer\.resblocks\.(\d+)\.adapter\.")
    flags = {name: layers_of(state, pattern) for name, pattern in blocks.items()}
    for tower, key, dim in (("dinov2.blocks", "visual_layers", "visual_dim"),
                            ("txt_backbone.transformer.resblocks", "text_layers", "text_dim")):
        if flags[key]:
            flags[dim] = len(state[f"{tower}.{flags[key][0]}.adapter.D_fc1.weight"])
    large = state["dinov2.pos_embed"].shape[2] == 1024
    import dcris

    c = dcris.config("dinov2-large" if large else "dinov2-base", "detris", dataset, **flags)
    out = renamed(state, [
        (blocks["visual_layers"], r"visual_adapters.\1."), (blocks["text_layers"], r"text_adapters.\1."),
        (r"\.D_fc1\.", ".down."), (r"\.D_fc2\.", ".up."),
        (r"\.dense_branch(\d)((?:\.\d)?)\.conv\.", r".dense.branch\1\2.0."),
        (r"\.dense_branch(\d)((?:\.\d)?)\.bn\.", r".dense.branch\1\2.1."),
        (r"\.cross\.multihead_attn\.", ".attention."), (r"\.cross\.", "."), (r"^txt_backbone\.", "text."), *CRIS_HEAD])
    with torch.device("meta"):
        vision = dcris.DCRIS(c).vision  # whose names depend on the version of transformers
    dino = {k.removeprefix("dinov2."): out.pop(k) for k in list(out) if k.startswith("dinov2.")}
    out |= {f"vision.{k}": v for k, v in dinov2_state(dino, vision).items()}
    f5 = "neck.f_proj.2.0.weight"  # theirs is a deconvolution of one pixel, the same but for the order of its channels
    if f5 in out:
        out[f5] = out[f5].transpose(0, 1).contiguous()
    return c, out


def from_etris(state: dict[str, Tensor], dataset: str) -> tuple | None:
    """A checkpoint that ETRIS's authors trained on a data set: its settings, and its tensors under our names; None for
    another file. Raises UserError, LookupError or TypeError for half a file."""
    if "bridger.linear1.0.weight" not in state and "bridger.linear1.2.weight" not in state:
        return None
    vit = "backbone.visual.proj" in state
    backbone = "ViT-B-16" if vit else "RN101" if "backbone.visual.layer3.22.conv1.weight" in state else "RN50"
    stages = layers_of(state, r"bridger\.linear1\.(\d)\.")  # the public code's number of stages keeps the last ones
    import etris

    c = etris.config(backbone, "released", dataset, bridger_stages=tuple(i + 2 for i in stages),
               bridger_dim=len(state[f"bridger.linear1.{stages[-1]}.weight"]))
    return c, renamed(state, [
        (r"^backbone\.", "clip."), (r"^bridger\.ln_([vt])\.(\d)\.", lambda m: f"bridgers.{int(m[2]) + 3}.ln_{m[1]}."),
        (r"^bridger\.(\w+)\.(\d)\.", lambda m: f"bridgers.{int(m[2]) + 2}.{m[1].replace('fusion', 'ita')}."),
        (r"(\.ita_[vt])\.multihead_attn\.", r"\1.cross_attn."), (r"(\.ita_[vt])\.linear1\.", r"\1.ffn.0."),
        (r"(\.ita_[vt])\.linear2\.", r"\1.ffn.3."), *CRIS_HEAD])
