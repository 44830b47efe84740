"""ETRIS: Bridging Vision and Language Encoders: Parameter-Efficient Tuning for Referring Image Segmentation
Xu, Chen, Zhang, Song, Wan, Li, ICCV 2023, https://arxiv.org/abs/2307.11545

CLIP's image and text towers stay frozen and run side by side in three stages. After each stage a Bridger exchanges
information between them. Its Zoom Layer brings the image's map to a common size, its Interactors attend from each
modality to the other, and the results are added to the features that the next stages read. The decoder aligns maps of
three levels with the sentence, then the fused map with the words, and convolves it with a kernel made of the sentence.

    Fig. 2               the whole model               ETRIS.forward
    Fig. 3               features with, w/o Bridgers   toolbox/attention.py
    Sec. 3.1             image tower in stages         toolbox/clip_towers.py
    Sec. 3.1             text tower in stages          ETRIS.encode
    Sec. 3.2, Eq. 1-2    Bridger                       Bridger.forward
    Sec. 3.2, Eq. 3      its residuals                 lines 1, 2: Bridger.forward; lines 3, 4: ETRIS.encode
    Sec. 3.2, Eq. 4      Zoom Layer                    zoom_layer
    Sec. 3.2, Eq. 5      Interactor                    Bridger.interact, of layers of Interactor
    Sec. 3.3, Eq. 6-7    Hierarchical Alignment (HA)   Neck
    Sec. 3.3, Eq. 8      Global Alignment (GA)         Decoder, DecoderLayer
    Sec. 3.3, Eq. 9      Projector                     Projector
    Sec. 3.4, Eq. 10-11  text-to-pixel loss            ETRIS.loss
    Tables 1 to 8        their rows                    toolbox/tables.py

Deviations. "silent": the paper does not say. "same": as here. The public code is `--variant released`, except where
its column says "not here".

    where                | the paper                      | here                               | the public code
    ---------------------+--------------------------------+------------------------------------+------------------------
    Sec. 3.1, stages     | end after blocks 6, 9 and 12   | after 4, 8 and 12                  | same
    Sec. 3.1, ResNet     | silent; CLIP pools to a vector | a query at each place, as in CRIS  | + random conv (connect)
    Sec. 3.1, positions  | silent                         | resized to the grid each time      | ViT: resized once
    Sec. 3.1, "frozen"   | all of CLIP                    | as printed, BatchNorm's means too  | positions are trained
    Sec. 3.1, BatchNorm  | silent                         | running statistics stay            | they drift (not here)
    Eq. 2, sum           | no norm                        | LayerNorm (512 parameters)         | same
    Eq. 2, f^(i-1)       | result of the last Interactors | as printed                         | what those read
    Eq. 3, lines 3, 4    | added to F^(i+1)               | to F^i, also of the last stage     | same
    Eq. 4, ViT           | 1.39M; kernels not printed     | 1,385,024: the ResNet's, stride 1  | 598,592: 1x1, BN, ReLU
    Eq. 4, RN50          | 1.68M                          | 1,942,080: as wide as RN101        | same
    Eq. 5, line 3        | keys: result of lines 1, 2     | as printed                         | keys: what they read
    Eq. 5, ViT           | as for a ResNet                | as printed                         | only x * MHCA(x, other)
    Eq. 5                | no residual, norm, FFN width   | residual, then LayerNorm; 128      | same
    Eq. 5                | heads, dropout: silent         | 4 heads, for a ViT 8; 0.1          | same
    Eq. 5, padding       | silent                         | masked                             | not masked
    Eq. 6, lines 1, 3    | Conv                           | (de)convolution, BatchNorm, ReLU   | same
    Eq. 6, line 2        | keys: F_s; one key, softmax 1  | as printed: 1,575,936 dead weights | same
    Eq. 6, line 2        | result of the attention        | map times result                   | same
    Eq. 6, F_s           | no projection                  | projected if its width differs     | always projected
    Eq. 7                | F_coord: C channels; one 3x3   | 2 channels, x and y; two 3x3       | same
    Eq. 8, line 2        | keys: F_s                      | keys: words (decoder_text)         | same
    Eq. 8, positions     | added to F_v and F_s once      | to queries and keys of each layer  | same
    Eq. 8, norms         | silent                         | see DecoderLayer; one at the end   | same
    Eq. 8, padding       | silent                         | what follows the end token         | id 0, a "!" (not here)
    Eq. 9, lines 1, 2    | 4x upsampling, then Conv       | twice 2x and a 3x3; at last a 1x1  | same
    Eq. 9, bias          | D values                       | one                                | same
    Eq. 10, target       | silent                         | mean over the logit's cell (1)     | nearest pixel
    Table 2, full        | 120.74M                        | with `connect`                     | same
    Table 3, head        | 23.98M for all three           | RN101; RN50: 26.74M, ViT: 22.41M   | 24.24M, 26.74M, 22.67M
    Table 6, without HA  | silent                         | last level alone, deconvolved      | not there
    Sec. 4.2, images     | resized to 416 x 416           | letterbox, antialiased             | cv2's letterbox
    Sec. 4.2, masks      | silent                         | resized, antialiased               | soft edges, from cv2
    Sec. 4.2, lr, ViT    | Bridgers: 0.001                | as printed                         | 0.0001
    Sec. 4.2, epoch      | 120,624 samples                | a sentence of each object: 42,404  | same
    Sec. 4.2, best epoch | silent                         | mIoU, all sentences of val         | (2), not here
    Sec. 4.2, precision  | silent                         | bf16 on a GPU                      | fp16 (not here)
    Sec. 4, metric       | oIoU                           | oIoU and mIoU                      | mIoU only
    Appendix A, MDETR    | Bridgers for grounding         | absent                             | absent
    BACKBONES            | CLIP                           | also DINOv2 (Table 2 of DCRIS)     | not there
    BACKBONES            | pretrained                     | also tiny, tiny-vit (3)            | not there

(1) `target`. With the nearest pixel, cell i learns pixel 4i of the canvas, but the way back reads it at 4i + 1.5: exact
predictions come to 95 mIoU, with the cell's mean to 98.5. (2) By the first sentence of each object of val, for RefCOCO+
of testB. (3) They train with AdamW, warm-up, cosine and Dice. Their decoder adds positions to the map itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import (Dropout, MultiheadAttention, Preprocess, Recomputed, TrainConfig, check_config, dice_loss, freeze,
                    in_full_precision, recomputed, sine_1d, sine_2d)
from toolbox import baselines
from toolbox.clip_towers import TOWERS, build_clip, resized
from toolbox.tokenizers import clip_tokens

# Sec. 4.2: CLIP, as open_clip's RN101-quickgelu, RN50-quickgelu and ViT-B-16-quickgelu. `kind`: of the image tower
CLIP_TEXT = dict(context_length=77, vocab_size=49408, width=512, heads=8, layers=12)
CLIP_B16 = dict(embed_dim=512, quick_gelu=True, text_cfg=CLIP_TEXT,
                vision_cfg=dict(layers=12, width=768, image_size=224, patch_size=16))
TINY_TEXT = dict(context_length=77, vocab_size=4096, width=64, heads=2, layers=4)
BACKBONES = {
    "RN101": dict(kind="resnet", hub="timm/resnet101_clip.openai", clip=dict(
        embed_dim=512, quick_gelu=True, text_cfg=CLIP_TEXT,
        vision_cfg=dict(layers=[3, 4, 23, 3], width=64, image_size=224))),
    "RN50": dict(kind="resnet", hub="timm/resnet50_clip.openai", clip=dict(
        embed_dim=1024, quick_gelu=True, text_cfg=CLIP_TEXT,
        vision_cfg=dict(layers=[3, 4, 6, 3], width=64, image_size=224))),
    "ViT-B-16": dict(kind="vit", hub="timm/vit_base_patch16_clip_224.openai", clip=CLIP_B16),
    "dinov2-base": dict(kind="dinov2", hub="facebook/dinov2-with-registers-base", clip=CLIP_B16),
    "tiny": dict(kind="resnet", clip=dict(
        embed_dim=64, quick_gelu=True, text_cfg=TINY_TEXT,
        vision_cfg=dict(layers=[1, 1, 1, 1], width=8, head_width=64, image_size=128))),
    "tiny-vit": dict(kind="vit", clip=dict(
        embed_dim=64, quick_gelu=True, text_cfg=TINY_TEXT,
        vision_cfg=dict(layers=4, width=64, head_width=32, image_size=64, patch_size=8))),
}
VARIANTS = ("etris", "released")
TUNES = baselines.TUNES
STAGES = (2, 3, 4)         # i of F^i; a ResNet's layer2 to layer4
UP = (False, False, True)  # which of their maps are deconvolved to the size of stage 3's (Eq. 4 and 6)


@dataclass(frozen=True)
class Config(TrainConfig):
    """Every setting of the paper. `config()` gives those of a backbone, variant and data set."""

    backbone: str = "RN101"                 # Sec. 4.2
    variant: str = "etris"                  # released: the authors' public code
    tune: str = "method"                    # Table 2: frozen is "Fix Backbone", full is "Full-Tuning"
    # architecture
    image_size: int = 416                   # side of the input in pixels (Sec. 4.2); a multiple of 32, DINOv2: of 14
    words: int = 17                         # length of a sentence in BPE tokens, start and end included (Sec. 4.2)
    blocks: tuple[int, ...] = (4, 8, 12)    # blocks of the text tower, and of a ViT, after which stages 2 to 4 end
    bridger_stages: tuple[int, ...] = STAGES  # stages that have a Bridger (Table 4)
    bridger_dim: int = 64                   # width of the Bridgers (Table 7)
    bridger_heads: int = 4                  # attention heads of the Interactors
    bridger_ffn: int = 128                  # hidden width of the Interactors' FFN
    bridger_dropout: float = 0.1            # dropout in the Interactors
    zoom: Literal["deconv", "interpolate", "linear", "mlp"] = "deconv"  # kind of Zoom Layer (Table 5)
    zero_init: bool = False                 # Bridgers start with residuals of 0; not in the paper
    connect: bool = False                   # a random 1x1 convolution beside the attention pool, as in the public code
    train_positions: bool = False           # the towers' positional embeddings are trained, as in the public code
    hierarchical_alignment: bool = True     # the Hierarchical Alignment Module (Table 6)
    global_alignment: bool = True           # the Global Alignment Module (Table 6)
    text_proj: bool = False                 # Eq. 6 projects F_s also where its width fits, as in the public code
    decoder_text: Literal["words", "sentence"] = "words"  # keys of the decoder's cross-attention (Eq. 8)
    head_dim: int = 512                     # width of the decoder
    head_heads: int = 8                     # attention heads of the decoder (Sec. 4.2)
    decoder_layers: int = 3                 # layers of the Global Alignment Module (Sec. 4.2)
    decoder_ffn: int = 512                  # hidden width of the decoder's FFN (Sec. 4.2)
    decoder_dropout: float = 0.1            # dropout in the decoder
    decoder_position: Literal["attention", "content"] = "attention"  # content: positions are also added to the map
    threshold: float = 0.35                 # a pixel belongs to the object above this probability (Sec. 4.2)
    # training (Sec. 4.2)
    milestones: tuple[int, ...] = (35,)     # Sec. 4.2
    target: Literal["area", "nearest"] = "area"  # how a mask comes to the size of the logits; nearest: the public code
    dice: float = 0.0                       # weight of a Dice loss, added to Eq. 10; not in the paper


VIT = dict(bridger_heads=8, adapter_lr=10.0)  # Sec. 4.2: a learning rate of 0.001 for the Bridgers of a ViT
RELEASED = dict(train_positions=True, text_proj=True, adapter_lr=1.0, target="nearest")  # and ReleasedBridger, "warp"
DINOV2 = dict(image_size=448, train_positions=False)
TINY = dict(
    blocks=(2, 3, 4), bridger_dim=32, bridger_heads=2, bridger_ffn=64, bridger_dropout=0.0, head_dim=64, head_heads=2,
    decoder_layers=2, decoder_ffn=128, decoder_dropout=0.0, decoder_position="content", steps=1500, batch_size=16,
    optimizer="adamw", lr=2e-3, adapter_lr=1.0, weight_decay=0.01, schedule="cosine", milestones=(), warmup=50,
    clip_norm=1.0, dice=1.0, val_every=300)


def config(backbone: str = "RN101", variant: str = "etris", dataset: str = "refcoco", **flags) -> Config:
    """The settings of a backbone, variant and data set; `flags` override them. Raises UserError."""
    kind, clip = BACKBONES[backbone]["kind"], BACKBONES[backbone]["clip"]
    resnet, tiny, tune = kind == "resnet", backbone.startswith("tiny"), flags.get("tune", "method")
    quarter = 128 if resnet else 192  # Sec. 5.1: a quarter of the width
    c = dict(backbone=backbone, variant=variant, baseline_dims=baselines.dims(
        tune, tiny, lora=(1, 1), adapter=(quarter, 128), conv_adapter=(quarter, 0)))
    if dataset.startswith("refcocog") or dataset == "mixed":
        c |= dict(words=22)
    if not resnet:
        c |= VIT
    if variant == "released":
        c |= RELEASED | dict(connect=resnet)
    if kind == "dinov2":
        c |= DINOV2
    if tiny:
        c |= TINY | dict(image_size=clip["vision_cfg"]["image_size"], tower_lr=1.0 if resnet else 0.5)
    if not tune.startswith("method"):
        c |= dict(bridger_stages=(), train_positions=False)
    c = Config(**(c | flags))
    check(c, kind, clip["text_cfg"], clip["embed_dim"])
    return c


def check(c: Config, kind: str, text: dict, sentence_width: int) -> None:
    """Raises UserError for settings that do not fit one another."""
    multiple, most, depth = 14 if kind == "dinov2" else 32, 77 - baselines.prompts(c), text["layers"]
    check_config(
        c, baseline_dims=baselines.rule(c),
        image_size=(c.image_size % multiple == 0, f"a multiple of {multiple}"),
        words=(3 <= c.words <= most, f"3 to {most} tokens, which CLIP's text tower reads"),
        blocks=(len(c.blocks) == 3 and 0 < c.blocks[0] < c.blocks[1] < c.blocks[2] == depth,
                f"three rising numbers up to {depth}, the last block"),
        bridger_stages=(set(c.bridger_stages) <= set(STAGES), "some of the stages 2, 3, 4"),
        bridger_heads=(lambda: c.bridger_dim % c.bridger_heads == 0, f"a divisor of bridger_dim, {c.bridger_dim}"),
        zoom=(c.zoom == "deconv" or kind == "resnet" or c.zoom != "interpolate" and c.variant == "etris",
              "one of deconv, linear, mlp for a ViT; in the released variant deconv"),
        zero_init=(not c.zero_init or c.variant == "etris", "off in the released variant"),
        train_positions=(not c.train_positions or kind != "dinov2", "off for DINOv2"),
        connect=(not c.connect or kind == "resnet", "off for a ViT, which has no attention pool"),
        head_dim=(c.head_dim == text["width"], f"{text['width']}, the width of the words, the decoder's keys"),
        head_heads=(lambda: c.head_dim % c.head_heads == 0, f"a divisor of head_dim, {c.head_dim}"),
        decoder_text=(c.decoder_text == "words" or c.head_dim == sentence_width,
                      f"words: F_s is {sentence_width} wide, not {c.head_dim}"),
        tune=(c.tune.startswith("method") or not c.bridger_stages, "method, where stages have Bridgers"))


# Bridger (Sec. 3.2)


def resample(c_in: int, c_out: int, stride: int, up: bool) -> nn.Module:
    """A convolution that shrinks a map by `stride`, or a deconvolution that enlarges it; no bias."""
    return (nn.ConvTranspose2d if up else nn.Conv2d)(c_in, c_out, stride, stride, bias=False)


def resample_layer(c_in: int, c_out: int, stride: int, up: bool) -> nn.Sequential:
    """The same with BatchNorm and ReLU."""
    return nn.Sequential(resample(c_in, c_out, stride, up), nn.BatchNorm2d(c_out), nn.ReLU())


class SpatialLinear(nn.Module):
    """Table 5 (a), (c): a linear layer over channels, then one or two over places. It fits one input size only."""

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
    """Eq. 4 and Table 5: (B, c_in, h, w) -> (B, c_out, h', w'). `kernel`: the ratio of their sizes in a ResNet; `up`:
    the second case of Eq. 4."""
    if kind in ("linear", "mlp"):
        return SpatialLinear(c_in, c_out, side_in, side_out, hidden=64 if kind == "mlp" else 0)
    if kernel > 1 and side_in == side_out:  # a ViT. Zoom-out pads on the other side, so that both together are centred
        pad = nn.ZeroPad2d((1, 0, 1, 0) if up else (0, 1, 0, 1))
        return nn.Sequential(pad, nn.Conv2d(c_in, c_out, kernel, bias=False))
    if kind == "interpolate" and up and kernel > 1:
        return nn.Sequential(nn.Conv2d(c_in, c_out, 1, bias=False), nn.Upsample(scale_factor=kernel, mode="bilinear"))
    return resample(c_in, c_out, kernel, up)                     # Eq. 4


class Interactor(nn.Module):
    """The layers of Eq. 5 for one modality; after each a residual and a LayerNorm. Bridger.interact calls them."""

    def __init__(self, c: Config):
        super().__init__()
        d, heads, p = c.bridger_dim, c.bridger_heads, c.bridger_dropout
        self.self_attn = MultiheadAttention(d, heads, p)
        self.cross_attn = MultiheadAttention(d, heads, p)
        self.ffn = nn.Sequential(nn.Linear(d, c.bridger_ffn), Dropout(p), nn.ReLU(), nn.Linear(c.bridger_ffn, d))
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(d), nn.LayerNorm(d), nn.LayerNorm(d)
        self.dropout = Dropout(p)

    def mhsa(self, x: Tensor, pad: Tensor | None) -> Tensor:
        """x: (B, N, d); pad: (B, N), True = padding -> (B, N, d)"""
        return self.norm1(x + self.dropout(self.self_attn(x, x, x, pad)[0]))

    def mhca(self, x: Tensor, other: Tensor, pad: Tensor | None) -> Tensor:
        """x: (B, N, d); other: (B, M, d); pad: (B, M), True = padding -> (B, N, d)"""
        return self.norm2(x + self.dropout(self.cross_attn(x, other, other, pad)[0]))

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.norm3(x + self.dropout(self.ffn(x)))


class Bridger(nn.Module):
    """Eq. 1 to 5 for one stage. `width`, `side`: of its map; `middle`: of stage 3's map, the common size h', w'."""

    interactor, zoom_layer = Interactor, staticmethod(zoom_layer)

    def __init__(self, c: Config, stage: int, width: int, text_width: int, side: int, middle: int):
        super().__init__()
        d, kernel, up = c.bridger_dim, 1 if stage == 3 else 2, UP[stage - 2]
        self.zoom_in = self.zoom_layer(c.zoom, width, d, kernel, up, side, middle)
        self.zoom_out = self.zoom_layer(c.zoom, d, width, kernel, not up, middle, side)
        self.linear1, self.linear2 = nn.Linear(text_width, d), nn.Linear(d, text_width)
        linked = stage > min(c.bridger_stages)  # it adds what the Bridger before gives
        self.ln_v, self.ln_t = (nn.LayerNorm(d), nn.LayerNorm(d)) if linked else (None, None)
        self.ita_v, self.ita_t = self.interactor(c), self.interactor(c)
        for m in self.modules():  # as in the public code; in_proj of the attentions keeps PyTorch's initialisation
            if isinstance(m, nn.Linear):
                nn.init.normal_(m.weight, std=0.02)
                nn.init.zeros_(m.bias)
            elif isinstance(m, (nn.Conv2d, nn.ConvTranspose2d)):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
        if c.zero_init:
            last = [m for m in self.zoom_out.modules() if isinstance(m, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d))][-1]
            for p in *last.parameters(), *self.linear2.parameters():
                nn.init.zeros_(p)

    def forward(self, f_v: Tensor, f_t: Tensor, last: tuple[Tensor, Tensor] | None, pad: Tensor | None):
        """f_v: map (B, C_i, h, w); f_t: words (B, L, C); last: f^(i-1) of the Bridger before, or None; pad: (B, L),
        True = padding -> residuals for f_v and f_t, and f^i for the next Bridger: (B, N, d) and (B, L, d)"""
        v = self.zoom_in(f_v)                                    # (B, d, h', w')  Eq. 1, line 1
        t = self.linear1(f_t)                                    # (B, L, d)       Eq. 1, line 2
        grid, v = v.shape[-2:], v.flatten(2).transpose(1, 2)     # (B, N, d)
        if last is not None:
            v, t = self.ln_v(v + last[0]), self.ln_t(t + last[1])  # the sums in Eq. 2
        v, t, last = self.interact(v, t, pad)                    # (B, N, d), (B, L, d)  Eq. 2
        f_v = self.zoom_out(v.transpose(1, 2).unflatten(2, grid))  # (B, C_i, h, w)  Eq. 3, line 1
        f_t = self.linear2(t)                                    # (B, L, C)       Eq. 3, line 2
        return f_v, f_t, last

    def interact(self, v: Tensor, t: Tensor, pad: Tensor | None):
        """Eq. 5: v (B, N, d), t (B, L, d) -> both after the Interactors, and what the next Bridger adds (Eq. 2)"""
        v, t = self.ita_v.mhsa(v, None), self.ita_t.mhsa(t, pad)  # Eq. 5, lines 1 and 2
        v, t = self.ita_v.mhca(v, t, pad), self.ita_t.mhca(t, v, None)  # Eq. 5, line 3
        v, t = self.ita_v.feed_forward(v), self.ita_t.feed_forward(t)  # Eq. 5, line 4
        return v, t, (v, t)


