"""DCRIS: Enhancing Fine-grained Multi-modal Alignment via Adapters (Xu, Huang, Liu et al., WANT@ICML 2024),
and DETRIS: Densely Connected Parameter-Efficient Tuning for Referring Image Segmentation (Huang, Xu, Liu et
al., AAAI 2025, arXiv:2501.08580), its successor, as `--variant detris`.

Two frozen towers that were never trained together, DINOv2 with registers for the picture and CLIP's text
transformer for the sentence, are aligned by small modules beside their MLPs. The sentence is read first. Each
DenseCrossAdapter then gives some vision blocks what they lack: a densely connected stack of 1x1, 3x3 and 5x5
convolutions (local detail at several scales) that queries all words (the global prior). A head that goes back
to CRIS turns three levels of the vision tower into a map and convolves it with a kernel made of the sentence.

    Sec. 3.2             encoders                      DCRIS.encode_text, DCRIS.encode_image
    Sec. 3.3, Eq. 1      densely connected module      DenselyConnected
    Sec. 3.3, Eq. 2      DenseCrossAdapter             DenseCrossAdapter
    Sec. 3.3, Eq. 3      text adapter                  TextAdapter
    Sec. 3.4, Eq. 4      cross-modal neck              Neck
    Sec. 3.4             vision-language decoder       Decoder, DecoderLayer
    Sec. 3.4, Eq. 5      up-sample projector           Projector
    Sec. 3.5, Eq. 6      text-to-pixel loss            DCRIS.loss
    Tables 1 to 5        their rows                    TABLES; Config.tune, .visual_dim, .visual_layers, ...

Deviations (the paper is silent, contradicts its printed figures, or its successor's code does otherwise):
  * Eq. 1 prints bare convolutions; the printed 2.69 M needs a bias and a BatchNorm in each, as in DETRIS.
  * The widths inside Eq. 2 are not printed; 128 for the attention, whatever the adapter's width, gives Table 4.
  * Both adapters are scaled by 0.2 inside the MLP's residual (inside LayerScale for DINOv2), as in DETRIS.
  * CLS and registers pass Eq. 2 as F_v; DETRIS doubles them (double_prefix).
  * Padding is masked wherever words are keys; DETRIS masks it in the decoder only (mask_padding).
  * Eq. 4 attends to the words f_t, as printed. DETRIS attends to the sentence vector alone (neck_text): the softmax
    over one key is 1, so the query and key projections, 1,575,936 parameters, are dead there.
  * That attention multiplies the map, and the neck's input is added to its output, as in CRIS and DETRIS.
  * "1/3, 2/3, and the last layer" are blocks 5, 9 and 12 of 12, or 9, 17 and 24 of 24, as in DETRIS.
  * Pictures are normalised and positions resized as DINOv2's authors do. DETRIS uses CLIP's mean and std, and a grid
    scaled by 32.1 / 37 without antialiasing (normalize, position_grid).
  * `tiny` is this project's: small random towers, trained from scratch by AdamW with warm-up, cosine and Dice; its
    decoder adds positions to the map itself (decoder_position), without which it learns colours but not places.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from common import (Preprocess, TrainConfig, check_config, dice_loss, in_full_precision, sine_1d, sine_2d)
from toolbox import baselines, tokenizers, weights as released

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

# Sec. 3.2: DINOv2 with registers + the text tower of CLIP ViT-B/16
BACKBONES = {
    "dinov2-base": dict(
        hub="facebook/dinov2-with-registers-base", clip="ViT-B-16-quickgelu",
        dino=dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, patch_size=14, image_size=518)),
    "dinov2-large": dict(
        hub="facebook/dinov2-with-registers-large", clip="ViT-B-16-quickgelu",
        dino=dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, patch_size=14, image_size=518)),
    "tiny": dict(
        dino=dict(hidden_size=64, num_hidden_layers=4, num_attention_heads=2, patch_size=8, image_size=64,
                  initializer_range=0.25),  # with DINOv2's 0.02, made for wider towers, these never learn positions
        clip=dict(embed_dim=64, quick_gelu=True, vision_cfg=dict(layers=1, width=64, image_size=16, patch_size=16),
                  text_cfg=dict(context_length=77, vocab_size=4096, width=64, heads=2, layers=4))),
}
VARIANTS = ("dcris", "detris")
TUNES = baselines.TUNES


@dataclass(frozen=True)
class Config(TrainConfig):
    """Every setting of the paper. `config()` gives the ones of a backbone, variant and data set."""

    backbone: str = "dinov2-base"           # Sec. 4.2
    variant: str = "dcris"
    tune: str = "method"                    # Table 2; others: Fix Backbone is "frozen", Full-Tuning "full"
    # architecture
    image_size: int = 448                   # Sec. 4.2, pixels; any multiple of the patch size
    words: int = 17                         # BPE tokens with start and end; 22 for G-Ref (umd)
    visual_layers: tuple[int, ...] = (1, 3, 5, 7, 9, 11)  # Table 5, counted from 0
    text_layers: tuple[int, ...] = (1, 3, 5, 7, 9, 11)
    visual_dim: int = 128                   # Table 4, a multiple of 16
    text_dim: int = 64                      # Table 4
    cross_dim: int = 128                    # width of the attention in Eq. 2
    cross_heads: int = 8
    cross_dropout: float = 0.1
    adapter_scale: float = 0.2
    text_adapter: Literal["plain", "dense"] = "plain"  # Eq. 3; dense, as DETRIS: Eq. 1 over the words in its middle
    mask_padding: bool = True
    double_prefix: bool = False
    dense_residual: bool = False            # Eq. 2 + F_dense: not the paper's, a shorter way for its gradient
    zero_init: bool = False                 # adapters start as nothing: not the paper's
    position_grid: Literal["dinov2", "detris"] = "dinov2"
    normalize: Literal["imagenet", "clip"] = "imagenet"
    taps: tuple[int, int] = (5, 9)          # Sec. 3.4: maps after so many blocks, and the last
    neck_text: Literal["words", "sentence"] = "words"  # Eq. 4; sentence, as DETRIS
    head_dim: int = 512
    head_heads: int = 8
    decoder_layers: int = 3                 # Sec. 3.4
    decoder_ffn: int = 512
    decoder_dropout: float = 0.1
    decoder_position: Literal["attention", "content"] = "attention"  # queries and keys; content: the map itself too
    threshold: float = 0.35                 # on the sigmoid, as CRIS and DETRIS
    # training (Sec. 4.2)
    milestones: tuple[int, ...] = (35,)
    dice: float = 0.0                       # weight of a Dice loss beside Eq. 6: not the paper's


def config(backbone: str = "dinov2-base", variant: str = "dcris", dataset: str = "refcoco", **flags) -> Config:
    """The settings of a backbone, variant and data set, and over them what the user set."""
    c = dict(backbone=backbone, variant=variant)
    if dataset in ("refcocog_umd", "mixed"):
        c |= dict(words=22)
    if backbone == "dinov2-large":
        c |= dict(visual_layers=(2, 6, 10, 14, 18, 22), taps=(9, 17), batch_size=64, lr=2e-4)
    if variant == "detris":
        c |= dict(text_adapter="dense", mask_padding=False, double_prefix=True, neck_text="sentence",
                  position_grid="detris", normalize="clip")
        c |= dict(batch_size=32, lr=1e-4)
        if backbone == "dinov2-base" and dataset != "refcocog_google":
            c |= dict(epochs=65, milestones=(35, 55))
    if backbone == "tiny":
        c |= dict(image_size=64, visual_layers=(1, 3), text_layers=(1, 3), visual_dim=32, text_dim=32, cross_dim=32,
                  cross_heads=2, cross_dropout=0.0, taps=(2, 3), head_dim=64, head_heads=2, decoder_layers=2,
                  decoder_ffn=128, decoder_dropout=0.0, decoder_position="content", steps=2400, batch_size=16,
                  optimizer="adamw", lr=2e-3, tower_lr=0.5, weight_decay=0.01, schedule="cosine", milestones=(),
                  warmup=50, clip_norm=1.0, dice=1.0, val_every=300)
    tune = flags.get("tune", "method")
    c |= dict(baseline_dims=baselines.dims(tune, backbone == "tiny", lora=(32, 16), compacter=(42, 42)))  # Table 2
    if not tune.startswith("method"):
        c |= dict(visual_layers=(), text_layers=())
    c = Config(**(c | flags))
    dino = BACKBONES[backbone]["dino"]
    depth, text_depth, text_width = dino["num_hidden_layers"], *((4, 64) if backbone == "tiny" else (12, 512))
    check_config(
        c, baseline_dims=baselines.rule(c), visual_layers=(set(c.visual_layers) <= set(range(depth)), f"blocks from 0 to {depth - 1}"),
        text_layers=(set(c.text_layers) <= set(range(text_depth)), f"blocks from 0 to {text_depth - 1}"),
        image_size=(c.image_size % dino["patch_size"] == 0, f"a multiple of the patch size, {dino['patch_size']}"),
        words=(3 <= c.words <= 77 - baselines.prompts(c), f"3 to {77 - baselines.prompts(c)} tokens, what CLIP's text tower reads"),
        visual_dim=(c.visual_dim % 16 == 0, "a multiple of 16 (Eq. 1)"),
        text_dim=(c.text_adapter == "plain" or c.text_dim % 16 == 0, "a multiple of 16 (Eq. 1)"),
        cross_heads=(lambda: c.cross_dim % c.cross_heads == 0, f"a divisor of cross_dim, {c.cross_dim}"),
        head_dim=(c.head_dim == text_width, f"{text_width}, the width of the words, which are the decoder's keys"),
        head_heads=(lambda: c.head_dim % c.head_heads == 0, f"a divisor of head_dim, {c.head_dim}"),
        taps=(len(c.taps) == 2 and 1 <= c.taps[0] < c.taps[1] < depth, f"two rising numbers, 1 to {depth - 1}"),
        tune=(c.tune.startswith("method") or not c.visual_layers + c.text_layers,
              "method, where layers are given adapters"))
    return c


# Adapters (Sec. 3.3)


def conv_block(dims: int, c_in: int, c_out: int, kernel: int) -> nn.Sequential:
    """Convolution with bias, BatchNorm and ReLU, over a map (dims=2) or over words (dims=1)."""
    conv, norm = (nn.Conv2d, nn.BatchNorm2d) if dims == 2 else (nn.Conv1d, nn.BatchNorm1d)
    return nn.Sequential(conv(c_in, c_out, kernel, padding=kernel // 2), norm(c_out, eps=1e-3), nn.ReLU())


class DenselyConnected(nn.Module):
    """Eq. 1 after its first line: each convolution reads the outputs of all before it. (B, d, ...) -> (B, d, ...)"""

    def __init__(self, d: int, dims: int):
        super().__init__()
        self.branch1 = conv_block(dims, d, d // 2, 1)
        self.branch2 = nn.Sequential(conv_block(dims, d + d // 2, d // 16, 1), conv_block(dims, d // 16, d // 4, 3))
        self.branch3 = nn.Sequential(conv_block(dims, d + d // 2 + d // 4, d // 16, 1),
                                     conv_block(dims, d // 16, d // 4, 5))

    def forward(self, f_v: Tensor) -> Tensor:
        f_v1 = self.branch1(f_v)                                 # (B, d/2, H, W)  Eq. 1, line 2
        f_v2 = self.branch2(torch.cat([f_v, f_v1], 1))           # (B, d/4, H, W)  Eq. 1, line 3
        f_v3 = self.branch3(torch.cat([f_v, f_v1, f_v2], 1))     # (B, d/4, H, W)  Eq. 1, line 4
        return torch.cat([f_v1, f_v2, f_v3], 1) + f_v            # (B, d, H, W)    Eq. 1, line 5


class DenseCrossAdapter(nn.Module):
    """Eq. 1 and 2: what stands beside the MLP of a vision block (DETRIS calls it Dense Aligner)."""

    def __init__(self, c: Config, width: int, text_width: int):
        super().__init__()
        d, e = c.visual_dim, c.cross_dim
        self.down = nn.Linear(width, d)
        self.dense = DenselyConnected(d, dims=2)
        self.image_proj = nn.Linear(d, e)
        self.text_proj = nn.Linear(text_width, e)
        self.attention = nn.MultiheadAttention(e, c.cross_heads, dropout=c.cross_dropout, batch_first=True)
        self.back_proj = nn.Linear(e, d)
        self.up = nn.Linear(d, width)
        self.double_prefix, self.dense_residual = c.double_prefix, c.dense_residual
        for m in self.modules():  # as DETRIS: DINOv2's initialisation for linear layers, He's for convolutions
            if isinstance(m, nn.Linear):
                nn.init.trunc_normal_(m.weight, std=0.02)
                nn.init.zeros_(m.bias)
            elif isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight)
                nn.init.zeros_(m.bias)
        if c.zero_init:
            nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor, f_t: Tensor, pad: Tensor | None, grid: tuple[int, int]) -> Tensor:
        """x: all tokens of a block before its MLP (B, 5+N, D); f_t: words (B, L, C); pad: (B, L), True = padding."""
        x = F.relu(self.down(x))                                 # (B, 5+N, d)  Eq. 1, line 1
        n = grid[0] * grid[1]
        prefix, f_v = x[:, :-n], x[:, -n:]                       # CLS and registers have no place on the grid
        f_dense = self.dense(f_v.transpose(1, 2).unflatten(2, grid)).flatten(2).transpose(1, 2)  # (B, N, d)
        words = self.text_proj(f_t)                              # (B, L, e)
        f_cross = self.attention(self.image_proj(f_dense), words, words, key_padding_mask=pad, need_weights=False)[0]
        f_cross = self.back_proj(f_cross) + f_v                  # (B, N, d)  Eq. 2, line 1
        if self.dense_residual:
            f_cross = f_cross + f_dense
        if self.double_prefix:
            prefix = 2 * prefix
        return self.up(torch.cat([prefix, f_cross], 1))          # (B, 5+N, D)  Eq. 2, line 2


class TextAdapter(nn.Module):
    """Eq. 3; DETRIS puts Eq. 1 between its two lines, along the words, the start token left out and doubled."""

    def __init__(self, c: Config, width: int):
        super().__init__()
        self.down = nn.Linear(width, c.text_dim)
        self.dense = DenselyConnected(c.text_dim, dims=1) if c.text_adapter == "dense" else None
        self.up = nn.Linear(c.text_dim, width)
        if c.zero_init:
            nn.init.zeros_(self.up.weight)
            nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.down(x))                                 # (B, L, t)  Eq. 3, lines 1 and 2
        if self.dense is not None:
            words = self.dense(x[:, 1:].transpose(1, 2)).transpose(1, 2)
            x = torch.cat([2 * x[:, :1], words], 1)
        return self.up(x)                                        # (B, L, C)  Eq. 3, line 3


# The head (Sec. 3.4)


def conv_layer(c_in: int, c_out: int, kernel: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2, bias=False), nn.BatchNorm2d(c_out),
                         nn.ReLU())


class CoordConv(nn.Module):
    """A 3x3 convolution that also sees where it is: x and y in -1..1 as two more channels (Eq. 4)."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.conv = conv_layer(c_in + 2, c_out, 3)

    def forward(self, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        xs = torch.linspace(-1, 1, w, device=x.device, dtype=x.dtype).expand(b, 1, h, w)
        ys = torch.linspace(-1, 1, h, device=x.device, dtype=x.dtype).view(h, 1).expand(b, 1, h, w)
        return self.conv(torch.cat([x, xs, ys], 1))


class Neck(nn.Module):
    """Eq. 4: three levels of the vision tower, each weighted by the text, become one map. -> (B, dim, H, W)"""

    def __init__(self, width: int, text_width: int, dim: int, heads: int):
        super().__init__()
        self.txt_proj = nn.Linear(text_width, dim)
        self.f_proj = nn.ModuleList(conv_layer(width, dim, 1) for _ in range(3))
        self.fusion = nn.ModuleList(nn.MultiheadAttention(dim, heads, batch_first=True) for _ in range(3))
        self.aggr = conv_layer(3 * dim, dim, 1)
        self.coordconv = nn.Sequential(CoordConv(dim, dim), conv_layer(dim, dim, 3))

    def forward(self, maps: list[Tensor], text: Tensor, pad: Tensor | None) -> Tensor:
        text = self.txt_proj(text)                               # (B, L or 1, dim)
        levels = []
        for f_v, proj, fusion in zip(maps, self.f_proj, self.fusion):
            v = proj(f_v)                                        # (B, dim, H, W)
            q = v.flatten(2).transpose(1, 2)                     # (B, N, dim)
            a = fusion(q, text, text, key_padding_mask=pad, need_weights=False)[0]
            levels.append(v * a.transpose(1, 2).view_as(v))
        f_f = self.aggr(torch.cat(levels, 1))                    # (B, dim, H, W)
        return self.coordconv(f_f) + f_f                         # Eq. 4


class DecoderLayer(nn.Module):
    """MHSA over the map, MHCA to the words, feed-forward; norms before each and after the attentions, as CRIS."""

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

    def forward(self, x: Tensor, f_t: Tensor, pad: Tensor, x_pos: Tensor, t_pos: Tensor) -> Tensor:
        """x: (B, N, dim); f_t: (B, L, dim); pad: (B, L), True = padding."""
        y = self.norm1(x)
        y = self.self_attn(y + x_pos, y + x_pos, y, need_weights=False)[0]
        x = x + self.dropout(self.self_attn_norm(y))
        y = self.norm2(x)
        y = self.cross_attn(y + x_pos, f_t + t_pos, f_t, key_padding_mask=pad, need_weights=False)[0]
        x = x + self.dropout(self.cross_attn_norm(y))
        return x + self.dropout(self.ffn(self.norm3(x)))


class Decoder(nn.Module):
    """f_c, f_t -> F_mm (Sec. 3.4)."""

    def __init__(self, c: Config):
        super().__init__()
        dim, self.position = c.head_dim, c.decoder_position
        self.layers = nn.ModuleList(DecoderLayer(dim, c.head_heads, c.decoder_ffn, c.decoder_dropout)
                                    for _ in range(c.decoder_layers))
        self.norm = nn.LayerNorm(dim)

    def forward(self, f_c: Tensor, f_t: Tensor, pad: Tensor) -> Tensor:
        b, dim, h, w = f_c.shape
        x = f_c.flatten(2).transpose(1, 2)                       # (B, N, dim)
        x_pos, t_pos = sine_2d(h, w, dim, x), sine_1d(f_t.shape[1], dim, f_t)
        if self.position == "content":
            x = F.layer_norm(x, (dim,)) + x_pos
        for layer in self.layers:
            x = layer(x, f_t, pad, x_pos, t_pos)
        return self.norm(x).transpose(1, 2).reshape(b, dim, h, w)


class Projector(nn.Module):
    """Eq. 5, and the product F_c . F_l of Eq. 6: the sentence becomes a 3x3 kernel and a bias for the map."""

    def __init__(self, dim: int, text_width: int):
        super().__init__()
        up = nn.Upsample(scale_factor=2, mode="bilinear")
        self.vis = nn.Sequential(up, conv_layer(dim, dim, 3), up, conv_layer(dim, dim // 2, 3),
                                 nn.Conv2d(dim // 2, dim // 2, 1))
        self.txt = nn.Linear(text_width, dim // 2 * 9 + 1)  # 3x3 weights and a bias

    def forward(self, f_mm: Tensor, f_s: Tensor) -> Tensor:
        f_c = self.vis(f_mm)                                     # (B, dim/2, 4H, 4W)  Eq. 5
        f_l = self.txt(f_s)                                      # (B, dim/2 * 9 + 1)  Eq. 5
        b, d, h, w = f_c.shape
        # each sample has its own 3x3 kernel. The nine products first, then their shifted sum (fold mirrors, hence
        # flip): the same convolution, several times faster than one group per sample
        kernel = f_l[:, :-1].reshape(b, d, 9).flip(2).transpose(1, 2)  # (B, 9, dim/2)
        with in_full_precision(f_c):
            out = F.fold(kernel.float() @ f_c.float().flatten(2), (h, w), 3, padding=1)  # (B, 1, 4H, 4W)
            return out + f_l[:, -1].float().view(b, 1, 1, 1)


# The model


class DCRIS(nn.Module):
    """The whole model: frozen towers, adapters, head. `c` comes from config(); `weights` is "pretrained", "random",
    or comma-separated files of the towers. Raises UserError where weights are missing or do not fit."""

    task = "mask"

    def __init__(self, c: Config, weights: str = "random"):
        super().__init__()
        self.c = c
        self.vision, self.text = build_towers(c.backbone, weights)
        width, text_width = self.vision.config.hidden_size, self.text.positional_embedding.shape[1]
        sentence_width = self.text.text_projection.shape[1]
        self.visual_adapters = nn.ModuleDict({str(i): DenseCrossAdapter(c, width, text_width) for i in c.visual_layers})
        self.text_adapters = nn.ModuleDict({str(i): TextAdapter(c, text_width) for i in c.text_layers})
        self.neck = Neck(width, text_width if c.neck_text == "words" else sentence_width, c.head_dim, c.head_heads)
        self.decoder = Decoder(c)
        self.proj = Projector(c.head_dim, sentence_width)
        mean_std = IMAGENET if c.normalize == "imagenet" else CLIP
        self.preprocess = Preprocess(c.image_size, "letterbox", "bicubic", *mean_std)
        for tower in self.vision, self.text:
            tower.requires_grad_(c.tune == "full")
        # nothing reads these two here, so nothing can train them
        self.vision.embeddings.mask_token.requires_grad_(False)
        self.text.logit_scale.requires_grad_(False)
        self.baseline = baselines.add(c, dict(self.vision.named_modules()), dict(self.text.named_modules()), self.text.token_embedding)

    def parts(self) -> dict[str, list[nn.Module]]:
        """What the parameter tables count."""
        return dict(backbone=[self.vision, self.text],
                    adapter=[self.visual_adapters, self.text_adapters, *self.baseline],
                    head=[self.neck, self.decoder, self.proj])

    def train(self, mode: bool = True) -> DCRIS:
        super().train(mode)
        if self.c.tune != "full":  # frozen is frozen: nothing in the towers may depend on the mode
            self.vision.eval()
            self.text.eval()
        return self

    def tokenize(self, sentences: Iterable[str]) -> Tensor:
        """CLIP's BPE, lower case; start, words, end, zeros; cut to `words` with the end kept. -> (B, words)"""
        return baselines.prompted(tokenizers.clip_tokens(list(sentences), self.c.words, self.text.token_embedding.num_embeddings), self.c)

    def encode_text(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, L) -> words f_t (B, L, C), sentence f_s (B, C'), padding (B, L), True after the end token."""
        clip, n = self.text, tokens.shape[1]
        x = clip.token_embedding(tokens) + clip.positional_embedding[:n]  # (B, L, C)
        for i, block in enumerate(clip.transformer.resblocks):
            x = x + block.attention(block.ln_1(x), attn_mask=clip.attn_mask[:n, :n])
            y = block.mlp(block.ln_2(x))
            if str(i) in self.text_adapters:
                y = y + self.c.adapter_scale * self.text_adapters[str(i)](x)
            x = x + y
        f_t = clip.ln_final(x)                                   # (B, L, C)
        end = tokens.argmax(1)                                   # the end token has the highest id
        f_s = f_t[torch.arange(len(end), device=end.device), end] @ clip.text_projection  # (B, C')
        return f_t, f_s, torch.arange(n, device=end.device) > end[:, None]

    def encode_image(self, images: Tensor, f_t: Tensor, pad: Tensor,
                     maps: dict[str, Tensor] | None = None) -> list[Tensor]:
        """(B, 3, H, W) and the words -> three maps (B, D, H/p, W/p)"""
        p = self.vision.config.patch_size
        grid = images.shape[2] // p, images.shape[3] // p
        n, pad = grid[0] * grid[1], pad if self.c.mask_padding else None
        x, taps = self.embed(images, grid), []                   # (B, 5+N, D)
        for i, block in enumerate(self.vision.encoder.layer):
            a = block.attention(block.norm1(x))
            x = x + block.layer_scale1(a[0] if isinstance(a, tuple) else a)  # a tensor before transformers 5
            h = block.norm2(x)
            y = block.mlp(h)
            if str(i) in self.visual_adapters:  # in parallel to the MLP (Sec. 3.3)
                added = self.c.adapter_scale * self.visual_adapters[str(i)](h, f_t, pad, grid)
                y = y + added
                if maps is not None:
                    maps[f"adapter of block {i + 1}"] = block.layer_scale2(added)[:, -n:].norm(dim=2).unflatten(1, grid)
            x = x + block.layer_scale2(y)
            if i + 1 in self.c.taps:
                taps.append(x)
        taps.append(self.vision.layernorm(x))
        return [t[:, -n:].transpose(1, 2).unflatten(2, grid) for t in taps]

    def embed(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        """Patches with positions, behind CLS and the registers. -> (B, 5+N, D)"""
        e = self.vision.embeddings
        if self.c.position_grid == "dinov2":
            return e(images)
        patches, b = e.patch_embeddings(images), len(images)     # (B, N, D)
        pos = e.position_embeddings
        side = int((pos.shape[1] - 1) ** 0.5)
        pos2d = pos[:, 1:].transpose(1, 2).unflatten(2, (side, side))
        pos2d = F.interpolate(pos2d, scale_factor=tuple((g + 0.1) / side for g in grid), mode="bicubic")
        patches = patches + pos2d.flatten(2).transpose(1, 2)
        cls = (e.cls_token + pos[:, :1]).expand(b, -1, -1)
        return torch.cat([cls, e.register_tokens.expand(b, -1, -1), patches], 1)

    def forward(self, images: Tensor, tokens: Tensor, maps: dict[str, Tensor] | None = None) -> Tensor:
        """(B, 3, H, W) normalised pictures, (B, L) tokens -> logits (B, 1, 4H/p, 4W/p)

        `maps` gets the length, at each place, of what the adapters add to the picture's tokens, and of its features.
        """
        f_t, f_s, pad = self.encode_text(tokens)
        levels = self.encode_image(images, f_t, pad, maps)
        if maps is not None:
            maps |= {f"features, level {n}": level.norm(dim=1) for n, level in enumerate(levels, 1)}
        if self.c.neck_text == "words":
            f_c = self.neck(levels, f_t, pad if self.c.mask_padding else None)
        else:
            f_c = self.neck(levels, f_s[:, None], None)
        return self.proj(self.decoder(f_c, f_t, pad), f_s)

    def loss(self, logits: Tensor, masks: Tensor) -> Tensor:
        """Eq. 6, a mean over pixels at the logits' size; masks: (B, H, W) in 0..1 on the canvas."""
        target = F.interpolate(masks[:, None], logits.shape[-2:])  # nearest
        logits = logits.float()
        loss = F.binary_cross_entropy_with_logits(logits, target)  # Eq. 6
        if self.c.dice:
            loss = loss + self.c.dice * dice_loss(logits, target)
        return loss


Model = DCRIS  # the name by which train.py and evaluate.py know it


# Towers


def build_towers(backbone: str, weights: str) -> tuple[Dinov2WithRegistersModel, open_clip.CLIP]:
    """DINOv2 and CLIP's text half, random or from the files that Meta, OpenAI or the Hugging Face hub publish.

    `weights`: "random", "pretrained" (the hub's cache, or downloaded) or two files with a comma between.
    """
    names = BACKBONES[backbone]
    released.check_released(backbone, weights)
    vision = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**names["dino"]))
    clip = names["clip"]
    text = open_clip.CLIP(**(open_clip.get_model_config(clip) if isinstance(clip, str) else clip))
    del text.visual  # Sec. 3.2: only its text transformer
    if weights != "random":
        released.load_dinov2_and_clip(vision, text, weights, names.get("hub", ""), backbone)
    return vision, text


