"""Shared-RIS: A Simple Baseline with Single-encoder for Referring Image Segmentation (Yu, Jung, Han et al.,
arXiv:2408.15521).

One encoder reads picture and sentence together: BEiT-3, whose every layer attends over patches and words at once. The
same shared self-attention goes on after it: once over each of four levels of the encoder (Shared FPN), and in one
transformer layer over what these become (Shared Mask Decoder). The object is where the pixels' vectors agree with that
of the sentence's first token. Everything is trained. No code of the authors is public.

    Sec. III-A, Eq. 1-3      embeddings                BEiT3.embed
    Sec. III-A, Eq. 4-5      shared transformer        BEiT3, Layer, Attention, FFN
    Sec. III-B, Eq. 6-7      shared FPN                SharedFPN, Fusion
    Sec. III-C, Eq. 8-9      shared transformer        SharedLayer, Fusion
    Sec. III-C, Eq. 10-11    mask prediction           SharedMaskDecoder
    Sec. III-D, Eq. 12       loss                      SharedRIS.loss
    Fig. 5                   bi-directional fusion     BiDirection
    Tables I to IX           their rows                TABLES; Config.stages, .shared_layers, .fpn_fusion, ...

Deviations (where the paper is silent or contradicts itself, its printed figures or BEiT-3's weights):
  * Eq. 4 and 5 draw one MSA and one LN for both modalities. In BEiT-3's weights each modality has its own of everything
    but the softmax, and a LayerNorm stands before each last projection (sub-LN): so it is here. With AMP, GELU runs in
    half precision; BEiT-3's code has it in fp32.
  * Eq. 6 and 7 give 6.83 M parameters, the tables print 8 M; no layer was invented for the rest.
  * The decoder's printed 46 GFLOPs fit only with 3x3 convolutions of 512 channels and a 1x1 convolution behind them,
    as in CRIS. Its printed 5 M without a shared layer leave no room for the MLP of Eq. 11, which is then left out; else
    it has two layers and a ReLU. The MLP of Eq. 9 is 4 times as wide as its input, with GELU.
  * h_j are the outputs of layer j as they are. BEiT-3's last LayerNorm and its mask token are therefore not read, and
    not trained. The text once says stages "3, 6, 8, 12", else 3, 6, 9, 12; the large encoder's are in proportion.
  * Without FPN one linear layer takes h_L to 512 channels. In cross-attention the queries are the picture's, and the
    words stay as they are. Outside the encoder: 8 heads, no positions, no dropout. Padding is no key anywhere.
  * Pictures are stretched to a square (bilinear), as in CGFormer, and normalised to -1..1, as in BEiT-3. A sentence has
    up to 64 tokens, as in BEiT-3, and is padded to the longest of its batch.
  * The logits are resized to the photograph before the threshold; the paper thresholds first.
  * Eq. 12 is taken at the logits' size, of the masks' nearest pixels; BCE is a mean over pixels, Dice over samples. An
    epoch has one sentence of each object, as in CGFormer. The batch is 14 on each of 8 GPUs, 112. "Gradient clipping"
    cites GradNorm; here it is of the norm. Weight decay excepts nothing, as the paper names no exception.
  * `--tune frozen` (FPN and decoder alone, for small GPUs) is not the paper's.
  * `tiny` is this project's: a small random encoder, trained from scratch. Its words have no vocabulary but are
    numbered by their checksum, as they are for --weights random.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from common import Preprocess, TrainConfig, check_config, dice_loss, in_full_precision
from toolbox import baselines, tokenizers, weights as released
from toolbox.tokenizers import PAD

BACKBONES = {  # Sec. IV-A; std: linear layers start as a normal distribution cut at one std, as in BEiT-3
    "beit3-base": dict(layers=12, dim=768, heads=12, ffn=3072, patch=16, rows=64010, words=1022, std=0.02),
    "beit3-large": dict(layers=24, dim=1024, heads=16, ffn=4096, patch=16, rows=64010, words=1022, std=0.02),
    "tiny": dict(layers=4, dim=64, heads=2, ffn=128, patch=8, rows=4096, words=64, std=0.25),
}
VARIANTS = ("shared_ris",)
TUNES = ("method", "frozen", "full", *baselines.BASELINES)  # the method is full tuning
FUSION = Literal["self", "cross", "bi"]


@dataclass(frozen=True)
class Config(TrainConfig):
    """Every setting of the paper. `config()` gives the ones of a backbone and data set."""

    backbone: str = "beit3-base"            # Sec. IV-A
    variant: str = "shared_ris"
    tune: str = "method"                    # "full" is the same; "frozen": not the paper's
    # architecture
    image_size: int = 480                   # pixels, a multiple of the patch size
    words: int = 64                         # tokens with start and end
    stages: tuple[int, ...] = (3, 6, 9, 12)  # Table VII (a): after so many layers; "": no FPN
    fpn_fusion: FUSION = "self"             # Table VII (b)
    shared_layers: int = 1                  # Table VIII (a); 0: no fusion in the decoder (Tables III, V)
    decoder_fusion: FUSION = "self"         # Table VIII (b)
    head_dim: int = 512                     # d_w
    head_heads: int = 8
    upsamplings: int = 2                    # l in Eq. 10
    threshold: float = 0.35                 # tau, on the sigmoid
    # training
    bce: float = 2.0                        # lambda of Eq. 12
    dice: float = 0.5
    drop_path: float = 0.1                  # stochastic depth: of the last layer, from 0 for the first
    checkpointing: bool = False             # keep only each layer's input, and compute the rest again for backward
    epochs: int = 35
    batch_size: int = 112                   # of all processes together
    optimizer: Literal["adam", "adamw"] = "adamw"
    beta2: float = 0.98                     # Adam's second
    weight_decay: float = 5e-4
    schedule: Literal["step", "cosine"] = "cosine"  # to 0 over the run; step: x 0.1 at each milestone (epochs)
    clip_norm: float = 1.0                  # 0: gradients are not clipped


def config(backbone: str = "beit3-base", variant: str = "shared_ris", dataset: str = "refcoco", **flags) -> Config:
    """The settings of a backbone, and over them what the user set."""
    c = dict(backbone=backbone, variant=variant)
    if backbone == "beit3-large":
        c |= dict(stages=(6, 12, 18, 24))
    if backbone == "tiny":
        c |= dict(image_size=64, stages=(1, 2, 3, 4), head_dim=64, head_heads=2, drop_path=0.0, steps=2400,
                  batch_size=16, lr=2e-3, tower_lr=0.5, weight_decay=0.01, warmup=50, val_every=300)
    c |= dict(baseline_dims=baselines.dims(flags.get("tune", "method"), backbone == "tiny"))
    if (backbone, flags.get("tune")) == ("tiny", "coop"):
        c |= dict(words=56)  # and 8 prompts
    c = Config(**(c | flags))
    b = BACKBONES[backbone]
    check_config(
        c, baseline_dims=baselines.rule(c), image_size=(c.image_size % b["patch"] == 0, f"a multiple of the patch size, {b['patch']}"),
        words=(3 <= c.words <= b["words"] - baselines.prompts(c), f"3 to {b['words'] - baselines.prompts(c)} tokens"),
        stages=(not c.stages or list(c.stages) == sorted(c.stages) and c.stages[0] > 0 and c.stages[-1] == b["layers"],
                f"rising numbers from 1 on, the last of them {b['layers']}, or none"),
        head_heads=(lambda: c.head_dim % c.head_heads == 0, f"a divisor of head_dim, {c.head_dim}"),
        fpn_fusion=(c.stages or c.fpn_fusion == "self", "self, where there is no FPN"),
        decoder_fusion=(c.shared_layers or c.decoder_fusion == "self", "self, where there is no shared layer"))
    if "bi" in (c.fpn_fusion, c.decoder_fusion):  # which has half as many heads for words
        check_config(c, head_heads=(c.head_heads % 2 == 0, "an even number with bi"))
    return c


# The encoder: BEiT-3, with the names of its released files (Sec. III-A). A is vision, B is text.

Pair = tuple[Tensor, Tensor]  # tokens of the picture (B, n, d) and of the sentence (B, L, d)


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
        """keys: (B, 1, 1, n + L), False = padding; not expanded, which would cost more than the attention itself"""
        q, k, x = (torch.cat(proj(v, t), 1).unflatten(2, (self.heads, -1)).transpose(1, 2)
                   for proj in (self.q_proj, self.k_proj, self.v_proj))  # (B, h, n + L, d / h)
        x = F.scaled_dot_product_attention(q, k, x, keys).transpose(1, 2).flatten(2)  # (B, n + L, d)
        n = v.shape[1]
        return self.out_proj(*self.inner_attn_ln(x[:, :n], x[:, n:]))

    def look(self, v: Tensor, t: Tensor, pad: Tensor) -> Tensor:
        """How the sentence's first token attends to the picture's (B, n), a mean over heads; pad: (B, n + L)."""
        q, k = self.q_proj.B(t[:, :1]), torch.cat(self.k_proj(v, t), 1)
        q, k = (x.unflatten(2, (self.heads, -1)).transpose(1, 2) for x in (q, k))  # (B, h, 1 or n + L, d / h)
        scores = (q @ k.transpose(2, 3) / q.shape[3] ** 0.5).masked_fill(pad[:, None, None], -torch.inf)
        return scores.softmax(3).mean(1)[:, 0, :v.shape[1]]


class FFN(nn.Module):
    """MLP_v or MLP_t of Eq. 5."""

    def __init__(self, dim: int, ffn: int):
        super().__init__()
        self.fc1, self.ffn_layernorm, self.fc2 = nn.Linear(dim, ffn), nn.LayerNorm(ffn), nn.Linear(ffn, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.ffn_layernorm(F.gelu(self.fc1(x))))


class Layer(nn.Module):
    """Eq. 4 and 5. `final_layer_norm` is the one before the feed-forward network."""

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
        """x + y; in training y is left out for a share of the samples, for both modalities alike (stochastic depth)."""
        if self.training and self.drop:
            stay = (torch.rand(len(x[0]), 1, 1, device=x[0].device) >= self.drop) / (1 - self.drop)
            y = [stay * part for part in y]
        return x[0] + y[0], x[1] + y[1]


class BEiT3(nn.Module):
    """BEiT-3's encoder at another picture size: `layer_norm(*beit3(images, tokens)[-1])` is what the original returns,
    the picture's tokens with its class token first, and the sentence's."""

    def __init__(self, layers: int, dim: int, heads: int, ffn: int, patch: int, rows: int, words: int, std: float,
                 image_size: int, drop_path: float = 0.0, checkpointing: bool = False):
        super().__init__()
        self.grid, self.checkpointing = image_size // patch, checkpointing
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
        """(B, 3, S, S), (B, L) -> (B, 1 + N, d), (B, L, d)"""
        positions = self.embed_positions  # both count from row 2
        v = self.proj(images).flatten(2).transpose(1, 2)         # (B, N, d)
        v = torch.cat([self.cls_token.expand(len(v), -1, -1), v], 1) + positions.A.weight[2:]  # Eq. 1
        t = self.text_embed(tokens) + positions.B.weight[2:2 + tokens.shape[1]]                # Eq. 2
        return v, t * (tokens != PAD)[..., None]

    def forward(self, images: Tensor, tokens: Tensor) -> list[Pair]:
        """Normalised pictures (B, 3, S, S), tokens (B, L), PAD behind the end -> what each layer gives"""
        v, t = self.embed(images, tokens)                        # Eq. 3
        keys = torch.cat([tokens.new_ones(v.shape[:2]), tokens != PAD], 1).bool()[:, None, None]  # (B, 1, 1, 1 + N + L)
        h = []
        for layer in self.layers:
            if self.checkpointing and self.training and torch.is_grad_enabled():
                v, t = checkpoint(layer, v, t, keys, use_reentrant=False)
            else:
                v, t = layer(v, t, keys)
            h.append((v, t))
        return h


# Fusion of both modalities (Sec. III-B, III-C)


class Fusion(nn.Module):
    """MSA(LN(x)) + x of Eq. 6 and 8 over picture and sentence; with `cross` its queries are the picture's, its keys
    the words."""

    def __init__(self, dim: int, heads: int, cross: bool):
        super().__init__()
        self.cross = cross
        self.norm = nn.LayerNorm(dim)
        self.attention = nn.MultiheadAttention(dim, heads, batch_first=True)

    def forward(self, x: Tensor, n: int, pad: Tensor) -> Tensor:
        """x: (B, n + L, d), the picture's n tokens first; pad: (B, n + L), True = padding"""
        q = kv = self.norm(x)
        if self.cross:
            q, kv, pad = q[:, :n], kv[:, n:], pad[:, n:]
        y = self.attention(q, kv, kv, key_padding_mask=pad, need_weights=False)[0]
        return x + F.pad(y, (0, 0, 0, x.shape[1] - y.shape[1]))

    def look(self, x: Tensor, n: int, pad: Tensor) -> Tensor:
        """How the sentence's first token attends to the picture's (B, n), a mean over heads."""
        y = self.norm(x)
        return self.attention(y[:, n:n + 1], y, y, key_padding_mask=pad)[1][:, 0, :n]