class ReleasedBridger(Bridger):
    """The public code's for a ResNet. Its cross-attention reads the other modality as it was before self-attention,
    padding is not masked, and the next Bridger adds what the Interactors read."""

    def interact(self, v: Tensor, t: Tensor, pad: Tensor | None):
        v1, t1 = self.ita_v.mhsa(v, None), self.ita_t.mhsa(t, None)
        v2, t2 = self.ita_v.mhca(v1, t, None), self.ita_t.mhca(t1, v, None)
        return self.ita_v.feed_forward(v2), self.ita_t.feed_forward(t2), (v, t)


class ReleasedViTInteractor(nn.Module):
    """The public code's for a ViT: x times its attention to the other modality."""

    def __init__(self, c: Config):
        super().__init__()
        self.cross_attn = MultiheadAttention(c.bridger_dim, c.bridger_heads)

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        return x * self.cross_attn(x, other, other)[0]


class ReleasedViTBridger(Bridger):
    """The public code's for a ViT: zooms with 1x1 convolutions, BatchNorm and ReLU. Padding is not masked, and the next
    Bridger adds what the Interactors read."""

    interactor = ReleasedViTInteractor

    @staticmethod
    def zoom_layer(kind: str, c_in: int, c_out: int, kernel: int, up: bool, side_in: int, side_out: int) -> nn.Module:
        return resample_layer(c_in, c_out, 1, up)

    def interact(self, v: Tensor, t: Tensor, pad: Tensor | None):
        return self.ita_v(v, t), self.ita_t(t, v), (v, t)


