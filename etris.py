"""ETRIS: Bridging Vision and Language Encoders: Parameter-Efficient Tuning for Referring Image Segmentation (Xu, Chen,
Zhang, Song, Wan, Li, ICCV 2023, arXiv:2307.11545).

CLIP's picture and text towers stay frozen and run side by side in three stages. After each stage a Bridger lets the two
look at one another: a Zoom Layer brings the picture's map to a common width and grid, Interactors attend across, and
what they found is added to what the towers' next stages read. A light decoder aligns three levels of the picture with
the sentence, level by level and then as a whole, and convolves the result with a kernel made of the sentence.

    Sec. 3.1             towers in stages              ETRIS.encode
    Sec. 3.2, Eq. 1-3    Bridger                       Bridger
    Sec. 3.2, Eq. 4      Zoom Layer                    zoom_layer
    Sec. 3.2, Eq. 5      Interactor                    Interactor
    Sec. 3.3, Eq. 6-7    hierarchical alignment (HA)   Neck
    Sec. 3.3, Eq. 8      global alignment (GA)         Decoder, DecoderLayer
    Sec. 3.3, Eq. 9      projector                     Projector
    Sec. 3.4, Eq. 10-11  text-to-pixel loss            ETRIS.loss
    Tables 1 to 8        their rows                    TABLES; Config.tune, .bridger_stages, .zoom, ...

Deviations (the paper is silent, or contradicts itself or its printed figures; `--variant released` is the authors'
public model, which differs again):
  * Sec. 3.1 splits ViT and text tower into N = 4 even parts, whose last three end after blocks 6, 9 and 12; here they
    end after 4, 8 and 12, as in the public code. The residuals of the last stage (Eq. 3) are read by the decoder.
  * Eq. 2 prints bare sums; a LayerNorm follows each, as in the public code (512 parameters, 1.94 M either way).
  * Eq. 2 hands on what the last Interactors gave. Released: what they were given (link).
  * Eq. 5 attends to the other modality after its MHSA. Released: before it; and beside the ViT, one product stands for
    all of Eq. 5 (interactor). Residuals, norms and an FFN of 128 are not printed; these give the printed sizes.
  * Padding is masked wherever words are keys. Released: in the decoder only (mask_padding). Padding is what follows
    the end token; the public code takes id 0 for it, which is also a "!" within a sentence.
  * The ViT's printed 1.39 M (1,385,024 here) has the ResNet's kernels, 2x2, 1x1 and 2x2. Its maps are of one size, so
    they need no stride: Eq. 4 takes its first case. Released: 0.60 M, 1x1 with BatchNorm and ReLU.
  * RN50's stages are as wide as RN101's, so its Bridger has 1,942,080 too, not the printed 1.68 M (`--zoom mlp` would).
  * Eq. 6 attends to F_s alone: the softmax over one key is 1, so queries and keys, 1,575,936 parameters, are dead;
    `--neck-fusion gate` computes the same without them. The attention's result multiplies the map, as in the public
    code, which also projects F_s first (text_proj); without that RN101's head is the printed 23.98 M, dead parameters
    and all. Table 3 prints it for RN50 (26.74 M here: its F_s, 1024 wide, must be projected) and ViT (22.41 M) too.
  * Eq. 8 attends to F_s with sine positions added, which one vector cannot use: the words, as released (decoder_text).
    The decoder's norms are not printed: before each part, after both attentions and within the FFN, as released.
  * CLIP's ResNet pools to one vector; here, as in CRIS, every place asks, for a map. Released: plus a random, frozen
    1x1 convolution with BatchNorm (connect), which is in the printed 120.74 M of full tuning.
  * Frozen is frozen: positions too, resized at each forward to the picture's grid, and BatchNorm statistics. Released:
    positions are trained, uncounted (train_positions); that code's drifting statistics are not repeated.
  * Table 6 does not say what stands in for HA: the last level alone, deconvolved.
  * `tiny` (a ResNet) and `tiny-vit` are this project's: small random towers, trained from scratch by AdamW with
    warm-up, cosine and Dice; their decoder norms the map and adds positions to it (decoder_position).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import (Preprocess, TrainConfig, check_config, dice_loss, in_full_precision, sine_1d, sine_2d)
from toolbox import baselines, tokenizers, weights as released

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

TINY_TEXT = dict(context_length=77, vocab_size=4096, width=64, heads=2, layers=4)
# Sec. 4.2: CLIP
BACKBONES = {
    "RN101": dict(hub="timm/resnet101_clip.openai", clip=open_clip.get_model_config("RN101-quickgelu")),
    "RN50": dict(hub="timm/resnet50_clip.openai", clip=open_clip.get_model_config("RN50-quickgelu")),
    "ViT-B-16": dict(hub="timm/vit_base_patch16_clip_224.openai",
                     clip=open_clip.get_model_config("ViT-B-16-quickgelu")),
    "dinov2-base": dict(hub="facebook/dinov2-with-registers-base", dino=True,  # not the paper's: DCRIS, Table 2
                        clip=open_clip.get_model_config("ViT-B-16-quickgelu")),
    "tiny": dict(clip=dict(embed_dim=64, quick_gelu=True, text_cfg=TINY_TEXT,
                           vision_cfg=dict(layers=[1, 1, 1, 1], width=8, head_width=64, image_size=128))),
    "tiny-vit": dict(clip=dict(embed_dim=64, quick_gelu=True, text_cfg=TINY_TEXT,
                               vision_cfg=dict(layers=4, width=64, head_width=32, image_size=64, patch_size=8))),
}
VARIANTS = ("etris", "released")
TUNES = baselines.TUNES
STAGES = (2, 3, 4)  # Sec. 3.1: i in {2, ..., N}; a ResNet's layer2 to layer4
UP = (False, False, True)  # Eq. 4: only the last stage's map is smaller than the common one


@dataclass(frozen=True)
class Config(TrainConfig):
    """Every setting of the paper. `config()` gives the ones of a backbone, variant and data set."""

    backbone: str = "RN101"                 # Sec. 4.2
    variant: str = "etris"
    tune: str = "method"                    # Table 2; others: Fix Backbone is "frozen", Full-Tuning "full"
    # architecture
    image_size: int = 416                   # Sec. 4.2, pixels; any multiple of 32
    words: int = 17                         # Sec. 4.2, BPE tokens with start and end; 22 for G-Ref
    blocks: tuple[int, ...] = (4, 8, 12)    # where the stages of the text tower end, and those of a ViT
    bridger_stages: tuple[int, ...] = STAGES  # Table 4
    bridger_dim: int = 64                   # Table 7
    bridger_heads: int = 4
    bridger_ffn: int = 128
    bridger_dropout: float = 0.1
    zoom: Literal["deconv", "interpolate", "linear", "mlp", "pointwise"] = "deconv"  # Table 5; pointwise: released ViT
    link: Literal["output", "input"] = "output"  # Eq. 2: of the Interactors before
    interactor: Literal["attended", "raw", "product"] = "attended"  # Eq. 5: its keys; product: released ViT
    mask_padding: bool = True
    zero_init: bool = False                 # Bridgers start as nothing: not the paper's
    connect: bool = False
    train_positions: bool = False
    hierarchical_alignment: bool = True     # Table 6
    global_alignment: bool = True           # Table 6
    text_proj: bool = False
    neck_fusion: Literal["attention", "gate"] = "attention"
    decoder_text: Literal["words", "sentence"] = "words"
    head_dim: int = 512
    head_heads: int = 8                     # Sec. 4.2
    decoder_layers: int = 3                 # Sec. 4.2
    decoder_ffn: int = 512                  # Sec. 4.2
    decoder_dropout: float = 0.1
    decoder_position: Literal["attention", "content"] = "attention"  # queries and keys; content: the normed map too
    threshold: float = 0.35                 # Sec. 4.2, on the sigmoid
    # training (Sec. 4.2)
    milestones: tuple[int, ...] = (35,)
    dice: float = 0.0                       # weight of a Dice loss beside Eq. 10: not the paper's


def config(backbone: str = "RN101", variant: str = "etris", dataset: str = "refcoco", **flags) -> Config:
    """The settings of a backbone, variant and data set, and over them what the user set."""
    c = dict(backbone=backbone, variant=variant)
    vision, text = (BACKBONES[backbone]["clip"][k] for k in ("vision_cfg", "text_cfg"))
    tune, tiny = flags.get("tune", "method"), backbone.startswith("tiny")
    vit, dino = isinstance(vision["layers"], int), "dino" in BACKBONES[backbone]
    if dataset.startswith("refcocog") or dataset == "mixed":
        c |= dict(words=22)
    if vit:
        c |= dict(bridger_heads=8, adapter_lr=10.0)  # Sec. 4.2: 0.001 for the Bridger beside a ViT
    if variant == "released":
        c |= dict(link="input", interactor="raw", mask_padding=False, train_positions=True, text_proj=True,
                  connect=not vit, adapter_lr=1.0)
        if vit:
            c |= dict(zoom="pointwise", interactor="product")
    if dino:
        c |= dict(image_size=448, train_positions=False)
    if tiny:
        c |= dict(image_size=vision["image_size"], blocks=(2, 3, 4), bridger_dim=32, bridger_heads=2, bridger_ffn=64,
                  bridger_dropout=0.0, adapter_lr=1.0, head_dim=64, head_heads=2, decoder_layers=2, decoder_ffn=128,
                  decoder_dropout=0.0, decoder_position="content", steps=2000, batch_size=16, optimizer="adamw",
                  lr=2e-3, tower_lr=0.5 if vit else 1.0, weight_decay=0.01, schedule="cosine", milestones=(),
                  warmup=50, clip_norm=1.0, dice=1.0, val_every=250)
    c |= dict(baseline_dims=baselines.dims(  # Sec. 5.1: a quarter; Table 2
        tune, tiny, lora=(1, 1), adapter=(192 if vit else 128, 128), conv_adapter=(192 if vit else 128, 0)))
    if not tune.startswith("method"):
        c |= dict(bridger_stages=(), train_positions=False)
    c = Config(**(c | flags))
    depth, sentence_width = text["layers"], BACKBONES[backbone]["clip"]["embed_dim"]
    check_config(
        c, baseline_dims=baselines.rule(c), image_size=(c.image_size % (14 if dino else 32) == 0, f"a multiple of {14 if dino else 32}"),
        words=(3 <= c.words <= 77 - baselines.prompts(c), f"3 to {77 - baselines.prompts(c)} tokens, what CLIP's text tower reads"),
        blocks=(len(c.blocks) == 3 and 0 < c.blocks[0] < c.blocks[1] < c.blocks[2] == depth,
                f"three rising numbers up to {depth}, the last block"),
        bridger_stages=(set(c.bridger_stages) <= set(STAGES), "stages from 2 to 4"),
        bridger_heads=(lambda: c.bridger_dim % c.bridger_heads == 0, f"a divisor of bridger_dim, {c.bridger_dim}"),
        zoom=(c.zoom != ("interpolate" if vit else "pointwise"),
              f"deconv, linear or mlp, as this backbone's maps are {'all of one size' if vit else 'not of one size'}"),
        zero_init=(not c.zero_init or c.zoom != "pointwise", "off with pointwise: its ReLU over zeros never learns"),
        train_positions=(not c.train_positions or not dino, "off for DINOv2, which the public code has not"),
        connect=(not c.connect or not vit, "off for a ViT, which has no attention pool"),
        head_dim=(c.head_dim == text["width"], f"{text['width']}, as wide as the words, the decoder's keys"),
        head_heads=(lambda: c.head_dim % c.head_heads == 0, f"a divisor of head_dim, {c.head_dim}"),
        decoder_text=(c.decoder_text == "words" or c.head_dim == sentence_width, "words: F_s has another width"),
        tune=(c.tune.startswith("method") or not c.bridger_stages, "method, where stages are given Bridgers"))
    return c


# Bridger (Sec. 3.2)


def resample(c_in: int, c_out: int, stride: int, up: bool) -> nn.Module:
    """A convolution that shrinks a map by `stride`, or a deconvolution that enlarges it (Eq. 4); no bias."""
    return (nn.ConvTranspose2d if up else nn.Conv2d)(c_in, c_out, stride, stride, bias=False)


def resample_layer(c_in: int, c_out: int, stride: int, up: bool) -> nn.Sequential:
    """The same with BatchNorm and ReLU."""
    return nn.Sequential(resample(c_in, c_out, stride, up), nn.BatchNorm2d(c_out), nn.ReLU())


class SpatialLinear(nn.Module):
    """Table 5 (a) and (c): a linear layer over channels and one, or two, over places; for one picture size only."""

    def __init__(self, c_in: int, c_out: int, side_in: int, side_out: int, hidden: int):
        super().__init__()
        n_in, n_out, self.side = side_in**2, side_out**2, side_out
        self.channel = nn.Linear(c_in, c_out)
        self.spatial = nn.Linear(n_in, n_out) if not hidden else nn.Sequential(
            nn.Linear(n_in, hidden), nn.ReLU(), nn.Linear(hidden, n_out))

    def forward(self, x: Tensor) -> Tensor:
        x = self.channel(x.flatten(2).transpose(1, 2))           # (B, N, c_out)
        return self.spatial(x.transpose(1, 2)).unflatten(2, (self.side, self.side))


def zoom_layer(kind: str, c_in: int, c_out: int, kernel: int, up: bool, side_in: int, side_out: int) -> nn.Module:
    """Eq. 4 and Table 5: (B, c_in, h, w) -> (B, c_out, h', w'), smaller or (up) larger by `kernel`, or of one size."""
    if kind in ("linear", "mlp"):
        return SpatialLinear(c_in, c_out, side_in, side_out, hidden=64 if kind == "mlp" else 0)
    if kind == "pointwise":
        return resample_layer(c_in, c_out, 1, up)
    if kernel > 1 and side_in == side_out:  # a ViT's; zooming out looks the other way, as a deconvolution does
        pad = nn.ZeroPad2d((1, 0, 1, 0) if up else (0, 1, 0, 1))
        return nn.Sequential(pad, nn.Conv2d(c_in, c_out, kernel, bias=False))
    if kind == "interpolate" and up and kernel > 1:
        return nn.Sequential(nn.Conv2d(c_in, c_out, 1, bias=False), nn.Upsample(scale_factor=kernel, mode="bilinear"))
    return resample(c_in, c_out, kernel, up)


class Interactor(nn.Module):
    """Eq. 5 for one modality: MHSA, MHCA to the other modality, FFN, each with a residual and a norm after it."""

    def __init__(self, c: Config):
        super().__init__()
        d, heads, p = c.bridger_dim, c.bridger_heads, c.bridger_dropout
        self.self_attn = nn.MultiheadAttention(d, heads, dropout=p, batch_first=True)
        self.cross_attn = nn.MultiheadAttention(d, heads, dropout=p, batch_first=True)
        self.ffn = nn.Sequential(nn.Linear(d, c.bridger_ffn), nn.ReLU(), nn.Dropout(p), nn.Linear(c.bridger_ffn, d))
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(d), nn.LayerNorm(d), nn.LayerNorm(d)
        self.dropout = nn.Dropout(p)

    def attend(self, x: Tensor, pad: Tensor | None) -> Tensor:
        """x: (B, N, d); pad: (B, N), True = padding."""
        y = self.self_attn(x, x, x, key_padding_mask=pad, need_weights=False)[0]
        return self.norm1(x + self.dropout(y))                   # Eq. 5, lines 1 and 2

    def interact(self, x: Tensor, other: Tensor, pad: Tensor | None) -> Tensor:
        """x: (B, N, d); other: (B, M, d); pad: (B, M), True = padding."""
        y = self.cross_attn(x, other, other, key_padding_mask=pad, need_weights=False)[0]
        x = self.norm2(x + self.dropout(y))                      # Eq. 5, line 3
        return self.norm3(x + self.dropout(self.ffn(x)))         # Eq. 5, line 4


class Product(nn.Module):
    """What stands for Eq. 5 beside the released ViT: x times its attention to the other modality, and no more."""

    def __init__(self, c: Config):
        super().__init__()
        self.cross_attn = nn.MultiheadAttention(c.bridger_dim, c.bridger_heads, batch_first=True)

    def attend(self, x: Tensor, pad: Tensor | None) -> Tensor:
        return x

    def interact(self, x: Tensor, other: Tensor, pad: Tensor | None) -> Tensor:
        return x * self.cross_attn(x, other, other, key_padding_mask=pad, need_weights=False)[0]


class Bridger(nn.Module):
    """Eq. 1 to 3 of one stage. `side`: of its map; `middle`: of stage 3's, which all are zoomed to; `linked`: not the
    first."""

    def __init__(self, c: Config, stage: int, width: int, text_width: int, side: int, middle: int, linked: bool):
        super().__init__()
        d, self.link, self.raw = c.bridger_dim, c.link, c.interactor == "raw"
        kernel, up = 1 if stage == 3 else 2, UP[stage - 2]
        self.zoom_in = zoom_layer(c.zoom, width, d, kernel, up, side, middle)
        self.zoom_out = zoom_layer(c.zoom, d, width, kernel, not up, middle, side)
        self.linear1, self.linear2 = nn.Linear(text_width, d), nn.Linear(d, text_width)
        self.ln_v, self.ln_t = (nn.LayerNorm(d), nn.LayerNorm(d)) if linked else (None, None)
        interactor = Product if c.interactor == "product" else Interactor
        self.ita_v, self.ita_t = interactor(c), interactor(c)
        for m in self.modules():  # as the public code; PyTorch's own for the attentions' in_proj
            if isinstance(m, nn.Linear):
                nn.init.normal_(m.weight, std=0.02)
                nn.init.zeros_(m.bias)
            elif isinstance(m, (nn.Conv2d, nn.ConvTranspose2d)):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
        if c.zero_init:
            last = [m for m in self.zoom_out.modules() if isinstance(m, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d))][-1]
            for p in *last.parameters(), *self.linear2.parameters():
                nn.init.zeros_(p)

    def forward(self, f_v: Tensor, f_t: Tensor, memory: tuple[Tensor, Tensor] | None, pad: Tensor | None):
        """f_v: map (B, C, h, w); f_t: words (B, L, C'); memory: places (B, N, d) and words (B, L, d) of the last one.

        -> residuals for f_v and f_t, and the memory for the next stage
        """
        v = self.zoom_in(f_v)                                    # (B, d, h', w')  Eq. 1
        t = self.linear1(f_t)                                    # (B, L, d)  Eq. 1
        grid, v = v.shape[-2:], v.flatten(2).transpose(1, 2)     # (B, N, d)
        if memory is not None:
            v, t = self.ln_v(v + memory[0]), self.ln_t(t + memory[1])  # the sums in Eq. 2
        v1, t1 = self.ita_v.attend(v, None), self.ita_t.attend(t, pad)  # Eq. 5, lines 1 and 2
        keys_v, keys_t = (v, t) if self.raw else (v1, t1)
        v2, t2 = self.ita_v.interact(v1, keys_t, pad), self.ita_t.interact(t1, keys_v, None)  # Eq. 5, lines 3 and 4
        f_v = self.zoom_out(v2.transpose(1, 2).unflatten(2, grid))  # (B, C, h, w)  Eq. 3, line 1
        f_t = self.linear2(t2)                                   # (B, L, C')  Eq. 3, line 2
        return f_v, f_t, (v2, t2) if self.link == "output" else (v, t)


# The head (Sec. 3.3)


def conv_layer(c_in: int, c_out: int, kernel: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2, bias=False), nn.BatchNorm2d(c_out),
                         nn.ReLU())


class CoordConv(nn.Module):
    """A 3x3 convolution that also sees where it is: x and y in -1..1 as two more channels (Eq. 7)."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.conv = conv_layer(c_in + 2, c_out, 3)

    def forward(self, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        xs = torch.linspace(-1, 1, w, device=x.device, dtype=x.dtype).expand(b, 1, h, w)
        ys = torch.linspace(-1, 1, h, device=x.device, dtype=x.dtype).view(h, 1).expand(b, 1, h, w)
        return self.conv(torch.cat([x, xs, ys], 1))


class Neck(nn.Module):
    """Eq. 6 and 7: three levels of the vision tower, each weighted by the text, become one map. -> (B, dim, H, W)"""

    def __init__(self, c: Config, widths: tuple[int, ...], strides: tuple[int, ...], text_width: int):
        super().__init__()
        dim, self.gate = c.head_dim, c.neck_fusion == "gate"
        self.txt_proj = nn.Linear(text_width, dim) if c.text_proj or text_width != dim else nn.Identity()
        self.f_proj = nn.ModuleList(resample_layer(w, dim, s, up) for w, s, up in zip(widths, strides, UP))
        self.fusion = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, dim), nn.Linear(dim, dim)) if self.gate else  # values, output: all that lives
            nn.MultiheadAttention(dim, c.head_heads, batch_first=True) for _ in range(3))
        self.aggr = conv_layer(3 * dim, dim, 1)
        self.coordconv = nn.Sequential(CoordConv(dim, dim), conv_layer(dim, dim, 3))

    def forward(self, maps: list[Tensor], f_s: Tensor) -> Tensor:
        text = self.txt_proj(f_s)[:, None]                       # (B, 1, dim)
        levels = []
        for f_v, proj, fusion in zip(maps, self.f_proj, self.fusion):
            v = proj(f_v)                                        # (B, dim, H, W)  Eq. 6, line 1
            q = v.flatten(2).transpose(1, 2)                     # (B, N, dim)
            a = fusion(text).expand_as(q) if self.gate else fusion(q, text, text, need_weights=False)[0]
            levels.append(v * a.transpose(1, 2).view_as(v))      # Eq. 6, line 2
        f_m = self.aggr(torch.cat(levels, 1))                    # (B, dim, H, W)  Eq. 6, line 3
        return self.coordconv(f_m)                               # Eq. 7