class BiDirection(nn.Module):
    """A feature enhancer layer of Grounding DINO (Fig. 5, Tables VII b, VIII b), its image attention not deformable:
    each modality attends to the other, by one matrix of products, and then to itself."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads, inner = max(1, heads // 2), 2 * dim
        self.norm_v, self.norm_t = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.ask_v, self.ask_t, self.value_v, self.value_t = (nn.Linear(dim, inner) for _ in range(4))
        self.out_v, self.out_t = nn.Linear(inner, dim), nn.Linear(inner, dim)
        self.gamma_v, self.gamma_t = (nn.Parameter(torch.full((dim,), 1e-4)) for _ in range(2))
        self.image = nn.TransformerEncoderLayer(dim, heads, 2 * inner, 0.0, batch_first=True)
        self.text = nn.TransformerEncoderLayer(dim, self.heads, inner, 0.0, batch_first=True)

    def forward(self, x: Tensor, n: int, pad: Tensor) -> Tensor:
        """As Fusion."""
        v, t, pad = self.norm_v(x[:, :n]), self.norm_t(x[:, n:]), pad[:, n:]
        ask_v, value_v, ask_t, value_t = (
            proj(y).unflatten(2, (self.heads, -1)).transpose(1, 2)  # (B, h, n or L, 2d / h)
            for proj, y in ((self.ask_v, v), (self.value_v, v), (self.ask_t, t), (self.value_t, t)))
        to_v = F.scaled_dot_product_attention(ask_v, ask_t, value_t, ~pad[:, None, None])
        to_t = F.scaled_dot_product_attention(ask_t, ask_v, value_v)
        v = v + self.gamma_v * self.out_v(to_v.transpose(1, 2).flatten(2))
        t = t + self.gamma_t * self.out_t(to_t.transpose(1, 2).flatten(2))
        return torch.cat([self.image(v), self.text(t, src_key_padding_mask=pad)], 1)


def fusion(kind: str, c: Config) -> Fusion | BiDirection:
    return BiDirection(c.head_dim, c.head_heads) if kind == "bi" else Fusion(c.head_dim, c.head_heads, kind == "cross")


class SharedFPN(nn.Module):
    """Eq. 6 and 7: some layers' outputs become one. -> (B, n + L, d_w)"""

    def __init__(self, c: Config, width: int):
        super().__init__()
        self.stages = c.stages
        self.w = nn.ModuleList(nn.Linear(width, c.head_dim) for _ in c.stages or (0,))
        self.fusion = nn.ModuleList(fusion(c.fpn_fusion, c) for _ in c.stages)
        self.w_f = nn.Linear(len(c.stages) * c.head_dim, c.head_dim) if c.stages else None

    def forward(self, h: list[Pair], pad: Tensor) -> Tensor:
        if not self.stages:
            return torch.cat([self.w[0](part) for part in h[-1]], 1)
        z = []
        for j, w, fuse in zip(self.stages, self.w, self.fusion):
            v, t = h[j - 1]
            x = torch.cat([w(v), w(t)], 1)                       # (B, n + L, d_w)
            z.append(fuse(x, v.shape[1], pad))                   # Eq. 6
        return self.w_f(torch.cat(z, 2))                         # Eq. 7


