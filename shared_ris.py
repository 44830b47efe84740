"""Shared-RIS: A Simple Baseline with Single-encoder for Referring Image Segmentation (Yu, Jung, Han et al., 2024,
https://arxiv.org/abs/2408.15521).

One encoder, BEiT-3, reads the image and the sentence together: every layer attends over patches and words at once. The
same shared self-attention continues after the encoder. The Shared FPN applies it to four levels of the encoder, and the
Shared Mask Decoder applies one transformer layer to their combination. The mask is the dot product of each pixel's
vector with the vector of the sentence's first token. All parameters are trained.

    Fig. 3                   overall framework          SharedRIS
    Sec. III-A, Eq. 1-3      embeddings                 BEiT3.embed
    Sec. III-A, Eq. 4-5      shared transformer         Layer; its parts: Attention, FFN
    Sec. III-B, Eq. 6-7      shared FPN                 SharedAttention (Eq. 6), SharedFPN (Eq. 7)
    Sec. III-C, Eq. 8-9      shared transformer         SharedAttention (Eq. 8), SharedLayer (Eq. 9)
    Sec. III-C, Eq. 10-11    mask prediction            SharedMaskDecoder, up to the sigmoid
    Sec. III-C, Eq. 11       sigmoid, threshold tau     SharedRIS.loss (sigmoid); evaluate.py, predicted_mask (both)
    Sec. III-D, Eq. 12       loss                       SharedRIS.loss
    Fig. 5                   bi-directional fusion      BiDirection
    Fig. 7, 10, 11           attention maps             evaluate.py --attention (toolbox/attention.py)
    Tables III, V, VII, VIII ablations                  Config.stages, .shared_layers, .fpn_fusion, .decoder_fusion

Deviations. No code of the authors is public. The last column names the public code that is followed instead.

    where      | the paper                          | here                                              | public code
    -----------+------------------------------------+---------------------------------------------------+-------------
    Eq. 4, 5   | one MSA and one LN for both        | one per modality; only the softmax is shared      | BEiT-3
    Eq. 4, 5   | -                                  | a LayerNorm before each last projection (sub-LN)  | BEiT-3
    Eq. 5      | -                                  | with AMP, GELU runs in 16 bits (BEiT-3: fp32)     | -
    Eq. 6      | h_j                                | output of layer j, without BEiT-3's last LayerNorm| -
    Eq. 6      | -                                  | that norm and the mask token: unused, not trained | -
    Eq. 6      | stages 3, 6, 9, 12; once 3, 6, 8,12| 3, 6, 9, 12; beit3-large: 6, 12, 18, 24           | -
    Eq. 6, 7   | 8 M parameters (Table VII)         | 6.83 M, which is what the equations have          | -
    Eq. 6, 8   | number of heads                    | 8; no positions, no dropout, padding is masked    | -
    Eq. 9      | width of the MLP                   | 4 times its input, GELU                           | ViT
    Eq. 10     | 3x3 convolutions; 46 GFLOPs        | 512 channels and a last 1x1, which give 46        | CRIS
    Eq. 11     | depth of the MLP                   | 2 layers, ReLU; none without shared layer (5 M)   | -
    Eq. 11     | tau, then resize to the input size | resize logits to the original image, then tau     | (CRIS)
    Eq. 12     | size of the loss's target          | the logits' size; a mean over each cell (1)       | CRIS: nearest
    Eq. 12     | Dice, cited from V-Net             | V-Net's, squares below (2); + 1 above and below   | CGFormer: sums
    Eq. 12     | reduction                          | BCE: mean over pixels; Dice: mean over samples    | -
    Table VII  | "No FPN"                           | one linear layer from h_L to 512 channels         | -
    Fig. 5     | deformable attention (image)       | full self-attention                               | -
    Table VII b| "cross-attention"                  | queries: image; keys: words, which do not change  | -
    Sec. IV-A  | "BEiT-3 base"                      | the plain weights, not the "indomain" ones        | -
    Sec. IV-A  | init of FPN and decoder            | PyTorch's default                                 | -
    Sec. IV-A  | 480 x 480                          | stretched, bilinear; no augmentation              | CGFormer
    Sec. IV-A  | normalisation, sentence length     | -1..1; up to 64 tokens                            | BEiT-3
    Sec. IV-A  | lr 1e-4; warm-up not mentioned     | no warm-up; the lr is 3 times BEiT-3's fine-tuning| -
    Sec. IV-A  | weight decay 5e-4                  | on all parameters, norms and biases included      | -
    Sec. IV-A  | gradient clipping 1.0 (GradNorm)   | of the gradient's norm                            | -
    Sec. IV-A  | 14 batch sizes and 8 V100          | 14 per GPU: 112                                   | -
    Sec. IV-A  | sentences in an epoch              | one of each object, drawn at random               | CGFormer
    Sec. IV-B  | oIoU; choice of the checkpoint     | the best mIoU on val                              | -
    -          | -                                  | --tune frozen: FPN and decoder alone              | -
    -          | -                                  | tiny: a small random encoder, hashed words        | -

    (1) --target nearest: logit i learns pixel 4i of the canvas, but the resize back reads it at 4i + 1.5. Predictions
        equal to their target reach 95.5 mIoU, with the mean 98.7. CGFormer takes its loss at the canvas's size.
    (2) V-Net's Dice is greatest where prediction and target are equal, also for the values between 0 and 1 that a mean
        has. With sums (--no-dice-squared), a prediction of 0 or 1 makes it greater than an equal one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import (MultiheadAttention, Preprocess, Recomputed, TrainConfig, check_config, freeze, in_full_precision,
                    recompute, recomputed)
from toolbox import baselines
from toolbox.tokenizers import PAD, SentencePieces
from toolbox.weights import check_released, load_beit3

BACKBONES = {  # Sec. IV-A; std: linear layers start from a normal distribution truncated at one std, as in BEiT-3
    "beit3-base": dict(layers=12, dim=768, heads=12, ffn=3072, patch=16, rows=64010, words=1022, std=0.02),
    "beit3-large": dict(layers=24, dim=1024, heads=16, ffn=4096, patch=16, rows=64010, words=1022, std=0.02),
    "tiny": dict(layers=4, dim=64, heads=2, ffn=128, patch=8, rows=4096, words=64, std=0.25),
}
VARIANTS = ("shared_ris",)
TUNES = ("method", "frozen", "full", *baselines.BASELINES)  # the method is full tuning
FUSION = Literal["self", "cross", "bi"]


@dataclass(frozen=True)
class Config(TrainConfig):
    """Every setting of the paper; of Sec. IV-A where no other place is named."""

    backbone: str = "beit3-base"            # the encoder
    variant: str = "shared_ris"             # there is one
    tune: str = "method"                    # method, full: everything is trained; frozen: FPN and decoder alone
    # architecture
    image_size: int = 480                   # side of the input in pixels, a multiple of the patch size
    words: int = 64                         # longest sentence in tokens, start and end included
    stages: tuple[int, ...] = (3, 6, 9, 12)  # encoder layers that the FPN reads, from 1; "": no FPN (Table VII a)
    fpn_fusion: FUSION = "self"             # attention in the FPN: self, cross or bi-directional (Table VII b)
    shared_layers: int = 1                  # transformer layers in the decoder (Table VIII a); 0: none (Tables III, V)
    decoder_fusion: FUSION = "self"         # attention in the decoder: self, cross or bi-directional (Table VIII b)
    head_dim: int = 512                     # d_w, width of FPN and decoder
    head_heads: int = 8                     # attention heads in FPN and decoder
    upsamplings: int = 2                    # l of Eq. 10: how often the decoder doubles the map's size
    threshold: float = 0.35                 # tau: a pixel above it, after the sigmoid, belongs to the object
    # loss and regularisation
    target: Literal["area", "nearest"] = "area"  # the mask at the logits' size: mean over each cell, or one pixel of it
    bce: float = 2.0                        # lambda_bce of Eq. 12
    dice: float = 0.5                       # lambda_dice of Eq. 12
    dice_squared: bool = True               # the denominator of Dice sums squares, as in V-Net
    drop_path: float = 0.1                  # stochastic depth of the last encoder layer; it grows linearly from 0
    # training
    epochs: int = 35                        # Sec. IV-A
    batch_size: int = 112                   # Sec. IV-A: 14 on each of 8 GPUs
    optimizer: Literal["adam", "adamw"] = "adamw"  # Sec. IV-A
    beta2: float = 0.98                     # Sec. IV-A
    weight_decay: float = 5e-4              # Sec. IV-A
    schedule: Literal["step", "cosine"] = "cosine"  # Sec. IV-A
    clip_norm: float = 1.0                  # Sec. IV-A


LARGE = dict(stages=(6, 12, 18, 24))
TINY = dict(image_size=64, stages=(1, 2, 3, 4), head_dim=32, head_heads=2, drop_path=0.0, steps=1800, batch_size=16,
            lr=2e-3, tower_lr=0.5, weight_decay=0.01, warmup=50, val_every=300)
TINY_COOP = dict(words=56)  # the encoder reads 64 tokens, 8 of them prompts
PRESETS = {"beit3-base": {}, "beit3-large": LARGE, "tiny": TINY}


def config(backbone: str = "beit3-base", variant: str = "shared_ris", dataset: str = "refcoco", **flags) -> Config:
    """The settings of a backbone, overridden by `flags`. Raises UserError for impossible ones."""
    tune = flags.get("tune", "method")
    preset = PRESETS[backbone] | (TINY_COOP if (backbone, tune) == ("tiny", "coop") else {})
    c = Config(**(dict(backbone=backbone, variant=variant, baseline_dims=baselines.dims(tune, backbone == "tiny"))
                  | preset | flags))
    b, bi = BACKBONES[backbone], "bi" in (c.fpn_fusion, c.decoder_fusion)
    longest = b["words"] - baselines.prompts(c)
    check_config(
        c, baseline_dims=baselines.rule(c),
        image_size=(c.image_size % b["patch"] == 0, f"a multiple of the patch size, {b['patch']}"),
        words=(3 <= c.words <= longest, f"3 to {longest} tokens"),
        stages=(not c.stages or list(c.stages) == sorted(c.stages) and c.stages[0] > 0 and c.stages[-1] == b["layers"],
                f"rising numbers from 1 on, the last of them {b['layers']}, or none"),
        head_heads=(lambda: c.head_dim % c.head_heads == 0 and not (bi and c.head_heads % 2),
                    f"a divisor of head_dim, {c.head_dim}" + (", and even for bi" if bi else "")),
        fpn_fusion=(c.stages or c.fpn_fusion == "self", "self, where there is no FPN"),
        decoder_fusion=(c.shared_layers or c.decoder_fusion == "self", "self, where there is no shared layer"))
    return c


# Sec. III-A: the encoder, BEiT-3, with the names of its released files: A is vision, B is text
#
# Shapes: B samples, S x S pixels, n = (S / p)^2 patches of p x p pixels, n_v = n + 1 visual tokens (class token first),
# n_t text tokens (start and end included; the paper's m + 2), d channels in the encoder, d_w after it.

Pair = tuple[Tensor, Tensor]  # visual tokens (B, n_v, d), text tokens (B, n_t, d): the two halves of the paper's h


class Multiway(nn.Module):
    """One module for each modality."""

    def __init__(self, make: Callable[[], nn.Module]):
        super().__init__()
        self.A, self.B = make(), make()

    def forward(self, v: Tensor, t: Tensor) -> Pair:
        return self.A(v), self.B(t)


class Attention(nn.Module):
    """MSA of Eq. 4: the softmax is over the keys of both modalities."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (Multiway(lambda: nn.Linear(dim, dim)) for _ in range(4))
        self.inner_attn_ln = Multiway(lambda: nn.LayerNorm(dim))

    def forward(self, v: Tensor, t: Tensor, keys: Tensor) -> Pair:
        """keys: (B, 1, 1, n_v + n_t), False = padding. It is not expanded, which would take more memory than the
        attention itself."""
        query, key, value = (
            torch.cat(proj(v, t), 1).unflatten(2, (self.heads, -1)).transpose(1, 2)  # (B, heads, n_v + n_t, d / heads)
            for proj in (self.q_proj, self.k_proj, self.v_proj))
        x = F.scaled_dot_product_attention(query, key, value, keys).transpose(1, 2).flatten(2)  # (B, n_v + n_t, d)
        n_v = v.shape[1]
        return self.out_proj(*self.inner_attn_ln(x[:, :n_v], x[:, n_v:]))