# Decoder (Sec. 3.3)


def conv_layer(c_in: int, c_out: int, kernel: int) -> nn.Sequential:
    """Convolution, BatchNorm, ReLU; the size of the map stays."""
    conv = nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(c_out), nn.ReLU())


class CoordConv(nn.Module):
    """Eq. 7: a 3x3 convolution over a map and its coordinates, x and y in -1..1, as two more channels."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.conv = conv_layer(c_in + 2, c_out, 3)

    def forward(self, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        xs = torch.linspace(-1, 1, w, device=x.device, dtype=x.dtype).expand(b, 1, h, w)
        ys = torch.linspace(-1, 1, h, device=x.device, dtype=x.dtype).view(h, 1).expand(b, 1, h, w)
        return self.conv(torch.cat([x, xs, ys], 1))


class Neck(nn.Module):
    """Eq. 6 and 7, the Hierarchical Alignment Module: three maps, each multiplied by its attention to the text, become
    one."""

    def __init__(self, c: Config, widths: tuple[int, ...], strides: tuple[int, ...], text_width: int):
        super().__init__()
        dim = c.head_dim
        self.txt_proj = nn.Linear(text_width, dim) if c.text_proj or text_width != dim else nn.Identity()
        self.f_proj = nn.ModuleList(resample_layer(w, dim, s, up) for w, s, up in zip(widths, strides, UP))
        self.fusion = nn.ModuleList(MultiheadAttention(dim, c.head_heads) for _ in range(3))
        self.aggr = conv_layer(3 * dim, dim, 1)
        self.coordconv = nn.Sequential(CoordConv(dim, dim), conv_layer(dim, dim, 3))

    def forward(self, maps: list[Tensor], f_s: Tensor) -> Tensor:
        """maps: three of (B, C_i, h_i, w_i); f_s: sentence (B, C') -> F_v (B, dim, H, W)"""
        text = self.txt_proj(f_s)[:, None]                       # (B, 1, dim)
        levels = []
        for x, proj, fusion in zip(maps, self.f_proj, self.fusion):
            x = proj(x)                                          # (B, dim, H, W)  Eq. 6, line 1
            q = x.flatten(2).transpose(1, 2)                     # (B, N, dim)
            a = fusion(q, text, text)[0]
            levels.append(x * a.transpose(1, 2).view_as(x))      # (B, dim, H, W)  Eq. 6, line 2
        f_m = self.aggr(torch.cat(levels, 1))                    # (B, dim, H, W)  Eq. 6, line 3
        return self.coordconv(f_m)                               # (B, dim, H, W)  Eq. 7


class DecoderLayer(nn.Module):
    """Eq. 8: self-attention of the map, cross-attention to the words, FFN; a norm before each, and behind both
    attentions."""

    def __init__(self, dim: int, heads: int, ffn: int, dropout: float):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.self_attn = MultiheadAttention(dim, heads, dropout)
        self.self_attn_norm = nn.LayerNorm(dim)
        self.cross_attn = MultiheadAttention(dim, heads, dropout)
        self.cross_attn_norm = nn.LayerNorm(dim)
        self.ffn = nn.Sequential(nn.Linear(dim, ffn), Dropout(dropout), nn.ReLU(), nn.LayerNorm(ffn),
                                 nn.Linear(ffn, dim))
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, f_t: Tensor, pad: Tensor | None, x_pos: Tensor, t_pos: Tensor) -> Tensor:
        """x: (B, N, dim); f_t: (B, L, dim); pad: (B, L), True = padding -> (B, N, dim)"""
        y = self.norm1(x)
        q = y + x_pos
        y = self.self_attn(q, q, y)[0]
        x = x + self.dropout(self.self_attn_norm(y))             # Eq. 8, line 1
        y = self.norm2(x)
        y = self.cross_attn(y + x_pos, f_t + t_pos, f_t, pad)[0]
        x = x + self.dropout(self.cross_attn_norm(y))            # Eq. 8, line 2
        return x + self.dropout(self.ffn(self.norm3(x)))         # Eq. 8, line 3