class DecoderLayer(nn.Module):
    """Eq. 8: MHSA over the map, MHCA to the words, feed-forward; norms before all and after the attentions, as CRIS."""

    def __init__(self, dim: int, heads: int, ffn: int, dropout: float):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.self_attn = nn.MultiheadAttention(dim, heads, dropout=dropout, batch_first=True)
        self.self_attn_norm = nn.LayerNorm(dim)
        self.cross_attn = nn.MultiheadAttention(dim, heads, dropout=dropout, batch_first=True)
        self.cross_attn_norm = nn.LayerNorm(dim)
        self.ffn = nn.Sequential(nn.Linear(dim, ffn), nn.ReLU(), nn.Dropout(dropout), nn.LayerNorm(ffn),
                                 nn.Linear(ffn, dim))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, f_t: Tensor, pad: Tensor | None, x_pos: Tensor, t_pos: Tensor) -> Tensor:
        """x: (B, N, dim); f_t: (B, L, dim); pad: (B, L), True = padding."""
        y = self.norm1(x)
        y = self.self_attn(y + x_pos, y + x_pos, y, need_weights=False)[0]
        x = x + self.dropout(self.self_attn_norm(y))             # Eq. 8, line 1
        y = self.norm2(x)
        y = self.cross_attn(y + x_pos, f_t + t_pos, f_t, key_padding_mask=pad, need_weights=False)[0]
        x = x + self.dropout(self.cross_attn_norm(y))            # Eq. 8, line 2
        return x + self.dropout(self.ffn(self.norm3(x)))         # Eq. 8, line 3