class FFN(nn.Module):
    """MLP_v or MLP_t of Eq. 5."""

    def __init__(self, dim: int, ffn: int):
        super().__init__()
        self.fc1, self.ffn_layernorm, self.fc2 = nn.Linear(dim, ffn), nn.LayerNorm(ffn), nn.Linear(ffn, dim)

    def forward(self, x: Tensor) -> Tensor:
        return recompute([F.gelu, self.ffn_layernorm, self.fc2], self.fc1(x))


class Layer(nn.Module):
    """The shared transformer, Eq. 4 and 5. `final_layer_norm` is BEiT-3's name for the norm before the MLP."""

    def __init__(self, dim: int, heads: int, ffn: int, drop: float):
        super().__init__()
        self.drop = drop
        self.self_attn_layer_norm = Multiway(lambda: nn.LayerNorm(dim))
        self.self_attn = Attention(dim, heads)
        self.final_layer_norm = Multiway(lambda: nn.LayerNorm(dim))
        self.ffn = Multiway(lambda: FFN(dim, ffn))

    def forward(self, v: Tensor, t: Tensor, keys: Tensor) -> Pair:
        v, t = self.add((v, t), self.self_attn(*self.self_attn_layer_norm(v, t), keys))  # Eq. 4
        return self.add((v, t), self.ffn(*self.final_layer_norm(v, t)))                  # Eq. 5

    def add(self, x: Pair, y: Pair) -> Pair:
        """x + y. Stochastic depth: in training, y is dropped for some samples, in both modalities together."""
        if self.training and self.drop:
            keep = (torch.rand(len(x[0]), 1, 1, device=x[0].device) >= self.drop) / (1 - self.drop)
            y = [keep * part for part in y]
        return x[0] + y[0], x[1] + y[1]


