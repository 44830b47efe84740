"""DCRIS: Enhancing Fine-grained Multi-modal Alignment via Adapters: A Parameter-Efficient Training Framework for
Referring Image Segmentation
Xu, Huang, Liu, Liu, Yuan, Li, WANT@ICML 2024

and its successor DETRIS (`--variant detris`): Densely Connected Parameter-Efficient Tuning for Referring Image
Segmentation, Huang, Xu, Liu et al., AAAI 2025, https://arxiv.org/abs/2501.08580

DINOv2 with registers encodes the image, CLIP's text transformer the sentence. Both stay frozen, and they were not
pretrained together. Small modules beside their MLPs align them. The sentence is encoded first. A DenseCrossAdapter
gives a vision block local detail, by densely connected 1x1, 3x3 and 5x5 convolutions, and a global prior, by attention
to the words. A decoder as in CRIS fuses maps of three levels, and convolves the result with a kernel made of the
sentence.

    Fig. 1            the whole model               DCRIS.forward
    Fig. 3 and 4      predicted masks               evaluate.py --image; Fig. 4 (d), (e): runs of Table 3
    Sec. 3.2          encoders                      DCRIS.encode_text, DCRIS.encode_image
    Sec. 3.3, Eq. 1   densely connected module      line 1: DenseCrossAdapter.forward; lines 2-5: DenselyConnected
    Sec. 3.3, Eq. 2   DenseCrossAdapter (DA)        DenseCrossAdapter; DETRIS: DenseAligner
    Sec. 3.3, Eq. 3   text adapter (TA)             TextAdapter; DETRIS: DETRISTextAdapter
    Sec. 3.4, Eq. 4   cross-modal neck              Neck; F_coord: CoordConv
    Sec. 3.4          vision-language decoder       Decoder, DecoderLayer
    Sec. 3.4, Eq. 5   up-sample projector           Projector
    Sec. 3.5, Eq. 6   text-to-pixel loss            its product: Projector; the loss: DCRIS.loss
    Tables, Fig. 2    rows of the tables            toolbox/tables.py

Deviations. "silent": the paper does not say. "same": as here. DETRIS's code is `--variant detris`, except where its
column says "not here".

    where                | the paper                   | here                                   | DETRIS's code
    ---------------------+-----------------------------+----------------------------------------+-----------------------
    abstract             | links a layer to all before | links branches within one adapter      | same
    Sec. 3.2, positions  | silent                      | resized as in DINOv2                   | detris_embeddings
    Fig. 1, adapters     | beside the MLP              | times 0.2; DA: inside LayerScale       | same
    Eq. 1, convolutions  | no more                     | + bias, BatchNorm, ReLU: fits 2.69M    | same
    Eq. 1, 3x3           | in the text: F_v1           | F_v and F_v1, as printed: fits 2.69M   | same
    Eq. 1, widths        | silent                      | d/2, d/4, d/4; reduced to d/16         | same
    Eq. 2, f_v^l         | silent                      | behind norm2, as the MLP's input       | same
    Eq. 2, CLS, reg.     | silent                      | F_cross = F_v                          | F_cross = 2 F_v
    Eq. 2, padding       | silent                      | masked                                 | not masked
    Eq. 2, F_MHCA        | silent                      | 128 wide: Table 4; 8 heads, dropout .1 | same
    Eq. 3, f_t^l         | silent                      | before ln_2, not normed                | same
    Eq. 3, between       | ReLU                        | as printed                             | DETRISTextAdapter
    Sec. 3.4, f_v^i      | at 1/3, 2/3 and the end     | after 5, 9, 12; L: 9, 17, 24           | same
    Eq. 4, keys          | words                       | as printed                             | the sentence alone
    Eq. 4, F_f           | result of F_MHCA            | map times result, concatenated, 1x1    | same
    Eq. 4, Conv          | one 3x3                     | two 3x3, + F_f                         | same
    Sec. 3.4, decoder    | norms, sizes: silent        | norms: DecoderLayer; 512 wide, 8 heads | same
    Sec. 3.4, padding    | silent                      | what follows the end token             | id 0, a "!" (not here)
    Eq. 5, F_c           | 4x upsampling, Conv         | twice 2x and a 3x3; at last a 1x1      | same
    Eq. 6, target        | silent                      | area: the mean of a cell, see below    | nearest pixel
    Sec. 4.1, epoch      | 120,624 samples             | one sentence of each object: 42,404    | same
    Sec. 4.2, words      | silent                      | 17; G-Ref (umd), mixed: 22             | mixed: 17
    Sec. 4.2, images     | resized to 448 x 448        | letterbox, antialiased; mask likewise  | cv2's warp of both
    Sec. 4.2, mean, std  | silent                      | ImageNet's, as in DINOv2               | CLIP's
    Sec. 4.2, training   | 50 epochs; L: batch 64      | as printed                             | DETRIS, DETRIS_BASE
    Sec. 4.2, best epoch | silent                      | mIoU, all sentences of val             | one each (not here)
    Sec. 4.2, precision  | silent                      | bf16 on a GPU                          | fp16 (not here)
    Sec. 4.2, metric     | IoU; threshold: silent      | mIoU and oIoU, threshold 0.35          | mIoU, oIoU; 0.35
    Table 1, DCRIS-L*    | silent                      | as DCRIS-L: 3.09M in adapters          | 33.33M (not here)
    BACKBONES            | pretrained                  | tiny: this project's                   | not there

Target: a logit covers 3.5 x 3.5 pixels of the canvas. `nearest` takes its first pixel, but the way back to the
photograph reads the logit at its centre. An output equal to its target then reaches 93 mIoU, with `area` 99 (objects of
1 to 8 % of a photograph).
DETRIS-L* has adapters of width 384 in vision blocks 1 to 23 and text blocks 1 to 11, counted from 0.
`tiny` is small random towers. It trains with AdamW, warm-up, cosine and Dice, and its decoder adds positions to the map
itself (decoder_position): without that it learned colours, not places.
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
from toolbox.tokenizers import clip_tokens
from toolbox.weights import check_released, load_dinov2_and_clip

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and standard deviation of RGB values
CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

# Sec. 3.2: DINOv2 with registers, and the text tower of CLIP ViT-B/16, as open_clip's ViT-B-16-quickgelu
CLIP_B16 = dict(embed_dim=512, quick_gelu=True, vision_cfg=dict(layers=12, width=768, image_size=224, patch_size=16),
                text_cfg=dict(context_length=77, vocab_size=49408, width=512, heads=8, layers=12))
BACKBONES = {
    "dinov2-base": dict(hub="facebook/dinov2-with-registers-base", clip=CLIP_B16, dino=dict(
        hidden_size=768, num_hidden_layers=12, num_attention_heads=12, patch_size=14, image_size=518)),
    "dinov2-large": dict(hub="facebook/dinov2-with-registers-large", clip=CLIP_B16, dino=dict(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, patch_size=14, image_size=518)),
    "tiny": dict(
        dino=dict(hidden_size=64, num_hidden_layers=4, num_attention_heads=2, patch_size=8, image_size=64,
                  initializer_range=0.25),  # with DINOv2's 0.02, chosen for wider towers, it does not learn positions
        clip=dict(embed_dim=64, quick_gelu=True, vision_cfg=dict(layers=1, width=64, image_size=16, patch_size=16),
                  text_cfg=dict(context_length=77, vocab_size=4096, width=64, heads=2, layers=4))),
}
VARIANTS = ("dcris", "detris")
TUNES = baselines.TUNES


@dataclass(frozen=True)
class Config(TrainConfig):
    """Every setting of the paper. `config()` gives those of a backbone, variant and data set."""

    backbone: str = "dinov2-base"           # Sec. 4.2
    variant: str = "dcris"                  # detris: the successor's public code
    tune: str = "method"                    # Table 2: frozen is "Fix Backbone", full is "Full-Tuning"
    # architecture
    image_size: int = 448                   # side of the input in pixels (Sec. 4.2); a multiple of the patch size
    words: int = 17                         # length of a sentence in BPE tokens, start and end included
    visual_layers: tuple[int, ...] = (1, 3, 5, 7, 9, 11)  # vision blocks with a DA, from 0 (Sec. 4.2, Table 5)
    text_layers: tuple[int, ...] = (1, 3, 5, 7, 9, 11)  # text blocks with a TA, from 0 (Sec. 4.2, Table 5)
    visual_dim: int = 128                   # width of the DAs, a multiple of 16 (Sec. 4.2, Table 4)
    text_dim: int = 64                      # width of the TAs (Sec. 4.2, Table 4)
    cross_dim: int = 128                    # width of the DAs' attention (Eq. 2)
    cross_heads: int = 8                    # heads of the DAs' attention
    cross_dropout: float = 0.1              # dropout in the DAs' attention
    adapter_scale: float = 0.2              # factor of what the adapters add
    zero_init: bool = False                 # adapters start with outputs of 0; not in the paper
    map_layers: tuple[int, ...] = (4, 8)    # vision blocks, from 0, after which maps 1 and 2 are taken; 3: the last
    head_dim: int = 512                     # width of the decoder
    head_heads: int = 8                     # attention heads of the decoder
    decoder_layers: int = 3                 # layers of the decoder (Sec. 3.4)
    decoder_ffn: int = 512                  # hidden width of the decoder's FFN
    decoder_dropout: float = 0.1            # dropout in the decoder
    decoder_position: Literal["attention", "content"] = "attention"  # content: positions are also added to the map
    threshold: float = 0.35                 # a pixel belongs to the object above this probability
    # training (Sec. 4.2)
    milestones: tuple[int, ...] = (35,)     # Sec. 4.2
    target: Literal["area", "nearest"] = "area"  # of a logit: the mean of the mask in its cell, or one pixel
    dice: float = 0.0                       # weight of a Dice loss, added to Eq. 6; not in the paper


LARGE = dict(visual_layers=(2, 6, 10, 14, 18, 22), map_layers=(8, 16), batch_size=64, lr=2e-4)  # Sec. 4.2: DCRIS-L
# DETRIS has its own blocks, too: DenseAligner, DETRISTextAdapter, detris_embeddings, and the neck reads the sentence
DETRIS = dict(batch_size=32, lr=1e-4, target="nearest")
DETRIS_BASE = dict(epochs=65, milestones=(35, 55))  # but for G-Ref (google)
TINY = dict(
    image_size=64, visual_layers=(1, 3), text_layers=(1, 3), visual_dim=32, text_dim=32, cross_dim=32, cross_heads=2,
    cross_dropout=0.0, map_layers=(1, 2), head_dim=64, head_heads=2, decoder_layers=1, decoder_ffn=128,
    decoder_dropout=0.0, decoder_position="content", steps=1200, batch_size=16, optimizer="adamw", lr=2e-3,
    tower_lr=0.5, weight_decay=0.01, schedule="cosine", milestones=(), warmup=50, clip_norm=1.0, dice=1.0,
    val_every=300)


def config(backbone: str = "dinov2-base", variant: str = "dcris", dataset: str = "refcoco", **flags) -> Config:
    """The settings of a backbone, variant and data set; `flags` override them. Raises UserError."""
    tune, tiny = flags.get("tune", "method"), backbone == "tiny"
    c = dict(backbone=backbone, variant=variant)
    if dataset == "refcocog_umd" or dataset == "mixed" and variant == "dcris":
        c |= dict(words=22)
    if backbone == "dinov2-large":
        c |= LARGE
    if variant == "detris":
        c |= DETRIS
        if backbone == "dinov2-base" and dataset != "refcocog_google":
            c |= DETRIS_BASE
    if tiny:
        c |= TINY
    c |= dict(baseline_dims=baselines.dims(tune, tiny, lora=(32, 16), compacter=(42, 42)))  # Table 2
    if not tune.startswith("method"):
        c |= dict(visual_layers=(), text_layers=())
    c = Config(**(c | flags))
    dino, text, most = BACKBONES[backbone]["dino"], BACKBONES[backbone]["clip"]["text_cfg"], 77 - baselines.prompts(c)
    patch, depth = dino["patch_size"], dino["num_hidden_layers"]
    check_config(
        c, baseline_dims=baselines.rule(c),
        image_size=(c.image_size % patch == 0, f"a multiple of the patch size, {patch}"),
        words=(3 <= c.words <= most, f"3 to {most} tokens, which CLIP's text tower reads"),
        visual_layers=(set(c.visual_layers) <= set(range(depth)), f"blocks from 0 to {depth - 1}"),
        text_layers=(set(c.text_layers) <= set(range(text["layers"])), f"blocks from 0 to {text['layers'] - 1}"),
        visual_dim=(c.visual_dim % 16 == 0, "a multiple of 16 (Eq. 1)"),
        text_dim=(c.variant == "dcris" or c.text_dim % 16 == 0, "a multiple of 16 for DETRIS (Eq. 1)"),
        cross_heads=(lambda: c.cross_dim % c.cross_heads == 0, f"a divisor of cross_dim, {c.cross_dim}"),
        map_layers=(len(c.map_layers) == 2 and c.map_layers[0] < c.map_layers[1] < depth - 1,
                    f"two rising numbers from 0 to {depth - 2}"),
        head_dim=(c.head_dim == text["width"], f"{text['width']}, the width of the words, the decoder's keys"),
        head_heads=(lambda: c.head_dim % c.head_heads == 0, f"a divisor of head_dim, {c.head_dim}"),
        tune=(c.tune.startswith("method") or not c.visual_layers + c.text_layers, "method, where blocks have adapters"))
    return c


# Encoders (Sec. 3.2)


def build_towers(backbone: str, weights: str) -> tuple[nn.Module, nn.Module]:
    """DINOv2 of transformers, and open_clip's CLIP without its image tower. `weights`: "random", "pretrained" (the
    hub's cache, or downloaded) or two files with a comma between."""
    import open_clip  # slow, and --help does without
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    names = BACKBONES[backbone]
    check_released(backbone, weights)
    vision = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**names["dino"]))
    text = open_clip.CLIP(**names["clip"])
    del text.visual
    if weights != "random":
        load_dinov2_and_clip(vision, text, weights, names["hub"], backbone)
    return vision, text