class SharedLayer(nn.Module):
    """Eq. 8 and 9, one MLP for both modalities; a bi-directional layer has its own."""

    def __init__(self, c: Config):
        super().__init__()
        d = c.head_dim
        self.fusion, self.mlp = fusion(c.decoder_fusion, c), None
        if c.decoder_fusion != "bi":
            self.mlp = nn.Sequential(nn.LayerNorm(d), nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d))

    def forward(self, z: Tensor, n: int, pad: Tensor) -> Tensor:
        u = self.fusion(z, n, pad)                               # Eq. 8
        return u if self.mlp is None else self.mlp(u) + u        # Eq. 9


class SharedMaskDecoder(nn.Module):
    """Eq. 8 to 11, before the sigmoid."""

    def __init__(self, c: Config):
        super().__init__()
        d = c.head_dim
        self.layers = nn.ModuleList(SharedLayer(c) for _ in range(c.shared_layers))
        blocks = [nn.Sequential(nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(d, d, 3, padding=1, bias=False),
                                nn.BatchNorm2d(d), nn.ReLU()) for _ in range(c.upsamplings)]
        self.conv = nn.Sequential(*blocks, nn.Conv2d(d, d, 1))
        self.mlp = nn.Sequential(nn.Linear(d, d), nn.ReLU(), nn.Linear(d, d)) if c.shared_layers else nn.Identity()

    def forward(self, z: Tensor, n: int, pad: Tensor) -> Tensor:
        """z: (B, n + L, d_w), the picture's n tokens first -> logits (B, 1, H, W)"""
        for layer in self.layers:
            z = layer(z, n, pad)
        grid = int((n - 1) ** 0.5)
        f = z[:, 1:n].transpose(1, 2).unflatten(2, (grid, grid))  # (B, d_w, S/p, S/p)  F_0
        f = self.conv(f)                                         # (B, d_w, H, W)  Eq. 10
        t_cls = self.mlp(z[:, n])                                # (B, d_w)
        with in_full_precision(f):
            return (t_cls[:, None].float() @ f.float().flatten(2)).unflatten(2, f.shape[2:])  # Eq. 11