class BEiT3(nn.Module):
    """BEiT-3's encoder. `layer_norm(*beit3(images, tokens)[-1])` is the output of the original."""

    def __init__(self, layers: int, dim: int, heads: int, ffn: int, patch: int, rows: int, words: int, std: float,
                 image_size: int, drop_path: float = 0.0):
        super().__init__()
        self.grid = image_size // patch
        self.text_embed = nn.Embedding(rows, dim)
        self.proj = nn.Conv2d(3, dim, patch, patch)
        self.cls_token, self.mask_token = (nn.Parameter(torch.zeros(1, 1, dim)) for _ in range(2))
        self.embed_positions = Multiway(lambda: nn.Embedding(words + 2, dim))
        self.embed_positions.A = nn.Embedding(self.grid ** 2 + 3, dim)  # two unused rows, class token, patches
        drops = torch.linspace(0, drop_path, layers, device="cpu").tolist()
        self.layers = nn.ModuleList(Layer(dim, heads, ffn, drop) for drop in drops)
        self.layer_norm = Multiway(lambda: nn.LayerNorm(dim))
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.trunc_normal_(m.weight, std=std, a=-std, b=std)
                nn.init.zeros_(m.bias)

    def embed(self, images: Tensor, tokens: Tensor) -> Pair:
        """(B, 3, S, S), (B, n_t) -> (B, n_v, d), (B, n_t, d)"""
        v_pos, t_pos = (positions.weight[2:] for positions in (self.embed_positions.A, self.embed_positions.B))
        x = self.proj(images).flatten(2).transpose(1, 2)                       # (B, n, d)
        v = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + v_pos   # Eq. 1, (B, n_v, d)
        t = self.text_embed(tokens) + t_pos[:tokens.shape[1]]                  # Eq. 2, (B, n_t, d)
        return v, t * (tokens != PAD)[..., None]                               # Eq. 3: h_0, as a pair; padding is 0

    def forward(self, images: Tensor, tokens: Tensor) -> list[Pair]:
        """Normalised images (B, 3, S, S), tokens (B, n_t), PAD behind the end -> h_1 ... h_L"""
        return self.encode(*self.embed(images, tokens), tokens)

    def encode(self, v: Tensor, t: Tensor, tokens: Tensor) -> list[Pair]:
        """h_0 as a pair; the tokens tell the padding -> h_1 ... h_L"""
        keys = torch.cat([tokens.new_ones(v.shape[:2]), tokens != PAD], 1).bool()[:, None, None]  # (B, 1, 1, n_v + n_t)
        h = []
        for layer in self.layers:
            v, t = layer(v, t, keys)
            h.append((v, t))
        return h