class Decoder(nn.Module):
    """The Global Alignment Module: sine positions, the layers of Eq. 8, a final norm."""

    def __init__(self, c: Config):
        super().__init__()
        dim, self.position = c.head_dim, c.decoder_position
        self.layers = nn.ModuleList(DecoderLayer(dim, c.head_heads, c.decoder_ffn, c.decoder_dropout)
                                    for _ in range(c.decoder_layers))
        self.norm = nn.LayerNorm(dim)

    def forward(self, f_v: Tensor, f_t: Tensor, pad: Tensor | None) -> Tensor:
        """f_v: the neck's map (B, dim, H, W); f_t: words (B, L, dim); pad: (B, L) -> F_c (B, dim, H, W)"""
        b, dim, h, w = f_v.shape
        x = f_v.flatten(2).transpose(1, 2)                       # (B, N, dim)
        x_pos, t_pos = sine_2d(h, w, dim, x), sine_1d(f_t.shape[1], dim, f_t)
        if self.position == "content":
            x = F.layer_norm(x, (dim,)) + x_pos
        for layer in self.layers:
            x = layer(x, f_t, pad, x_pos, t_pos)
        return self.norm(x).transpose(1, 2).reshape(b, dim, h, w)


class Projector(nn.Module):
    """Eq. 9: the sentence becomes a 3x3 kernel and a bias, with which the enlarged map is convolved."""

    def __init__(self, dim: int, text_width: int):
        super().__init__()
        up1, up2 = (nn.Upsample(scale_factor=2, mode="bilinear") for _ in range(2))
        self.vis = Recomputed(up1, conv_layer(dim, dim, 3), up2, conv_layer(dim, dim // 2, 3),
                              nn.Conv2d(dim // 2, dim // 2, 1))
        self.txt = nn.Linear(text_width, dim // 2 * 9 + 1)       # a 3x3 kernel and a bias

    def forward(self, f_c: Tensor, f_s: Tensor) -> Tensor:
        """f_c: the decoder's map (B, dim, H, W); f_s: sentence (B, C') -> logits (B, 1, 4H, 4W)"""
        z_c = self.vis(f_c)                                      # (B, dim/2, 4H, 4W)  Eq. 9, lines 1 and 2
        z_t = self.txt(f_s)                                      # (B, dim/2 * 9 + 1)  Eq. 9, line 3
        b, d, h, w = z_c.shape
        # A 3x3 convolution with a kernel for each sample: the nine products, then their shifted sum. fold mirrors the
        # kernel, hence flip. Several times faster than a grouped convolution with one group for each sample.
        kernel = z_t[:, :-1].reshape(b, d, 9).flip(2).transpose(1, 2)  # (B, 9, dim/2)
        with in_full_precision(z_c):
            out = F.fold(kernel.float() @ z_c.float().flatten(2), (h, w), 3, padding=1)
            return out + z_t[:, -1].float().view(b, 1, 1, 1)     # (B, 1, 4H, 4W)  Z_t . Z_c of Eq. 11


# The model (Fig. 2) and its loss (Sec. 3.4)


class ETRIS(nn.Module):
    """The whole model: frozen CLIP, Bridgers, decoder. `c` comes from config(); `weights`: see build_clip. Raises
    UserError where weights are missing or do not fit."""

    task = "mask"

    def __init__(self, c: Config, weights: str = "random"):
        super().__init__()
        self.c, kind = c, BACKBONES[c.backbone]["kind"]
        self.clip = build_clip(c.backbone, weights, **BACKBONES[c.backbone])
        text_width, sentence_width = self.clip.text_projection.shape
        self.tower = tower = TOWERS[kind](self.clip.visual, c.blocks, sentence_width)
        sides = [c.image_size // s for s in tower.strides]
        fit = "letterbox" if c.variant == "etris" else "warp"    # the authors' way, in training too
        self.preprocess = Preprocess(c.image_size, fit, "bicubic", *tower.mean_std)
        # Random values are drawn in the order towers, decoder, Bridgers: each --tune starts from the same decoder.
        ratios = tuple(max(s, sides[1]) // min(s, sides[1]) for s in sides)  # to the size of stage 3's map
        if c.hierarchical_alignment:
            self.neck = Neck(c, (*tower.widths[:2], tower.out_width), ratios, sentence_width)
        else:
            self.neck = resample_layer(tower.out_width, c.head_dim, ratios[2], up=True)
        self.decoder = Decoder(c) if c.global_alignment else None
        self.proj = Projector(c.head_dim, sentence_width)
        if c.connect:  # under the public code's name
            self.clip.visual.attnpool.connect = nn.Sequential(
                nn.Conv2d(tower.widths[2], sentence_width, 1, bias=False), nn.BatchNorm2d(sentence_width))
        if c.train_positions and kind == "vit":  # one table of the input's size, as in the public code
            table = self.clip.visual.positional_embedding.detach()
            self.clip.visual.positional_embedding = nn.Parameter(resized(table, (sides[0], sides[0])))
        if c.tune != "full":
            freeze(self.clip)
        for name, p in self.clip.named_parameters():
            if name.endswith(("logit_scale", "mask_token")):     # two that nothing reads
                p.requires_grad_(False)
            elif c.train_positions and name.endswith("positional_embedding"):
                p.requires_grad_(True)
        bridger = Bridger if c.variant == "etris" else ReleasedBridger if kind == "resnet" else ReleasedViTBridger
        self.bridgers = nn.ModuleDict({
            str(i): bridger(c, i, width, text_width, side, sides[1])
            for i, width, side in zip(STAGES, tower.widths, sides) if i in c.bridger_stages})
        if c.checkpointing:
            blocks = [block for stage in tower.stages for block in stage]
            recomputed(*blocks, *self.clip.transformer.resblocks, *(self.decoder.layers if self.decoder else ()))
        text = {n: m for n, m in self.clip.named_modules() if not n.startswith("visual")}
        self.baseline = baselines.add(c, dict(self.clip.visual.named_modules()), text, self.clip.token_embedding)

    def parts(self) -> dict[str, list[nn.Module]]:
        """What the parameter tables count."""
        return dict(backbone=[self.clip], adapter=[self.bridgers, *self.baseline],
                    head=[m for m in (self.neck, self.decoder, self.proj) if m is not None])

    def tokenize(self, sentences: Iterable[str]) -> Tensor:
        """CLIP's BPE, lower case: start, words, end, zeros; cut to `words` tokens, the end kept. -> (B, words)"""
        tokens = clip_tokens(list(sentences), self.c.words, self.clip.token_embedding.num_embeddings)
        return baselines.prompted(tokens, self.c)

    def encode(self, images: Tensor, tokens: Tensor) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
        """(B, 3, H, W), (B, L) -> maps F_v of stages 2 to 4, words F_t (B, L, C), sentence F_s (B, C'), padding (B, L),
        True after the end token"""
        clip, tower, n = self.clip, self.tower, tokens.shape[1]
        end = tokens.argmax(1)                                   # the end token has the highest id
        pad = torch.arange(n, device=end.device) > end[:, None]  # (B, L)
        grid = tuple(side // tower.strides[2] for side in images.shape[2:])
        v = tower.start(images)                                  # (B, C, H/4, W/4), or tokens (B, 1+N, C)
        t = clip.token_embedding(tokens) + clip.positional_embedding[:n]  # (B, L, C)
        maps, last = [], None
        for i, stage, first, after in zip(STAGES, tower.stages, (0, *self.c.blocks), self.c.blocks):
            v = stage(v)
            for block in clip.transformer.resblocks[first:after]:
                t = block(t, attn_mask=clip.attn_mask[:n, :n])
            if str(i) in self.bridgers:
                f_v, f_t, last = self.bridgers[str(i)](tower.as_map(v, grid), t, last, pad)
                v = tower.add(v, f_v)                            # Eq. 3, line 3
                t = t + f_t                                      # Eq. 3, line 4
            maps.append(tower.as_map(v, grid))                   # (B, C_i, h_i, w_i)
        maps[2] = tower.end(v, grid)
        f_t = clip.ln_final(t)                                   # (B, L, C)
        f_s = f_t[torch.arange(len(end), device=end.device), end] @ clip.text_projection  # (B, C')
        return maps, f_t, f_s, pad

    def forward(self, images: Tensor, tokens: Tensor) -> Tensor:
        """(B, 3, H, W) normalised images, (B, L) tokens -> logits (B, 1, H/4, W/4); for a ViT, 4 per patch side"""
        maps, f_t, f_s, pad = self.encode(images, tokens)
        f_v = self.neck(maps, f_s) if self.c.hierarchical_alignment else self.neck(maps[2])  # (B, dim, H/16, W/16)
        f_c = f_v
        if self.decoder is not None:
            keys = (f_t, pad) if self.c.decoder_text == "words" else (f_s[:, None], None)
            f_c = self.decoder(f_v, *keys)                       # (B, dim, H/16, W/16)
        return self.proj(f_c, f_s)

    def loss(self, logits: Tensor, masks: Tensor) -> Tensor:
        """Mean over pixels at the size of the logits; masks: (B, H, W) in 0..1 on the canvas."""
        target = F.interpolate(masks[:, None], logits.shape[-2:], mode=self.c.target)  # (B, 1, H/4, W/4)
        logits = logits.float()
        loss = F.binary_cross_entropy_with_logits(logits, target)  # Eq. 10 and 11
        if self.c.dice:
            loss = loss + self.c.dice * dice_loss(logits, target)
        return loss


Model = ETRIS  # the name by which train.py and evaluate.py know it