class Decoder(nn.Module):
    """F_v, words -> F_c (Eq. 8)."""

    def __init__(self, c: Config):
        super().__init__()
        dim, self.position = c.head_dim, c.decoder_position
        self.layers = nn.ModuleList(DecoderLayer(dim, c.head_heads, c.decoder_ffn, c.decoder_dropout)
                                    for _ in range(c.decoder_layers))
        self.norm = nn.LayerNorm(dim)

    def forward(self, f_v: Tensor, f_t: Tensor, pad: Tensor | None) -> Tensor:
        b, dim, h, w = f_v.shape
        x = f_v.flatten(2).transpose(1, 2)                       # (B, N, dim)
        x_pos, t_pos = sine_2d(h, w, dim, x), sine_1d(f_t.shape[1], dim, f_t)
        if self.position == "content":
            x = F.layer_norm(x, (dim,)) + x_pos
        for layer in self.layers:
            x = layer(x, f_t, pad, x_pos, t_pos)
        return self.norm(x).transpose(1, 2).reshape(b, dim, h, w)


class Projector(nn.Module):
    """Eq. 9, and the product Z_t . Z_c of Eq. 11: the sentence becomes a 3x3 kernel and a bias for the map."""

    def __init__(self, dim: int, text_width: int):
        super().__init__()
        up = nn.Upsample(scale_factor=2, mode="bilinear")
        self.vis = nn.Sequential(up, conv_layer(dim, dim, 3), up, conv_layer(dim, dim // 2, 3),
                                 nn.Conv2d(dim // 2, dim // 2, 1))
        self.txt = nn.Linear(text_width, dim // 2 * 9 + 1)  # 3x3 weights and a bias

    def forward(self, f_c: Tensor, f_s: Tensor) -> Tensor:
        z_c = self.vis(f_c)                                      # (B, dim/2, 4H, 4W)  Eq. 9, lines 1 and 2
        z_t = self.txt(f_s)                                      # (B, dim/2 * 9 + 1)  Eq. 9, line 3
        b, d, h, w = z_c.shape
        # each sample has its own 3x3 kernel. The nine products first, then their shifted sum (fold mirrors, hence
        # flip): the same convolution, several times faster than one group per sample
        kernel = z_t[:, :-1].reshape(b, d, 9).flip(2).transpose(1, 2)  # (B, 9, dim/2)
        with in_full_precision(z_c):
            out = F.fold(kernel.float() @ z_c.float().flatten(2), (h, w), 3, padding=1)  # (B, 1, 4H, 4W)
            return out + z_t[:, -1].float().view(b, 1, 1, 1)


# The model


class ETRIS(nn.Module):
    """The whole model: frozen CLIP, Bridgers, head. `c` comes from config(); `weights` is "pretrained", "random", or
    a file of CLIP's. Raises UserError where weights are missing or do not fit."""

    task = "mask"

    def __init__(self, c: Config, weights: str = "random"):
        super().__init__()
        self.c = c
        self.clip = build_tower(c.backbone, weights)
        visual, (text_width, sentence_width) = self.clip.visual, self.clip.text_projection.shape
        self.resnet, self.dino = hasattr(visual, "attnpool"), "dino" in BACKBONES[c.backbone]
        self.prefix = 5 if self.dino else 1  # tokens of no place: the class, and DINOv2's registers
        if self.resnet:
            base = visual.conv3.out_channels
            widths, pixels, strides = (8 * base, 16 * base, 32 * base), (8, 16, 32), (2, 1, 2)
        else:
            width, patch = (visual.config.hidden_size, visual.config.patch_size) if self.dino else (
                visual.conv1.out_channels, visual.patch_size[0])
            widths, pixels, strides = (width,) * 3, (patch,) * 3, (1, 1, 1)
        last = widths[2] if self.dino else sentence_width  # CLIP projects its last map, DINOv2 has no projection
        sides = [c.image_size // p for p in pixels]
        self.bridgers = nn.ModuleDict({
            str(i): Bridger(c, i, width, text_width, side, sides[1], linked=i > min(c.bridger_stages))
            for i, width, side in zip(STAGES, widths, sides) if i in c.bridger_stages})
        if c.hierarchical_alignment:
            self.neck = Neck(c, (*widths[:2], last), strides, sentence_width)
        else:
            self.neck = resample_layer(last, c.head_dim, strides[2], up=True)
        self.decoder = Decoder(c) if c.global_alignment else None
        self.proj = Projector(c.head_dim, sentence_width)
        self.preprocess = Preprocess(c.image_size, "letterbox", "bicubic", *(IMAGENET if self.dino else CLIP))
        if c.connect:  # under the public code's name
            visual.attnpool.connect = nn.Sequential(nn.Conv2d(widths[2], sentence_width, 1, bias=False),
                                                    nn.BatchNorm2d(sentence_width))
        if c.train_positions and not self.resnet:  # the public code trains a table of the input's grid
            table = resized(visual.positional_embedding.detach(), (sides[0], sides[0]))
            visual.positional_embedding = nn.Parameter(table)
        self.clip.requires_grad_(c.tune == "full")
        for positions in (self.clip, visual.attnpool if self.resnet else visual) if c.train_positions else ():
            positions.positional_embedding.requires_grad_(True)
        # nothing reads these here, so nothing can train them
        self.clip.logit_scale.requires_grad_(False)
        if self.dino:
            visual.embeddings.mask_token.requires_grad_(False)
        text = {n: m for n, m in dict(self.clip.named_modules()).items() if not n.startswith("visual")}
        self.baseline = baselines.add(c, dict(visual.named_modules()), text, self.clip.token_embedding)

    def parts(self) -> dict[str, list[nn.Module]]:
        """What the parameter tables count."""
        return dict(backbone=[self.clip], adapter=[self.bridgers, *self.baseline],
                    head=[m for m in (self.neck, self.decoder, self.proj) if m is not None])

    def train(self, mode: bool = True) -> ETRIS:
        super().train(mode)
        if self.c.tune != "full":  # frozen is frozen: nothing in the towers may depend on the mode
            self.clip.eval()
        return self

    def tokenize(self, sentences: Iterable[str]) -> Tensor:
        """CLIP's BPE, lower case; start, words, end, zeros; cut to `words` with the end kept. -> (B, words)"""
        return baselines.prompted(tokenizers.clip_tokens(list(sentences), self.c.words, self.clip.token_embedding.num_embeddings), self.c)

    def encode(self, images: Tensor, tokens: Tensor,
               bridged: bool = True) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
        """(B, 3, H, W), (B, L) -> maps of the three stages, words F_t (B, L, C), sentence F_s (B, C'), padding (B, L),
        True after the end token."""
        clip, n = self.clip, tokens.shape[1]
        end = tokens.argmax(1)                                   # the end token has the highest id
        pad = torch.arange(n, device=end.device) > end[:, None]
        v, grid = self.image_start(images)
        t = clip.token_embedding(tokens) + clip.positional_embedding[:n]  # (B, L, C)
        maps, memory = [], None
        for i in STAGES:
            v = self.image_stage(v, i)
            for block in clip.transformer.resblocks[self.blocks_of(i)]:
                t = block(t, attn_mask=clip.attn_mask[:n, :n])
            if bridged and str(i) in self.bridgers:
                f_v, f_t, memory = self.bridgers[str(i)](self.as_map(v, grid), t, memory,
                                                         pad if self.c.mask_padding else None)
                if not self.resnet:  # tokens of no place get nothing
                    f_v = F.pad(f_v.flatten(2).transpose(1, 2), (0, 0, self.prefix, 0))  # (B, 1+N, C)
                v = v + f_v                                      # Eq. 3, line 3
                t = t + f_t                                      # Eq. 3, line 4
            maps.append(self.as_map(v, grid))
        maps[2] = self.image_end(v, grid)
        f_t = clip.ln_final(t)                                   # (B, L, C)
        f_s = f_t[torch.arange(len(end), device=end.device), end] @ clip.text_projection  # (B, C')
        return maps, f_t, f_s, pad

    def image_start(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """What comes before stage 2, and the grid of a ViT's patches."""
        visual = self.clip.visual
        if self.dino:
            patch = visual.config.patch_size
            return visual.embeddings(images), (images.shape[2] // patch, images.shape[3] // patch)
        x = visual.stem(images) if self.resnet else visual.conv1(images)
        grid = tuple(x.shape[-2:])
        if self.resnet:
            return visual.layer1(x), grid                        # (B, C, H/4, W/4)
        x = torch.cat([visual.class_embedding.expand(len(x), 1, -1), x.flatten(2).transpose(1, 2)], 1)
        return visual.ln_pre(x + resized(visual.positional_embedding, grid)), grid  # (B, 1+N, C)

    def image_stage(self, v: Tensor, i: int) -> Tensor:
        if self.resnet:
            return getattr(self.clip.visual, f"layer{i}")(v)
        blocks = self.clip.visual.encoder.layer if self.dino else self.clip.visual.transformer.resblocks
        for block in blocks[self.blocks_of(i)]:
            v = block(v)
            v = v[0] if isinstance(v, tuple) else v  # DINOv2's, before transformers 5
        return v

    def blocks_of(self, i: int) -> slice:
        """Of the text tower, or of a ViT, in stage i."""
        ends = (0, *self.c.blocks)
        return slice(ends[i - 2], ends[i - 1])

    def as_map(self, v: Tensor, grid: tuple[int, int]) -> Tensor:
        return v if self.resnet else v[:, self.prefix:].transpose(1, 2).unflatten(2, grid)  # (B, C, H, W)

    def image_end(self, v: Tensor, grid: tuple[int, int]) -> Tensor:
        """CLIP's projection to the space it shares with text, at every place. -> (B, C', H, W)"""
        if self.resnet:
            return attention_pool(self.clip.visual.attnpool, v)
        if self.dino:
            return self.as_map(self.clip.visual.layernorm(v), grid)
        return self.as_map(self.clip.visual.ln_post(v) @ self.clip.visual.proj, grid)

    def forward(self, images: Tensor, tokens: Tensor, maps: dict[str, Tensor] | None = None) -> Tensor:
        """(B, 3, H, W) normalised pictures, (B, L) tokens -> logits (B, 1, H/4, W/4); for a ViT, 4 to a patch side.

        `maps` gets the length of the vision features at each place, as Fig. 3: with Bridgers and without.
        """
        levels, f_t, f_s, pad = self.encode(images, tokens)
        if maps is not None:
            maps |= {f"features, level {n}": level.norm(dim=1) for n, level in enumerate(levels, 1)}
            if self.bridgers:
                maps |= {f"level {n} without Bridgers": level.norm(dim=1)
                         for n, level in enumerate(self.encode(images, tokens, bridged=False)[0], 1)}
        f_v = self.neck(levels, f_s) if self.c.hierarchical_alignment else self.neck(levels[2])
        if self.decoder is not None:
            words = self.c.decoder_text == "words"
            f_v = self.decoder(f_v, f_t, pad) if words else self.decoder(f_v, f_s[:, None], None)
        return self.proj(f_v, f_s)

    def loss(self, logits: Tensor, masks: Tensor) -> Tensor:
        """Eq. 10 and 11, a mean over pixels at the logits' size; masks: (B, H, W) in 0..1 on the canvas."""
        target = F.interpolate(masks[:, None], logits.shape[-2:])  # nearest
        logits = logits.float()
        loss = F.binary_cross_entropy_with_logits(logits, target)  # Eq. 10, 11
        if self.c.dice:
            loss = loss + self.c.dice * dice_loss(logits, target)
        return loss


Model = ETRIS  # the name by which train.py and evaluate.py know it


# Towers (Sec. 3.1)


def attention_pool(pool: nn.Module, x: Tensor) -> Tensor:
    """CLIP's attention pool with every place as a query, none of them the mean. (B, C, H, W) -> (B, C', H, W)"""
    grid = tuple(x.shape[-2:])
    y = x.flatten(2).transpose(1, 2) + resized(pool.positional_embedding, grid)[1:]  # (B, N, C)
    q, k, v = (p(y).unflatten(2, (pool.num_heads, -1)).transpose(1, 2) for p in (pool.q_proj, pool.k_proj, pool.v_proj))
    y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # (B, N, C)
    y = pool.c_proj(y).transpose(1, 2).unflatten(2, grid)        # (B, C', H, W)
    return F.relu(y + pool.connect(x)) if hasattr(pool, "connect") else y


def resized(table: Tensor, grid: tuple[int, int]) -> Tensor:
    """Positions (1 + n, C), the first of no place, for another grid. -> (1 + H*W, C)"""
    side = int((len(table) - 1) ** 0.5)
    if grid == (side, side):
        return table
    places = F.interpolate(table[1:].T.unflatten(1, (side, side))[None], grid, mode="bicubic")
    return torch.cat([table[:1], places[0].flatten(1).T])


def build_tower(backbone: str, weights: str) -> open_clip.CLIP:
    """CLIP, random or from a file that OpenAI or the Hugging Face hub publish.

    `weights`: "random", "pretrained" (the hub's cache, or downloaded) or a file; for DINOv2 its file and CLIP's.
    """
    names = BACKBONES[backbone]
    released.check_released(backbone, weights)
    clip = open_clip.CLIP(**names["clip"])
    if "dino" in names:
        from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

        del clip.visual
        dino = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(patch_size=14, image_size=518))
        if weights != "random":
            released.load_dinov2_and_clip(dino, clip, weights, names["hub"], backbone)
        clip.visual = dino
        return clip
    if hasattr(clip.visual, "attnpool"):  # a ResNet: a training step takes 4 (RN101) to 12 % (tiny) less on a CPU
        clip.visual.to(memory_format=torch.channels_last)
    if weights != "random":
        released.load_clip(clip, weights, names["hub"], backbone)
    return clip