# Sec. III-B and III-C: attention over both modalities, as FPN and decoder have it. Each module takes x (B, n_v + n_t,
# d_w), the visual tokens first, their number n_v, and pad (B, n_v + n_t), True = padding. It returns a tensor like x.


class SharedAttention(nn.Module):
    """Shared self-attention of Eq. 6 and 8: queries and keys are the tokens of both modalities."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.attention = MultiheadAttention(dim, heads)

    def forward(self, x: Tensor, n_v: int, pad: Tensor) -> Tensor:
        y = self.norm(x)                                         # LN
        y = self.attention(y, y, y, pad)[0]                      # MSA
        return y + x                                             # residual; Eq. 6 for x = h_j W_j, Eq. 8 for x = z


class CrossAttention(SharedAttention):
    """Cross-attention of Tables VII b and VIII b: the queries are visual, the keys are words."""

    def forward(self, x: Tensor, n_v: int, pad: Tensor) -> Tensor:
        y = self.norm(x)
        v, t = y[:, :n_v], y[:, n_v:]
        v = self.attention(v, t, t, pad[:, n_v:])[0]             # (B, n_v, d_w)
        return torch.cat([v + x[:, :n_v], x[:, n_v:]], 1)


class BiDirection(nn.Module):
    """Bi-directional fusion of Fig. 5, Tables VII b and VIII b: a feature enhancer layer of Grounding DINO. Each
    modality attends to the other, then to itself."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads, inner = max(1, heads // 2), 2 * dim
        self.norm_v, self.norm_t = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.ask_v, self.ask_t, self.value_v, self.value_t = (nn.Linear(dim, inner) for _ in range(4))
        self.out_v, self.out_t = nn.Linear(inner, dim), nn.Linear(inner, dim)
        self.gamma_v, self.gamma_t = (nn.Parameter(torch.full((dim,), 1e-4)) for _ in range(2))
        self.image = nn.TransformerEncoderLayer(dim, heads, 2 * inner, 0.0, batch_first=True)
        self.text = nn.TransformerEncoderLayer(dim, self.heads, inner, 0.0, batch_first=True)

    def forward(self, x: Tensor, n_v: int, pad: Tensor) -> Tensor:
        v, t, pad = self.norm_v(x[:, :n_v]), self.norm_t(x[:, n_v:]), pad[:, n_v:]
        ask_v, value_v, ask_t, value_t = (
            proj(y).unflatten(2, (self.heads, -1)).transpose(1, 2)  # (B, heads, n_v or n_t, 2 d_w / heads)
            for proj, y in ((self.ask_v, v), (self.value_v, v), (self.ask_t, t), (self.value_t, t)))
        to_v = F.scaled_dot_product_attention(ask_v, ask_t, value_t, ~pad[:, None, None])
        to_t = F.scaled_dot_product_attention(ask_t, ask_v, value_v)
        v = v + self.gamma_v * self.out_v(to_v.transpose(1, 2).flatten(2))
        t = t + self.gamma_t * self.out_t(to_t.transpose(1, 2).flatten(2))
        return torch.cat([self.image(v), self.text(t, src_key_padding_mask=pad)], 1)