def detris_embeddings(e: nn.Module, images: Tensor, grid: tuple[int, int]) -> Tensor:
    """DINOv2's embeddings with positions resized as in DETRIS, unless they fit: by (g + 0.1) / 37, not antialiased.
    -> CLS, registers, patches (B, 5+N, D)"""
    b, pos = len(images), e.position_embeddings                  # (1, 1 + 37 * 37, D)
    side = int((pos.shape[1] - 1) ** 0.5)
    pos2d = pos[:, 1:].transpose(1, 2).unflatten(2, (side, side))  # (1, D, 37, 37)
    if grid != (side, side):
        pos2d = F.interpolate(pos2d, scale_factor=tuple((g + 0.1) / side for g in grid), mode="bicubic")
    patches = e.patch_embeddings(images) + pos2d.flatten(2).transpose(1, 2)  # (B, N, D)
    cls = (e.cls_token + pos[:, :1]).expand(b, -1, -1)           # (B, 1, D)
    return torch.cat([cls, e.register_tokens.expand(b, -1, -1), patches], 1)


# Adapters (Sec. 3.3)


def conv_block(dims: int, c_in: int, c_out: int, kernel: int) -> nn.Sequential:
    """Convolution with bias, BatchNorm, ReLU, over a map (dims=2) or over words (dims=1); its size stays."""
    conv, norm = (nn.Conv2d, nn.BatchNorm2d) if dims == 2 else (nn.Conv1d, nn.BatchNorm1d)
    return nn.Sequential(conv(c_in, c_out, kernel, padding=kernel // 2), norm(c_out, eps=1e-3), nn.ReLU())


class DenselyConnected(nn.Module):
    """Eq. 1, lines 2 to 5: each convolution reads the outputs of all before it."""

    def __init__(self, d: int, dims: int):
        super().__init__()
        self.branch1 = conv_block(dims, d, d // 2, 1)
        self.branch2 = nn.Sequential(conv_block(dims, d + d // 2, d // 16, 1), conv_block(dims, d // 16, d // 4, 3))
        self.branch3 = nn.Sequential(conv_block(dims, d + d // 2 + d // 4, d // 16, 1),
                                     conv_block(dims, d // 16, d // 4, 5))

    def forward(self, F_v: Tensor) -> Tensor:
        """A map (B, d, H, W), for DETRIS also words (B, d, L) -> of the same shape"""
        F_v1 = self.branch1(F_v)                                 # (B, d/2, H, W)  Eq. 1, line 2
        F_v2 = self.branch2(torch.cat([F_v, F_v1], 1))           # (B, d/4, H, W)  Eq. 1, line 3
        F_v3 = self.branch3(torch.cat([F_v, F_v1, F_v2], 1))     # (B, d/4, H, W)  Eq. 1, line 4
        return torch.cat([F_v1, F_v2, F_v3], 1) + F_v            # (B, d, H, W)    Eq. 1, line 5


class DenseCrossAdapter(nn.Module):
    """Eq. 1 and 2: the adapter beside the MLP of a vision block."""

    def __init__(self, c: Config, width: int, text_width: int):
        super().__init__()
        d, e = c.visual_dim, c.cross_dim
        self.down = nn.Linear(width, d)
        self.dense = DenselyConnected(d, dims=2)
        self.image_proj = nn.Linear(d, e)
        self.text_proj = nn.Linear(text_width, e)
        self.attention = MultiheadAttention(e, c.cross_heads, c.cross_dropout)
        self.back_proj = nn.Linear(e, d)
        self.up = nn.Linear(d, width)
        for m in self.modules():  # as in DETRIS: DINOv2's initialization for linear layers, He's for convolutions
            if isinstance(m, nn.Linear):
                nn.init.trunc_normal_(m.weight, std=0.02)
                nn.init.zeros_(m.bias)
            elif isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight)
                nn.init.zeros_(m.bias)
        if c.zero_init:
            nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor, f_t: Tensor, pad: Tensor, grid: tuple[int, int]) -> Tensor:
        """x: f_v^l, what the block's MLP reads, CLS and registers first (B, 5+N, D); f_t: words (B, L, C); pad: (B, L),
        True = padding -> f_dc (B, 5+N, D)"""
        F_v = F.relu(self.down(x))                               # (B, 5+N, d)  Eq. 1, line 1
        return self.up(self.cross(F_v, f_t, pad, grid))          # (B, 5+N, D)  Eq. 2, line 2

    def cross(self, F_v: Tensor, f_t: Tensor, pad: Tensor | None, grid: tuple[int, int]) -> Tensor:
        """F_cross (B, 5+N, d); CLS and registers have no place on the grid and stay F_v."""
        n = grid[0] * grid[1]
        prefix, F_v = F_v[:, :-n], F_v[:, -n:]                   # (B, 5, d), (B, N, d)
        F_dense = self.dense(F_v.transpose(1, 2).unflatten(2, grid)).flatten(2).transpose(1, 2)  # (B, N, d)
        q, words = self.image_proj(F_dense), self.text_proj(f_t)  # (B, N, e), (B, L, e)
        a = self.attention(q, words, words, pad)[0]
        F_cross = self.back_proj(a) + F_v                        # (B, N, d)  Eq. 2, line 1
        return torch.cat([prefix, F_cross], 1)


class DenseAligner(DenseCrossAdapter):
    """DETRIS: padding is attended to, and CLS and registers are doubled."""

    def cross(self, F_v: Tensor, f_t: Tensor, pad: Tensor, grid: tuple[int, int]) -> Tensor:
        n, F_cross = grid[0] * grid[1], super().cross(F_v, f_t, None, grid)
        return torch.cat([2 * F_cross[:, :-n], F_cross[:, -n:]], 1)


class TextAdapter(nn.Module):
    """Eq. 3: the adapter beside the MLP of a text block."""

    def __init__(self, c: Config, width: int):
        super().__init__()
        self.down = nn.Linear(width, c.text_dim)
        self.up = nn.Linear(c.text_dim, width)
        if c.zero_init:
            nn.init.zeros_(self.up.weight)
            nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x: f_t^l, words (B, L, C) -> f_w (B, L, C)"""
        F_t = self.down(x)                                       # (B, L, t)  Eq. 3, line 1
        F_relu = F.relu(F_t)                                     # (B, L, t)  Eq. 3, line 2
        return self.up(F_relu)                                   # (B, L, C)  Eq. 3, line 3


class DETRISTextAdapter(TextAdapter):
    """DETRIS: DenselyConnected over the words before the last line; the start token skips it and is doubled."""

    def __init__(self, c: Config, width: int):
        super().__init__(c, width)
        self.dense = DenselyConnected(c.text_dim, dims=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.down(x))                                 # (B, L, t)
        words = self.dense(x[:, 1:].transpose(1, 2)).transpose(1, 2)  # (B, L-1, t)
        return self.up(torch.cat([2 * x[:, :1], words], 1))      # (B, L, C)


# Decoder (Sec. 3.4)


def conv_layer(c_in: int, c_out: int, kernel: int) -> nn.Sequential:
    """Convolution, BatchNorm, ReLU; the size of the map stays."""
    conv = nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(c_out), nn.ReLU())


class CoordConv(nn.Module):
    """Eq. 4: a 3x3 convolution over a map and F_coord, x and y in -1..1, as two more channels."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.conv = conv_layer(c_in + 2, c_out, 3)

    def forward(self, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        xs = torch.linspace(-1, 1, w, device=x.device, dtype=x.dtype).expand(b, 1, h, w)
        ys = torch.linspace(-1, 1, h, device=x.device, dtype=x.dtype).view(h, 1).expand(b, 1, h, w)
        return self.conv(torch.cat([x, xs, ys], 1))


class Neck(nn.Module):
    """Eq. 4: three maps, each multiplied by its attention to the text, become one."""

    def __init__(self, c: Config, width: int, text_width: int):
        super().__init__()
        dim = c.head_dim
        self.txt_proj = nn.Linear(text_width, dim)
        self.f_proj = nn.ModuleList(conv_layer(width, dim, 1) for _ in range(3))
        self.fusion = nn.ModuleList(MultiheadAttention(dim, c.head_heads) for _ in range(3))
        self.aggr = conv_layer(3 * dim, dim, 1)
        self.coordconv = nn.Sequential(CoordConv(dim, dim), conv_layer(dim, dim, 3))

    def forward(self, maps: list[Tensor], text: Tensor, pad: Tensor | None) -> Tensor:
        """maps: f_v^i, 3 of (B, D, H, W); text: words (B, L, C), or one vector; pad: (B, L) -> f_c (B, dim, H, W)"""
        text = self.txt_proj(text)                               # (B, L or 1, dim)
        levels = []
        for x, proj, fusion in zip(maps, self.f_proj, self.fusion):
            x = proj(x)                                          # (B, dim, H, W)
            q = x.flatten(2).transpose(1, 2)                     # (B, N, dim)
            a = fusion(q, text, text, pad)[0]
            levels.append(x * a.transpose(1, 2).view_as(x))      # (B, dim, H, W)  Eq. 4, F_MHCA
        F_f = self.aggr(torch.cat(levels, 1))                    # (B, dim, H, W)  Eq. 4, F_f
        return self.coordconv(F_f) + F_f                         # (B, dim, H, W)  Eq. 4, f_c


class DecoderLayer(nn.Module):
    """Sec. 3.4: self-attention of the map, cross-attention to the words, FFN; a norm before each, and behind both
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
        x = x + self.dropout(self.self_attn_norm(y))             # MHSA
        y = self.norm2(x)
        y = self.cross_attn(y + x_pos, f_t + t_pos, f_t, pad)[0]
        x = x + self.dropout(self.cross_attn_norm(y))            # MHCA
        return x + self.dropout(self.ffn(self.norm3(x)))         # MLP


class Decoder(nn.Module):
    """Sec. 3.4: sine positions, the layers, a final norm."""

    def __init__(self, c: Config):
        super().__init__()
        dim, self.position = c.head_dim, c.decoder_position
        self.layers = nn.ModuleList(DecoderLayer(dim, c.head_heads, c.decoder_ffn, c.decoder_dropout)
                                    for _ in range(c.decoder_layers))
        self.norm = nn.LayerNorm(dim)

    def forward(self, f_c: Tensor, f_t: Tensor, pad: Tensor | None) -> Tensor:
        """f_c: the neck's map (B, dim, H, W); f_t: words (B, L, dim); pad: (B, L) -> F_mm (B, dim, H, W)"""
        b, dim, h, w = f_c.shape
        x = f_c.flatten(2).transpose(1, 2)                       # (B, N, dim)
        x_pos, t_pos = sine_2d(h, w, dim, x), sine_1d(f_t.shape[1], dim, f_t)
        if self.position == "content":
            x = F.layer_norm(x, (dim,)) + x_pos
        for layer in self.layers:
            x = layer(x, f_t, pad, x_pos, t_pos)
        return self.norm(x).transpose(1, 2).reshape(b, dim, h, w)


class Projector(nn.Module):
    """Eq. 5: the sentence becomes a 3x3 kernel and a bias, with which the enlarged map is convolved."""

    def __init__(self, dim: int, text_width: int):
        super().__init__()
        up1, up2 = (nn.Upsample(scale_factor=2, mode="bilinear") for _ in range(2))
        self.vis = Recomputed(up1, conv_layer(dim, dim, 3), up2, conv_layer(dim, dim // 2, 3),
                              nn.Conv2d(dim // 2, dim // 2, 1))
        self.txt = nn.Linear(text_width, dim // 2 * 9 + 1)       # a 3x3 kernel and a bias

    def forward(self, F_mm: Tensor, f_s: Tensor) -> Tensor:
        """F_mm: the decoder's map (B, dim, H, W); f_s: sentence (B, C') -> logits (B, 1, 4H, 4W)"""
        F_c = self.vis(F_mm)                                     # (B, dim/2, 4H, 4W)  Eq. 5, line 1
        F_l = self.txt(f_s)                                      # (B, dim/2 * 9 + 1)  Eq. 5, line 2
        b, d, h, w = F_c.shape
        # A 3x3 convolution with a kernel for each sample: the nine products, then their shifted sum. fold mirrors the
        # kernel, hence flip. Several times faster than a grouped convolution with one group for each sample.
        kernel = F_l[:, :-1].reshape(b, d, 9).flip(2).transpose(1, 2)  # (B, 9, dim/2)
        with in_full_precision(F_c):
            out = F.fold(kernel.float() @ F_c.float().flatten(2), (h, w), 3, padding=1)
            return out + F_l[:, -1].float().view(b, 1, 1, 1)     # (B, 1, 4H, 4W)  F_c . F_l of Eq. 6


# The model (Fig. 1) and its loss (Sec. 3.5)


class DCRIS(nn.Module):
    """The whole model: frozen towers, adapters, decoder. `c` comes from config(); `weights`: see build_towers. Raises
    UserError where weights are missing or do not fit."""

    task = "mask"

    def __init__(self, c: Config, weights: str = "random"):
        super().__init__()
        self.c, self.detris = c, c.variant == "detris"
        self.vision, self.text = build_towers(c.backbone, weights)
        width, (text_width, sentence_width) = self.vision.config.hidden_size, self.text.text_projection.shape
        fit, mean_std = ("warp", CLIP) if self.detris else ("letterbox", IMAGENET)
        self.preprocess = Preprocess(c.image_size, fit, "bicubic", *mean_std)
        # Random values are drawn in the order towers, decoder, adapters: each --tune starts from the same decoder.
        self.neck = Neck(c, width, sentence_width if self.detris else text_width)
        self.decoder = Decoder(c)
        self.proj = Projector(c.head_dim, sentence_width)
        if c.tune != "full":
            freeze(self.vision)
            freeze(self.text)
        for p in self.vision.embeddings.mask_token, self.text.logit_scale:  # which the forward pass does not read
            p.requires_grad_(False)
        DA, TA = (DenseAligner, DETRISTextAdapter) if self.detris else (DenseCrossAdapter, TextAdapter)
        self.visual_adapters = nn.ModuleDict({str(i): DA(c, width, text_width) for i in c.visual_layers})
        self.text_adapters = nn.ModuleDict({str(i): TA(c, text_width) for i in c.text_layers})
        if c.checkpointing:
            recomputed(*(m for block in self.vision.encoder.layer for m in (block.attention, block.mlp)),
                       *(m for block in self.text.transformer.resblocks for m in (block.attn, block.mlp)),
                       *self.visual_adapters.values(), *self.text_adapters.values(), *self.decoder.layers)
        self.baseline = baselines.add(c, dict(self.vision.named_modules()), dict(self.text.named_modules()),
                                      self.text.token_embedding)

    def parts(self) -> dict[str, list[nn.Module]]:
        """What the parameter tables count."""
        return dict(backbone=[self.vision, self.text],
                    adapter=[self.visual_adapters, self.text_adapters, *self.baseline],
                    head=[self.neck, self.decoder, self.proj])

    def tokenize(self, sentences: Iterable[str]) -> Tensor:
        """CLIP's BPE, lower case: start, words, end, zeros; cut to `words` tokens, the end kept. -> (B, words)"""
        tokens = clip_tokens(list(sentences), self.c.words, self.text.token_embedding.num_embeddings)
        return baselines.prompted(tokens, self.c)

    def encode_text(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, L) -> words f_t (B, L, C), sentence f_s (B, C'), padding (B, L), True after the end token"""
        clip, n = self.text, tokens.shape[1]
        x = clip.token_embedding(tokens) + clip.positional_embedding[:n]  # (B, L, C)
        for i, block in enumerate(clip.transformer.resblocks):
            x = x + block.attention(block.ln_1(x), attn_mask=clip.attn_mask[:n, :n])
            y = block.mlp(block.ln_2(x))
            if str(i) in self.text_adapters:
                y = y + self.c.adapter_scale * self.text_adapters[str(i)](x)
            x = x + y                                            # (B, L, C)
        f_t = clip.ln_final(x)                                   # (B, L, C)
        end = tokens.argmax(1)                                   # the end token has the highest id
        f_s = f_t[torch.arange(len(end), device=end.device), end] @ clip.text_projection  # (B, C')
        return f_t, f_s, torch.arange(n, device=end.device) > end[:, None]

    def encode_image(self, images: Tensor, f_t: Tensor, pad: Tensor) -> list[Tensor]:
        """(B, 3, H, W), words (B, L, C), padding (B, L) -> maps f_v^1 to f_v^3, each (B, D, H/p, W/p)"""
        p, embed = self.vision.config.patch_size, self.vision.embeddings
        grid = images.shape[2] // p, images.shape[3] // p
        x = detris_embeddings(embed, images, grid) if self.detris else embed(images)  # (B, 5+N, D)
        levels = []
        for i, block in enumerate(self.vision.encoder.layer):
            a = block.attention(block.norm1(x))
            x = x + block.layer_scale1(a[0] if isinstance(a, tuple) else a)  # a tensor before transformers 5
            h = block.norm2(x)                                   # (B, 5+N, D)
            y = block.mlp(h)
            if str(i) in self.visual_adapters:                   # in parallel to the MLP (Sec. 3.3)
                y = y + self.c.adapter_scale * self.visual_adapters[str(i)](h, f_t, pad, grid)
            x = x + block.layer_scale2(y)                        # (B, 5+N, D)
            if i in self.c.map_layers:
                levels.append(x)
        levels.append(self.vision.layernorm(x))
        n = grid[0] * grid[1]
        return [x[:, -n:].transpose(1, 2).unflatten(2, grid) for x in levels]

    def forward(self, images: Tensor, tokens: Tensor) -> Tensor:
        """(B, 3, H, W) normalised images, (B, L) tokens -> logits (B, 1, 4H/p, 4W/p)"""
        f_t, f_s, pad = self.encode_text(tokens)
        maps = self.encode_image(images, f_t, pad)
        # DETRIS: the softmax over one key is 1, so 1,575,936 parameters of queries and keys have no effect
        f_c = self.neck(maps, f_s[:, None], None) if self.detris else self.neck(maps, f_t, pad)  # (B, dim, H/p, W/p)
        F_mm = self.decoder(f_c, f_t, pad)                       # (B, dim, H/p, W/p)
        return self.proj(F_mm, f_s)

    def loss(self, logits: Tensor, masks: Tensor) -> Tensor:
        """Mean over pixels at the size of the logits; masks: (B, H, W) in 0..1 on the canvas."""
        target = F.interpolate(masks[:, None], logits.shape[-2:], mode=self.c.target)  # (B, 1, 4H/p, 4W/p)
        logits = logits.float()
        loss = F.binary_cross_entropy_with_logits(logits, target)  # Eq. 6
        if self.c.dice:
            loss = loss + self.c.dice * dice_loss(logits, target)
        return loss


Model = DCRIS  # the name by which train.py and evaluate.py know it