# The model


class SharedRIS(nn.Module):
    """The whole model. `c` comes from config(); `weights` is "pretrained", "random", or a file of BEiT-3, with
    beit3.spm beside it or behind a comma. Raises UserError where they are missing or do not fit."""

    task = "mask"

    def __init__(self, c: Config, weights: str = "random"):
        super().__init__()
        self.c = c
        self.beit3 = build_encoder(c, weights)
        self.fpn = SharedFPN(c, BACKBONES[c.backbone]["dim"])
        self.decoder = SharedMaskDecoder(c)
        self.preprocess = Preprocess(c.image_size, "stretch", "bilinear", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
        self.trains = c.tune in ("method", "full")
        self.beit3.requires_grad_(self.trains)
        a, b = ({name.replace(f".{x}", ""): m for name, m in dict(self.beit3.named_modules()).items() if f".{y}" not in name}
                for x, y in ("AB", "BA"))
        self.baseline = baselines.add(c, a, b, self.beit3.text_embed)
        # nothing reads these here, so nothing can train them
        self.beit3.mask_token.requires_grad_(False)
        self.beit3.layer_norm.requires_grad_(False)

    def parts(self) -> dict[str, list[nn.Module]]:
        """What the parameter tables count."""
        return dict(backbone=[self.beit3], adapter=self.baseline, head=[self.fpn, self.decoder])

    def train(self, mode: bool = True) -> SharedRIS:
        super().train(mode)
        if not self.trains:  # no stochastic depth either
            self.beit3.eval()
        return self

    def tokenize(self, sentences: Iterable[str]) -> Tensor:
        """SentencePiece: start, pieces, end, then PAD up to the longest; cut to `words` with the end kept. -> (B, L)"""
        return baselines.prompted(self.beit3.pieces.tokenize(list(sentences), self.c.words), self.c)

    def forward(self, images: Tensor, tokens: Tensor, maps: dict[str, Tensor] | None = None) -> Tensor:
        """(B, 3, S, S) normalised pictures, (B, L) tokens -> logits (B, 1, 4S/p, 4S/p)

        `maps` gets the attention of the sentence's first token over the picture (Fig. 7), in the encoder's last layer,
        and in FPN and decoder where these have self-attention.
        """
        h = self.beit3(images, tokens)
        n = h[-1][0].shape[1]
        pad = F.pad(tokens == PAD, (n, 0))                       # (B, n + L), the picture has none
        z = self.fpn(h, pad)                                     # (B, n + L, d_w)
        if maps is not None:
            layer = self.beit3.layers[-1]
            looks = {"encoder": layer.self_attn.look(*layer.self_attn_layer_norm(*h[-2]), pad)}
            for j, w, fuse in zip(self.fpn.stages, self.fpn.w, self.fpn.fusion):
                if self.c.fpn_fusion == "self":
                    looks[f"FPN, stage {j}"] = fuse.look(torch.cat([w(part) for part in h[j - 1]], 1), n, pad)
            if self.c.decoder_fusion == "self" and len(self.decoder.layers):
                looks["decoder"] = self.decoder.layers[0].fusion.look(z, n, pad)
            maps |= {name: x[:, 1:].unflatten(1, (self.beit3.grid,) * 2) for name, x in looks.items()}
        return self.decoder(z, n, pad)

    def loss(self, logits: Tensor, masks: Tensor) -> Tensor:
        """Eq. 12; masks: (B, S, S) in 0..1 on the canvas."""
        logits, target = logits.float(), F.interpolate(masks[:, None], logits.shape[-2:])  # nearest
        bce = F.binary_cross_entropy_with_logits(logits, target)
        return self.c.bce * bce + self.c.dice * dice_loss(logits, target)  # Eq. 12


Model = SharedRIS  # the name by which train.py and evaluate.py know it


# Weights


def build_encoder(c: Config, weights: str) -> BEiT3:
    """BEiT-3 for pictures of c.image_size with its tokenizer, random or from its authors' files.

    `weights`: "random", "pretrained" (torch.hub's cache, or downloaded), or a file for any picture size, with beit3.spm
    beside it or behind a comma.
    """
    beit3 = BEiT3(**BACKBONES[c.backbone], image_size=c.image_size, drop_path=c.drop_path,
                  checkpointing=c.checkpointing)
    released.check_released(c.backbone, weights)
    pieces = "" if weights == "random" else released.load_beit3(beit3, weights, c.backbone)
    # after loading, as the tokenizer is among the weights in our own checkpoints alone
    beit3.pieces = tokenizers.SentencePieces(pieces, BACKBONES[c.backbone]["rows"])
    return beit3