FUSIONS = {"self": SharedAttention, "cross": CrossAttention, "bi": BiDirection}


# Sec. III-B: shared FPN


class SharedFPN(nn.Module):
    """Eq. 6 and 7: the outputs of some encoder layers become one. -> (B, n_v + n_t, d_w)"""

    def __init__(self, c: Config, dim: int):
        super().__init__()
        self.stages = c.stages
        self.w = nn.ModuleList(nn.Linear(dim, c.head_dim) for _ in c.stages or (0,))
        self.fusion = nn.ModuleList(FUSIONS[c.fpn_fusion](c.head_dim, c.head_heads) for _ in c.stages)
        self.w_f = nn.Linear(len(c.stages) * c.head_dim, c.head_dim) if c.stages else None

    def forward(self, h: list[Pair], pad: Tensor) -> Tensor:
        if not self.stages:
            return torch.cat([self.w[0](part) for part in h[-1]], 1)
        z = []
        for j, w, fuse in zip(self.stages, self.w, self.fusion):
            v, t = h[j - 1]                                      # (B, n_v, d), (B, n_t, d)
            x = torch.cat([w(v), w(t)], 1)                       # h_j W_j, (B, n_v + n_t, d_w)
            z.append(fuse(x, v.shape[1], pad))                   # z_j, (B, n_v + n_t, d_w)
        return self.w_f(torch.cat(z, 2))                         # Eq. 7


# Sec. III-C: shared mask decoder


class SharedLayer(nn.Module):
    """The decoder's shared transformer, Eq. 8 and 9: one MLP for both modalities. BiDirection has its own MLPs."""

    def __init__(self, c: Config):
        super().__init__()
        d_w = c.head_dim
        self.fusion, self.mlp = FUSIONS[c.decoder_fusion](d_w, c.head_heads), None
        if c.decoder_fusion != "bi":
            self.mlp = nn.Sequential(nn.LayerNorm(d_w), nn.Linear(d_w, 4 * d_w), nn.GELU(), nn.Linear(4 * d_w, d_w))

    def forward(self, z: Tensor, n_v: int, pad: Tensor) -> Tensor:
        u = self.fusion(z, n_v, pad)                             # u', (B, n_v + n_t, d_w)
        return u if self.mlp is None else self.mlp(u) + u        # Eq. 9; the MLP begins with its LN


class SharedMaskDecoder(nn.Module):
    """Shared layers and mask prediction, Eq. 10 and 11."""

    def __init__(self, c: Config):
        super().__init__()
        d_w = c.head_dim
        self.layers = nn.ModuleList(SharedLayer(c) for _ in range(c.shared_layers))
        blocks = [nn.Sequential(nn.Upsample(scale_factor=2, mode="bilinear"),
                                nn.Conv2d(d_w, d_w, 3, padding=1, bias=False), nn.BatchNorm2d(d_w), nn.ReLU())
                  for _ in range(c.upsamplings)]
        self.conv = Recomputed(*blocks, nn.Conv2d(d_w, d_w, 1))
        self.mlp = nn.Sequential(nn.Linear(d_w, d_w), nn.ReLU(), nn.Linear(d_w, d_w)) if c.shared_layers \
            else nn.Identity()

    def forward(self, z: Tensor, n_v: int, pad: Tensor) -> Tensor:
        """z: (B, n_v + n_t, d_w) -> logits (B, 1, H, W), the M of Eq. 11 before its sigmoid"""
        u = z
        for layer in self.layers:
            u = layer(u, n_v, pad)                               # (B, n_v + n_t, d_w)
        side = int((n_v - 1) ** 0.5)                             # S / p
        f = u[:, 1:n_v].transpose(1, 2).unflatten(2, (side, side))  # F_0, (B, d_w, S / p, S / p)
        f = self.conv(f)                                         # F_l, (B, d_w, H, W)  Eq. 10
        t_cls = self.mlp(u[:, n_v])                              # t'_u^cls = MLP(t_u^cls), (B, d_w)
        with in_full_precision(f):                               # Eq. 11, F_l(i, j) . t'_u^cls
            return (t_cls[:, None].float() @ f.float().flatten(2)).unflatten(2, f.shape[2:])


# Fig. 3: the model


class SharedRIS(nn.Module):
    """The whole model. `c` comes from config(); `weights` is "random", "pretrained" (torch.hub's cache, or downloaded),
    or a file of BEiT-3, with beit3.spm beside it or after a comma. Raises UserError where they are missing or wrong."""

    task = "mask"

    def __init__(self, c: Config, weights: str = "random"):
        super().__init__()
        self.c = c
        self.beit3 = build_encoder(c, weights)
        self.fpn = SharedFPN(c, BACKBONES[c.backbone]["dim"])
        self.decoder = SharedMaskDecoder(c)
        self.preprocess = Preprocess(c.image_size, "stretch", "bilinear", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
        if c.tune not in ("method", "full"):
            freeze(self.beit3)
        self.baseline = baselines.add(c, modality(self.beit3, "A"), modality(self.beit3, "B"), self.beit3.text_embed)
        if c.checkpointing:
            recomputed(*self.beit3.layers, *self.fpn.fusion, *self.decoder.layers)
        # not used, so they get no gradient
        self.beit3.mask_token.requires_grad_(False)
        self.beit3.layer_norm.requires_grad_(False)

    def parts(self) -> dict[str, list[nn.Module]]:
        return dict(backbone=[self.beit3], adapter=self.baseline, head=[self.fpn, self.decoder])

    def tokenize(self, sentences: Iterable[str]) -> Tensor:
        """Start, pieces, end, then PAD up to the longest; cut to `words` tokens with the end kept. -> (B, n_t)"""
        return baselines.prompted(self.beit3.pieces.tokenize(list(sentences), self.c.words), self.c)

    def forward(self, images: Tensor, tokens: Tensor) -> Tensor:
        """Normalised images (B, 3, S, S), tokens (B, n_t) -> logits (B, 1, H, W), H = W = S / p * 2^l"""
        h = self.beit3(images, tokens)                           # L pairs
        n_v = h[-1][0].shape[1]
        pad = F.pad(tokens == PAD, (n_v, 0))                     # (B, n_v + n_t), True = padding
        z = self.fpn(h, pad)                                     # (B, n_v + n_t, d_w)
        return self.decoder(z, n_v, pad)

    def loss(self, logits: Tensor, masks: Tensor) -> Tensor:
        """Sec. III-D; masks: (B, S, S) in 0..1"""
        target = F.interpolate(masks[:, None], logits.shape[-2:], mode=self.c.target).flatten(1)  # (B, H * W)
        logits = logits.float().flatten(1)
        bce = F.binary_cross_entropy_with_logits(logits, target)
        m, power = logits.sigmoid(), 2 if self.c.dice_squared else 1  # Eq. 11, the sigmoid
        size = m.pow(power).sum(1) + target.pow(power).sum(1)    # (B,)
        dice = (1 - (2 * (m * target).sum(1) + 1) / (size + 1)).mean()
        return self.c.bce * bce + self.c.dice * dice             # Eq. 12


Model = SharedRIS  # the name that train.py and evaluate.py use


def build_encoder(c: Config, weights: str) -> BEiT3:
    """BEiT-3 and its tokenizer, for images of c.image_size; random or released."""
    check_released(c.backbone, weights)
    size = BACKBONES[c.backbone]
    beit3 = BEiT3(**size, image_size=c.image_size, drop_path=c.drop_path)
    spm = "" if weights == "random" else load_beit3(beit3, weights, c.backbone)
    # after loading: the tokenizer is in the state dict of our checkpoints, but not of the released files
    beit3.pieces = SentencePieces(spm, size["rows"])
    return beit3


def modality(beit3: BEiT3, letter: str) -> dict[str, nn.Module]:
    """The modules of one modality, "A" or "B", by their names without that letter, for toolbox/baselines.py."""
    other = "B" if letter == "A" else "A"
    return {name.replace(f".{letter}", ""): m for name, m in beit3.named_modules() if f".{other}" not in name}
